"""The recovery ladder, level by level."""

from __future__ import annotations

from typing import Any

import pytest
from some_rows import changed, hot, ladder_table, make_row

from fdir import ladder as module
from fdir.ladder import (
    RESETS_CLEAN_S,
    Act,
    DeEscalated,
    Detected,
    Escalate,
    ExternalControl,
    Failed,
    Ladder,
    LadderEvent,
    LoadTable,
    PersistResets,
    Recovered,
    ResetCount,
    ResetCounters,
    SafeChanged,
    SetStates,
    Suppressed,
    Tick,
    Why,
)
from fdir.table import Action, RowState, Table
from telemetry.packets import Level

TABLE = ladder_table()


class Bench:
    """A ladder, and a clock of one second an event."""

    def __init__(self, table: Table = TABLE, resets: int = 0, limit: int = 3, **settings: bool) -> None:
        self.table = table
        self.now_s = 0.0
        self.ladder = Ladder(table, ResetCount(resets, limit), 0.0, **settings)

    def tell(self, event: LadderEvent, after_s: float = 1.0) -> list[Any]:
        self.now_s += after_s
        return self.ladder.handle(event, self.now_s)

    def detect(self, row: str, after_s: float = 1.0) -> list[Any]:
        return self.tell(Detected(self.table.row(row), {"page": 7}, "found"), after_s)

    def acted(self, row: str, after_s: float = 1.0) -> list[str]:
        return [a.row.id for a in self.detect(row, after_s) if isinstance(a, Act)]

    def why(self, row: str, after_s: float = 1.0) -> Why:
        (suppressed,) = self.detect(row, after_s)
        assert isinstance(suppressed, Suppressed)
        return suppressed.why


@pytest.mark.parametrize(
    ("row", "level"), [("m.repair", 0), ("m.worker", 2), ("m.image", 3), ("node.resets", 5), ("m.note", 0)]
)
def test_a_detection_is_answered_with_the_rows_action(row, level):
    (act,) = Bench().detect(row)
    assert (act.row.id, act.attempt, act.reason, act.evidence) == (row, 1, "found", {"page": 7})
    assert act.row.level == level


def test_a_restart_of_the_node_is_counted_before_it_is_done():
    bench = Bench()
    persist, act = bench.detect("m.node")
    assert persist == PersistResets(1)
    assert (act.row.id, bench.ladder.resets.count) == ("m.node", 1)


def test_attempts_are_bounded_within_their_window_and_then_it_escalates():
    bench = Bench()
    for attempt in (1, 2):
        (act,) = bench.detect("m.worker")
        assert act.attempt == attempt
        bench.tell(Recovered("m.worker"))
    escalate, act = bench.detect("m.worker")
    assert isinstance(escalate, Escalate)
    assert (escalate.from_row.id, escalate.to_row.id, act.row.id) == ("m.worker", "m.image", "m.image")
    assert act.evidence == {"page": 7, "escalated_from": "m.worker"}
    assert bench.ladder.attempts("m.worker", bench.now_s) == 0, "it begins anew below the one that took over"


def test_attempts_outside_the_window_do_not_count():
    bench = Bench()
    for _ in range(5):
        assert bench.acted("m.worker", 60.0) == ["m.worker"]
        bench.tell(Recovered("m.worker"), 0.0)


def test_zero_attempts_are_without_limit():
    bench = Bench()
    for _ in range(50):
        assert bench.acted("m.free", 5.0) == ["m.free"]
        bench.tell(Recovered("m.free"), 0.0)


def test_within_the_cooldown_nothing_is_done():
    bench = Bench()
    assert bench.acted("m.free") == ["m.free"]
    bench.tell(Recovered("m.free"), 0.0)
    assert bench.why("m.free", 4.9) is Why.COOLDOWN
    assert bench.acted("m.free", 0.2) == ["m.free"]


def test_an_action_that_fails_escalates_at_once():
    bench = Bench()
    bench.detect("m.image")
    escalate, persist, act = bench.tell(Failed("m.image", "no slot is whole"))
    assert isinstance(escalate, Escalate)
    assert "no slot is whole" in escalate.reason
    assert (persist, act.row.id) == (PersistResets(1), "m.node")


def test_the_whole_ladder_is_climbed_to_safe_mode_and_no_further():
    bench = Bench(limit=2)
    levels = []
    for _ in range(20):
        waiting = [a for a in bench.detect("m.repair") if isinstance(a, Act)]
        while waiting:
            act = waiting.pop()
            levels.append(int(act.row.level))
            if 0 < act.row.level < Level.SAFE_MODE:
                waiting += [a for a in bench.tell(Failed(act.row.id, "no"), 0.0) if isinstance(a, Act)]
    assert levels[:7] == [0, 0, 2, 3, 4, 5, 0]
    assert levels.count(5) == 1
    assert bench.ladder.level is Level.SAFE_MODE
    assert bench.ladder.resets.count <= 2


def test_resets_are_bounded_over_boots_and_beyond_them_is_safe_mode():
    bench = Bench(resets=3, limit=3)
    escalate, act = bench.detect("m.node")
    assert isinstance(escalate, Escalate)
    assert (escalate.to_row.id, act.row.action) == ("node.resets", Action.SAFE_MODE)
    assert bench.ladder.resets.count == 3


