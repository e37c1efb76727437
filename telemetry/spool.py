"""The node's telemetry store: nothing leaves it but what the ground's archive has acknowledged, or policy.

Every method takes a connection and is run inside `Database.run`: a sequence number is assigned in the same
transaction that stores its record, so after a crash there is neither a gap nor a number used twice, and for
every (boot, stream), at every commit:

    generated = acked + stored + dropped

When the store is full (`capacity_bytes`, or the disk itself), `telemetry.spool_policy` says what gives way.
Each drop is counted under its reason, with its sequence numbers. The node bounds its database below the free
space of the disk (`Database.open(max_bytes=...)`): a disk that others filled shows only at commit. From then
on the database does not grow, so that policy acts there too, and the room of a reserve serves the log.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from telemetry.ack import Ack
from telemetry.database import StoreFull, is_full
from telemetry.errors import PenumbraError
from telemetry.frame import FrameError, decode_frame, encode_frame
from telemetry.packets import PRIORITY, Packet, Stream, StreamLedger
from telemetry.spool_audit import FaultKind, SpoolFault, audit, pack_counter, vote_counter
from telemetry.spool_policy import PROTECTED, REFUSED_ABOVE, DropReason, victims

log = logging.getLogger("penumbra.spool")

DISK_FULL_EVICTIONS = 64
"""Records given up for one append when the disk itself is full: a page holds several (assumed)."""

FAULTS_KEPT = 256
"""Findings of damage kept until they are taken (assumed: one pass over a badly struck store)."""


class SpoolRefused(Exception):
    """No room for this result or product now. It was not generated: keep it, and try again later."""


@dataclass(frozen=True)
class SpoolRecord:
    """A stored frame. `rowid` is never used again for another record."""

    rowid: int
    stream: Stream
    boot: int
    seq: int
    frame: bytes


class _Row(NamedTuple):
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
CREATE TABLE IF NOT EXISTS spool_node (node TEXT PRIMARY KEY) WITHOUT ROWID;
"""

# SELECT, not VALUES: only a statement that may write several rows has a journal of its own, without which
# SQLite gives up the whole transaction when the database is full.
_INSERT = "INSERT INTO spool_record (priority, boot, stream, seq, size, frame) SELECT ?, ?, ?, ?, ?, ?"


