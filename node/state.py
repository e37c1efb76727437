"""What the node remembers over restarts besides jobs and telemetry: boots, safe mode, recovery, row states.

Each value is kept in three copies, voted when it is read: a struck copy is outvoted, written anew, and named
in `BootState.repaired`. A value beyond a vote is named in `BootState.lost` and has the cautious default.

All functions take a connection and are meant for `telemetry.database.Database.run`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from fdir.boot import BootDecision, BootMode, Slot
from fdir.table import RowState
from fdir.voting import Unvoted, decode3, encode3

_TABLE = "CREATE TABLE IF NOT EXISTS node_values (key TEXT PRIMARY KEY, value BLOB NOT NULL)"
_OLD_TABLE = "node_state"
"""Held one copy of each value, in software before the vote."""


class TableSource(StrEnum):
    """Where an FDIR table in force came from; see the command `load_fdir`."""

    CONFIGURED = "configured"
    UPLINKED = "uplinked"
    PREVIOUS = "previous"


class Rates(msgspec.Struct, frozen=True):
    """Commanded periods of telemetry, s of physical time; None: that of the configuration."""

    housekeeping_s: float | None = None
    ledger_s: float | None = None


DEFAULT_RATES = Rates()


class Armed(msgspec.Struct, frozen=True):
    """A hazardous command that may be given once, exactly so."""

    name: str
    args: dict[str, Any]
    until_s: float
    """CLOCK_MONOTONIC, s."""


@dataclass(frozen=True)
class BootState:
    """State found at the start of a boot."""

    boot: int
    """Number of this boot, from 1, never used twice."""
    clean_shutdown: bool
    """True when the boot before ended in an ordered stop; True as well for the very first."""
    safe: bool
    """True when the node was in safe mode, or when that is lost."""
    restarts_s: tuple[float, ...]
    """Times of worker restarts, CLOCK_MONOTONIC, s."""
    cap_w: float | None
    """Commanded power cap, W."""
    rates: Rates = DEFAULT_RATES
    """Commanded periods of telemetry."""
    restart_requested: str = ""
    """Why the recovery ladder ended the boot before; empty when it did not."""
    resets: int = 0
    """Restarts of the node that the ladder asked for, since they were cleared."""
    unintended: int = 0
    """Unintended reboots in a row before this boot."""
    slot: Slot | None = None
    """Image slot of the boot before."""
    active: Slot | None = None
    """Slot that was to be used at the boot before, by ground or configuration."""
    failed_starts: Mapping[Slot, int] = field(default_factory=dict)
    """Unintended reboots put down to each slot."""
    fdir_states: Mapping[str, RowState] = field(default_factory=dict)
    """Commanded states of rows of the FDIR table, by id."""
    fdir_overall: RowState = RowState.ENABLED
    """Commanded state of the FDIR as a whole."""
    external_control: bool = False
    """True when the ground has taken over from the FDIR."""
    repaired: tuple[str, ...] = ()
    """Values of which a copy was struck, and is whole again."""
    lost: tuple[str, ...] = ()
    """Values beyond a vote, which have their default now."""


def create(connection: sqlite3.Connection) -> None:
    """Create the table where it is missing; take over what software before this one has stored."""
    connection.execute(_TABLE)
    known = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    if connection.execute(known, (_OLD_TABLE,)).fetchone() is None:
        return
    for key, value in connection.execute(f"SELECT key, value FROM {_OLD_TABLE}").fetchall():  # noqa: S608
        connection.execute("INSERT OR IGNORE INTO node_values VALUES (?, ?)", (key, encode3(value)))
    connection.execute(f"DROP TABLE {_OLD_TABLE}")


def begin_boot(connection: sqlite3.Connection, lowest_boot: int = 1, fallback_boot: int = 1) -> BootState:
    """Count this boot, mark it as not ended in order, and return what is remembered.

    Parameters
    ----------
    lowest_boot
        Lowest number this boot may get: after a lost database one that no earlier boot can have had.
    fallback_boot
        Number no earlier boot can have had, for when the counter alone is lost.
    """
    reader = _Reader(connection)
    last = reader.get("boot", int, None)
    if "boot" in reader.lost:
        lowest_boot = max(lowest_boot, fallback_boot)
    boot = max(lowest_boot, 1 if last is None else last + 1)
    clean = reader.get("clean_shutdown", bool, lowest_boot <= 1, lost=False)
    state = BootState(
        boot=boot,
        clean_shutdown=clean,
        safe=reader.get("safe", bool, False, lost=True),
        restarts_s=tuple(reader.get("restarts_s", list[float], [])),
        cap_w=reader.get("cap_w", float | None, None),
        rates=reader.get("rates", Rates, DEFAULT_RATES),
        restart_requested=reader.get("restart_requested", str, ""),
        resets=reader.get("resets", int, 0),
        unintended=reader.get("unintended", int, 0),
        slot=reader.get("slot", Slot | None, None),
        active=reader.get("active", Slot | None, None),
        failed_starts=reader.get("failed_starts", dict[Slot, int], {}),
        fdir_states=reader.get("fdir_states", dict[str, RowState], {}),
        fdir_overall=reader.get("fdir_overall", RowState, RowState.ENABLED),
        external_control=reader.get("external_control", bool, False),
        repaired=tuple(reader.repaired),
        lost=tuple(reader.lost),
    )
    for key in reader.lost:
        _set(connection, key, getattr(state, key))
    _set(connection, "boot", boot)
    _set(connection, "clean_shutdown", False)
    _set(connection, "restart_requested", "")
    _set(connection, "armed", None)
    return state


def keep_decision(connection: sqlite3.Connection, decision: BootDecision) -> None:
    """Remember what the boot manager decided, before it is acted on."""
    _set(connection, "unintended", decision.unintended)
    _set(connection, "slot", decision.slot)
    _set(connection, "active", decision.active)
    _set(connection, "failed_starts", dict(decision.failed_starts))
    if decision.mode is BootMode.SAFE:
        _set(connection, "safe", True)


def note_good_boot(connection: sqlite3.Connection) -> None:
    """Note that this boot has served long enough: reboots before it count no more, nor against its slot."""
    reader = _Reader(connection)
    failed = dict(reader.get("failed_starts", dict[Slot, int], {}))
    slot = reader.get("slot", Slot | None, None)
    if slot is not None:
        failed[slot] = 0
    _set(connection, "failed_starts", failed)
    _set(connection, "unintended", 0)


def end_boot(connection: sqlite3.Connection) -> None:
    """Note that this boot ended in an ordered stop."""
    _set(connection, "clean_shutdown", True)


def request_restart(connection: sqlite3.Connection, reason: str, resets: int) -> None:
    """Note that the boot to come is asked for, and count it. Call before the restart, or the power cycle.

    Parameters
    ----------
    reason
        Why, not empty.
    resets
        Restarts asked for since they were cleared, this one included.

    Raises
    ------
    ValueError
        No reason, or a negative count.
    """
    if not reason:
        raise ValueError("a restart needs a reason: an empty one means that none is asked for")
    set_resets(connection, resets)
    _set(connection, "restart_requested", reason)


def withdraw_restart(connection: sqlite3.Connection) -> None:
    """Note that a reboot would not be asked for any more, e.g. because no power cycle came."""
    _set(connection, "restart_requested", "")


def set_resets(connection: sqlite3.Connection, resets: int) -> None:
    """Remember how many restarts the ladder has asked for. Raises ValueError if negative."""
    if resets < 0:
        raise ValueError(f"resets {resets}: 0 or more are allowed")
    _set(connection, "resets", resets)


def forget_reboots(connection: sqlite3.Connection) -> None:
    """Clear the counts of reboots and resets, by command."""
    _set(connection, "unintended", 0)
    _set(connection, "failed_starts", {})
    _set(connection, "resets", 0)


def set_safe(connection: sqlite3.Connection, safe: bool) -> None:
    """Remember whether the node is in safe mode."""
    _set(connection, "safe", safe)


def set_restarts(connection: sqlite3.Connection, restarts_s: Sequence[float]) -> None:
    """Remember the times of the latest worker restarts, CLOCK_MONOTONIC, s."""
    _set(connection, "restarts_s", list(restarts_s))


def set_rates(connection: sqlite3.Connection, rates: Rates) -> None:
    """Remember the commanded periods of telemetry."""
    _set(connection, "rates", rates)


def set_armed(connection: sqlite3.Connection, armed: Armed | None) -> None:
    """Remember which hazardous command is armed. A boot forgets it: that is the safe side."""
    _set(connection, "armed", armed)


def armed(connection: sqlite3.Connection) -> Armed | None:
    """Return which hazardous command is armed; None as well when that is lost."""
    found: Armed | None = _Reader(connection).get("armed", Armed | None, None)
    return found


def set_cap(connection: sqlite3.Connection, cap_w: float | None) -> None:
    """Remember the commanded power cap, W; None takes it away."""
    _set(connection, "cap_w", cap_w)


def cap_w(connection: sqlite3.Connection) -> float | None:
    """Return the commanded power cap, W; None without one."""
    cap: float | None = _Reader(connection).get("cap_w", float | None, None)
    return cap


def set_slot(connection: sqlite3.Connection, slot: Slot) -> None:
    """Remember that the worker uses another image slot since the boot, which begins without failed starts."""
    failed = dict(_Reader(connection).get("failed_starts", dict[Slot, int], {}))
    _set(connection, "failed_starts", {**failed, slot: 0})
    _set(connection, "slot", slot)


def set_fdir_states(
    connection: sqlite3.Connection, states: Mapping[str, RowState], overall: RowState
) -> None:
    """Remember the commanded states of the rows, by id, and of the FDIR as a whole."""
    _set(connection, "fdir_states", dict(states))
    _set(connection, "fdir_overall", overall)


def change_fdir_state(connection: sqlite3.Connection, row: str | None, state: RowState) -> None:
    """Remember the commanded state of one row, by id; None: of the FDIR as a whole."""
    reader = _Reader(connection)
    states = dict(reader.get("fdir_states", dict[str, RowState], {}))
    overall = reader.get("fdir_overall", RowState, RowState.ENABLED)
    if row is None:
        overall = state
    else:
        states[row] = state
    set_fdir_states(connection, states, overall)


def keep_table(connection: sqlite3.Connection, encoded: bytes) -> None:
    """Remember the FDIR table in force, `Table.encode`: for a boot that finds its file refused."""
    _set(connection, "fdir_table", encoded)


def kept_table(connection: sqlite3.Connection) -> bytes:
    """Return the FDIR table that was in force last; empty when there was none, or it is lost."""
    return bytes(_Reader(connection).get("fdir_table", bytes, b""))


def kept_source(connection: sqlite3.Connection) -> TableSource:
    """Return where the FDIR table in force came from; `configured` when that is lost."""
    source: TableSource = _Reader(connection).get("fdir_source", TableSource, TableSource.CONFIGURED)
    return source


def change_table(connection: sqlite3.Connection, encoded: bytes, source: TableSource) -> None:
    """Remember the FDIR table that is put in force by command, and the one it takes the place of."""
    _set(connection, "fdir_previous", kept_table(connection))
    _set(connection, "fdir_source", source)
    keep_table(connection, encoded)


def forget_source(connection: sqlite3.Connection) -> None:
    """Remember that the FDIR table in force is the configured one."""
    _set(connection, "fdir_source", TableSource.CONFIGURED)


def keep_uplinked_table(connection: sqlite3.Connection, encoded: bytes) -> None:
    """Remember an FDIR table that came up; it is not in force."""
    _set(connection, "fdir_uplinked", encoded)


def other_table(connection: sqlite3.Connection, source: TableSource) -> bytes:
    """Return the uplinked table, or the one before that in force; empty if there is none, or it is lost."""
    return bytes(_Reader(connection).get(f"fdir_{source}", bytes, b""))


def set_external_control(connection: sqlite3.Connection, on: bool) -> None:
    """Remember whether the ground has taken over from the FDIR."""
    _set(connection, "external_control", on)


class _Reader:
    """Reads values by vote, mends struck copies, and notes what it found."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.repaired: list[str] = []
        self.lost: list[str] = []
        self._connection = connection

    def get(self, key: str, kind: Any, default: Any, lost: Any = ...) -> Any:
        """Return a value; `default` if it was never stored, `lost` (else the default) beyond a vote."""
        row = self._connection.execute("SELECT value FROM node_values WHERE key = ?", (key,)).fetchone()
        if row is None:
            return default
        try:
            voted = decode3(row[0])
            value = msgspec.msgpack.decode(voted.value, type=kind)
        except (Unvoted, msgspec.DecodeError, TypeError):
            self.lost.append(key)
            return default if lost is ... else lost
        if voted.repaired:
            self.repaired.append(key)
            _set(self._connection, key, value)
        return value


def _set(connection: sqlite3.Connection, key: str, value: Any) -> None:
    connection.execute(
        "INSERT INTO node_values VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (key, encode3(msgspec.msgpack.encode(value))),
    )
