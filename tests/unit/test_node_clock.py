from __future__ import annotations

import pytest

from node.clock import (
    CONFIRM_AFTER_S,
    HOLD_S,
    SILENT_S,
    SLEW_S,
    STEP_S,
    ClockLocked,
    ClockLost,
    ClockStepped,
    MissionClock,
    StepHeld,
    StepRejected,
    Tick,
)
from telemetry.bus import EARLIEST_NS, LATEST_NS, BusTime

S = 1_000_000_000
T0 = 1_700_000_000 * S


def test_it_runs_free_and_flagged_until_the_bus_speaks() -> None:
    clock = MissionClock(T0, 0)
    assert not clock.locked
    assert clock.now_ns(5 * S) == T0 + 5 * S
    assert clock.handle(Tick(), 100 * S) == []


WEEKS_S = 1024 * 7 * 86400
"""A receiver of the navigation satellites that counts its weeks wrong is off by this."""


def locked(rate: float = 1.0) -> MissionClock:
    """Return a clock that the bus steers since 0 of the monotonic clock."""
    clock = MissionClock(T0 + 1000 * S, -2 * S)
    for mono_ns in (-2 * S, -S, 0):
        clock.handle(BusTime(t_ns=T0 + round(mono_ns * rate), rate=rate), mono_ns)
    assert clock.locked
    assert clock.now_ns(0) == T0
    return clock


def test_the_first_time_of_the_bus_locks_once_a_second_sample_confirms_it() -> None:
    clock = MissionClock(T0, 0)
    assert clock.handle(BusTime(t_ns=T0 + 1000 * S, rate=60.0), S) == []
    assert not clock.known
    assert clock.now_ns(2 * S) == T0 + 2 * S
    assert clock.handle(BusTime(t_ns=T0 + 1060 * S, rate=60.0), 2 * S) == [ClockLocked(1058.0)]
    assert clock.locked
    assert clock.known
    assert clock.now_ns(3 * S) == T0 + 1120 * S


