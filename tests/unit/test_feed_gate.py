from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from node.feed_gate import (
    Feed,
    FeedGate,
    FeedLimits,
    GateAction,
    LagBeat,
    PingReport,
    RestartRequested,
    Resumed,
    Stopping,
    Withheld,
)

LIMITS = FeedLimits(period_s=1.0, lag_s=2.0, report_s=3.0, start_s=60.0, stop_s=30.0)
WELL = PingReport(())


def healthy(now_s: float = 100.0) -> FeedGate:
    """A gate that has just been fed at `now_s`."""
    gate = FeedGate(LIMITS, 0.0)
    gate.handle(WELL, now_s)
    assert gate.handle(LagBeat(0.0), now_s) == [Feed()]
    return gate


def withheld(actions: list[GateAction]) -> str:
    """The reasons of the one action, which must be Withheld: the watchdog is not fed."""
    (action,) = actions
    assert isinstance(action, Withheld)
    return "; ".join(action.reasons)


def test_it_feeds_once_a_period_while_all_is_well() -> None:
    gate = healthy()
    for tenth in range(1, 10):
        assert gate.handle(LagBeat(0.01), 100 + tenth / 10) == []
    assert gate.handle(LagBeat(0.01), 101.0) == [Feed()]
    assert gate.feeds == 2
    assert gate.withheld == ()


def test_only_a_beat_of_the_lag_thread_feeds() -> None:
    gate = healthy()
    assert gate.handle(WELL, 105.0) == []
    assert gate.handle(Stopping(), 106.0) == []


def test_it_is_not_fed_while_one_ping_is_out_of_limits() -> None:
    gate = healthy()
    gate.handle(PingReport(("jobs", "link")), 101.0)
    assert withheld(gate.handle(LagBeat(0.0), 101.0)) == "out of limits: jobs, link"
    assert gate.withheld == ("pings",)
    for second in range(102, 110):
        gate.handle(PingReport(("jobs",)), second)
        assert gate.handle(LagBeat(0.0), second) == []
    gate.handle(WELL, 110.0)
    assert gate.handle(LagBeat(0.0), 110.0) == [Resumed(), Feed()]


@pytest.mark.parametrize("lag_s", [2.01, 60.0, math.inf, math.nan])
def test_it_is_not_fed_while_the_loop_lags(lag_s: float) -> None:
    gate = healthy()
    assert "the event loop lags" in withheld(gate.handle(LagBeat(lag_s), 101.0))
    assert gate.handle(LagBeat(lag_s), 102.0) == []
    assert gate.handle(LagBeat(2.0), 103.0) == [Resumed(), Feed()]


def test_it_is_not_fed_when_nobody_looks_at_the_pings_any_more() -> None:
    gate = healthy()
    for second in range(101, 104):
        assert gate.handle(LagBeat(0.0), second) == [Feed()]
    assert "no account of the pings for 4.0 s" in withheld(gate.handle(LagBeat(0.0), 104.0))
    assert gate.handle(LagBeat(0.0), 200.0) == []
    gate.handle(WELL, 200.5)
    assert gate.handle(LagBeat(0.0), 200.5) == [Resumed(), Feed()]


def test_it_is_never_fed_again_once_a_restart_is_asked_for() -> None:
    gate = healthy()
    gate.handle(RestartRequested("node.restart"), 101.0)
    gate.handle(RestartRequested("another"), 101.0)
    assert withheld(gate.handle(LagBeat(0.0), 101.0)) == "a restart was asked for: node.restart"
    for event in (WELL, Stopping(), WELL):
        gate.handle(event, 102.0)
        assert gate.handle(LagBeat(0.0), 103.0) == []
    assert gate.feeds == 1


def test_the_start_is_excused_but_not_for_ever() -> None:
    gate = FeedGate(LIMITS, 0.0)
    assert gate.handle(LagBeat(0.0), 1.0) == [Feed()]
    assert gate.handle(LagBeat(0.0), 60.0) == [Feed()]
    assert "within 60.0 s of the start" in withheld(gate.handle(LagBeat(0.0), 60.5))
    gate.handle(WELL, 61.0)
    assert gate.handle(LagBeat(0.0), 61.5) == [Resumed(), Feed()]


def test_a_lagging_loop_is_not_excused_by_the_start() -> None:
    assert "lags" in withheld(FeedGate(LIMITS, 0.0).handle(LagBeat(5.0), 1.0))


def test_an_ordered_stop_is_excused_but_not_for_ever() -> None:
    gate = healthy()
    gate.handle(Stopping(), 101.0)
    gate.handle(PingReport(("jobs",)), 102.0)
    assert gate.handle(LagBeat(0.0), 131.0) == [Feed()]
    # Said again it does not begin again.
    gate.handle(Stopping(), 131.0)
    assert "the ordered stop takes longer than 30.0 s" in withheld(gate.handle(LagBeat(0.0), 131.5))


def test_all_reasons_are_told_and_a_change_of_them_is_told_again() -> None:
    gate = healthy()
    gate.handle(PingReport(("jobs",)), 101.0)
    assert gate.handle(LagBeat(5.0), 101.0) == [
        Withheld(("the event loop lags by 5.00 s, 2.0 s allowed", "out of limits: jobs"))
    ]
    assert gate.withheld == ("lag", "pings")
    assert gate.handle(LagBeat(6.0), 101.1) == []
    assert withheld(gate.handle(LagBeat(0.0), 101.2)) == "out of limits: jobs"


@pytest.mark.parametrize("name", ["period_s", "lag_s", "report_s", "start_s", "stop_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_limits_must_be_above_zero(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        FeedLimits(**(asdict(LIMITS) | {name: value}))


def test_feeds_must_be_more_frequent_than_the_oldest_report_allowed() -> None:
    with pytest.raises(ValueError, match="period_s must be below report_s"):
        FeedLimits(period_s=3.0, report_s=3.0)
