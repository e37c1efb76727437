"""What the monitors are told, what they answer, and how they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from fdir.table import Row, RowState, Table
from telemetry.packets import Mode, Severity

Value: TypeAlias = float | int | bool
Evidence: TypeAlias = Mapping[str, str | int | float | bool | None]


class Watch(StrEnum):
    """Result of the latest check."""

    FALSE = "false"
    """No violation."""
    TRUE = "true"
    """A violation."""
    STALE = "stale"
    """No sample yet, or none for too long."""
    ERROR = "error"
    """The item cannot be read."""
    UNCHECKED = "unchecked"
    """Not checked: disabled, another mode, not valid, or too few samples for a change."""


class Point(StrEnum):
    """Result over persistence and clear counts."""

    PASS = "pass"  # noqa: S105 - a result
    FAIL = "fail"
    STALE = "stale"
    ERROR = "error"
    UNCHECKED = "unchecked"


class Transition(StrEnum):
    """What an `Announce` tells."""

    VIOLATED = "violated"
    """The point failed."""
    REPEATED = "repeated"
    """Found again while the row waits to be re-armed."""
    CLEARED = "cleared"
    """The point passes again."""
    UNREADABLE = "unreadable"
    """The item became stale or cannot be read."""
    REARMED = "rearmed"
    """By command."""
    STATE = "state"
    """Enabled, passive or disabled by command."""


@dataclass(frozen=True)
class Sample:
    """Event: an item was read; None when it could not be."""

    item: str
    value: Value | None


@dataclass(frozen=True)
class Tick:
    """Event: time has passed; about one a second. Staleness and expressions are decided here."""


@dataclass(frozen=True)
class ModeChanged:
    """Event: the node is in this mode."""

    mode: Mode


@dataclass(frozen=True)
class Reported:
    """Event: a component found a violation of a row whose check is `report`."""

    row: str
    evidence: Evidence
    reason: str


@dataclass(frozen=True)
class SetState:
    """Event: the ground commands a state; row None: of the FDIR as a whole, above the rows' own."""

    row: str | None
    state: RowState


@dataclass(frozen=True)
class Rearm:
    """Event: the ground lets a row, or all (None), fire again."""

    row: str | None


@dataclass(frozen=True)
class Recovered:
    """Event: the action of a row has made things whole."""

    row: str


@dataclass(frozen=True)
class LoadTable:
    """Event: use this table. Rows that are the same in both go on as they are; commanded states stay."""

    table: Table


MonitorEvent: TypeAlias = Sample | Tick | ModeChanged | Reported | SetState | Rearm | Recovered | LoadTable


@dataclass(frozen=True)
class Fired:
    """Action: the ladder is to act on this row."""

    row: Row
    evidence: Evidence
    reason: str


@dataclass(frozen=True)
class Announce:
    """Action: send an event. Row None: about the FDIR as a whole."""

    row: Row | None
    what: Transition
    severity: Severity
    text: str
    evidence: Evidence


@dataclass(frozen=True)
class PersistStates:
    """Action: store the states commanded, by row, and that of the whole."""

    states: dict[str, RowState]
    overall: RowState


MonitorAction: TypeAlias = Fired | Announce | PersistStates


@dataclass(frozen=True)
class Stamp:
    """A change of the watch result: the value that made it, and when (clock of `now_s`)."""

    value: Value | None
    t_s: float


@dataclass
class Counts:
    """Counters of a row since boot."""

    evaluations: int = 0
    """Checks that gave TRUE or FALSE."""
    consecutive: int = 0
    """Violations since the last good result or recovery."""
    cumulative: int = 0
    """Violations."""
    false_to_true: int = 0
    actions: int = 0
    """Times it fired."""
    events: int = 0
    """Announcements."""
    throttled: int = 0
    """Announcements left out by `max_events`."""
    ignored: int = 0
    """Findings that came while the row was disabled, or in a mode it is not for."""


@dataclass(frozen=True)
class RowStatus:
    """Read-out of a row."""

    watch: Watch
    point: Point
    state: RowState
    """Of the row itself; see `Monitors.effective` for what holds."""
    fired: bool
    """True from its action until it is re-armed."""
    counts: Counts
    last_false_to_true: Stamp | None
    last_true_to_false: Stamp | None
