"""How the spool makes room: it carries out what `telemetry.spool_policy` says."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from telemetry.database import StoreFull, is_full
from telemetry.fdir_merge import Kind, kind_of, merged, shorter
from telemetry.frame import FrameError, decode_frame, encode_frame
from telemetry.packets import FdirReport, FdirStatus, FlightRecord, Packet, Stream
from telemetry.spool_books import SpoolBooks, SpoolRecord, SpoolRow
from telemetry.spool_policy import PROTECTED, REFUSED_ABOVE, REPORT_BYTES, DropReason, victims

EVICTIONS = 64
"""Steps of giving way for one append when the disk itself is full: a page holds several (assumed)."""
SCANNED = 256
"""Records of the FDIR looked at before the first that can be merged are (assumed: a few ms)."""


class _Report(NamedTuple):
    """A stored report that has a running number."""

    record: SpoolRecord
    t_ns: int
    report: FdirReport


@dataclass
class _Held:
    """What of the FDIR is stored, oldest first; not all of it where that is much."""

    reports: defaultdict[Kind, list[_Report]] = field(default_factory=lambda: defaultdict(list))
    statuses: list[SpoolRecord] = field(default_factory=list)
    others: list[SpoolRecord] = field(default_factory=list)
    """Flight records and statuses."""

    @property
    def most(self) -> list[_Report]:
        """The reports of the row and outcome that has most of them."""
        return max(self.reports.values(), key=len, default=[])


class SpoolRoom:
    """Stores records in the room there is, or that is made for them.

    Parameters
    ----------
    books
        Records and accounts of the spool.
    """

    def __init__(self, books: SpoolBooks) -> None:
        self._books = books

    def limit(self, stream: Stream) -> int:
        """Return how far a stream may fill the store, bytes."""
        return int(self._books.capacity_bytes * REFUSED_ABOVE.get(stream, 1))

    def place(
        self, connection: sqlite3.Connection, packet: Packet, seq: int, t_ns: int, frame: bytes
    ) -> bool:
        """Store a packet, giving way to it; return whether it is stored.

        Raises
        ------
        StoreFull
            The disk is full, and giving way did not help.
        """
        stream = packet.stream
        while True:
            full: sqlite3.OperationalError | None = None
            try:
                if self._make_room(connection, stream, len(frame)):
                    self._store(connection, stream, seq, frame)
                    return True
            except sqlite3.OperationalError as error:
                if not is_full(error) or not connection.in_transaction:
                    raise
                full = error
            if isinstance(packet, FdirReport) and self._absorb(connection, packet, seq, t_ns):
                return True
            if stream is not Stream.FDIR or not self._drop_other(connection):
                if full is not None and stream in PROTECTED:
                    raise full
                return False

    def make_way(self, connection: sqlite3.Connection) -> int:
        """Drop what gives way to a boot report; return how many records."""
        return sum(self._evict(connection, Stream.BOOT) is not None for _ in range(EVICTIONS))

    def encode_report(self, seq: int, t_ns: int, report: FdirReport, max_bytes: int = REPORT_BYTES) -> bytes:
        """Return the frame of a report, with so much of its evidence that it has `max_bytes` if it can."""
        books = self._books
        frames = (
            encode_frame(node=books.node, boot=books.boot, seq=seq, t_ns=t_ns, packet=each)
            for each in shorter(report)
        )
        frame = b""
        for frame in frames:
            if len(frame) <= max_bytes:
                break
        return frame

    def _make_room(self, connection: sqlite3.Connection, stream: Stream, size: int) -> bool:
        """Give way until `size` bytes fit. Results count against their share with everything else stored."""
        while self._books.size(connection)[1] + size > self.limit(stream):
            if not self._evict(connection, stream):
                return False
        return True

    def _store(self, connection: sqlite3.Connection, stream: Stream, seq: int, frame: bytes) -> None:
        """Insert the record, giving way when the disk itself is full."""
        for _ in range(EVICTIONS):
            try:
                self._books.insert(connection, stream, seq, frame)
            except sqlite3.OperationalError as error:
                if not is_full(error) or not connection.in_transaction:
                    raise
                if not self._evict(connection, stream):
                    raise
                continue
            return
        raise StoreFull(f"the disk is full: {EVICTIONS} records gave way in vain")

    def _evict(self, connection: sqlite3.Connection, wanting: Stream) -> bool:
        """Take one step of giving way to `wanting`; return False when none is left."""
        for victim in victims(wanting):
            found = connection.execute(
                "SELECT rowid, boot, stream, seq, size FROM spool_record WHERE stream = ? "
                "ORDER BY boot, seq LIMIT 1",
                (victim.value,),
            ).fetchone()
            if found is not None:
                self._books.drop(connection, SpoolRow(*found), DropReason.FULL)
                return True
        return wanting is Stream.FDIR and self._condense(connection)

    def _condense(self, connection: sqlite3.Connection) -> bool:
        """Drop a status that a newer one replaces, or merge reports; return False if there is neither."""
        books = self._books
        _, before = books.size(connection)
        held = self._look(connection)
        if len(held.statuses) > 1:
            self._drop(connection, held.statuses[0], DropReason.FULL)
        elif len(held.most) > 1:
            seq = books.generated(connection, books.boot, Stream.FDIR) or 0
            whole = merged(each.report for each in held.most)
            room = sum(len(each.record.frame) for each in held.most) - 1
            frame = self.encode_report(seq, held.most[-1].t_ns, whole, min(room, REPORT_BYTES))
            if len(frame) <= room and self._replace(connection, held.most, seq, frame):
                books.count_generated(connection, Stream.FDIR, seq + 1)
        # Reading drops what is damaged: that is room as well.
        return books.size(connection)[1] < before

    def _absorb(self, connection: sqlite3.Connection, report: FdirReport, seq: int, t_ns: int) -> bool:
        """Store a report as one with those of its row and outcome; return False where that has no room."""
        held = self._look(connection, complete=True).reports.get(kind_of(report), [])
        if not held or not report.covers:
            return False
        _, used = self._books.size(connection)
        room = self.limit(Stream.FDIR) - used + sum(len(each.record.frame) for each in held)
        whole = merged([*(each.report for each in held), report])
        frame = self.encode_report(seq, t_ns, whole, min(room, REPORT_BYTES))
        return len(frame) <= room and self._replace(connection, held, seq, frame)

    def _replace(
        self, connection: sqlite3.Connection, held: Sequence[_Report], seq: int, frame: bytes
    ) -> bool:
        """Store a frame in the place of reports; return False, with all as it was, if the disk is full."""
        connection.execute("SAVEPOINT whole")
        try:
            for each in held:
                self._drop(connection, each.record, DropReason.MERGED)
            self._books.insert(connection, Stream.FDIR, seq, frame)
        except sqlite3.OperationalError as error:
            if not is_full(error) or not connection.in_transaction:
                raise
            connection.execute("ROLLBACK TO whole")
            connection.execute("RELEASE whole")
            return False
        connection.execute("RELEASE whole")
        return True

    def _drop_other(self, connection: sqlite3.Connection) -> bool:
        """Drop the oldest record of the FDIR that is no report; return False if there is none."""
        others = self._look(connection, complete=True).others
        if others:
            self._drop(connection, others[0], DropReason.FULL)
        return bool(others)

    def _drop(self, connection: sqlite3.Connection, record: SpoolRecord, reason: DropReason) -> None:
        row = SpoolRow(record.rowid, record.boot, record.stream.value, record.seq, len(record.frame))
        self._books.drop(connection, row, reason)

    def _look(self, connection: sqlite3.Connection, *, complete: bool = False) -> _Held:
        """Return what of the FDIR is stored: all of it, or as much as has something to condense."""
        held = _Held()
        rows = connection.execute(
            "SELECT rowid FROM spool_record WHERE stream = ? ORDER BY boot, seq", (Stream.FDIR.value,)
        ).fetchall()
        for number, (rowid,) in enumerate(rows, 1):
            record = self._books.read(connection, rowid)
            if record is None:
                continue
            frame = decode_frame(record.frame)
            try:
                packet = frame.packet()
            except FrameError:
                continue
            if isinstance(packet, FdirReport) and packet.covers:
                held.reports[kind_of(packet)].append(_Report(record, frame.t_ns, packet))
            elif isinstance(packet, FdirStatus):
                held.statuses.append(record)
            if isinstance(packet, (FdirStatus, FlightRecord)):
                held.others.append(record)
            if not complete and number >= SCANNED and (len(held.statuses) > 1 or len(held.most) > 1):
                break
        return held
