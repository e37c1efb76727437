"""The monitors: each check, persistence, states, re-arming, throttles."""

from __future__ import annotations

from typing import Any

import pytest
from some_rows import hot, make_row

from fdir.monitors import (
    Announce,
    Fired,
    LoadTable,
    ModeChanged,
    MonitorEvent,
    Monitors,
    PersistStates,
    Point,
    Rearm,
    Recovered,
    Reported,
    Sample,
    SetState,
    Stamp,
    Tick,
    Transition,
    Watch,
)
from fdir.table import Action, Delta, Expected, Expr, Limit, Row, RowState, Stale, Table
from telemetry.errors import PenumbraError
from telemetry.packets import Mode, Severity


class Bench:
    """Monitors of some rows, and a clock of one second an event."""

    def __init__(self, *rows: Row, states: dict[str, RowState] | None = None) -> None:
        self.monitors = Monitors(Table(rows), states or {})
        self.now_s = 0.0

    def tell(self, event: MonitorEvent, after_s: float = 1.0) -> list[Any]:
        self.now_s += after_s
        return self.monitors.handle(event, self.now_s)

    def fired(self, *events: MonitorEvent) -> list[int]:
        """Which of the events fired a row."""
        return [n for n, event in enumerate(events) if any(isinstance(a, Fired) for a in self.tell(event))]

    def samples(self, *values: float | int | bool | None, item: str = "board.c") -> list[int]:
        return self.fired(*(Sample(item, value) for value in values))

    def status(self, row: str = "board.hot") -> Any:
        return self.monitors.status(row)


def test_a_limit_fires_after_so_many_violations_in_a_row_and_once():
    bench = Bench(hot(persistence=3, action=Action.SAFE_MODE))
    assert bench.samples(60.0, 60.0, 40.0, 60.0, 60.0, 60.0, 60.0) == [5]
    status = bench.status()
    assert (status.watch, status.point, status.fired) == (Watch.TRUE, Point.FAIL, True)
    assert (status.counts.consecutive, status.counts.cumulative, status.counts.actions) == (4, 6, 1)
    assert (status.counts.evaluations, status.counts.false_to_true) == (7, 1)


@pytest.mark.parametrize(("value", "fires"), [(9.99, True), (10.0, False), (20.0, False), (20.01, True)])
def test_limits_are_the_last_good_values(value, fires):
    bench = Bench(hot(check=Limit(low=10.0, high=20.0, unit="degC")))
    assert bool(bench.samples(value)) is fires


@pytest.mark.parametrize(
    ("check", "value", "fires"),
    [
        (Expected(value=5), 5, False),
        (Expected(value=5), 4, True),
        (Expected(value=4, mask=6), 5, False),
        (Expected(value=4, mask=6), 7, True),
    ],
)
def test_an_expected_value_counts_in_the_bits_of_its_mask(check, value, fires):
    bench = Bench(make_row("jobs.odd", item="jobs.queued", check=check))
    assert bool(bench.samples(value, item="jobs.queued")) is fires


def test_an_expected_bool():
    bench = Bench(make_row("clock.off", item="clock.locked", check=Expected(value=True)))
    assert bench.samples(True, False, item="clock.locked") == [1]


def test_a_change_is_taken_over_samples_and_not_over_gaps():
    bench = Bench(hot(check=Delta(high=5.0, low=-5.0, unit="degC", samples=2), clear=1))
    assert bench.samples(1.0, 9.0) == []
    assert bench.status().watch is Watch.UNCHECKED
    assert bench.samples(7.0) == [0]
    assert bench.samples(9.0, 11.0, 4.0, 4.0) == [3]
    assert bench.samples(None, 90.0, 90.0) == []
    assert bench.samples(90.0) == []


def test_no_sample_for_too_long_is_stale_and_an_old_result_is_no_result():
    bench = Bench(make_row("bus.stale", item="battery.v", check=Stale(after_s=3.0)), hot(stale_after_s=2.0))
    assert bench.fired(Tick(), Tick(), Tick(), Tick()) == []
    assert bench.fired(Tick()) == [0]
    bench.samples(14.0, item="battery.v")
    assert bench.status("bus.stale").point is Point.PASS
    assert bench.samples(None, None, None, None, item="battery.v") == [3], "unreadable samples are none"
    bench.samples(20.0)
    bench.tell(Tick())
    assert bench.status().watch is Watch.FALSE
    announced = bench.tell(Tick(), 2.0)
    assert bench.status().point is Point.STALE
    assert [a.what for a in announced if isinstance(a, Announce)] == [Transition.UNREADABLE]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_cannot_be_read_moves_no_count(value):
    bench = Bench(hot(persistence=2))
    bench.samples(60.0)
    assert bench.samples(value, value) == []
    assert bench.status().watch is Watch.ERROR
    assert bench.status().counts.consecutive == 1
    assert bench.samples(60.0) == [0]