def test_a_first_time_that_agrees_with_the_host_locks_at_once() -> None:
    clock = MissionClock(T0, 0)
    assert clock.handle(BusTime(t_ns=T0 + S + S // 10), S) == [ClockLocked(0.1)]


@pytest.mark.parametrize("weeks_s", [WEEKS_S, -WEEKS_S // 64])
def test_one_wrong_second_moves_nothing(weeks_s: int) -> None:
    clock = locked()
    assert clock.handle(BusTime(t_ns=T0 + (1 + weeks_s) * S), S) == [StepHeld(weeks_s, 1.0)]
    assert clock.holding
    assert clock.now_ns(S) == T0 + S
    assert clock.handle(BusTime(t_ns=T0 + 2 * S), 2 * S) == [StepRejected(weeks_s, agreed=True)]
    assert not clock.holding
    assert clock.now_ns(3 * S) == T0 + 3 * S


def test_one_sample_of_another_rate_moves_nothing() -> None:
    clock = locked()
    assert clock.handle(BusTime(t_ns=T0 + S, rate=10_000.0), S) == [StepHeld(0.0, 10_000.0)]
    assert clock.now_ns(2 * S) == T0 + 2 * S
    assert clock.handle(BusTime(t_ns=T0 + 2 * S), 2 * S) == [StepRejected(0.0, agreed=True)]


def test_another_rate_is_taken_when_it_is_confirmed() -> None:
    clock = locked()
    clock.handle(BusTime(t_ns=T0 + S, rate=60.0), S)
    assert clock.handle(BusTime(t_ns=T0 + 61 * S, rate=60.0), 2 * S) == [ClockStepped(59.0)]
    assert clock.now_ns(3 * S) == T0 + 121 * S


@pytest.mark.parametrize(
    ("second_s", "after_s"),
    [
        (WEEKS_S + 1.0, 1.0),
        (WEEKS_S + 1.0, 0.4),
        (WEEKS_S + 2.0, CONFIRM_AFTER_S / 2),
        (WEEKS_S + 9.0, 1.0),
        (WEEKS_S * 2, 1.0),
    ],
    ids=["a copy", "a copy soon", "one burst", "another clock", "another week"],
)
def test_what_does_not_confirm_a_step(second_s: float, after_s: float) -> None:
    clock = locked()
    clock.handle(BusTime(t_ns=T0 + (WEEKS_S + 1) * S), S)
    mono_ns = S + round(after_s * S)
    assert clock.handle(BusTime(t_ns=T0 + round(second_s * S)), mono_ns) == []
    assert clock.holding
    assert clock.now_ns(mono_ns) == T0 + mono_ns


def test_what_cannot_be_undone_waits_no_longer_than_stated_and_the_bus_counts_as_silent() -> None:
    clock = locked()
    actions: list[object] = []
    for second in range(1, 21):
        actions += clock.handle(BusTime(t_ns=T0 + second * second * 1000 * S), second * S)
        actions += clock.handle(Tick(), second * S)
        assert clock.holding == (second < 1 + HOLD_S)
        assert clock.now_ns(second * S) == T0 + second * S
    assert actions == [StepHeld(999.0, 1.0), ClockLost(SILENT_S), StepRejected(999.0, agreed=False)]
    assert clock.handle(BusTime(t_ns=T0 + 21 * S), 21 * S) == [ClockLocked(0.0)]


def test_a_slow_bus_confirms_a_step_after_the_wait() -> None:
    clock = locked()
    clock.handle(BusTime(t_ns=T0 + 1060 * S), 60 * S)
    assert clock.handle(Tick(), 90 * S) == [StepRejected(1000.0, agreed=False), ClockLost(90.0)]
    assert clock.handle(BusTime(t_ns=T0 + 1120 * S), 120 * S) == [ClockStepped(1000.0), ClockLocked(1000.0)]


def test_a_small_error_is_worked_off_without_a_step() -> None:
    clock = MissionClock(T0, 0)
    clock.handle(BusTime(t_ns=T0, rate=1.0), 0)
    late_ns = S // 10
    assert clock.handle(BusTime(t_ns=T0 + S + late_ns, rate=1.0), S) == []
    assert clock.now_ns(S) == T0 + S
    assert clock.now_ns(S + round(SLEW_S * S / 2)) == T0 + S + round(SLEW_S * S / 2) + late_ns // 2
    assert clock.now_ns(10 * S) == T0 + 10 * S + late_ns


@pytest.mark.parametrize("sign", [1, -1])
def test_a_large_error_steps_when_it_is_confirmed_and_is_reported(sign: int) -> None:
    clock = locked()
    jump_ns = round(sign * (STEP_S * S + 1))
    assert clock.handle(BusTime(t_ns=T0 + S + jump_ns), S) == [StepHeld(jump_ns / S, 1.0)]
    assert clock.handle(BusTime(t_ns=T0 + 2 * S + jump_ns), 2 * S) == [ClockStepped(jump_ns / S)]
    assert clock.now_ns(2 * S) == T0 + 2 * S + jump_ns
    assert not clock.holding


def test_the_threshold_is_physical_so_an_accelerated_bench_jitters_freely() -> None:
    clock = locked(60.0)
    assert clock.handle(BusTime(t_ns=T0 + 60 * S + 20 * S, rate=60.0), S) == []
    assert clock.now_ns(3 * S) == T0 + 200 * S


def test_silence_of_the_bus_is_reported_once_and_time_goes_on_at_the_last_rate() -> None:
    clock = locked(10.0)
    assert clock.handle(Tick(), round(SILENT_S * S) - 1) == []
    assert clock.handle(Tick(), round(SILENT_S * S)) == [ClockLost(SILENT_S)]
    assert clock.handle(Tick(), 9 * S) == []
    assert not clock.locked
    assert clock.now_ns(10 * S) == T0 + 100 * S
    assert clock.handle(BusTime(t_ns=T0 + 101 * S, rate=10.0), 10 * S) == [ClockLocked(1.0)]


@pytest.mark.parametrize("t_ns", [EARLIEST_NS - 1, LATEST_NS + 1, 0, 2**62])
def test_an_impossible_time_is_refused_and_changes_nothing(t_ns: int) -> None:
    clock = MissionClock(T0, 0)
    with pytest.raises(ValueError, match="2000 to 2100"):
        clock.handle(BusTime(t_ns=t_ns, rate=2.0), 0)
    assert (clock.locked, clock.rate, clock.now_ns(S)) == (False, 1.0, T0 + S)
