"""Commands for later: a durable schedule by mission time, and named sequences that are put into it.

A sequence is stored under its name, each step with the CRC-32C the ground gave it; starting it puts its steps
into the schedule, stopping it takes them out. A step is due by its delay after the one before: when mission
time steps, what is left of a sequence moves with it, while a command scheduled by itself keeps its time. How
many steps of a run were carried out is counted, since some may be skipped.

Entries and sequences are kept in three copies and voted when they are read: a struck copy is outvoted, and
what is beyond a vote is reported and not executed. All methods take the connection and are meant for
`telemetry.database.Database.run`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from telemetry.commands import SequenceStep, step_crc
from telemetry.dictionary.codes import FailureCode
from telemetry.packets import CommandSchedule, ScheduledCommand
from telemetry.voting import Unvoted, decode3, encode3

MAX_ENTRIES = 256
"""Entries the schedule holds (assumed: a day of contacts, and room)."""
MAX_SEQUENCES = 32
SKIP_AFTER_NS = 30 * 1_000_000_000
"""Mission time after which a command that was not executed in time is skipped, ns (assumed)."""

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS schedule (
        entry INTEGER PRIMARY KEY AUTOINCREMENT,
        t_ns INTEGER NOT NULL,
        sequence TEXT,
        record BLOB NOT NULL)""",
    "CREATE TABLE IF NOT EXISTS sequences (name TEXT PRIMARY KEY, steps BLOB NOT NULL)",
    """CREATE TABLE IF NOT EXISTS sequence_runs (
        name TEXT PRIMARY KEY,
        ran INTEGER NOT NULL,
        missed INTEGER NOT NULL)""",
)


class _Record(msgspec.Struct, frozen=True, array_like=True):
    """An entry as stored, three times. The columns beside it are for finding it."""

    t_ns: int
    name: str
    args: dict[str, Any]
    key_id: str
    seq: int
    sequence: str | None


