"""Redundant sensors of the bus: what they give, what the node makes of them, and when it falls back."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdir.sensors import Rejected, Source, Why
from hil.sensor_faults import CHANNELS, SensorBench, SensorFault
from node.bus_view import BusView
from node.power.estimator import EstimatorSettings
from telemetry.bus import SENSOR_RANGES, BusEps, EpsReading, decode_eps, encode

T0_NS = 1_700_000_000 * 10**9

TRUTH = BusEps(
    t_ns=T0_NS, battery_soc=0.8, battery_v=14.0, battery_a=-2.0, battery_wh=100.0, array_w=50.0,
    array_sun_w=60.0, platform_w=10.0, soc_floor=0.5,
)  # fmt: skip


class Bench:
    """Sensors, and the node's view of them, a message a second."""

    def __init__(self, sets: int = 3, settings: EstimatorSettings | None = None) -> None:
        self.sensors = SensorBench(7, sets)
        self.view = BusView(settings)
        self.now_s = 0.0
        self.found: list[Rejected] = []

    def fly(self, seconds: int, **values: float) -> BusEps | None:
        for _ in range(seconds):
            self.now_s += 1.0
            truth = msgspec.structs.replace(TRUTH, t_ns=T0_NS + round(self.now_s * 1e9), **values)
            self.view.handle(decode_eps(encode(self.sensors.read(truth))), self.now_s)
            self.found += [a for a in self.view.take_findings() if isinstance(a, Rejected)]
        return self.view.eps


def test_sound_sensors_are_voted_and_none_is_rejected():
    bench = Bench()
    eps = bench.fly(60)
    assert eps is not None
    assert eps.battery_soc == pytest.approx(0.8, abs=0.01)
    assert bench.found == []
    assert bench.view.eps_source is Source.VOTED


@pytest.mark.parametrize(
    ("fault", "whys"),
    [
        (SensorFault.STUCK, {Why.STUCK}),
        (SensorFault.SPIKE, {Why.SPIKE, Why.OUTVOTED}),
        (SensorFault.OFFSET, {Why.OUTVOTED, Why.SPIKE}),
        (SensorFault.MISSING, {Why.NAN}),
        (SensorFault.STALE, {Why.STALE}),
    ],
)
@pytest.mark.parametrize("channel", CHANNELS)
def test_each_fault_of_one_set_is_rejected_and_the_value_stays_right(channel, fault, whys):
    bench = Bench()
    bench.fly(5)
    bench.sensors.fail(1, channel, fault)
    eps = bench.fly(60)
    assert {(a.channel, a.sensor_set) for a in bench.found} >= {(channel, 1)}
    assert {a.why for a in bench.found} <= whys
    assert {a.sensor_set for a in bench.found} == {1}
    assert eps is not None
    assert getattr(eps, channel) == pytest.approx(getattr(TRUTH, channel), rel=0.02)
    bench.sensors.fail(1, channel, None)
    bench.fly(40)
    assert bench.view.rejected_sensors() == {}


def test_without_any_sensor_of_the_charge_it_is_bridged_and_then_given_up():
    bench = Bench(2, EstimatorSettings(max_bridge_s=30.0))
    bench.fly(5)
    bench.sensors.fail(1, "battery_soc", SensorFault.MISSING)
    bench.sensors.fail(0, "battery_soc", SensorFault.SPIKE)
    bench.fly(6)
    eps = bench.fly(1)
    assert eps is not None
    assert eps.battery_soc == pytest.approx(0.8, abs=0.02)
    # The main set jumps between right and wrong: it is rejected, and comes back only when it stays right.
    assert bench.view.rejected_sensors()["battery_soc"]
    bridged = bench.view.soc
    assert bridged is not None
    assert bridged.bridged_s > 0
    assert bench.fly(60) is None, "the governor then falls back as for a silent bus"


def test_control_a_lie_of_all_sets_is_believed_if_it_is_slow_enough():
    bench = Bench()
    bench.fly(5)
    assert bench.fly(5, array_w=20.0).array_w == pytest.approx(20.0, rel=0.02)


def test_sensors_that_are_not_there_or_cannot_fail_so_are_refused():
    with pytest.raises(ValueError, match="1 to 3 allowed"):
        SensorBench(1, 4)
    bench = SensorBench(1)
    for sensor_set, channel, fault in (
        (3, "battery_v", SensorFault.MISSING),
        (0, "x", None),
        (0, "battery_v", SensorFault.MISSING),
    ):
        with pytest.raises(ValueError, match="set"):
            bench.fail(sensor_set, channel, fault)


ANY: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.floats(), st.integers(-1000, 1000), st.booleans(), st.text(max_size=3)
)


@given(st.sampled_from(CHANNELS), st.one_of(st.none(), st.floats(), st.integers(-1000, 1000)), st.booleans())
def test_one_bad_value_costs_that_value_and_nothing_else(channel, value, main):
    raw = msgspec.to_builtins(SensorBench(3).read(TRUTH))
    (raw if main else raw["redundant"][0])[channel] = value
    reading = decode_eps(msgspec.msgpack.encode(raw))
    number = 0 if main else 1
    low, high = SENSOR_RANGES[channel]
    good = value is not None and math.isfinite(value) and low <= value <= high
    assert (getattr(reading.sets[number], channel) is not None) == good
    assert all(r.field == channel and r.sensor_set == number for r in reading.refused)
    for other in CHANNELS:
        for at, each in enumerate(reading.sets):
            assert (other, at) == (channel, number) or getattr(each, other) is not None


@given(
    st.dictionaries(st.sampled_from([*CHANNELS, "t_ns", "battery_wh", "redundant", "soc_floor", "x"]), ANY)
)
def test_what_is_no_message_is_refused_and_never_more_than_that(changes):
    raw = msgspec.to_builtins(TRUTH) | changes
    try:
        reading = decode_eps(msgspec.msgpack.encode(raw))
    except ValueError:
        return
    assert isinstance(reading, EpsReading)


@given(st.binary(max_size=60))
def test_garbage_is_refused(payload):
    with pytest.raises(ValueError, match="bus/eps"):
        decode_eps(payload)
