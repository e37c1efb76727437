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
from collections import Counter
from collections.abc import Iterator, Sequence

from telemetry.ack import Ack
from telemetry.frame import encode_frame
from telemetry.packets import PRIORITY, FdirReport, Packet, Stream
from telemetry.spool_books import INSERT, DroppedRange, SpoolBooks, SpoolRecord
from telemetry.spool_policy import REFUSED_ABOVE, DropReason
from telemetry.spool_room import SpoolRoom

__all__ = ("DroppedRange", "Spool", "SpoolRecord", "SpoolRefused")

log = logging.getLogger("penumbra.spool")


class SpoolRefused(Exception):
    """No room for this result or product now. It was not generated: keep it, and try again later."""


class Spool(SpoolBooks):
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
        super().__init__(node, boot, capacity_bytes)
        self._room = SpoolRoom(self)

    def append(self, connection: sqlite3.Connection, packet: Packet, t_ns: int) -> int:
        """Store a packet; return its sequence number. It counts as generated when this is committed.

        What finds no room is generated and dropped at once, if it is no result or product. Reports of the
        FDIR may be merged to make room; the merged one is a record of its own, with the next number.

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
        seq = self.generated(connection, self.boot, stream) or 0
        if isinstance(packet, FdirReport):
            packet = self.numbered(connection, packet)
            frame = self._room.encode_report(seq, t_ns, packet)
        else:
            frame = encode_frame(node=self.node, boot=self.boot, seq=seq, t_ns=t_ns, packet=packet)
        self.count_generated(connection, stream, seq + 1)
        if len(frame) > self._room.limit(stream):
            self.count_drop(connection, self.boot, stream.value, seq, DropReason.TOO_LARGE)
        elif not self._room.place(connection, packet, seq, t_ns, frame):
            if stream in REFUSED_ABOVE:
                raise SpoolRefused(f"no room for a {stream.value} of {len(frame)} bytes")
            self.count_drop(connection, self.boot, stream.value, seq, DropReason.FULL)
        return seq

    def append_many(self, connection: sqlite3.Connection, packets: Sequence[tuple[Packet, int]]) -> list[int]:
        """Store several (packet, t_ns) as by `append`; return their sequence numbers.

        Where all plainly fit, and there is no report of the FDIR, each stream's account is written once
        instead of once a packet.

        Raises
        ------
        SpoolRefused, StoreFull, FrameError
            As `append`, for any of them; the caller undoes the transaction, and may append each alone.
        """
        if any(isinstance(packet, FdirReport) for packet, _ in packets):
            return [self.append(connection, packet, t_ns) for packet, t_ns in packets]
        following: dict[Stream, int] = {}
        sizes: Counter[Stream] = Counter()
        counts: Counter[Stream] = Counter()
        rows = []
        for packet, t_ns in packets:
            stream = packet.stream
            seq = following.get(stream)
            if seq is None:
                seq = self.generated(connection, self.boot, stream) or 0
            frame = encode_frame(node=self.node, boot=self.boot, seq=seq, t_ns=t_ns, packet=packet)
            following[stream] = seq + 1
            sizes[stream] += len(frame)
            counts[stream] += 1
            rows.append((PRIORITY[stream], self.boot, stream.value, seq, len(frame), frame))
        _, used = self.size(connection)
        if used + sizes.total() > min(self._room.limit(stream) for stream in (*following, Stream.EVENT)):
            return [self.append(connection, packet, t_ns) for packet, t_ns in packets]
        for stream, generated in following.items():
            self.count_generated(connection, stream, generated)
            self.use(connection, stream.value, counts[stream], sizes[stream])
        connection.executemany(INSERT, rows)
        return [row[3] for row in rows]

    def make_way(self, connection: sqlite3.Connection) -> int:
        """Drop what gives way to a boot report, so that a boot or a command fits; return how many records."""
        return self._room.make_way(connection)

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
            record = self.read(connection, rowid)
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

    def acknowledge(self, connection: sqlite3.Connection, ack: Ack, most: int | None = None) -> int:
        """Delete what the ground has archived; return how many records that was. Idempotent.

        With `most` it stops after so many, where the disk is too full for a larger transaction.

        A record that was under way when it was dropped, and is archived after all, moves from dropped to
        acked, so that `dropped` is what the ground really lacks. An acknowledgement of another node, or of
        sequence numbers never generated, is ignored as a whole (0).
        """
        generated = self.generated(connection, ack.boot, ack.stream) if ack.node == self.node else None
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
            undropped += self.undrop(connection, key, first, end)
        if deleted:
            self.use(connection, ack.stream.value, -deleted, -freed)
        if deleted or undropped:
            connection.execute(
                "UPDATE spool_stream SET acked = acked + ? WHERE boot = ? AND stream = ?",
                (deleted + undropped, *key),
            )
        return deleted
