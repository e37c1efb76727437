"""Commands that take longer than their transaction: which are open, so that none ends without an answer.

A command that is carried out after its commit stays in this table until its completion is stored, in the
same transaction as its effect. What a boot finds in it was interrupted, and is reported so.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from node.schedule import Origin
from telemetry.packets import Stage, Verification

OK = "ok"

_SCHEMA = """CREATE TABLE IF NOT EXISTS open_command (
    id INTEGER PRIMARY KEY, key_id TEXT NOT NULL, seq INTEGER NOT NULL, name TEXT NOT NULL, entry INTEGER)"""
_SAME = "key_id = ? AND seq = ? AND name = ? AND entry IS ?"


@dataclass(frozen=True)
class Order:
    """A command to be executed, and where it comes from."""

    origin: Origin
    name: str
    args: dict[str, Any]
    entry: int | None = None
    """Entry of the schedule; None for a telecommand itself."""

    def report(self, stage: Stage, code: str = OK, reason: str = "") -> Verification:
        """Return the verification of a stage."""
        return Verification(
            key_id=self.origin.key_id,
            command_seq=self.origin.seq,
            name=self.name,
            stage=stage,
            ok=code == OK,
            code=code,
            reason=reason,
            entry=self.entry,
        )


def create(connection: sqlite3.Connection) -> None:
    """Create the table where it is missing."""
    connection.execute(_SCHEMA)


def add(connection: sqlite3.Connection, order: Order) -> None:
    """Note that an order is being carried out."""
    connection.execute(
        "INSERT INTO open_command (key_id, seq, name, entry) VALUES (?, ?, ?, ?)", _identity(order)
    )


def remove(connection: sqlite3.Connection, order: Order) -> None:
    """Note that its completion is stored."""
    connection.execute(f"DELETE FROM open_command WHERE {_SAME}", _identity(order))  # noqa: S608 - fixed


def all_open(connection: sqlite3.Connection) -> list[Order]:
    """Return the open orders in the order of their start, without their arguments."""
    rows = connection.execute("SELECT key_id, seq, name, entry FROM open_command ORDER BY id").fetchall()
    return [Order(Origin(key_id, seq), name, {}, entry) for key_id, seq, name, entry in rows]


def _identity(order: Order) -> tuple[str, int, str, int | None]:
    return order.origin.key_id, order.origin.seq, order.name, order.entry
