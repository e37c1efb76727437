"""Every number on the bus has a physical range, and what divides by one lives with any."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import msgspec.inspect as inspect_
import numpy as np
import pytest

from node.power.array import ArrayModel
from node.power.battery import BatteryModel
from node.power.ceiling import Limits, PowerInputs
from node.power.estimator import EnergyReading, SocEstimator
from node.power.forecast import UmbraPass
from node.power.sensed import LONGEST_ORBIT_NS, SensedEclipses
from node.power.soc_filter import SocFilter
from telemetry import bus

NS = 1_000_000_000
T0_NS = 1_700_000_000 * NS
TINY = (5e-324, 1e-308, 1e-12, 0.0)
"""No capacity or power that anything has."""
EPS: dict[str, Any] = {
    "t_ns": T0_NS, "battery_soc": 0.9, "battery_v": 7.6, "battery_a": 0.1, "battery_wh": 24.0,
    "array_w": 20.0, "array_sun_w": 25.0, "platform_w": 4.0, "soc_floor": 0.7,
}  # fmt: skip


def numbers(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every number of a type, however deep, with its path."""
    match kind:
        case inspect_.Metadata(type=inner):
            yield from numbers(inner, path)
        case inspect_.UnionType(types=types):
            for each in types:
                yield from numbers(each, path)
        case inspect_.ListType(item_type=item) | inspect_.VarTupleType(item_type=item):
            yield from numbers(item, f"{path}[]")
        case inspect_.DictType(value_type=value):
            yield from numbers(value, f"{path}{{}}")
        case inspect_.StructType(fields=fields):
            for field in fields:
                yield from numbers(field.type, f"{path}.{field.encode_name}")
        case inspect_.IntType() | inspect_.FloatType():
            yield path, kind


@pytest.mark.parametrize("channel", bus.CHANNELS)
def test_every_number_of_a_bus_message_has_a_range(channel: str) -> None:
    found = list(numbers(inspect_.type_info(bus.CHANNELS[channel]), channel))
    assert found or channel == "orbit"
    # Elements have ranges of their own (`node.power.ephemeris`); evidence is of any kind.
    open_ended = {"orbit.omm{}", "request.evidence{}"}
    for path, number in found:
        bounded = number.ge is not None and number.le is not None
        assert bounded or path in open_ended, path


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        *(("eps", {**EPS, "battery_wh": value}) for value in TINY),
        ("eps", {**EPS, "t_ns": 0}),
        ("eps", {**EPS, "t_ns": 2**63 - 1}),
        ("eps", {**EPS, "redundant": [{"t_ns": -1}]}),
        ("time", {"t_ns": T0_NS, "rate": 5e-324}),
        ("time", {"t_ns": bus.LATEST_NS + 1}),
        ("thermal", {"t_ns": 1, "board_c": 20.0, "radiator_c": 0.0}),
        ("contact", {"t_ns": T0_NS, "in_contact": True, "next_start_ns": 0}),
        ("contact", {"t_ns": T0_NS, "in_contact": True, "windows": [{"start_ns": 0, "end_ns": T0_NS}]}),
        ("contact", {"t_ns": T0_NS, "in_contact": True, "station": "x" * 65}),
    ],
)
def test_a_value_that_no_spacecraft_has_is_refused(channel: str, message: dict[str, Any]) -> None:
    payload = msgspec.msgpack.encode(message)
    with pytest.raises(ValueError, match=f"bus/{channel}"):
        bus.decode_eps(payload) if channel == "eps" else bus.decode(channel, payload)


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        ("load", bus.BusLoad(t_ns=7, power_w=4.0)),
        ("request", bus.BusRequest(t_ns=7, request="power_cycle", reason="latch-up")),
    ],
)
def test_what_a_node_says_before_its_clock_was_set_is_taken(channel: str, message: bus.BusMessage) -> None:
    assert bus.decode(channel, bus.encode(message)) == message


@pytest.mark.parametrize("battery_wh", [*TINY, math.nan, -1.0])
def test_no_capacity_ends_a_filter(battery_wh: float) -> None:
    battery = BatteryModel()
    soc_filter, estimator = SocFilter(battery), SocEstimator()
    for t_s in (0.0, 1.0, 3e9):
        soc = soc_filter.handle(
            t_s, soc=0.5, sigma=0.005, battery_v=7.6, battery_a=2.0, battery_wh=battery_wh
        )
        assert 0.0 <= soc <= 1.0
        estimator.handle(
            EnergyReading(
                t_s=t_s, soc=0.5 if t_s == 0.0 else None, battery_v=7.6, battery_a=2.0, array_w=0.0,
                platform_w=4.0, load_w=5.0, battery_wh=battery_wh,
            )
        )  # fmt: skip
    assert math.isfinite(battery.soc(100.0, battery_wh))
    assert math.isfinite(battery.energy_j(0.5, battery_wh))


@pytest.mark.parametrize("battery_wh", TINY)
@pytest.mark.parametrize("planned_w", [None, 6.0])
@pytest.mark.parametrize("entry_s", [-10, 100])
def test_no_capacity_ends_the_ceiling(battery_wh: float, planned_w: float | None, entry_s: int) -> None:
    entry_ns = T0_NS + entry_s * NS
    exit_ns = entry_ns + 2000 * NS
    umbra = UmbraPass(
        penumbra_entry_ns=entry_ns, entry_ns=entry_ns, exit_ns=exit_ns, penumbra_exit_ns=exit_ns
    )
    ceiling = Limits().handle(
        PowerInputs(
            t_ns=T0_NS, eps=bus.BusEps(**{**EPS, "battery_wh": battery_wh}), umbra=umbra, period_s=5560.0,
            load_w=6.0, planned_w=planned_w, idle_w=4.0, max_w=10.0,
        )
    )  # fmt: skip
    assert 4.0 <= ceiling.ceiling_w <= 10.0


@pytest.mark.parametrize("array_sun_w", TINY)
def test_an_array_without_power_teaches_nothing(array_sun_w: float) -> None:
    model, sensed = ArrayModel(), SensedEclipses()
    for t_s in (0.0, 0.0, 1.0):
        model.observe(t_s, sunlit=1.0, array_w=100.0, array_sun_w=array_sun_w, soc=0.5, taking_all=True)
        sensed.handle(int(t_s), 0.0, array_sun_w)
    assert model.gain == 1.0
    assert np.all(np.isfinite(model.expect_w(np.array([10.0]), np.array([1.0]), 25.0)))
    assert sensed.dark is None


def test_sensed_passes_a_century_ahead_cost_no_walk_through_all_of_them() -> None:
    sensed = SensedEclipses()
    for t_s in range(0, 20_000, 10):
        sensed.handle(t_s * NS, 25.0 if t_s % 5560 < 3460 else 0.0, 25.0)
    near = sensed.passes(20_000 * NS)
    period_ns = near[1].entry_ns - near[0].entry_ns
    far_ns = near[0].entry_ns + period_ns * 10**13
    assert period_ns < LONGEST_ORBIT_NS
    assert [p.entry_ns for p in sensed.passes(far_ns)] == [far_ns + n * period_ns for n in range(4)]
