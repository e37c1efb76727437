"""The flight's models of battery, array, heat and wear, and the filter of the state of charge."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.plant.eps import PowerSystem, open_circuit_v
from hil.scenario import Array, Battery
from node.power.array import ArrayModel, ArraySettings
from node.power.battery import BatteryModel, BatterySettings
from node.power.soc_filter import SocFilter
from node.power.thermal import HeatObserver, ThermalSettings
from node.power.wear import WearMeter, wear_of

MODEL = BatteryModel()


# Battery.


@given(st.floats(0, 1))
def test_energy_and_state_of_charge_are_each_others_inverse(soc: float) -> None:
    assert MODEL.soc(MODEL.energy_j(soc, 24.0), 24.0) == pytest.approx(soc, abs=1e-9)


def test_the_energy_of_a_full_battery_is_the_integral_of_its_voltage() -> None:
    socs = np.linspace(0, 1, 10_001)
    mean_v = np.mean([open_circuit_v(soc, 1) for soc in socs])
    assert MODEL.energy_j(1.0, 24.0) == pytest.approx(24.0 * 3600 * mean_v / 3.6, rel=1e-3)


@given(st.floats(0.02, 0.98), st.floats(-3, 3))
def test_the_voltage_tells_the_charge_it_was_made_of(soc: float, amps: float) -> None:
    volts = open_circuit_v(soc, 2) + amps * 0.10
    told = MODEL.soc_by_voltage(volts, amps)
    assert told is not None
    assert told[0] == pytest.approx(soc, abs=1e-9)
    assert told[1] > 0.3


def test_a_voltage_outside_of_the_curve_or_on_a_flat_one_tells_nothing() -> None:
    assert MODEL.soc_by_voltage(20.0, 0.0) is None
    assert MODEL.soc_by_voltage(math.nan, 0.0) is None
    flat = BatteryModel(BatterySettings(open_circuit_cell_v=(3.2,) * 5 + (3.21,) * 5 + (3.5,)))
    assert flat.soc_by_voltage(2 * 3.205, 0.0) is None


def test_losses_grow_with_the_current() -> None:
    low, high = MODEL.efficiencies(0.8, 1.0), MODEL.efficiencies(0.8, 30.0)
    assert high[0] < low[0] < 0.955
    assert high[1] < low[1] < 0.96


@pytest.mark.parametrize(
    "table",
    [
        {"open_circuit_cell_v": [3.0] * 10},
        {"open_circuit_cell_v": [3.0, 2.9, *[3.5] * 9]},
        {"life_depth": [0.2, 0.1], "life_cycles": [1.0, 2.0]},
        {"life_depth": [0.2], "life_cycles": [1.0, 2.0]},
        {"charge_efficiency": 1.1},
        {"resistance": 0.1},
    ],
)
def test_a_battery_that_cannot_be_is_refused(table: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(table, BatterySettings)


# Wear.


def test_cycles_are_counted_as_rainflow_counts_them() -> None:
    # The example of ASTM E1049-85, section 5.4.4, scaled into a battery: counts 0.5 of 3, 1.5 of 4, ...
    history = [-2, 1, -3, 5, -1, 3, -4, 4, -2]
    meter = wear_of([0.5 + each / 20 for each in history])
    assert meter.cycles == pytest.approx(4.0)
    assert meter.deepest == pytest.approx(9 / 20)


def test_wear_is_cycles_by_life_and_deep_ones_cost_more() -> None:
    shallow, deep = (wear_of([1.0, 1.0 - depth] * 100) for depth in (0.1, 0.4))
    assert shallow.wear == pytest.approx(shallow.cycles / 90_000, rel=1e-6)
    assert deep.wear > 4 * shallow.wear
    assert WearMeter().life(0.2) == pytest.approx(40_000)
    assert WearMeter().life(0.05) > 90_000


def test_noise_is_no_cycling_and_an_endless_history_is_bounded() -> None:
    rng = np.random.default_rng(1)
    still = wear_of((0.8 + 0.001 * rng.standard_normal(5_000)).tolist())
    assert still.cycles < 1
    meter = WearMeter()
    for _ in range(3_000):
        for soc in (0.9, 0.8, math.nan):
            meter.take(soc)
    assert meter.cycles == pytest.approx(3_000, abs=3)
    assert len(meter._turns) <= 4_100


# Array.


def run_array(gain: float, *, noise: float = 0.0, soc: float = 0.8, taking_all: bool = True) -> ArrayModel:
    model, truth, rng = ArrayModel(), ArrayModel(), np.random.default_rng(2)
    for k in range(1_200):
        sunlit = 0.0 if 300 <= k < 500 else 1.0
        truth.observe(k * 10.0, sunlit=0.5, array_w=0, array_sun_w=25.0, soc=1, taking_all=True)
        watts = 25.0 * sunlit * gain * (1 + noise * rng.standard_normal())
        model.observe(
            k * 10.0, sunlit=sunlit, array_w=watts, array_sun_w=25.0, soc=soc, taking_all=taking_all
        )
    return model


def test_the_loss_of_an_array_is_learnt_and_expected_from_then_on() -> None:
    model = run_array(0.9, noise=0.05)
    assert model.gain == pytest.approx(0.9, abs=0.02)
    expected = model.expect_w(np.full(10, 100.0), np.ones(10), 25.0)
    assert expected[-1] == pytest.approx(0.9 * 25.0, rel=0.03)


@pytest.mark.parametrize("held_back", [{"soc": 0.995}, {"taking_all": False}])
def test_what_a_full_battery_leaves_in_the_array_is_no_loss(held_back: dict[str, object]) -> None:
    assert run_array(0.4, **held_back).gain == 1.0  # type: ignore[arg-type]


def test_an_array_out_of_eclipse_is_cold_and_gives_more() -> None:
    model = ArrayModel()
    for k in range(300):
        model.observe(k * 10.0, sunlit=0.0, array_w=0, array_sun_w=25.0, soc=0.8, taking_all=True)
    watts = model.expect_w(np.full(30, 60.0), np.ones(30), 25.0)
    assert watts[0] > 1.2 * 25.0
    assert watts[-1] == pytest.approx(25.0, rel=0.02)
    assert np.all(np.diff(watts) < 0)


def test_the_array_of_the_bench_is_the_array_of_the_flight() -> None:
    # Another implementation, the same physics: the plant's array over an orbit.
    power = PowerSystem(
        Array(area_m2=0.1, efficiency=0.29), Battery(capacity_wh=24, soc_start=0.5, soc_floor=0.1), 4.0
    )
    full_w = power.full_sun_w(1.0, 60.0)
    model = ArrayModel(ArraySettings())
    lit = np.where((np.arange(560) > 200) & (np.arange(560) < 420), 0.0, 1.0)
    expected = model.expect_w(np.full(560, 10.0), lit, full_w)
    truth = [
        power.advance(10.0, irradiance=light, cos_incidence=1.0, payload_w=0.0).array_available_w
        for light in lit
    ]
    assert np.abs(expected - truth).max() < 0.02 * full_w


# Heat.


def test_the_observer_finds_what_cools_the_board_and_predicts_it() -> None:
    s = ThermalSettings()
    observer, board_c = HeatObserver(s), 20.0
    for k in range(600):
        watts = 11.0 if k % 200 < 100 else 5.0
        observer.observe(k * 10.0, board_c, watts)
        board_c += 10.0 * (watts - s.conductance_w_k * (board_c - 12.0)) / s.board_heat_capacity_j_k
    assert observer.sink_c == pytest.approx(12.0, abs=1.0)
    ahead = observer.predict_c(11.0, 1e6)
    assert ahead == pytest.approx(12.0 + 11.0 / 0.8 + 11.0, abs=1.5)
    most_w = observer.most_w(60.0)
    assert most_w is not None
    assert observer.predict_c(most_w, s.ahead_s) == pytest.approx(60.0)


def test_without_a_sensor_nothing_is_predicted() -> None:
    observer = HeatObserver()
    for value in (None, math.nan):
        observer.observe(0.0, value, 10.0)
    observer.observe(1.0, 20.0, 10.0)
    assert observer.predict_c(10.0, 60.0) is None
    assert observer.most_w(80.0) is None


# State of charge.


class Cells:
    """A true battery under a changing current, and its sensors."""

    def __init__(self, *, bias: float, noise: float, amps_gain: float = 1.0) -> None:
        self.rng = np.random.default_rng(3)
        self.bias, self.noise, self.amps_gain = bias, noise, amps_gain
        self.soc, self.t_s = 0.85, 0.0
        self.filter = SocFilter(MODEL)

    def step(self, amps: float, seconds: float = 10.0) -> float:
        self.t_s += seconds
        kept = 0.995 if amps > 0 else 1.0
        self.soc += amps * kept * seconds / 3600 / (24.0 / 7.2)
        return self.filter.handle(
            self.t_s,
            soc=self.soc + self.bias + self.noise * float(self.rng.standard_normal()),
            sigma=max(self.noise, 1e-3),
            battery_v=open_circuit_v(self.soc, 2) + amps * 0.1,
            battery_a=amps * self.amps_gain,
            battery_wh=24.0,
        )


def test_the_filter_is_nearer_to_the_truth_than_its_sensor() -> None:
    cells = Cells(bias=0.0, noise=0.02, amps_gain=1.01)
    off = [cells.step(-1.0 if k % 500 < 200 else 0.7) - cells.soc for k in range(2_000)]
    assert np.std(off[200:]) < 0.004
    assert cells.filter.sigma <= 0.011


def test_a_count_that_drifts_is_corrected() -> None:
    cells = Cells(bias=0.0, noise=0.01, amps_gain=1.05)
    off = [cells.step(-1.0 if k % 500 < 200 else 0.7) - cells.soc for k in range(3_000)]
    assert np.abs(off[200:]).max() < 0.012


def test_a_sensor_that_jumps_is_followed_only_when_it_stays() -> None:
    cells = Cells(bias=0.0, noise=0.005)
    for _ in range(50):
        before = cells.step(0.0)
    cells.bias = -0.2
    assert cells.step(0.0) == pytest.approx(before, abs=0.01)
    for _ in range(12):
        after = cells.step(0.0)
    assert after == pytest.approx(before - 0.2, abs=0.02)


@given(st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 5), min_size=1, max_size=30))
@settings(max_examples=60)
def test_whatever_its_witnesses_say_it_stays_a_state_of_charge(readings: list[tuple[float, ...]]) -> None:
    soc_filter = SocFilter(MODEL)
    for t_s, soc, volts, amps, sigma in readings:
        told = min(max(soc, 0.0), 1.0)
        found = soc_filter.handle(
            t_s, soc=told, sigma=abs(sigma), battery_v=volts, battery_a=amps, battery_wh=24.0
        )
        assert 0.0 <= found <= 1.0
        assert soc_filter.sigma >= 0.0
