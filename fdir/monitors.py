"""The monitors of the FDIR table: what is sampled and reported goes in, rows that fire come out.

The semantics are those of the limit checker of cFS: a *watch* result for each sample, a *point* result over
the persistence of the row, and a row that has fired stays quiet until it is re-armed. What cFS gets wrong is
not repeated: leaving STALE (or ERROR, UNCHECKED) leaves the stamps of the transitions alone, because nothing
is known to have changed.

`Monitors` decides; `node.fdir_service` samples, and hands what fires to the ladder.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from typing import Final

from fdir import expr as expressions
from fdir.items import ITEMS, ItemType
from fdir.monitor_events import (
    Announce,
    Counts,
    Evidence,
    Fired,
    LoadTable,
    ModeChanged,
    MonitorAction,
    MonitorEvent,
    PersistStates,
    Point,
    Rearm,
    Recovered,
    Reported,
    RowStatus,
    Sample,
    SetState,
    Stamp,
    Tick,
    Transition,
    Value,
    Watch,
)
from fdir.table import ACTS_IN_WORKER, Delta, Expected, Expr, Limit, Report, Row, RowState, Stale, Table
from telemetry.packets import Mode, Severity

__all__ = [
    "THROTTLE_S",
    "Announce",
    "Counts",
    "Evidence",
    "Fired",
    "LoadTable",
    "ModeChanged",
    "MonitorAction",
    "MonitorEvent",
    "Monitors",
    "PersistStates",
    "Point",
    "Rearm",
    "Recovered",
    "Reported",
    "RowStatus",
    "Sample",
    "SetState",
    "Stamp",
    "Tick",
    "Transition",
    "Value",
    "Watch",
]

THROTTLE_S: Final = 3600.0
"""Window of `Row.max_events`, s."""


@dataclass
class _Cell:
    """What is remembered of a row."""

    row: Row
    watch: Watch
    failed: bool = False
    fired: bool = False
    good: int = 0
    told: bool = False
    """The failure was announced, so its end is too."""
    counts: Counts = field(default_factory=Counts)
    rose: Stamp | None = None
    fell: Stamp | None = None
    sampled_s: float | None = None
    announced_s: deque[float] = field(default_factory=deque)
    """Times of announcements inside the throttle's window: at most `max_events`."""
    history: deque[float] = field(default_factory=deque)

    @property
    def point(self) -> Point:
        if self.watch in {Watch.TRUE, Watch.FALSE}:
            return Point.FAIL if self.failed else Point.PASS
        return Point(self.watch.value)


_RANK: Mapping[RowState, int] = {RowState.DISABLED: 0, RowState.PASSIVE: 1, RowState.ENABLED: 2}