def test_expressions_combine_results_and_do_not_guess():
    rows = (
        hot("a.hot"),
        make_row("b.full", item="spool.fill", check=Limit(high=0.9, unit="1")),
        make_row("c.both", check=Expr(rows="a.hot and not b.full")),
    )
    bench = Bench(*rows)
    bench.tell(Tick())
    assert bench.status("c.both").watch is Watch.STALE
    bench.samples(60.0)
    assert bench.fired(Tick()) == [], "b.full is not known"
    bench.samples(0.5, item="spool.fill")
    assert bench.fired(Tick()) == [0]
    bench.samples(0.95, item="spool.fill")
    bench.tell(Tick())
    assert bench.status("c.both").point is Point.PASS


def test_a_row_is_checked_in_its_modes_and_while_it_is_valid():
    bench = Bench(hot(modes=(Mode.NOMINAL,), validity="worker.running"))
    assert bench.samples(60.0) == []
    bench.tell(ModeChanged(Mode.NOMINAL))
    assert bench.samples(60.0) == [], "nobody has said that it is valid"
    bench.samples(True, item="worker.running")
    assert bench.samples(60.0) == [0]
    bench.samples(False, item="worker.running")
    bench.samples(60.0)
    assert bench.status().watch is Watch.UNCHECKED
    bench.samples(True, item="worker.running")
    bench.tell(ModeChanged(Mode.SAFE))
    assert bench.status().point is Point.UNCHECKED


def test_the_values_of_the_last_changes_are_kept_with_their_times():
    bench = Bench(hot())
    bench.samples(20.0, 60.0, 70.0, 30.0, 20.0)
    status = bench.status()
    assert (status.last_false_to_true, status.last_true_to_false) == (Stamp(60.0, 2.0), Stamp(30.0, 4.0))
    bench.samples(None, 80.0)
    assert bench.status().last_false_to_true == Stamp(60.0, 2.0), "from unreadable nothing is known to change"


def test_a_row_that_fired_is_armed_again_by_good_results():
    bench = Bench(hot(clear=2, action=Action.SAFE_MODE))
    assert bench.samples(60.0, 20.0, 60.0, 20.0, 20.0, 60.0) == [0, 5]


def test_a_row_for_the_ground_is_armed_again_by_command_only():
    bench = Bench(hot(rearm="ground", action=Action.SAFE_MODE))
    assert bench.samples(60.0, 20.0, 60.0) == [0]
    bench.tell(Recovered("board.hot"))
    assert bench.samples(20.0, 60.0) == []
    (told,) = bench.tell(Rearm(None))
    assert (told.what, told.severity) == (Transition.REARMED, Severity.INFO)
    assert bench.samples(60.0) == [0]
    assert bench.tell(Rearm("board.hot"))
    assert bench.tell(Rearm("board.hot")) == []


def test_recovery_lets_persistence_begin_anew():
    bench = Bench(hot(persistence=2, action=Action.SAFE_MODE))
    assert bench.samples(60.0, 60.0) == [1]
    bench.tell(Recovered("board.hot"))
    assert bench.samples(60.0, 60.0) == [1]


def test_momentary_findings_fire_each_time_and_others_once_until_they_are_over():
    bench = Bench(
        make_row("w.digest", action=Action.REPAIR), make_row("w.exit", action=Action.RESTART_WORKER)
    )
    for row, fired in (("w.digest", [0, 1, 2]), ("w.exit", [0])):
        assert bench.fired(*(Reported(row, {"page": n}, "struck") for n in range(3))) == fired
    actions = bench.tell(Reported("w.exit", {}, "again"))
    assert [a.what for a in actions] == [Transition.REPEATED]
    (over,) = bench.tell(Recovered("w.exit"))
    assert over.what is Transition.CLEARED
    assert bench.fired(Reported("w.exit", {}, "anew")) == [0]


def test_what_fires_carries_evidence_and_reason():
    bench = Bench(make_row("w.exit", action=Action.RESTART_WORKER), hot())
    fired = next(a for a in bench.tell(Reported("w.exit", {"code": 9}, "killed")) if isinstance(a, Fired))
    assert (fired.row.id, fired.evidence, fired.reason) == ("w.exit", {"code": 9}, "killed")
    fired = next(a for a in bench.tell(Sample("board.c", 77.0)) if isinstance(a, Fired))
    assert (fired.evidence, fired.reason) == ({"item": "board.c", "value": 77.0}, "board.hot is wrong")


