"""Tables, sequence numbers and accounts of the spool, for `telemetry.spool` and `telemetry.spool_room`."""

from __future__ import annotations

import logging
import sqlite3
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from msgspec.structs import replace

from telemetry.errors import PenumbraError
from telemetry.frame import FrameError, decode_frame
from telemetry.packets import PRIORITY, FdirReport, Stream, StreamLedger
from telemetry.spool_audit import FaultKind, SpoolFault, audit, pack_counter, vote_counter
from telemetry.spool_policy import DropReason

log = logging.getLogger("penumbra.spool")

FAULTS_KEPT = 256
"""Findings of damage kept until they are taken (assumed: one pass over a badly struck store)."""


@dataclass(frozen=True)
class SpoolRecord:
    """A stored frame. `rowid` is never used again for another record."""

    rowid: int
    stream: Stream
    boot: int
    seq: int
    frame: bytes


class SpoolRow(NamedTuple):
    """The key and the size of a stored frame."""

    rowid: int
    boot: int
    stream: str
    seq: int
    size: int


@dataclass(frozen=True)
class DroppedRange:
    """Sequence numbers `first` to `last`, both included, dropped for one reason."""

    boot: int
    stream: Stream
    first: int
    last: int
    reason: DropReason


_SCHEMA = """
CREATE TABLE IF NOT EXISTS spool_record (
    rowid INTEGER PRIMARY KEY AUTOINCREMENT, priority INTEGER NOT NULL, boot INTEGER NOT NULL,
    stream TEXT NOT NULL, seq INTEGER NOT NULL, size INTEGER NOT NULL, frame BLOB NOT NULL,
    UNIQUE (stream, boot, seq));
CREATE INDEX IF NOT EXISTS spool_record_order ON spool_record (priority, boot, seq);
CREATE TABLE IF NOT EXISTS spool_stream (
    boot INTEGER NOT NULL, stream TEXT NOT NULL, generated INTEGER NOT NULL, acked INTEGER NOT NULL,
    copies BLOB, PRIMARY KEY (boot, stream)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spool_usage (
    stream TEXT PRIMARY KEY, records INTEGER NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spool_drop (
    boot INTEGER NOT NULL, stream TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (boot, stream, first)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spool_finding (
    monitor TEXT NOT NULL, outcome TEXT NOT NULL, boot INTEGER NOT NULL, number INTEGER NOT NULL,
    copies BLOB NOT NULL, PRIMARY KEY (monitor, outcome)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spool_node (node TEXT PRIMARY KEY) WITHOUT ROWID;
"""

# SELECT, not VALUES: only a statement that may write several rows has a journal of its own, without which
# SQLite gives up the whole transaction when the database is full.
INSERT = "INSERT INTO spool_record (priority, boot, stream, seq, size, frame) SELECT ?, ?, ?, ?, ?, ?"