class Monitors:
    """Evaluate the rows of a table.

    Parameters
    ----------
    table
        The table.
    states
        States commanded before, by row, see `PersistStates`. What does not fit the table (a row it has not,
        a passive row that cannot be) is left out and told in `dropped`.
    overall
        State of the whole, commanded before.
    """

    def __init__(
        self, table: Table, states: Mapping[str, RowState], overall: RowState = RowState.ENABLED
    ) -> None:
        self.table = table
        self.overall = overall
        self.mode = Mode.BOOT
        self._states = {row: RowState(state) for row, state in states.items() if _fits(table, row, state)}
        self.dropped: tuple[str, ...] = tuple(sorted(states.keys() - self._states.keys()))
        """Rows of `states` that were left out."""
        self._cells = {row.id: _new_cell(row) for row in table.rows}
        self._exprs = _expr_order(table)
        self._values: dict[str, Value | None] = {}
        self._start_s: float | None = None
        self._uncheck()

    def handle(self, event: MonitorEvent, now_s: float) -> list[MonitorAction]:  # noqa: PLR0911 - one a kind
        """Take one event at `now_s` (monotonic, s); return what to do, in order.

        Raises
        ------
        ValueError
            An item that is not in the dictionary, a value of another type than the item's, a finding for a
            row whose check is no `report`, or a row the worker acts on made passive: a defect of the caller.
        PenumbraError
            The table has no such row.
        """
        if self._start_s is None:
            self._start_s = now_s
        match event:
            case Sample(item, value):
                return self._sample(item, value, now_s)
            case Tick():
                return self._tick(now_s)
            case ModeChanged(mode):
                self.mode = mode
                self._uncheck()
                return []
            case Reported():
                return self._report(event, now_s)
            case SetState(row, state):
                return self._set_state(row, state)
            case Rearm(row):
                return self._rearm(row)
            case Recovered(row):
                return self._recovered(row, now_s)
            case LoadTable(table):
                return self._load(table)

    def status(self, row_id: str) -> RowStatus:
        """Return the read-out of a row; raises PenumbraError when there is none."""
        cell = self._cell(row_id)
        return RowStatus(
            cell.watch, cell.point, self.state(row_id), cell.fired, replace(cell.counts), cell.rose, cell.fell
        )

    def state(self, row_id: str) -> RowState:
        """Return a row's own state: the one commanded, else the table's. Raises as `status`."""
        return self._states.get(row_id, self.table.row(row_id).state)

    def effective(self, row_id: str) -> RowState:
        """Return the state that holds: the lower of the row's and the whole's. Raises as `status`."""
        return min(self.state(row_id), self.overall, key=_RANK.__getitem__)

    def _cell(self, row_id: str) -> _Cell:
        self.table.row(row_id)
        return self._cells[row_id]

    def _is_checked(self, row: Row) -> bool:
        return self.effective(row.id) is not RowState.DISABLED and (not row.modes or self.mode in row.modes)

    def _uncheck(self) -> None:
        """Rows that are not checked any more say so at once; report rows are whole again once they are."""
        for cell in self._cells.values():
            if not self._is_checked(cell.row):
                cell.watch = Watch.UNCHECKED
            elif cell.watch is Watch.UNCHECKED and isinstance(cell.row.check, Report):
                cell.watch = Watch.TRUE if cell.failed else Watch.FALSE

    # --- evaluation ----------------------------------------------------------------------------

    def _sample(self, item: str, value: Value | None, now_s: float) -> list[MonitorAction]:
        kind = ITEMS.get(item)
        if kind is None:
            raise ValueError(f"{item!r} is no item of the dictionary; items: {', '.join(ITEMS)}")
        if value is not None and (kind.type is ItemType.BOOL) is not isinstance(value, bool):
            raise ValueError(f"item {item} = {value!r}: a value of type {kind.type.value} is expected")
        if isinstance(value, float) and not math.isfinite(value):
            value = None  # NaN slips through every comparison
        self._values[item] = value
        actions: list[MonitorAction] = []
        for cell in self._cells.values():
            if cell.row.item != item:
                continue
            if isinstance(cell.row.check, Delta):
                cell.history = deque(cell.history, maxlen=cell.row.check.samples + 1)
                if value is None:
                    # A change over a gap is no change from sample to sample.
                    cell.history.clear()
                else:
                    cell.history.append(value)
            if value is not None or not isinstance(cell.row.check, Stale):
                cell.sampled_s = now_s
            actions += self._evaluate(cell, value, now_s)
        return actions

    def _evaluate(self, cell: _Cell, value: Value | None, now_s: float) -> list[MonitorAction]:
        row = cell.row
        shown: Value | None = value
        invalid = bool(row.validity) and self._values.get(row.validity) is not True
        if not self._is_checked(row) or invalid:
            return self._settle(cell, Watch.UNCHECKED, value, now_s)
        match row.check:
            case Stale(after_s=after_s):
                assert self._start_s is not None  # noqa: S101 - set by `handle`
                since = self._start_s if cell.sampled_s is None else cell.sampled_s
                shown = now_s - since
                watch = _watch(shown > after_s)
            case _ if value is None:
                watch = Watch.ERROR
            case Limit(low=low, high=high):
                watch = _watch(_outside(value, low, high))
            case Expected(value=expected, mask=mask):
                found = int(value) if mask is None else int(value) & mask
                watch = _watch(found != int(expected))
            case Delta(low=low, high=high, samples=samples):
                if len(cell.history) <= samples:
                    return self._settle(cell, Watch.UNCHECKED, value, now_s)
                shown = cell.history[-1] - cell.history[0]
                watch = _watch(_outside(shown, low, high))
            case _:
                raise ValueError(f"row {row.id} watches no item")
        return self._settle(cell, watch, shown, now_s)

    def _tick(self, now_s: float) -> list[MonitorAction]:
        actions: list[MonitorAction] = []
        for cell in self._cells.values():
            row = cell.row
            if isinstance(row.check, Stale):
                actions += self._evaluate(cell, self._values.get(row.item), now_s)
            elif (
                row.stale_after_s is not None
                and cell.sampled_s is not None
                and now_s - cell.sampled_s > row.stale_after_s
                and self._is_checked(row)
            ):
                actions += self._settle(cell, Watch.STALE, self._values.get(row.item), now_s)
        for row_id in self._exprs:
            actions += self._combine(self._cells[row_id], now_s)
        for cell in self._cells.values():
            # A momentary finding is over once the expressions have seen it.
            if cell.row.is_momentary and cell.watch is Watch.TRUE:
                self._whole(cell, now_s)
        return actions

    def _combine(self, cell: _Cell, now_s: float) -> list[MonitorAction]:
        assert isinstance(cell.row.check, Expr)  # noqa: S101 - `_exprs` holds only these
        invalid = bool(cell.row.validity) and self._values.get(cell.row.validity) is not True
        if not self._is_checked(cell.row) or invalid:
            return self._settle(cell, Watch.UNCHECKED, None, now_s)
        tree = expressions.parse(cell.row.check.rows)
        found = {name: self._cells[name].watch for name in expressions.names(tree)}
        known = {name: {Watch.TRUE: True, Watch.FALSE: False}.get(watch) for name, watch in found.items()}
        result = expressions.evaluate(tree, known)
        if result is not None:
            return self._settle(cell, _watch(result), result, now_s)
        worst = next(w for w in (Watch.ERROR, Watch.STALE, Watch.UNCHECKED) if w in found.values())
        return self._settle(cell, worst, None, now_s)

    def _settle(self, cell: _Cell, watch: Watch, value: Value | None, now_s: float) -> list[MonitorAction]:
        before, cell.watch = cell.watch, watch
        row = cell.row
        if watch in {Watch.STALE, Watch.ERROR, Watch.UNCHECKED}:
            # Nothing is known: neither a violation nor a good result, and no count moves.
            if watch is Watch.UNCHECKED or before not in {Watch.TRUE, Watch.FALSE}:
                return []
            return self._announce(
                cell,
                Transition.UNREADABLE,
                f"{row.item or row.id} is {watch.value}",
                {"item": row.item},
                now_s,
            )
        cell.counts.evaluations += 1
        if watch is Watch.FALSE:
            return self._good(cell, before, value, now_s)
        evidence: dict[str, str | int | float | bool | None] = {"item": row.item, "value": value}
        return self._violation(cell, before, value, evidence, row.text, now_s)

    def _good(self, cell: _Cell, before: Watch, value: Value | None, now_s: float) -> list[MonitorAction]:
        if before is Watch.TRUE:
            cell.fell = Stamp(value, now_s)
        cell.counts.consecutive = 0
        cell.good = min(cell.good + 1, cell.row.clear)
        if cell.good < cell.row.clear:
            return []
        if cell.row.rearm == "auto":
            cell.fired = False
        if not cell.failed:
            return []
        cell.failed = False
        return self._announce_cleared(cell, {"item": cell.row.item, "value": value})

    def _violation(  # noqa: PLR0917
        self, cell: _Cell, before: Watch, value: Value | None, evidence: Evidence, reason: str, now_s: float
    ) -> list[MonitorAction]:
        row, counts = cell.row, cell.counts
        if before is Watch.FALSE:
            counts.false_to_true += 1
            cell.rose = Stamp(value, now_s)
        cell.good = 0
        counts.consecutive += 1
        counts.cumulative += 1
        if counts.consecutive < row.persistence:
            return []
        actions: list[MonitorAction] = []
        if not cell.failed or row.is_momentary:
            cell.failed = True
            actions += self._announce(cell, Transition.VIOLATED, reason, evidence, now_s)
        elif isinstance(row.check, Report):
            actions += self._announce(cell, Transition.REPEATED, reason, evidence, now_s)
        if self.effective(row.id) is RowState.ENABLED and (row.is_momentary or not cell.fired):
            cell.fired = not row.is_momentary
            counts.actions += 1
            actions.append(Fired(row, evidence, reason))
        return actions

    # --- findings and commands -----------------------------------------------------------------

    def _report(self, event: Reported, now_s: float) -> list[MonitorAction]:
        cell = self._cell(event.row)
        if not isinstance(cell.row.check, Report):
            raise ValueError(f"row {event.row} is checked by the monitors, it takes no reports")
        if not self._is_checked(cell.row):
            cell.counts.ignored += 1
            return []
        before, cell.watch = cell.watch, Watch.TRUE
        cell.counts.evaluations += 1
        return self._violation(cell, before, None, event.evidence, event.reason, now_s)

    def _recovered(self, row_id: str, now_s: float) -> list[MonitorAction]:
        cell = self._cell(row_id)
        # What was seen before the action says nothing about the time after it.
        cell.counts.consecutive = 0
        if cell.row.rearm == "auto":
            cell.fired = False
        if isinstance(cell.row.check, Report):
            return self._whole(cell, now_s)
        return []

    def _whole(self, cell: _Cell, now_s: float) -> list[MonitorAction]:
        """End a finding of a report row."""
        if cell.watch is Watch.TRUE:
            cell.watch, cell.fell = Watch.FALSE, Stamp(None, now_s)
        cell.counts.consecutive = 0
        if not cell.failed:
            return []
        cell.failed = False
        if cell.row.is_momentary:
            cell.told = False
            return []
        return self._announce_cleared(cell, {})

    def _set_state(self, row_id: str | None, state: RowState) -> list[MonitorAction]:
        row: Row | None = None
        if row_id is None:
            self.overall = state
        else:
            row = self.table.row(row_id)
            if not _fits(self.table, row_id, state):
                raise ValueError(f"row {row_id} cannot be {state.value}: the worker acts before it reports")
            self._states[row_id] = state
        self._uncheck()
        name = "FDIR" if row is None else row.id
        severity = Severity.INFO if state is RowState.ENABLED else Severity.MEDIUM
        return [
            PersistStates(dict(self._states), self.overall),
            Announce(row, Transition.STATE, severity, f"{name} is {state.value}", {"state": state.value}),
        ]

    def _rearm(self, row_id: str | None) -> list[MonitorAction]:
        cells = self._cells.values() if row_id is None else [self._cell(row_id)]
        actions: list[MonitorAction] = []
        for cell in cells:
            if cell.fired:
                cell.fired = False
                cell.counts.events += 1
                actions.append(
                    Announce(cell.row, Transition.REARMED, Severity.INFO, f"{cell.row.id} is re-armed", {})
                )
        return actions

    def _load(self, table: Table) -> list[MonitorAction]:
        kept = {row.id: self._cells[row.id] for row in table.rows if row.id in self.table
                and self.table.row(row.id) == row}  # fmt: skip
        self.table = table
        self._cells = {row.id: kept.get(row.id) or _new_cell(row) for row in table.rows}
        self._exprs = _expr_order(table)
        states = {row: state for row, state in self._states.items() if _fits(table, row, state)}
        changed, self._states = states != self._states, states
        self._uncheck()
        return [PersistStates(dict(states), self.overall)] if changed else []

    # --- announcements -------------------------------------------------------------------------

    def _announce(
        self, cell: _Cell, what: Transition, text: str, evidence: Evidence, now_s: float
    ) -> list[MonitorAction]:
        """Announce something bad, unless the row has had its share of events in the last hour."""
        while cell.announced_s and now_s - cell.announced_s[0] >= THROTTLE_S:
            cell.announced_s.popleft()
        if len(cell.announced_s) >= cell.row.max_events:
            cell.counts.throttled += 1
            return []
        cell.announced_s.append(now_s)
        cell.counts.events += 1
        if what is Transition.VIOLATED:
            cell.told = True
        return [Announce(cell.row, what, cell.row.severity, text, evidence)]

    def _announce_cleared(self, cell: _Cell, evidence: Evidence) -> list[MonitorAction]:
        if not cell.told:
            return []
        cell.told = False
        cell.counts.events += 1
        text = f"over: {cell.row.text}"
        return [Announce(cell.row, Transition.CLEARED, Severity.INFO, text, evidence)]


def _fits(table: Table, row_id: str, state: RowState) -> bool:
    return row_id in table and not (state == RowState.PASSIVE and row_id in ACTS_IN_WORKER)


def _new_cell(row: Row) -> _Cell:
    # Components report on their own, so nothing heard is good; an item must be read first.
    return _Cell(row, Watch.FALSE if isinstance(row.check, Report) else Watch.STALE)


def _expr_order(table: Table) -> tuple[str, ...]:
    """Return the rows of expressions so that each comes after those it names."""
    graph: dict[str, Iterable[str]] = {
        row.id: expressions.names(expressions.parse(row.check.rows))
        for row in table.rows
        if isinstance(row.check, Expr)
    }
    return tuple(row_id for row_id in TopologicalSorter(graph).static_order() if row_id in graph)


def _watch(violated: bool) -> Watch:
    return Watch.TRUE if violated else Watch.FALSE


def _outside(value: float, low: float | None, high: float | None) -> bool:
    return (low is not None and value < low) or (high is not None and value > high)
