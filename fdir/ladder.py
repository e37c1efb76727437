"""The recovery ladder, levels 0 to 5: what is done about a detection, how often, and what follows.

Each row of the FDIR table has an action, attempts within a window and a cooldown. When the attempts are used
up, or an action has failed, the row it escalates to takes over; above the last one stands safe mode. The
ladder is bounded: levels rise with each step, and restarts of the node (level 4) are counted, persisted
before they are carried out, and never exceed their limit until the count is cleared.

`Ladder` decides; `node.fdir_service` carries out, and tells it how that ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fdir.ladder_events import (
    Act,
    DeEscalated,
    Detected,
    Escalate,
    Evidence,
    ExternalControl,
    Failed,
    LadderAction,
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
from fdir.table import Action, Report, Row, RowState, Table
from telemetry.packets import Level, Severity

__all__ = [
    "RESETS_CLEAN_S",
    "Act",
    "DeEscalated",
    "Detected",
    "Escalate",
    "Evidence",
    "ExternalControl",
    "Failed",
    "Ladder",
    "LadderAction",
    "LadderEvent",
    "LoadTable",
    "PersistResets",
    "Recovered",
    "ResetCount",
    "ResetCounters",
    "SafeChanged",
    "SetStates",
    "Suppressed",
    "Tick",
    "Why",
]

RESETS_CLEAN_S: Final = 21_600.0
"""Time without a detection of level 4 or higher after which the resets are forgotten, s (assumed)."""
SAFE_ROW_ID: Final = "node.resets"
"""Row that stands above those that escalate to none."""

_SAFE_ROW: Final = Row(
    id=SAFE_ROW_ID,
    text="recovery is exhausted",
    level=Level.SAFE_MODE,
    check=Report(),
    severity=Severity.HIGH,
    max_events=10,
    action=Action.SAFE_MODE,
    injector="hil.none.none",
    test="tests/none.py::none",
)
"""Used when the table in force has no row that leads to safe mode."""
_ABOUT_WORKER: Final = frozenset({Action.RESTART_WORKER, Action.SWITCH_IMAGE})
_EXCLUSIVE: Final = frozenset({Action.SWITCH_IMAGE, Action.RESTART_NODE})
"""Actions of which one at a time runs. A second worker restart is one of a worker that died again."""
_LASTING: Final = frozenset({Action.RESTART_WORKER, *_EXCLUSIVE})
"""Actions that run until they are reported as over, and supersede lower ones meanwhile."""


@dataclass
class _Entry:
    """What is remembered of a row."""

    acts_s: list[float] = field(default_factory=list)
    """Times of its actions within the window."""
    last_act_s: float | None = None
    detected_s: float = 0.0
    """When it was detected last."""
    running_s: float | None = None
    """When its action began; None while none runs."""
    failed: str | None = None
    """Why its last action failed, while nothing above has taken over."""

    @property
    def is_blank(self) -> bool:
        return not self.acts_s and self.failed is None and self.last_act_s is None


class Ladder:
    """Decide what is done about detections.

    Parameters
    ----------
    table
        Table in force.
    resets
        Resets so far, as persisted, and their limit.
    now_s
        CLOCK_MONOTONIC now, s.
    safe
        True when the node starts in safe mode.
    external_control
        True when the ground has taken over before this boot.
    """

    def __init__(
        self,
        table: Table,
        resets: ResetCount,
        now_s: float,
        *,
        safe: bool = False,
        external_control: bool = False,
    ) -> None:
        self._table = table
        self._resets = resets
        self._safe = safe
        self._external = external_control
        self._states: Mapping[str, RowState] = {}
        self._entries: dict[str, _Entry] = {}
        self._reset_worthy_s = now_s
        """Last detection of level 4 or higher, or the start of the clean time."""

    @property
    def resets(self) -> ResetCount:
        """Resets so far and their limit."""
        return self._resets

    @property
    def external_control(self) -> bool:
        """True while the ground has taken over."""
        return self._external

    @property
    def level(self) -> Level:
        """Highest level that runs, or whose attempts are not forgotten yet; 5 in safe mode."""
        if self._safe:
            return Level.SAFE_MODE
        busy = [self._row(i).level for i, e in self._entries.items() if e.acts_s or e.running_s is not None]
        return max(busy, default=Level.IN_WORKER_REPAIR)

    def attempts(self, row_id: str, now_s: float) -> int:
        """Return how many actions of a row lie within its window that ends now."""
        entry = self._entries.get(row_id)
        return 0 if entry is None else len(self._recent(self._row(row_id), entry, now_s))

    def running(self) -> tuple[str, ...]:
        """Return the ids of the rows whose action runs."""
        return tuple(i for i, entry in self._entries.items() if entry.running_s is not None)

    def handle(self, event: LadderEvent, now_s: float) -> list[LadderAction]:
        """Take one event at `now_s` (CLOCK_MONOTONIC, s); return what to do, in order."""
        match event:
            case Detected(row, evidence, reason):
                return self._detected(row, evidence, reason, now_s)
            case Recovered(row_id):
                if (entry := self._entries.get(row_id)) is not None:
                    entry.running_s = entry.failed = None
            case Failed(row_id, reason):
                return self._failed(row_id, reason, now_s)
            case Tick():
                return self._tick(now_s)
            case ExternalControl(on):
                self._external = on
            case SafeChanged(safe):
                self._change_safe(safe)
            case SetStates(states):
                self._states = dict(states)
            case ResetCounters():
                return self._reset_counters(now_s)
            case LoadTable(table):
                self._table = table
                self._entries = {i: e for i, e in self._entries.items() if i in table or i == SAFE_ROW_ID}
        return []

    def _row(self, row_id: str) -> Row:
        return self._table.row(row_id) if row_id in self._table else _SAFE_ROW

    def _detected(self, row: Row, evidence: Evidence, reason: str, now_s: float) -> list[LadderAction]:
        if row.id not in self._table:
            return [Suppressed(row, Why.UNKNOWN_ROW)]
        return self._answer(self._table.row(row.id), evidence, reason, now_s)

    def _answer(self, row: Row, evidence: Evidence, reason: str, now_s: float) -> list[LadderAction]:
        """Return the actions for a row that was detected, or that another escalates to."""
        entry = self._entries.setdefault(row.id, _Entry())
        entry.detected_s = now_s
        entry.acts_s = self._recent(row, entry, now_s)
        if row.level >= Level.NODE_RESTART:
            self._reset_worthy_s = now_s
        if (why := self._obstacle(row, entry, now_s)) is not None:
            return [Suppressed(row, why)]
        if entry.failed is not None:
            return self._escalate(row, evidence, f"its action failed: {entry.failed}", now_s)
        if row.attempts and len(entry.acts_s) >= row.attempts:
            used_up = f"{len(entry.acts_s)} attempts within {row.window_s:g} s: {reason}"
            return self._escalate(row, evidence, used_up, now_s)
        if row.level is Level.NODE_RESTART and self._resets.count >= self._resets.limit:
            return self._escalate(row, evidence, f"{self._resets.count} resets: {reason}", now_s, top=True)
        act = self._act(row, entry, evidence, reason, now_s)
        return [self._count_reset(), act] if row.level is Level.NODE_RESTART else [act]

    def _obstacle(self, row: Row, entry: _Entry, now_s: float) -> Why | None:
        if self._external:
            return Why.EXTERNAL_CONTROL
        if self._states.get(row.id, row.state) is not RowState.ENABLED:
            return Why.STATE
        if self._safe and (row.action in _ABOUT_WORKER or row.action is Action.SAFE_MODE):
            return Why.SAFE_MODE
        # Levels 0 and 1 were done where they were found before they are told: nothing supersedes them.
        if row.level >= Level.WORKER_RESTART and any(self._supersedes(i, row) for i in self.running()):
            return Why.SUPERSEDED
        # An action that failed gets no time to work.
        waits = entry.failed is None and entry.last_act_s is not None
        if waits and now_s - (entry.last_act_s or 0.0) < row.cooldown_s:
            return Why.COOLDOWN
        return None

    def _supersedes(self, running_id: str, row: Row) -> bool:
        other = self._row(running_id)
        return other.level > row.level or (other.action is row.action and row.action in _EXCLUSIVE)

    def _recent(self, row: Row, entry: _Entry, now_s: float) -> list[float]:
        return [at for at in entry.acts_s if now_s - at < row.window_s]

    def _count_reset(self) -> PersistResets:
        self._resets = ResetCount(self._resets.count + 1, self._resets.limit)
        return PersistResets(self._resets.count)

    def _act(self, row: Row, entry: _Entry, evidence: Evidence, reason: str, now_s: float) -> Act:
        if row.attempts:
            entry.acts_s.append(now_s)
            attempt = len(entry.acts_s)
        else:
            # Without limit there is nothing to count against, and nothing that may grow for ever.
            entry.acts_s, attempt = [now_s], 1
        entry.last_act_s = now_s
        if row.action in _LASTING:
            entry.running_s = now_s
        if row.action is Action.SAFE_MODE:
            self._change_safe(True)
        return Act(row, attempt, evidence, reason)

    def _escalate(
        self, row: Row, evidence: Evidence, reason: str, now_s: float, *, top: bool = False
    ) -> list[LadderAction]:
        """Hand over to the row above; `top`: to the one that leads to safe mode."""
        above = self._above(row, top)
        if above is None:
            return [Suppressed(row, Why.ATTEMPTS)]
        actions = self._answer(above, {**evidence, "escalated_from": row.id}, reason, now_s)
        if any(isinstance(action, Act) for action in actions):
            # The row above has taken over: this one begins anew once that is over.
            entry = self._entries[row.id]
            self._entries[row.id] = _Entry(last_act_s=entry.last_act_s, detected_s=now_s)
            return [Escalate(row, above, reason), *actions]
        return actions

    def _above(self, row: Row, top: bool) -> Row | None:
        if row.escalates_to and not top:
            return self._table.row(row.escalates_to)
        if row.action is Action.SAFE_MODE:
            return None
        if SAFE_ROW_ID in self._table:
            return self._table.row(SAFE_ROW_ID)
        return next((r for r in self._table.rows if r.action is Action.SAFE_MODE), _SAFE_ROW)

    def _failed(self, row_id: str, reason: str, now_s: float) -> list[LadderAction]:
        entry = self._entries.get(row_id)
        if entry is None:
            return []
        row = self._row(row_id)
        entry.running_s = None
        if row.action is Action.SAFE_MODE:
            # There is nothing above: it is tried again at the next detection.
            self._safe = False
            entry.acts_s, entry.last_act_s = [], None
            return [Suppressed(row, Why.ATTEMPTS)]
        entry.failed = reason
        return self._answer(row, {}, reason, now_s)

    def _change_safe(self, safe: bool) -> None:
        if self._safe and not safe:
            for entry in self._entries.values():
                entry.acts_s, entry.last_act_s, entry.failed = [], None, None
        self._safe = safe
        if safe:
            for row_id, entry in self._entries.items():
                if self._row(row_id).action in _ABOUT_WORKER:
                    entry.running_s = None

    def _reset_counters(self, now_s: float) -> list[LadderAction]:
        for entry in self._entries.values():
            entry.acts_s, entry.last_act_s, entry.failed = [], None, None
        self._resets = ResetCount(0, self._resets.limit)
        self._reset_worthy_s = now_s
        return [PersistResets(0)]

    def _tick(self, now_s: float) -> list[LadderAction]:
        actions: list[LadderAction] = []
        for row_id, entry in list(self._entries.items()):
            row = self._row(row_id)
            if entry.running_s is not None and now_s - entry.running_s >= row.clean_s:
                if row.action is Action.RESTART_NODE:
                    actions += self._failed(row_id, f"the node still runs after {row.clean_s:g} s", now_s)
                    continue
                # Nobody told how it ended, e.g. because the worker was not wanted any more.
                entry.running_s = None
            last_s = max(entry.detected_s, entry.last_act_s or entry.detected_s)
            if entry.running_s is None and now_s - last_s >= row.clean_s:
                del self._entries[row_id]
                if not entry.is_blank:
                    actions.append(DeEscalated(row_id))
        if self._resets.count and now_s - self._reset_worthy_s >= RESETS_CLEAN_S:
            self._resets = ResetCount(0, self._resets.limit)
            self._reset_worthy_s = now_s
            actions.append(PersistResets(0))
        return actions