class Spool:
    """The store of one node in one boot. It also holds, and sends, what earlier boots left.

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

    def append(self, connection: sqlite3.Connection, packet: Packet, t_ns: int) -> int:
        """Store a packet; return its sequence number. It counts as generated when this is committed.

        A housekeeping or plan packet that finds no room is generated and dropped at once.

        Parameters
        ----------
        packet
            Its class decides the stream.
        t_ns
            Mission time (UTC), ns since 1970.

        Raises
        ------
        SpoolRefused
            A result or product that finds no room.
        StoreFull
            The disk is full and giving way did not help. Nothing was generated.
        FrameError
            The packet does not fit its own schema.
        """
        stream = packet.stream
        seq = self._generated(connection, self.boot, stream) or 0
        frame = encode_frame(node=self.node, boot=self.boot, seq=seq, t_ns=t_ns, packet=packet)
        self._count_generated(connection, stream, seq + 1)
        if len(frame) > self._limit(stream):
            self._count_drop(connection, self.boot, stream.value, seq, DropReason.TOO_LARGE)
        elif not (
            self._make_room(connection, stream, len(frame)) and self._store(connection, stream, seq, frame)
        ):
            if stream in REFUSED_ABOVE:
                raise SpoolRefused(f"no room for a {stream.value} of {len(frame)} bytes")
            self._count_drop(connection, self.boot, stream.value, seq, DropReason.FULL)
        return seq

    def append_many(self, connection: sqlite3.Connection, packets: Sequence[tuple[Packet, int]]) -> list[int]:
        """Store several (packet, t_ns) as by `append`; return their sequence numbers.

        Where all plainly fit, each stream's account is written once instead of once a packet.

        Raises
        ------
        SpoolRefused, StoreFull, FrameError
            As `append`, for any of them; the caller undoes the transaction, and may append each alone.
        """
        following: dict[Stream, int] = {}
        sizes: Counter[Stream] = Counter()
        counts: Counter[Stream] = Counter()
        rows = []
        for packet, t_ns in packets:
            stream = packet.stream
            seq = following.get(stream)
            if seq is None:
                seq = self._generated(connection, self.boot, stream) or 0
            frame = encode_frame(node=self.node, boot=self.boot, seq=seq, t_ns=t_ns, packet=packet)
            following[stream] = seq + 1
            sizes[stream] += len(frame)
            counts[stream] += 1
            rows.append((PRIORITY[stream], self.boot, stream.value, seq, len(frame), frame))
        _, used = self.size(connection)
        if used + sizes.total() > min(self._limit(stream) for stream in (*following, Stream.EVENT)):
            return [self.append(connection, packet, t_ns) for packet, t_ns in packets]
        for stream, generated in following.items():
            self._count_generated(connection, stream, generated)
            self._use(connection, stream.value, counts[stream], sizes[stream])
        connection.executemany(_INSERT, rows)
        return [row[3] for row in rows]

    def _count_generated(self, connection: sqlite3.Connection, stream: Stream, generated: int) -> None:
        connection.execute(
            "INSERT INTO spool_stream (boot, stream, generated, acked, copies) VALUES (?, ?, ?, 0, ?) "
            "ON CONFLICT (boot, stream) DO UPDATE "
            "SET generated = excluded.generated, copies = excluded.copies",
            (self.boot, stream.value, generated, pack_counter(generated)),
        )

    def _generated(self, connection: sqlite3.Connection, boot: int, stream: Stream) -> int | None:
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

    def _limit(self, stream: Stream) -> int:
        return int(self.capacity_bytes * REFUSED_ABOVE.get(stream, 1))

    def _make_room(self, connection: sqlite3.Connection, stream: Stream, size: int) -> bool:
        """Give way until `size` bytes fit. Results count against their share with everything else stored."""
        limit = self._limit(stream)
        _, used = self.size(connection)
        while used + size > limit:
            freed = self._evict(connection, stream)
            if freed is None:
                return False
            used -= freed
        return True

    def _evict(self, connection: sqlite3.Connection, wanting: Stream) -> int | None:
        """Drop the record that gives way to `wanting`; return its bytes, or None if there is none."""
        for victim in victims(wanting):
            found = connection.execute(
                "SELECT rowid, boot, stream, seq, size FROM spool_record WHERE stream = ? "
                "ORDER BY boot, seq LIMIT 1",
                (victim.value,),
            ).fetchone()
            if found is not None:
                row = _Row(*found)
                self._drop(connection, row, DropReason.FULL)
                return row.size
        return None

    def make_way(self, connection: sqlite3.Connection) -> int:
        """Drop what gives way to a boot report, so that a boot can be counted; return how many records."""
        return sum(self._evict(connection, Stream.BOOT) is not None for _ in range(DISK_FULL_EVICTIONS))

    def _store(self, connection: sqlite3.Connection, stream: Stream, seq: int, frame: bytes) -> bool:
        """Insert the record, giving way when the disk itself is full; return whether it is stored."""
        values = (PRIORITY[stream], self.boot, stream.value, seq, len(frame), frame)
        for _ in range(DISK_FULL_EVICTIONS):
            try:
                connection.execute(_INSERT, values)
            except sqlite3.OperationalError as error:
                if not is_full(error) or not connection.in_transaction:
                    raise
                if self._evict(connection, stream) is None:
                    if stream in PROTECTED:
                        raise
                    return False
                continue
            self._use(connection, stream.value, 1, len(frame))
            return True
        raise StoreFull(f"the disk is full: {DISK_FULL_EVICTIONS} records gave way in vain")

    @staticmethod
    def _use(connection: sqlite3.Connection, stream: str, records: int, size: int) -> None:
        connection.execute(
            "UPDATE spool_usage SET records = records + ?, bytes = bytes + ? WHERE stream = ?",
            (records, size, stream),
        )

    def _drop(self, connection: sqlite3.Connection, row: _Row, reason: DropReason) -> None:
        connection.execute("DELETE FROM spool_record WHERE rowid = ?", (row.rowid,))
        self._use(connection, row.stream, -1, -row.size)
        self._count_drop(connection, row.boot, row.stream, row.seq, reason)

    @staticmethod
    def _count_drop(
        connection: sqlite3.Connection, boot: int, stream: str, seq: int, reason: DropReason
    ) -> None:
        extended = connection.execute(
            "UPDATE spool_drop SET last = ? WHERE boot = ? AND stream = ? AND last = ? AND reason = ?",
            (seq, boot, stream, seq - 1, reason.value),
        )
        if extended.rowcount == 0:
            connection.execute(
                "INSERT INTO spool_drop VALUES (?, ?, ?, ?, ?)", (boot, stream, seq, seq, reason.value)
            )

    def batch(
        self,
        connection: sqlite3.Connection,
        limit: int,
        exclude: set[int],
        *,
        max_bytes: int | None = None,
        first: Stream | None = None,
    ) -> list[SpoolRecord]:
        """Return up to `limit` records to send, in order of (priority, boot, seq).

        A record whose frame is damaged is dropped as `corrupt` and counted; the others are not affected.

        Parameters
        ----------
        exclude
            Row ids already under way.
        max_bytes
            Most bytes of frames, but for one record at least. None: no bound.
        first
            A stream whose oldest record goes before all others, whatever its priority.
        """
        records: list[SpoolRecord] = []
        size = 0
        for rowid in self._order(connection, exclude, first):
            if len(records) >= limit:
                break
            record = self._read(connection, rowid)
            if record is None:
                continue
            size += len(record.frame)
            if records and max_bytes is not None and size > max_bytes:
                break
            records.append(record)
        return records

    @staticmethod
    def _order(connection: sqlite3.Connection, exclude: set[int], first: Stream | None) -> Iterator[int]:
        """Yield row ids in the order of sending; from an index alone, since most are under way already."""
        ahead = None
        if first is not None:
            rows = connection.execute(
                "SELECT rowid FROM spool_record WHERE stream = ? ORDER BY boot, seq", (first.value,)
            )
            ahead = next((rowid for (rowid,) in rows if rowid not in exclude), None)
            rows.close()
            if ahead is not None:
                yield ahead
        rows = connection.execute("SELECT rowid FROM spool_record ORDER BY priority, boot, seq")
        try:
            yield from (rowid for (rowid,) in rows if rowid not in exclude and rowid != ahead)
        finally:
            rows.close()

    def _read(self, connection: sqlite3.Connection, rowid: int) -> SpoolRecord | None:
        """Return a record, or None when it is damaged: then it is dropped."""
        *columns, frame = connection.execute(
            "SELECT rowid, boot, stream, seq, size, CAST(frame AS BLOB) FROM spool_record WHERE rowid = ?",
            (rowid,),
        ).fetchone()
        row = _Row(*columns)
        try:
            header = decode_frame(frame)
        except FrameError:
            header = None
        if header is not None and (header.boot, header.stream, header.seq) == (row.boot, row.stream, row.seq):
            return SpoolRecord(row.rowid, header.stream, row.boot, row.seq, frame)
        text = f"stored record {row.stream} {row.boot}/{row.seq} is corrupt: dropped"
        log.warning("spool: %s", text)
        self._faults.append(SpoolFault(FaultKind.RECORD, text, 1))
        self._drop(connection, row, DropReason.CORRUPT)
        return None

    def acknowledge(self, connection: sqlite3.Connection, ack: Ack, most: int | None = None) -> int:
        """Delete what the ground has archived; return how many records that was. Idempotent.

        With `most` it stops after so many, where the disk is too full for a larger transaction.

        A record that was under way when it was dropped, and is archived after all, moves from dropped to
        acked, so that `dropped` is what the ground really lacks. An acknowledgement of another node, or of
        sequence numbers never generated, is ignored as a whole (0).
        """
        generated = self._generated(connection, ack.boot, ack.stream) if ack.node == self.node else None
        if generated is None or ack.upto > generated:
            log.warning("ignored an acknowledgement of what this node has not generated: %s", ack)
            return 0
        deleted = undropped = freed = 0
        key = (ack.boot, ack.stream.value)
        for first, last in ack.ranges():
            end = last
            within = "boot = ? AND stream = ? AND seq BETWEEN ? AND ?"
            if most is not None:
                if deleted == most:
                    break
                row = connection.execute(
                    f"SELECT seq FROM spool_record WHERE {within} ORDER BY seq LIMIT 1 OFFSET ?",  # noqa: S608
                    (*key, first, last, most - deleted - 1),
                ).fetchone()
                end = last if row is None else row[0]
            count, size = connection.execute(
                f"SELECT COUNT(*), COALESCE(SUM(size), 0) FROM spool_record WHERE {within}",  # noqa: S608
                (*key, first, end),
            ).fetchone()
            if count:
                connection.execute(f"DELETE FROM spool_record WHERE {within}", (*key, first, end))  # noqa: S608
                deleted += count
                freed += size
            undropped += self._undrop(connection, key, first, end)
        if deleted:
            self._use(connection, ack.stream.value, -deleted, -freed)
        if deleted or undropped:
            connection.execute(
                "UPDATE spool_stream SET acked = acked + ? WHERE boot = ? AND stream = ?",
                (deleted + undropped, *key),
            )
        return deleted

    @staticmethod
    def _undrop(connection: sqlite3.Connection, key: tuple[int, str], first: int, last: int) -> int:
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
