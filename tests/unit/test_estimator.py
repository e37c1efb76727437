"""Bridging the state of charge while its sensors cannot be believed."""

from __future__ import annotations

import pytest

from node.power.estimator import EnergyReading, EstimatorSettings, SocEstimator


def reading(t_s: float, soc: float | None = None, **values: float | None) -> EnergyReading:
    known: dict[str, float | None] = {
        "battery_v": 14.0, "battery_a": -2.0, "array_w": 0.0, "platform_w": 10.0, "load_w": 18.0,
        "battery_wh": 100.0,
    }  # fmt: skip
    return EnergyReading(t_s=t_s, soc=soc, **(known | values))  # type: ignore[arg-type]


def test_a_good_reading_is_taken_as_it_is():
    found = SocEstimator().handle(reading(0.0, 0.8))
    assert found is not None
    assert (found.soc, found.bridged_s) == (0.8, 0.0)


def test_energy_is_counted_by_current_and_voltage():
    estimator = SocEstimator()
    estimator.handle(reading(0.0, 0.8))
    found = estimator.handle(reading(360.0))
    assert found is not None
    assert found.soc == pytest.approx(0.8 - 28.0 * 360 / 360_000)
    assert (found.bridged_s, found.sigma > 0.005) == (360.0, True)


def test_without_current_the_balance_counts_and_is_less_sure():
    sure, unsure = SocEstimator(), SocEstimator()
    for estimator in (sure, unsure):
        estimator.handle(reading(0.0, 0.8))
    one = sure.handle(reading(360.0))
    other = unsure.handle(reading(360.0, battery_a=None))
    assert one is not None
    assert other is not None
    assert other.soc == pytest.approx(0.8 - 28.0 / 0.95 * 360 / 360_000, abs=0.001)
    assert other.sigma > one.sigma


@pytest.mark.parametrize(
    "settings",
    [EstimatorSettings(max_bridge_s=300.0), EstimatorSettings(max_sigma=0.0051, sensor_sigma=0.005)],
)
def test_after_its_time_or_error_there_is_no_estimate(settings):
    estimator = SocEstimator(settings)
    estimator.handle(reading(0.0, 0.8))
    assert estimator.handle(reading(400.0)) is None
    assert estimator.handle(reading(401.0)) is None
    assert estimator.handle(reading(402.0, 0.7)) is not None


def test_nothing_is_made_up():
    assert SocEstimator().handle(reading(0.0)) is None, "there was no good reading"
    estimator = SocEstimator()
    estimator.handle(reading(0.0, 0.8))
    assert estimator.handle(reading(-5.0)) is None, "mission time went back"
    estimator.handle(reading(0.0, 0.8, battery_a=None, array_w=None))
    assert estimator.handle(reading(10.0, battery_a=None, array_w=None)) is None, "nothing tells the flow"
    assert SocEstimator().handle(reading(0.0, float("nan"))) is None


def test_the_estimate_stays_within_a_battery():
    estimator = SocEstimator()
    estimator.handle(reading(0.0, 0.01))
    found = estimator.handle(reading(600.0))
    assert found is not None
    assert found.soc == 0.0
