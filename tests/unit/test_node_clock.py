from __future__ import annotations

import pytest

from node.clock import (
    SILENT_S,
    SLEW_S,
    STEP_S,
    ClockLocked,
    ClockLost,
    ClockStepped,
    MissionClock,
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


def test_the_first_time_of_the_bus_locks_and_sets_rate() -> None:
    clock = MissionClock(T0, 0)
    assert clock.handle(BusTime(t_ns=T0 + 1000 * S, rate=60.0), S) == [ClockLocked(999.0)]
    assert clock.locked
    assert clock.now_ns(2 * S) == T0 + 1060 * S


def test_a_small_error_is_worked_off_without_a_step() -> None:
    clock = MissionClock(T0, 0)
    clock.handle(BusTime(t_ns=T0, rate=1.0), 0)
    late_ns = S // 10
    assert clock.handle(BusTime(t_ns=T0 + S + late_ns, rate=1.0), S) == []
    assert clock.now_ns(S) == T0 + S
    assert clock.now_ns(S + round(SLEW_S * S / 2)) == T0 + S + round(SLEW_S * S / 2) + late_ns // 2
    assert clock.now_ns(10 * S) == T0 + 10 * S + late_ns


@pytest.mark.parametrize("sign", [1, -1])
def test_a_large_error_steps_and_is_reported(sign: int) -> None:
    clock = MissionClock(T0, 0)
    clock.handle(BusTime(t_ns=T0, rate=1.0), 0)
    jump_ns = round(sign * (STEP_S * S + 1))
    assert clock.handle(BusTime(t_ns=T0 + S + jump_ns, rate=1.0), S) == [ClockStepped(jump_ns / S)]
    assert clock.now_ns(S) == T0 + S + jump_ns


def test_the_threshold_is_physical_so_an_accelerated_bench_jitters_freely() -> None:
    clock = MissionClock(T0, 0)
    clock.handle(BusTime(t_ns=T0, rate=60.0), 0)
    assert clock.handle(BusTime(t_ns=T0 + 60 * S + 20 * S, rate=60.0), S) == []


def test_silence_of_the_bus_is_reported_once_and_time_goes_on_at_the_last_rate() -> None:
    clock = MissionClock(T0, 0)
    clock.handle(BusTime(t_ns=T0, rate=10.0), 0)
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