def test_events_are_throttled_but_counted_and_action_is_not():
    bench = Bench(make_row("w.digest", action=Action.REPAIR, max_events=2))
    told = [bench.tell(Reported("w.digest", {}, "x")) for _ in range(5)]
    assert [sum(isinstance(a, Announce) for a in actions) for actions in told] == [1, 1, 0, 0, 0]
    assert all(isinstance(actions[-1], Fired) for actions in told)
    counts = bench.status("w.digest").counts
    assert (counts.events, counts.throttled, counts.cumulative) == (2, 3, 5)
    assert any(isinstance(a, Announce) for a in bench.tell(Reported("w.digest", {}, "x"), 3600.0))


def test_passive_reports_without_action_and_disabled_does_neither():
    bench = Bench(hot())
    bench.tell(SetState("board.hot", RowState.PASSIVE))
    (told,) = bench.tell(Sample("board.c", 60.0))
    assert told.what is Transition.VIOLATED
    assert not bench.status().fired
    bench.tell(SetState("board.hot", RowState.DISABLED))
    assert bench.tell(Sample("board.c", 60.0)) == []
    assert bench.status().point is Point.UNCHECKED
    bench.tell(SetState("board.hot", RowState.ENABLED))
    assert bench.samples(60.0) == [0]


def test_a_finding_of_a_disabled_row_is_counted_as_ignored():
    bench = Bench(make_row("w.exit", action=Action.RESTART_WORKER, state=RowState.DISABLED))
    assert bench.tell(Reported("w.exit", {}, "x")) == []
    assert bench.status("w.exit").counts.ignored == 1


def test_states_commanded_are_persisted_and_the_whole_stands_above_the_rows():
    bench = Bench(hot(), make_row("w.exit"))
    persist, told = bench.tell(SetState("board.hot", RowState.DISABLED))
    assert persist == PersistStates({"board.hot": RowState.DISABLED}, RowState.ENABLED)
    assert (told.what, told.severity) == (Transition.STATE, Severity.MEDIUM)
    persist, _ = bench.tell(SetState(None, RowState.PASSIVE))
    assert persist.overall is RowState.PASSIVE
    assert bench.monitors.effective("board.hot") is RowState.DISABLED
    assert bench.monitors.effective("w.exit") is RowState.PASSIVE
    assert bench.fired(Reported("w.exit", {}, "x")) == []
    assert bench.monitors.state("w.exit") is RowState.ENABLED


def test_states_of_a_boot_before_hold_as_far_as_they_fit():
    states = {"board.hot": RowState.PASSIVE, "no.row": RowState.DISABLED, "kv.digest": RowState.PASSIVE}
    bench = Bench(hot(), make_row("kv.digest", action=Action.REPAIR), states=states)
    assert bench.monitors.effective("board.hot") is RowState.PASSIVE
    assert bench.monitors.effective("kv.digest") is RowState.ENABLED
    assert bench.monitors.dropped == ("kv.digest", "no.row")


def test_a_new_table_keeps_what_is_the_same():
    bench = Bench(hot(action=Action.SAFE_MODE), make_row("w.exit"))
    bench.samples(60.0)
    bench.tell(SetState("w.exit", RowState.DISABLED))
    (persist,) = bench.tell(LoadTable(Table([hot(action=Action.SAFE_MODE), make_row("x.new")])))
    assert persist.states == {}
    assert bench.status().fired
    assert bench.samples(60.0) == []
    bench.tell(LoadTable(Table([hot(max_events=7)])))
    assert bench.status().watch is Watch.STALE


@pytest.mark.parametrize(
    ("event", "error", "words"),
    [
        (Sample("no.item", 1.0), ValueError, "no item of the dictionary"),
        (Sample("board.c", True), ValueError, "a value of type float is expected"),
        (Sample("clock.locked", 1.0), ValueError, "a value of type bool is expected"),
        (Reported("board.hot", {}, "x"), ValueError, "takes no reports"),
        (Reported("no.row", {}, "x"), PenumbraError, "no.row"),
        (SetState("no.row", RowState.ENABLED), PenumbraError, "no.row"),
        (SetState("kv.digest", RowState.PASSIVE), ValueError, "cannot be passive"),
        (Rearm("no.row"), PenumbraError, "no.row"),
    ],
)
def test_defects_of_the_caller_are_said(event, error, words):
    bench = Bench(hot(), make_row("kv.digest", action=Action.REPAIR))
    with pytest.raises(error, match=words):
        bench.tell(event)
