"""The governor's ceilings, reasons and duty loop, case by case."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from node.power.ceiling import GovernorSettings, PowerInputs, Reason
from node.power.forecast import UmbraPass
from node.power.governor import Governor, Setpoint
from telemetry.bus import BusEps

NS = 1_000_000_000
EPS = BusEps(
    t_ns=0,
    battery_soc=0.97,
    battery_v=8.0,
    battery_a=0.0,
    battery_wh=24.0,
    array_w=25.0,
    array_sun_w=25.0,
    platform_w=4.0,
    soc_floor=0.7,
)
UMBRA = UmbraPass(
    penumbra_entry_ns=1991 * NS, entry_ns=2000 * NS, exit_ns=4100 * NS, penumbra_exit_ns=4109 * NS
)
SUN = PowerInputs(t_ns=0, eps=EPS, umbra=UMBRA, period_s=5560.0, load_w=12.0, idle_w=4.0, max_w=12.0)
DARK = msgspec.structs.replace(SUN, t_ns=2000 * NS, eps=msgspec.structs.replace(EPS, array_w=0.0))
SERVICE_W = 4.0 + 0.05 * 8.0
BELOW_CAP_W = GovernorSettings().hard_margin * 8.0


def with_eps(inputs: PowerInputs, **changes: Any) -> PowerInputs:
    assert inputs.eps is not None
    return msgspec.structs.replace(inputs, eps=msgspec.structs.replace(inputs.eps, **changes))


def decide(inputs: PowerInputs) -> Setpoint:
    return Governor().handle(inputs, 0.0)


def test_rich_sunlight_gives_the_whole_board() -> None:
    setpoint = decide(SUN)
    assert (setpoint.ceiling_w, setpoint.duty, setpoint.reason) == (12.0, 1.0, Reason.BOARD)
    assert not setpoint.eclipse


def test_a_small_array_binds_and_leaves_what_charging_needs() -> None:
    full = decide(with_eps(SUN, array_w=14.0, array_sun_w=14.0))
    assert full.reason is Reason.ARRAY
    assert full.ceiling_w == pytest.approx(0.97 * 14.0 - 4.0)
    assert full.target_soc is not None
    # 0.2 of 24 Wh to be charged at 93 % in 2000 s.
    low_soc = full.target_soc - 0.2
    low = decide(with_eps(SUN, array_w=22.0, array_sun_w=22.0, battery_soc=low_soc))
    assert low.target_soc is not None
    missing_wh = (low.target_soc - low_soc) * 24.0
    assert low.allowed_w == pytest.approx(0.97 * 22.0 - 4.0 - missing_wh / 0.93 * 3600 / 2000)


def test_target_is_enough_for_the_eclipse_and_no_more_than_asked() -> None:
    large = decide(with_eps(SUN, battery_wh=200.0))
    small = decide(with_eps(SUN, battery_wh=24.0))
    least = decide(with_eps(SUN, battery_wh=10.0))
    assert large.target_soc is not None
    assert large.target_soc < 0.85
    assert small.target_soc == 0.97
    assert least.target_soc == 1.0  # bare service takes more than the target leaves


def test_eclipse_spends_what_the_battery_has_above_floor_and_margin() -> None:
    setpoint = decide(with_eps(DARK, battery_soc=0.95))
    assert setpoint.eclipse
    assert setpoint.reason is Reason.BATTERY
    assert setpoint.ceiling_w == pytest.approx(0.22 * 24.0 * 0.93 * 3600 / 2100 - 4.0, abs=1e-6)
    assert setpoint.target_soc is None


def test_a_full_battery_still_gives_eclipse_less_than_sunlight() -> None:
    setpoint = decide(with_eps(DARK, battery_soc=1.0, battery_wh=500.0, array_sun_w=100.0))
    assert setpoint.ceiling_w == pytest.approx(0.75 * 12.0)


def test_service_goes_on_when_nothing_is_left() -> None:
    setpoint = decide(with_eps(DARK, battery_soc=0.73))
    assert setpoint.ceiling_w == pytest.approx(SERVICE_W)
    assert setpoint.allowed_w < SERVICE_W
    assert setpoint.duty == pytest.approx(0.05)


def test_the_end_of_an_eclipse_is_no_excuse_to_spend_everything() -> None:
    almost_out = msgspec.structs.replace(DARK, t_ns=4099 * NS, rate=60.0)
    setpoint = decide(with_eps(almost_out, battery_soc=0.755))
    assert setpoint.ceiling_w == pytest.approx(0.025 * 24.0 * 0.93 * 3600 / 180 - 4.0)


def test_a_dark_array_is_eclipse_whatever_the_forecast_says() -> None:
    for umbra, period_s in ((UMBRA, 5560.0), (None, None)):
        inputs = msgspec.structs.replace(SUN, umbra=umbra, period_s=period_s)
        setpoint = decide(with_eps(inputs, array_w=0.0, battery_soc=0.85))
        assert setpoint.eclipse
        assert setpoint.reason is Reason.BATTERY
        assert setpoint.ceiling_w == pytest.approx(max(SERVICE_W, 0.12 * 24 * 0.93 * 3600 / 2200 - 4.0))


@pytest.mark.parametrize("umbra", [UMBRA, None])
def test_at_the_floor_duty_is_least_at_once_and_let_go_with_hysteresis(umbra: UmbraPass | None) -> None:
    governor = Governor()
    sun = msgspec.structs.replace(SUN, umbra=umbra)
    assert governor.handle(sun, 0.0).duty == 1.0
    guarded = governor.handle(with_eps(sun, battery_soc=0.704), 0.01)
    assert (guarded.duty, guarded.reason) == (0.05, Reason.FLOOR)
    assert guarded.ceiling_w == pytest.approx(SERVICE_W)
    assert governor.handle(with_eps(sun, battery_soc=0.709), 0.5).reason is Reason.FLOOR
    assert governor.handle(with_eps(sun, battery_soc=0.711), 1.0).reason is not Reason.FLOOR


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"eps": None}, id="never-heard"),
        pytest.param({"eps_age_s": 5.1}, id="stale"),
        pytest.param({"eps_age_s": 4.0, "rate": 200.0}, id="stale-in-mission-time"),
        pytest.param({"eps_age_s": math.nan}, id="nan-age"),
    ],
)
def test_an_unknown_bus_means_caution(changes: dict[str, Any]) -> None:
    setpoint = decide(msgspec.structs.replace(SUN, **changes))
    assert setpoint.reason is Reason.UNKNOWN_BUS
    assert setpoint.ceiling_w == pytest.approx(4.0 + 0.15 * 8.0)
    assert setpoint.target_soc is None


def test_a_message_in_time_is_no_unknown_bus() -> None:
    assert decide(msgspec.structs.replace(SUN, eps_age_s=4.9)).reason is Reason.BOARD


def test_a_commanded_cap_binds_when_lowest() -> None:
    setpoint = decide(msgspec.structs.replace(SUN, cap_w=7.0))
    assert (setpoint.ceiling_w, setpoint.reason) == (7.0, Reason.COMMAND)
    assert decide(msgspec.structs.replace(SUN, cap_w=50.0)).reason is Reason.BOARD
    # A cap below what service needs does not stop it.
    assert decide(msgspec.structs.replace(SUN, cap_w=1.0)).ceiling_w == pytest.approx(SERVICE_W)


@pytest.mark.parametrize(("board_c", "ceiling_w"), [(70.0, 12.0), (77.5, 8.2), (85.0, 4.4), (120.0, 4.4)])
def test_a_warm_board_is_throttled(board_c: float, ceiling_w: float) -> None:
    setpoint = decide(msgspec.structs.replace(SUN, board_c=board_c))
    assert setpoint.ceiling_w == pytest.approx(ceiling_w)
    assert (setpoint.reason is Reason.THERMAL) == (board_c > 70.0)


def settle(governor: Governor, inputs: PowerInputs, gain: float, seconds: float) -> tuple[float, float]:
    """Run against a board whose draw is `gain` times what the model says; return draw and duty."""
    load_w, duty, now_s = inputs.load_w or 4.0, 1.0, 0.0
    while now_s < seconds:
        setpoint = governor.handle(msgspec.structs.replace(inputs, load_w=load_w), now_s)
        duty = setpoint.duty
        load_w += 0.6 * (4.0 + 8.0 * gain * duty - load_w)
        now_s += 0.5
    return load_w, duty


@pytest.mark.parametrize("gain", [0.7, 1.0, 1.5])
def test_the_loop_brings_the_draw_to_the_ceiling_though_the_model_is_wrong(gain: float) -> None:
    inputs = msgspec.structs.replace(SUN, cap_w=8.0)
    load_w, _ = settle(Governor(), inputs, gain, 30.0)
    assert load_w == pytest.approx(8.0 - BELOW_CAP_W, abs=0.1)
    planned = msgspec.structs.replace(SUN, planned_w=8.0)
    load_w, _ = settle(Governor(), planned, gain, 30.0)
    assert load_w == pytest.approx(8.0, abs=0.1), "a plan holds on the mean, a cap each second"


@pytest.mark.parametrize("gain", [0.8, 1.3])
def test_without_a_meter_the_model_alone_paces(gain: float) -> None:
    governor, planned = Governor(), msgspec.structs.replace(SUN, planned_w=8.0)
    _, corrected = settle(governor, planned, gain, 30.0)
    assert corrected != pytest.approx(0.5, abs=0.02)
    blind = msgspec.structs.replace(planned, load_w=None)
    paced = [governor.handle(blind, 30.0 + 0.25 * turn).duty for turn in range(40)]
    assert paced[-1] == pytest.approx(0.5), "what a meter said that has died corrects nothing"


def test_no_windup_while_the_board_draws_less_than_it_may() -> None:
    governor = Governor()
    settle(governor, SUN, 0.5, 120.0)
    # Saturated at duty 1 for two minutes; the new ceiling is met without a long overshoot.
    duties = [
        governor.handle(msgspec.structs.replace(SUN, cap_w=6.0, load_w=8.0), 120.0 + 0.5 * i).duty
        for i in range(4)
    ]
    assert duties[-1] <= 0.25 + 1e-9


def test_no_windup_without_work() -> None:
    governor = Governor()
    idle = msgspec.structs.replace(SUN, cap_w=8.0, load_w=4.0, busy=False)
    for i in range(200):
        setpoint = governor.handle(idle, 0.5 * i)
    assert setpoint.duty == pytest.approx(0.5 - BELOW_CAP_W / 8)
    working = governor.handle(msgspec.structs.replace(idle, busy=True), 100.0)
    assert working.duty > 0.5 - BELOW_CAP_W / 8


def test_a_plan_is_followed_only_as_far_as_the_battery_carries_it() -> None:
    planned = msgspec.structs.replace(SUN, planned_w=9.0)
    assert (decide(planned).ceiling_w, decide(planned).reason) == (9.0, Reason.PLAN)
    # In eclipse: what is above floor and guard, to its end.
    dark = msgspec.structs.replace(with_eps(DARK, battery_soc=0.95), planned_w=12.0, soc_sigma=0.01)
    held = decide(dark)
    assert held.reason is Reason.BATTERY
    assert held.ceiling_w == pytest.approx(0.235 * 24.0 * 0.93 * 3600 / 2100 - 4.0, abs=0.01)
    # In sunlight: bare service through the eclipse ahead must stay possible, by the array as it is.
    needed = 0.7 + 0.005 + (4.0 + SERVICE_W) * 2100 / (24.0 * 3600 * 0.93)
    weak = with_eps(planned, battery_soc=needed, array_w=10.0)
    assert decide(weak).reason is Reason.BATTERY
    assert decide(weak).ceiling_w == pytest.approx(10.0 - 4.0, abs=0.01)
    assert decide(with_eps(planned, battery_soc=needed - 0.05, array_w=10.0)).ceiling_w < 6.0


def test_duty_rises_slower_than_it_falls() -> None:
    governor = Governor()
    low = msgspec.structs.replace(SUN, cap_w=4.4, load_w=4.4)
    governor.handle(low, 0.0)
    risen = governor.handle(SUN, 0.5).duty
    assert risen == pytest.approx(0.05 + 0.5 * 0.5)
    for i in range(1, 10):
        governor.handle(SUN, 0.5 + 0.5 * i)
    assert governor.handle(low, 5.25).duty == pytest.approx(1.0 - 2.0 * 0.25)


@pytest.mark.parametrize("load_w", [None, math.nan, math.inf])
def test_an_unreadable_draw_leaves_the_model_alone(load_w: float | None) -> None:
    governor = Governor()
    inputs = msgspec.structs.replace(SUN, cap_w=8.0, load_w=load_w)
    for i in range(20):
        setpoint = governor.handle(inputs, float(i))
    assert setpoint.duty == pytest.approx(0.5 - BELOW_CAP_W / 8)


def test_a_board_without_range_is_no_division_by_zero() -> None:
    setpoint = decide(msgspec.structs.replace(SUN, max_w=4.0))
    assert 0.05 <= setpoint.duty <= 1.0


@pytest.mark.parametrize(
    "table",
    [
        {"min_duty": 0.0},
        {"eclipse_share": 1.5},
        {"hot_c": 60.0},
        {"floor_guard": 0.05},
        {"soc_margn": 0.05},
        {"settle_s": 0},
    ],
)
def test_settings_out_of_range_are_refused(table: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(table, GovernorSettings)


def test_reasons_are_those_of_the_packet() -> None:
    assert {r.value for r in Reason} == {
        "board", "plan", "array", "battery", "thermal", "command", "floor", "unknown_bus",
    }  # fmt: skip
