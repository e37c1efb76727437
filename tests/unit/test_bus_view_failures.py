"""A message that makes the view of the spacecraft fail leaves it as it was."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fdir.sensors import SensorVoter
from hil.campaign.field_seeds import orbit_omm
from hil.campaign.node_state import state_of
from hil.sensor_faults import SensorBench
from node import bus_view
from node.bus_view import BusView
from node.power.elements import Elements
from node.power.ephemeris import Ephemeris
from node.power.estimator import SocEstimator
from node.power.forecast import EclipseForecast
from node.power.sensed import SensedEclipses
from telemetry import bus
from telemetry.errors import PenumbraError

NS = 1_000_000_000
ISS = bus.BusOrbit(
    line1="1 25544U 98067A   08264.51782528 -.00002182  00000-0 -11606-4 0  2927",
    line2="2 25544  51.6416 247.4627 0006703 130.5360 325.0288 15.72125391563537",
)
EPOCH_NS = 1_221_913_540 * NS
TRUTH = bus.BusEps(
    t_ns=EPOCH_NS, battery_soc=0.8, battery_v=14.0, battery_a=-2.0, battery_wh=100.0, array_w=50.0,
    array_sun_w=60.0, platform_w=10.0, soc_floor=0.5,
)  # fmt: skip


def flying(seconds: int = 40) -> tuple[BusView, SensorBench]:
    view, sensors = BusView(), SensorBench(3)
    view.handle(ISS, 0.0)
    for second in range(seconds):
        view.handle(reading(sensors, second), float(second))
    return view, sensors


def knows(view: BusView) -> bytes:
    return state_of(view, without={"forecast"})


def reading(sensors: SensorBench, second: int) -> bus.BusMessage:
    truth = msgspec.structs.replace(TRUTH, t_ns=EPOCH_NS + second * NS)
    return bus.decode_eps(bus.encode(sensors.read(truth)))


def raising(*_: object, **__: object) -> Any:
    raise ZeroDivisionError("float division by zero")


@pytest.mark.parametrize(
    ("of", "name"),
    [(SensorVoter, "value"), (SocEstimator, "handle"), (SensedEclipses, "handle"), (bus_view, "BusEps")],
)
def test_a_reading_that_fails_half_way_is_not_taken_at_all(
    monkeypatch: pytest.MonkeyPatch, of: object, name: str
) -> None:
    view, sensors = flying()
    before, forecast = knows(view), view.forecast
    message = reading(sensors, 40)
    with monkeypatch.context() as patched:
        patched.setattr(of, name, raising)
        if of is bus_view:  # a class pattern needs a class
            patched.setattr(of, name, type("BusEps", (), {"__init__": raising}))
        with pytest.raises(ZeroDivisionError):
            view.handle(message, 40.0)
    assert knows(view) == before
    assert view.forecast is forecast
    view.handle(message, 40.0)
    assert knows(view) != before


@pytest.mark.parametrize("error", [TypeError("t"), ZeroDivisionError("z"), PenumbraError("p")])
@pytest.mark.parametrize(("of", "name"), [(Elements, "from_omm"), (Ephemeris, "__init__")])
def test_elements_that_fail_leave_those_before(
    monkeypatch: pytest.MonkeyPatch, of: type, name: str, error: Exception
) -> None:
    view, _ = flying(1)
    before, forecast = knows(view), view.forecast

    def fail(*_: object, **__: object) -> Any:
        raise error

    monkeypatch.setattr(of, name, fail)
    with pytest.raises(type(error)):
        view.handle(orbit_omm(), 1.0)
    assert view.forecast is forecast
    assert knows(view) == before


def test_what_the_elements_do_not_rest_on_makes_no_new_forecast() -> None:
    view = BusView()
    view.handle(with_name("PENUMBRA"), 0.0)
    forecast = view.forecast
    for name in ("", float("nan"), {"a": [None]}):
        view.handle(with_name(name), 1.0)
        assert view.handle_retained(with_name(name), 1.0, None, 1.0) is None
    assert view.forecast is forecast is not None


def test_a_field_nested_as_deep_as_can_be_read_is_taken_each_time_it_comes() -> None:
    taken, refused = 1, 100_000
    while refused - taken > 1:
        depth = (taken + refused) // 2
        try:
            bus.decode("orbit", nested(depth))
            taken = depth
        except bus.BusError:
            refused = depth
    view = BusView()
    for _ in range(2):
        view.handle(bus.decode("orbit", nested(taken)), 0.0)
    assert view.forecast is not None


def with_name(name: object) -> bus.BusOrbit:
    return bus.BusOrbit(omm={**(orbit_omm().omm or {}), "OBJECT_NAME": name})


def nested(depth: int) -> bytes:
    # Lists of one element, the innermost an empty one: no encoder goes so deep.
    return bus.encode(with_name("here")).replace(b"\xa4here", b"\x91" * (depth - 1) + b"\x90")


def test_elements_on_which_the_forecast_fails_later_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    view, _ = flying()
    assert view.eclipses(EPOCH_NS).source == "forecast"
    monkeypatch.setattr(EclipseForecast, "passes", raising)
    assert view.eclipses(EPOCH_NS).source == "unknown"
    assert view.forecast is None
    assert view.forecast_fault == "ZeroDivisionError: float division by zero"
    view.handle(ISS, 41.0)
    assert view.forecast is None, "the same elements again"
    assert view.sunlit(EPOCH_NS) == 1.0, "by the array"


def test_what_is_forgotten_is_known_again_by_the_next_messages() -> None:
    view, sensors = flying()
    view.forget()
    assert view.eps is None
    assert view.forecast is None
    view.handle(ISS, 41.0)
    view.handle(reading(sensors, 41), 41.0)
    assert view.forecast is not None
    assert view.eps is not None


def test_the_state_tells_what_changed() -> None:
    one, other = BusView(), BusView()
    assert knows(one) == knows(other)
    other.handle(TRUTH, 0.0)
    assert knows(one) != knows(other)