def test_a_table_without_a_row_above_leads_to_safe_mode_all_the_same():
    table = Table([make_row("x.worker", action=Action.RESTART_WORKER, attempts=1)])
    bench = Bench(table)
    bench.detect("x.worker")
    bench.tell(Recovered("x.worker"))
    assert bench.detect("x.worker")[-1].row.action is Action.SAFE_MODE


def test_resets_are_forgotten_after_clean_time_only():
    bench = Bench(resets=2)
    assert bench.tell(Tick(), RESETS_CLEAN_S - 1) == []
    assert bench.tell(Tick(), 2.0) == [PersistResets(0)]
    bench = Bench(resets=2)
    bench.detect("m.node", RESETS_CLEAN_S - 1)
    assert PersistResets(0) not in bench.tell(Tick(), RESETS_CLEAN_S - 10)


def test_attempts_are_forgotten_after_clean_time():
    bench = Bench()
    bench.detect("m.worker")
    bench.tell(Recovered("m.worker"))
    assert bench.tell(Tick(), 47.0) == []
    assert bench.tell(Tick(), 2.0) == [DeEscalated("m.worker")]
    assert bench.ladder.level is Level.IN_WORKER_REPAIR


def test_a_running_action_of_a_higher_level_stands_above_lower_ones():
    bench = Bench()
    bench.detect("m.image")
    assert bench.ladder.running() == ("m.image",)
    assert bench.why("m.worker") is Why.SUPERSEDED
    assert bench.why("m.image") is Why.SUPERSEDED
    assert bench.acted("m.repair") == ["m.repair"], (
        "what was mended where it was found is reported all the same"
    )
    bench.tell(Recovered("m.image"))
    assert bench.acted("m.worker") == ["m.worker"]


def test_a_restart_of_the_node_that_does_not_come_has_failed():
    bench = Bench()
    bench.detect("m.node")
    escalate, act = bench.tell(Tick(), 50.0)
    assert "still runs after 50 s" in escalate.reason
    assert act.row.id == "node.resets"


def test_under_external_control_nothing_is_done_and_after_it_everything():
    bench = Bench(external_control=True)
    assert bench.ladder.external_control
    for row in TABLE.ids:
        assert bench.why(row) is Why.EXTERNAL_CONTROL
    bench.tell(ExternalControl(on=False))
    assert bench.acted("m.worker") == ["m.worker"]


def test_rows_that_are_not_enabled_are_not_acted_on_nor_escalated_into():
    bench = Bench()
    bench.tell(SetStates({"m.image": RowState.PASSIVE, "m.worker": RowState.DISABLED}))
    assert bench.why("m.worker") is Why.STATE
    bench.tell(SetStates({"m.image": RowState.PASSIVE}))
    for _ in range(2):
        bench.detect("m.worker")
        bench.tell(Recovered("m.worker"))
    assert [type(a) for a in bench.detect("m.worker")] == [Suppressed]
    bench.tell(SetStates({}))
    assert bench.acted("m.worker") == ["m.image"]


def test_in_safe_mode_the_worker_is_left_alone_and_leaving_it_forgets_attempts():
    bench = Bench(safe=True)
    assert bench.ladder.level is Level.SAFE_MODE
    for row in ("m.worker", "m.image", "node.resets"):
        assert bench.why(row) is Why.SAFE_MODE
    assert bench.acted("m.node") == ["m.node"]
    bench = Bench()
    for _ in range(2):
        bench.detect("m.worker")
    bench.tell(SafeChanged(safe=True))
    assert bench.ladder.running() == ()
    bench.tell(SafeChanged(safe=False))
    assert bench.acted("m.worker") == ["m.worker"]


def test_safe_mode_that_failed_is_tried_again():
    bench = Bench()
    bench.detect("node.resets")
    assert bench.why("node.resets") is Why.SAFE_MODE
    bench.tell(Failed("node.resets", "the database is full"))
    assert bench.acted("node.resets") == ["node.resets"]


def test_the_ground_clears_all_counts():
    bench = Bench(resets=3)
    for _ in range(2):
        bench.detect("m.worker")
        bench.tell(Recovered("m.worker"))
    assert bench.tell(ResetCounters()) == [PersistResets(0)]
    assert bench.acted("m.worker") == ["m.worker"]
    assert bench.detect("m.node")[0] == PersistResets(1)


def test_a_new_table_keeps_attempts_of_rows_of_the_same_id():
    bench = Bench()
    for _ in range(2):
        bench.detect("m.worker")
        bench.tell(Recovered("m.worker"))
    bench.tell(LoadTable(changed(TABLE, "m.worker", attempts=3)))
    assert bench.acted("m.worker") == ["m.worker"]
    assert bench.acted("m.worker") == ["m.image"]
    bench.tell(LoadTable(Table([hot()])))
    assert bench.why("m.worker") is Why.UNKNOWN_ROW


def test_what_is_told_of_rows_that_nothing_runs_for_changes_nothing():
    bench = Bench()
    assert bench.tell(Recovered("m.worker")) == []
    assert bench.tell(Failed("m.worker", "x")) == []
    assert bench.ladder.running() == ()


@pytest.mark.parametrize("values", [(-1, 3), (0, -1)])
def test_negative_counts_are_refused(values):
    with pytest.raises(ValueError, match="must not be negative"):
        ResetCount(*values)


def test_the_row_of_last_resort_is_no_row_of_a_table():
    assert module.SAFE_ROW_ID in TABLE
    assert module._SAFE_ROW.action is Action.SAFE_MODE