class SpoolBooks:
    """Records, sequence numbers and accounts of the store of one node in one boot.

    Parameters
    ----------
    node
        Node name.
    boot
        Boot counter; the caller never uses one twice, not even after the database was lost.
    capacity_bytes
        Most bytes of stored frames.
    """

    def __init__(self, node: str, boot: int, capacity_bytes: int) -> None:
        self.node = node
        self.boot = boot
        self.capacity_bytes = capacity_bytes
        self._faults: deque[SpoolFault] = deque(maxlen=FAULTS_KEPT)

    def create(self, connection: sqlite3.Connection) -> None:
        """Create what is missing of the tables, check all that is stored, and mend it; see `take_faults`.

        Raises
        ------
        PenumbraError
            The database belongs to a node of another name: its records could never be acknowledged.
        """
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        columns = {row[1] for row in connection.execute("PRAGMA table_info(spool_stream)")}
        if "copies" not in columns:  # a database of an earlier version
            connection.execute("ALTER TABLE spool_stream ADD COLUMN copies BLOB")
        connection.execute(
            "INSERT INTO spool_node SELECT ? WHERE NOT EXISTS (SELECT 1 FROM spool_node)", (self.node,)
        )
        (owner,) = connection.execute("SELECT node FROM spool_node").fetchone()
        if owner != self.node:
            raise PenumbraError(
                f"the state directory holds telemetry of node {owner!r}, this one is {self.node!r}",
                f"give {self.node!r} its own state directory, or set the name back to {owner!r}",
            )
        self._faults.extend(audit(connection))

    def take_faults(self) -> list[SpoolFault]:
        """Return the damage found since the last call, for reports. May be called from any thread.

        Damage may be told twice when the transaction that found it was lost. At most `FAULTS_KEPT` are kept;
        every record lost is counted in the ledger all the same.
        """
        faults: list[SpoolFault] = []
        with suppress(IndexError):
            while True:
                faults.append(self._faults.popleft())
        return faults

    def count_generated(self, connection: sqlite3.Connection, stream: Stream, generated: int) -> None:
        """Note how many sequence numbers of a stream this boot has given out."""
        connection.execute(
            "INSERT INTO spool_stream (boot, stream, generated, acked, copies) VALUES (?, ?, ?, 0, ?) "
            "ON CONFLICT (boot, stream) DO UPDATE "
            "SET generated = excluded.generated, copies = excluded.copies",
            (self.boot, stream.value, generated, pack_counter(generated)),
        )

    def generated(self, connection: sqlite3.Connection, boot: int, stream: Stream) -> int | None:
        """Return the voted count of numbers given out, which is the next one; None if the stream is new."""
        row = connection.execute(
            "SELECT generated, copies FROM spool_stream WHERE boot = ? AND stream = ?", (boot, stream.value)
        ).fetchone()
        if row is None:
            return None
        voted, anew = vote_counter(*row)
        if voted is None:
            # Beyond a vote. A number must not be used twice: go on above all that are known.
            (top,) = connection.execute(
                "SELECT MAX(top) FROM (SELECT MAX(seq) + 1 AS top FROM spool_record "
                "WHERE boot = :boot AND stream = :stream UNION ALL SELECT MAX(last) + 1 FROM spool_drop "
                "WHERE boot = :boot AND stream = :stream UNION ALL SELECT MAX(generated) FROM spool_stream "
                "WHERE boot = :boot AND stream = :stream)",
                {"boot": boot, "stream": stream.value},
            ).fetchone()
            voted = int(top)
        if anew and row[1] is not None:
            text = f"the sequence counter of {stream.value}, boot {boot}, was struck: {voted} it is"
            self._faults.append(SpoolFault(FaultKind.SEQUENCE, text))
        return voted

    def numbered(self, connection: sqlite3.Connection, report: FdirReport) -> FdirReport:
        """Return a report with the running number of its row and outcome in this boot.

        Without one where that is beyond a vote: then it is neither merged nor dropped.
        """
        kind = (report.monitor, report.outcome.value)
        row = connection.execute(
            "SELECT boot, number, copies FROM spool_finding WHERE monitor = ? AND outcome = ?", kind
        ).fetchone()
        before = vote_counter(*row[1:])[0] if row is not None and row[0] == self.boot else 0
        if before is None:
            return replace(report, count=1, first=None, covers=[])
        number = before + 1
        connection.execute(
            "INSERT OR REPLACE INTO spool_finding VALUES (?, ?, ?, ?, ?)",
            (*kind, self.boot, number, pack_counter(number)),
        )
        return replace(report, count=1, first=None, covers=[(self.boot, number, number)])

    def insert(self, connection: sqlite3.Connection, stream: Stream, seq: int, frame: bytes) -> None:
        """Store a frame of this boot under its sequence number."""
        connection.execute(INSERT, (PRIORITY[stream], self.boot, stream.value, seq, len(frame), frame))
        self.use(connection, stream.value, 1, len(frame))

    @staticmethod
    def use(connection: sqlite3.Connection, stream: str, records: int, size: int) -> None:
        """Count records and bytes that came, or with a minus went."""
        connection.execute(
            "UPDATE spool_usage SET records = records + ?, bytes = bytes + ? WHERE stream = ?",
            (records, size, stream),
        )

    def drop(self, connection: sqlite3.Connection, row: SpoolRow, reason: DropReason) -> None:
        """Delete a stored record, and count it as dropped."""
        connection.execute("DELETE FROM spool_record WHERE rowid = ?", (row.rowid,))
        self.use(connection, row.stream, -1, -row.size)
        self.count_drop(connection, row.boot, row.stream, row.seq, reason)

    @staticmethod
    def count_drop(
        connection: sqlite3.Connection, boot: int, stream: str, seq: int, reason: DropReason
    ) -> None:
        """Count a sequence number as dropped."""
        extended = connection.execute(
            "UPDATE spool_drop SET last = ? WHERE boot = ? AND stream = ? AND last = ? AND reason = ?",
            (seq, boot, stream, seq - 1, reason.value),
        )
        if extended.rowcount == 0:
            connection.execute(
                "INSERT INTO spool_drop VALUES (?, ?, ?, ?, ?)", (boot, stream, seq, seq, reason.value)
            )

    def read(self, connection: sqlite3.Connection, rowid: int) -> SpoolRecord | None:
        """Return a record, or None when it is damaged: then it is dropped."""
        *columns, frame = connection.execute(
            "SELECT rowid, boot, stream, seq, size, CAST(frame AS BLOB) FROM spool_record WHERE rowid = ?",
            (rowid,),
        ).fetchone()
        row = SpoolRow(*columns)
        try:
            header = decode_frame(frame)
        except FrameError:
            header = None
        if header is not None and (header.boot, header.stream, header.seq) == (row.boot, row.stream, row.seq):
            return SpoolRecord(row.rowid, header.stream, row.boot, row.seq, frame)
        text = f"stored record {row.stream} {row.boot}/{row.seq} is corrupt: dropped"
        log.warning("spool: %s", text)
        self._faults.append(SpoolFault(FaultKind.RECORD, text, 1))
        self.drop(connection, row, DropReason.CORRUPT)
        return None

    @staticmethod
    def undrop(connection: sqlite3.Connection, key: tuple[int, str], first: int, last: int) -> int:
        """Cut [first, last] out of the dropped ranges; return how many sequence numbers that took out."""
        taken = 0
        rows = connection.execute(
            "SELECT first, last, reason FROM spool_drop WHERE boot = ? AND stream = ? "
            "AND first <= ? AND last >= ?",
            (*key, last, first),
        ).fetchall()
        for low, high, reason in rows:
            connection.execute(
                "DELETE FROM spool_drop WHERE boot = ? AND stream = ? AND first = ?", (*key, low)
            )
            rest = [(low, first - 1), (last + 1, high)]
            connection.executemany(
                "INSERT INTO spool_drop VALUES (?, ?, ?, ?, ?)",
                [(*key, a, b, reason) for a, b in rest if a <= b],
            )
            taken += min(high, last) - max(low, first) + 1
        return taken

    def ledger(self, connection: sqlite3.Connection) -> list[StreamLedger]:
        """Return the account of every (boot, stream) that ever generated a record.

        `stored` is counted from the records themselves, not from a counter: the balance is a real check.
        """
        stored = {
            (boot, stream): count
            for boot, stream, count in connection.execute(
                "SELECT boot, stream, COUNT(*) FROM spool_record GROUP BY stream, boot"
            )
        }
        dropped: dict[tuple[int, str], dict[str, int]] = {}
        for boot, stream, reason, count in connection.execute(
            "SELECT boot, stream, reason, SUM(last - first + 1) FROM spool_drop GROUP BY boot, stream, reason"
        ):
            dropped.setdefault((boot, stream), {})[reason] = count
        return [
            StreamLedger(
                boot=boot,
                stream=Stream(stream),
                generated=vote_counter(generated, copies)[0] or 0,
                acked=acked,
                stored=stored.get((boot, stream), 0),
                dropped=dropped.get((boot, stream), {}),
            )
            for boot, stream, generated, acked, copies in connection.execute(
                "SELECT boot, stream, generated, acked, copies FROM spool_stream ORDER BY boot, stream"
            )
        ]

    def dropped_ranges(self, connection: sqlite3.Connection) -> list[DroppedRange]:
        """Return every range of sequence numbers dropped, by (boot, stream, first)."""
        rows = connection.execute(
            "SELECT boot, stream, first, last, reason FROM spool_drop ORDER BY boot, stream, first"
        )
        return [DroppedRange(b, Stream(s), f, la, DropReason(r)) for b, s, f, la, r in rows]

    def stored_sequences(self, connection: sqlite3.Connection) -> dict[tuple[int, Stream], list[int]]:
        """Return the sequence numbers stored, ascending, by (boot, stream)."""
        stored: dict[tuple[int, Stream], list[int]] = {}
        for boot, stream, seq in connection.execute(
            "SELECT boot, stream, seq FROM spool_record ORDER BY stream, boot, seq"
        ):
            stored.setdefault((boot, Stream(stream)), []).append(seq)
        return stored

    def size(self, connection: sqlite3.Connection) -> tuple[int, int]:
        """Return (records, bytes of frames) stored."""
        records, size = connection.execute("SELECT SUM(records), SUM(bytes) FROM spool_usage").fetchone()
        return records, size
