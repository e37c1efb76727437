"""What the node remembers over restarts besides jobs and telemetry: boot counter, how it ended, safe mode.

All functions take a connection and are meant for `telemetry.database.Database.run`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True)
class BootState:
    """State found at the start of a boot."""

    boot: int
    """Number of this boot, from 1, never used twice."""
    clean_shutdown: bool
    """True when the boot before ended in an ordered stop; True as well for the very first."""
    safe: bool
    """True when the node was in safe mode."""
    restarts_s: tuple[float, ...]
    """Times of worker restarts, CLOCK_MONOTONIC, s."""
    cap_w: float | None
    """Commanded power cap, W."""


def create(connection: sqlite3.Connection) -> None:
    """Create the table where it is missing."""
    connection.execute("CREATE TABLE IF NOT EXISTS node_state (key TEXT PRIMARY KEY, value BLOB NOT NULL)")


def begin_boot(connection: sqlite3.Connection, lowest_boot: int = 1) -> BootState:
    """Count this boot, mark it as not ended in order, and return what is remembered.

    Parameters
    ----------
    lowest_boot
        Lowest number this boot may get: after a lost database one that no earlier boot can have had.
    """
    last = _get(connection, "boot", int, None)
    boot = max(lowest_boot, 1 if last is None else last + 1)
    state = BootState(
        boot=boot,
        clean_shutdown=_get(connection, "clean_shutdown", bool, lowest_boot <= 1),
        safe=_get(connection, "safe", bool, False),
        restarts_s=tuple(_get(connection, "restarts_s", list[float], [])),
        cap_w=_get(connection, "cap_w", float | None, None),
    )
    _set(connection, "boot", boot)
    _set(connection, "clean_shutdown", False)
    return state


def end_boot(connection: sqlite3.Connection) -> None:
    """Note that this boot ended in an ordered stop."""
    _set(connection, "clean_shutdown", True)


def set_safe(connection: sqlite3.Connection, safe: bool) -> None:
    """Remember whether the node is in safe mode."""
    _set(connection, "safe", safe)


def set_restarts(connection: sqlite3.Connection, restarts_s: Sequence[float]) -> None:
    """Remember the times of the latest worker restarts, CLOCK_MONOTONIC, s."""
    _set(connection, "restarts_s", list(restarts_s))


def set_cap(connection: sqlite3.Connection, cap_w: float | None) -> None:
    """Remember the commanded power cap, W; None takes it away."""
    _set(connection, "cap_w", cap_w)


def _get(connection: sqlite3.Connection, key: str, kind: Any, default: Any) -> Any:
    row = connection.execute("SELECT value FROM node_state WHERE key = ?", (key,)).fetchone()
    return default if row is None else msgspec.msgpack.decode(row[0], type=kind)


def _set(connection: sqlite3.Connection, key: str, value: Any) -> None:
    connection.execute(
        "INSERT INTO node_state VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (key, msgspec.msgpack.encode(value)),
    )
