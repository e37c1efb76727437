"""What the recovery ladder is told, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from fdir.table import Row, RowState, Table

Evidence: TypeAlias = Mapping[str, str | int | float | bool]


class Why(StrEnum):
    """Why a detection led to no action."""

    EXTERNAL_CONTROL = "external_control"
    """The ground has taken over."""
    STATE = "state"
    """The row is passive or disabled."""
    SUPERSEDED = "superseded"
    """An action of a higher level, or the same one, runs."""
    SAFE_MODE = "safe_mode"
    """The node is in safe mode already, or the action concerns the worker, which does not run there."""
    COOLDOWN = "cooldown"
    ATTEMPTS = "attempts"
    """Used up, and there is nothing above."""
    UNKNOWN_ROW = "unknown_row"
    """The table in force has no such row any more."""


@dataclass(frozen=True)
class ResetCount:
    """Restarts of the node that the ladder asked for, kept over restarts.

    Raises
    ------
    ValueError
        A negative number.
    """

    count: int = 0
    limit: int = 3

    def __post_init__(self) -> None:
        if self.count < 0 or self.limit < 0:
            raise ValueError(f"count and limit of resets must not be negative, got {self}")


@dataclass(frozen=True)
class Detected:
    """Event: a row has fired."""

    row: Row
    evidence: Evidence
    reason: str


@dataclass(frozen=True)
class Recovered:
    """Event: the fault of a row is over, its action has succeeded."""

    row_id: str


@dataclass(frozen=True)
class Failed:
    """Event: the action of a row has failed."""

    row_id: str
    reason: str


@dataclass(frozen=True)
class Tick:
    """Event: time has passed."""


@dataclass(frozen=True)
class ExternalControl:
    """Event: the ground takes over (no action, state kept), or hands back."""

    on: bool


@dataclass(frozen=True)
class SafeChanged:
    """Event: the node has entered safe mode, for whatever reason, or left it by command.

    Leaving it forgets attempts and cooldowns, not the resets.
    """

    safe: bool


@dataclass(frozen=True)
class SetStates:
    """Event: the states in force, by row id; rows that are missing have the state of the table."""

    states: Mapping[str, RowState]


@dataclass(frozen=True)
class ResetCounters:
    """Event: the ground clears attempts, cooldowns and resets."""


@dataclass(frozen=True)
class LoadTable:
    """Event: another table is in force. Rows of the same id keep their attempts."""

    table: Table


LadderEvent: TypeAlias = (
    Detected
    | Recovered
    | Failed
    | Tick
    | ExternalControl
    | SafeChanged
    | SetStates
    | ResetCounters
    | LoadTable
)


@dataclass(frozen=True)
class Act:
    """Action: carry out `row.action`, then tell `Recovered` or `Failed`."""

    row: Row
    attempt: int
    """From 1, within the window of the row."""
    evidence: Evidence
    reason: str


@dataclass(frozen=True)
class Suppressed:
    """Action: report that nothing is done."""

    row: Row
    why: Why


@dataclass(frozen=True)
class Escalate:
    """Action: report that a higher row takes over; its `Act` follows."""

    from_row: Row
    to_row: Row
    reason: str


@dataclass(frozen=True)
class PersistResets:
    """Action: store this count before anything that follows is done."""

    count: int


@dataclass(frozen=True)
class DeEscalated:
    """Action: report that the attempts of a row are forgotten after clean time."""

    row_id: str


LadderAction: TypeAlias = Act | Suppressed | Escalate | PersistResets | DeEscalated
