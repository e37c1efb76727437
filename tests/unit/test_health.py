from __future__ import annotations

import pytest

from fdir.health import (
    Arm,
    Disarm,
    PingFatal,
    PingLate,
    PingLimits,
    PingMonitor,
    PingRecovered,
    PingState,
    Pong,
    SendPing,
    Tick,
)

LIMITS = PingLimits(period_s=0.5, warn_s=1.0, fatal_s=2.0, stall_s=0.5)


def armed() -> PingMonitor:
    monitor = PingMonitor(LIMITS)
    assert monitor.handle(Arm(), 0.0) == [SendPing(1)]
    return monitor


def test_it_pings_by_period_and_each_time_with_another_key() -> None:
    monitor = armed()
    assert monitor.handle(Pong(1), 0.1) == []
    assert monitor.handle(Tick(), 0.4) == []
    assert monitor.handle(Tick(), 0.5) == [SendPing(2)]
    assert monitor.handle(Tick(), 0.9) == []
    assert monitor.in_limits


def test_late_is_a_warning_then_fatal_then_passive() -> None:
    monitor = armed()
    assert monitor.handle(Tick(), 0.5) == []
    assert monitor.handle(Tick(), 1.0) == [PingLate(1, 1.0)]
    assert not monitor.in_limits
    assert monitor.handle(Tick(), 1.5) == []
    (fatal,) = monitor.handle(Tick(), 2.0)
    assert isinstance(fatal, PingFatal)
    assert fatal.silent_s == 2.0
    assert monitor.state is PingState.PASSIVE
    assert not monitor.in_limits
    assert monitor.handle(Tick(), 9.0) == []
    assert monitor.handle(Pong(1), 9.0) == []


def test_a_late_answer_is_a_recovery() -> None:
    monitor = armed()
    monitor.handle(Tick(), 0.5)
    monitor.handle(Tick(), 1.0)
    assert monitor.handle(Pong(1), 1.2) == [PingRecovered(1, 1.0)]
    assert monitor.in_limits


@pytest.mark.parametrize("key", [0, 2, -1])
def test_a_wrong_key_is_fatal(key: int) -> None:
    (fatal,) = armed().handle(Pong(key), 0.1)
    assert isinstance(fatal, PingFatal)
    assert "wrong key" in fatal.reason


def test_an_answer_given_twice_is_fatal() -> None:
    monitor = armed()
    monitor.handle(Pong(1), 0.1)
    (fatal,) = monitor.handle(Pong(1), 0.2)
    assert isinstance(fatal, PingFatal)
    assert "none was expected" in fatal.reason


def test_time_in_which_nobody_watched_is_not_silence() -> None:
    monitor = armed()
    monitor.handle(Tick(), 0.4)
    assert monitor.handle(Tick(), 100.0) == []
    assert monitor.silent_s == pytest.approx(0.9)
    assert monitor.handle(Pong(1), 100.0) == []


def test_a_clock_that_goes_back_is_no_silence_either() -> None:
    monitor = armed()
    monitor.handle(Tick(), 0.4)
    monitor.handle(Tick(), 0.1)
    assert monitor.silent_s == pytest.approx(0.4)


def test_disarmed_it_is_passive_and_can_be_armed_again() -> None:
    monitor = armed()
    assert monitor.handle(Disarm(), 0.1) == []
    assert monitor.silent_s == 0.0
    assert monitor.handle(Tick(), 5.0) == []
    assert monitor.handle(Arm(), 6.0) == [SendPing(2)]
    assert monitor.in_limits


@pytest.mark.parametrize(
    "wrong",
    [
        {"period_s": 0.0},
        {"period_s": 1.5},
        {"warn_s": 2.0},
        {"fatal_s": 0.9},
        {"stall_s": 0.0},
        {"stall_s": 2.0},
        {"warn_s": float("nan")},
    ],
)
def test_limits_out_of_order_are_refused(wrong: dict[str, float]) -> None:
    good = {"period_s": 0.5, "warn_s": 1.0, "fatal_s": 2.0, "stall_s": 0.5}
    with pytest.raises(ValueError, match="required"):
        PingLimits(**{**good, **wrong})