class ScheduleError(ValueError):
    """What was asked of the schedule cannot be done; `code` is that of the verification."""

    def __init__(self, code: FailureCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Origin:
    """The telecommand that put an entry into the schedule."""

    key_id: str
    seq: int


@dataclass(frozen=True)
class Entry:
    """A command whose time has come."""

    entry: int
    t_ns: int
    name: str
    args: dict[str, Any]
    origin: Origin
    sound: bool
    """Whether it is what the ground sent; if not, all but its number is unknown."""
    sequence: str | None = None
    """The sequence it is a step of."""


@dataclass(frozen=True)
class Run:
    """How a run of a sequence went."""

    ran: int
    """Steps that were carried out."""
    missed: int
    """Steps that were skipped, damaged or failed."""


class Schedule:
    """The schedule and the sequences."""

    def __init__(self) -> None:
        self.next_ns: int | None = None
        """Mission time of the earliest entry as last looked at, UTC ns; None without one."""

    def create(self, connection: sqlite3.Connection) -> None:
        """Create the tables where they are missing, and look at them."""
        for statement in _SCHEMA:
            connection.execute(statement)
        self.look(connection)

    def look(self, connection: sqlite3.Connection) -> None:
        """Take `next_ns` from the disk: to be called when a transaction failed, too."""
        (self.next_ns,) = connection.execute("SELECT MIN(t_ns) FROM schedule").fetchone()

    def insert(
        self, connection: sqlite3.Connection, t_ns: int, name: str, args: dict[str, Any], origin: Origin
    ) -> int:
        """Add a command; return the number of its entry. Raises `ScheduleError` when the schedule is full."""
        entry = self._insert(connection, _Record(t_ns, name, args, origin.key_id, origin.seq, None))
        self.look(connection)
        return entry

    def _insert(self, connection: sqlite3.Connection, record: _Record) -> int:
        (count,) = connection.execute("SELECT COUNT(*) FROM schedule").fetchone()
        if count >= MAX_ENTRIES:
            raise ScheduleError(FailureCode.SCHEDULE_FULL, f"{count} entries already")
        cursor = connection.execute(
            "INSERT INTO schedule (t_ns, sequence, record) VALUES (?, ?, ?)",
            (record.t_ns, record.sequence, _encode(record)),
        )
        return int(cursor.lastrowid or 0)

    def delete(self, connection: sqlite3.Connection, entry: int) -> None:
        """Take an entry out. Raises `ScheduleError` if there is none of that number."""
        if not connection.execute("DELETE FROM schedule WHERE entry = ?", (entry,)).rowcount:
            raise ScheduleError(FailureCode.UNKNOWN_ENTRY, f"no entry {entry} in the schedule")
        self.look(connection)

    def shift(self, connection: sqlite3.Connection, by_ns: int, entry: int | None, now_ns: int) -> int:
        """Move one entry or all in mission time; return how many.

        Raises
        ------
        ScheduleError
            There is no such entry, or one would come to lie in the past: then none is moved.
        """
        rows = connection.execute(
            "SELECT entry, record FROM schedule WHERE entry = ? OR ? IS NULL", (entry, entry)
        ).fetchall()
        if entry is not None and not rows:
            raise ScheduleError(FailureCode.UNKNOWN_ENTRY, f"no entry {entry} in the schedule")
        # What is beyond a vote stays where it is, and is reported when its time comes.
        found = [(number, record) for number, blob in rows if (record := _decode(blob)) is not None]
        for number, record in found:
            if not now_ns < record.t_ns + by_ns < 2**63:
                raise ScheduleError(
                    FailureCode.IN_THE_PAST, f"entry {number} would not lie ahead: none is moved"
                )
        self._move(connection, found, by_ns)
        return len(found)

    def shift_sequences(self, connection: sqlite3.Connection, by_ns: int) -> None:
        """Move all steps of sequences under way in mission time, which stepped by `by_ns`."""
        rows = connection.execute("SELECT entry, record FROM schedule WHERE sequence IS NOT NULL").fetchall()
        self._move(connection, [(n, record) for n, blob in rows if (record := _decode(blob))], by_ns)

    def _move(
        self, connection: sqlite3.Connection, entries: Sequence[tuple[int, _Record]], by_ns: int
    ) -> None:
        for number, record in entries:
            moved = msgspec.structs.replace(record, t_ns=record.t_ns + by_ns)
            connection.execute(
                "UPDATE schedule SET t_ns = ?, record = ? WHERE entry = ?",
                (moved.t_ns, _encode(moved), number),
            )
        self.look(connection)

    def take_due(self, connection: sqlite3.Connection, now_ns: int) -> Entry | None:
        """Take the earliest entry whose time has come out of the schedule; None if there is none."""
        row = connection.execute(
            "SELECT entry, t_ns, sequence, record FROM schedule WHERE t_ns <= ? ORDER BY t_ns, entry LIMIT 1",
            (now_ns,),
        ).fetchone()
        if row is None:
            self.look(connection)
            return None
        number, t_ns, sequence, blob = row
        connection.execute("DELETE FROM schedule WHERE entry = ?", (number,))
        self.look(connection)
        record = _decode(blob)
        if record is None or record.t_ns != t_ns:
            return Entry(number, t_ns, "", {}, Origin("", 0), sound=False, sequence=sequence)
        origin = Origin(record.key_id, record.seq)
        return Entry(number, t_ns, record.name, record.args, origin, sound=True, sequence=record.sequence)

    def count_step(self, connection: sqlite3.Connection, name: str, *, ran: bool) -> Run | None:
        """Count a step that was taken out; return the count of the run if that was its last one."""
        connection.execute(
            "UPDATE sequence_runs SET ran = ran + ?, missed = missed + ? WHERE name = ?",
            (int(ran), int(not ran), name),
        )
        if connection.execute("SELECT 1 FROM schedule WHERE sequence = ?", (name,)).fetchone():
            return None
        row = connection.execute(
            "DELETE FROM sequence_runs WHERE name = ? RETURNING ran, missed", (name,)
        ).fetchone()
        return None if row is None else Run(*row)

    def load(self, connection: sqlite3.Connection, name: str, steps: Sequence[SequenceStep]) -> None:
        """Store a sequence, in the place of one of that name.

        Raises
        ------
        ScheduleError
            A step does not have the CRC the ground gave it, that sequence runs, or there are too many.
        """
        for number, step in enumerate(steps):
            _check_step(number, step)
        self._not_running(connection, name)
        (others,) = connection.execute("SELECT COUNT(*) FROM sequences WHERE name != ?", (name,)).fetchone()
        if others >= MAX_SEQUENCES:
            raise ScheduleError(FailureCode.TOO_MANY_SEQUENCES, f"{others} are loaded already")
        connection.execute(
            "INSERT INTO sequences VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET steps = excluded.steps",
            (name, encode3(msgspec.msgpack.encode(list(steps)))),
        )

    def start(self, connection: sqlite3.Connection, name: str, now_ns: int, origin: Origin) -> int:
        """Put the steps of a sequence into the schedule; return how many.

        Raises
        ------
        ScheduleError
            There is none of that name, it runs already, a step was damaged, or there is no room for all.
        """
        row = connection.execute("SELECT steps FROM sequences WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise ScheduleError(FailureCode.UNKNOWN_SEQUENCE, f"no sequence {name!r} is loaded")
        self._not_running(connection, name)
        try:
            steps = msgspec.msgpack.decode(decode3(row[0]).value, type=list[SequenceStep])
        except (Unvoted, msgspec.DecodeError):
            raise ScheduleError(FailureCode.DAMAGED, f"sequence {name!r} is damaged: load it again") from None
        t_ns = now_ns
        for number, step in enumerate(steps):
            _check_step(number, step)
            t_ns += round(step.delay_s * 1e9)
            self._insert(connection, _Record(t_ns, step.command, step.args, origin.key_id, origin.seq, name))
        connection.execute("INSERT OR REPLACE INTO sequence_runs VALUES (?, 0, 0)", (name,))
        self.look(connection)
        return len(steps)

    def stop(self, connection: sqlite3.Connection, name: str) -> int:
        """Take what is left of a sequence out; return how many steps. Raises `ScheduleError` if none runs."""
        left = connection.execute("DELETE FROM schedule WHERE sequence = ?", (name,)).rowcount
        if not left:
            raise ScheduleError(FailureCode.NOT_RUNNING, f"sequence {name!r} does not run")
        self.look(connection)
        return left

    def _not_running(self, connection: sqlite3.Connection, name: str) -> None:
        if connection.execute("SELECT 1 FROM schedule WHERE sequence = ?", (name,)).fetchone():
            raise ScheduleError(FailureCode.SEQUENCE_RUNNING, f"sequence {name!r} runs: stop it first")

    def report(self, connection: sqlite3.Connection) -> CommandSchedule:
        """Return what is scheduled and loaded."""
        rows = connection.execute("SELECT entry, record FROM schedule ORDER BY t_ns, entry")
        sound = [(entry, record) for entry, blob in rows if (record := _decode(blob)) is not None]
        sequences = connection.execute("SELECT name FROM sequences ORDER BY name")
        return CommandSchedule(
            entries=[
                ScheduledCommand(
                    entry=entry,
                    execute_ns=record.t_ns,
                    name=record.name,
                    key_id=record.key_id,
                    command_seq=record.seq,
                    sequence=record.sequence,
                )
                for entry, record in sound
            ],
            sequences=[name for (name,) in sequences],
        )


def _encode(record: _Record) -> bytes:
    return encode3(msgspec.msgpack.encode(record))


def _decode(blob: bytes) -> _Record | None:
    """Return an entry by the vote of its copies; None beyond a vote."""
    try:
        return msgspec.msgpack.decode(decode3(blob).value, type=_Record)
    except (Unvoted, msgspec.DecodeError):
        return None


def _check_step(number: int, step: SequenceStep) -> None:
    if step_crc(step.command, step.args) != step.crc32c:
        raise ScheduleError(
            FailureCode.DAMAGED, f"step {number} ({step.command[:40]}) does not have its CRC-32C"
        )
