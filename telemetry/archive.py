"""The ground archive: every frame once, by its identity, committed before it is acknowledged.

The key is (node, boot, stream, seq). Ingest is idempotent: any frames, in any order, any number of times,
give the same archive. Late frames are as welcome as early ones. A frame is kept as received, also when this
ground cannot read its packet: its identity is sound, and it may be read later.

The class blocks on the disk; an asyncio ground calls it through `asyncio.to_thread`. Calls are serialised.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from telemetry.ack import MAX_GAPS, Ack
from telemetry.database import StoreFull, is_full
from telemetry.errors import PenumbraError
from telemetry.frame import Frame, FrameError, decode_frame
from telemetry.ledger import Key, Ranges
from telemetry.packets import Ledger, Packet, Result, Stream

P = TypeVar("P", bound=Packet)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS frame (
    arrival INTEGER PRIMARY KEY, node TEXT NOT NULL, boot INTEGER NOT NULL, stream TEXT NOT NULL,
    seq INTEGER NOT NULL, type TEXT NOT NULL, data BLOB NOT NULL, UNIQUE (node, stream, boot, seq));
CREATE INDEX IF NOT EXISTS frame_type ON frame (node, type, boot, seq);
CREATE TABLE IF NOT EXISTS coverage (
    node TEXT NOT NULL, boot INTEGER NOT NULL, stream TEXT NOT NULL, first INTEGER NOT NULL,
    last INTEGER NOT NULL, PRIMARY KEY (node, boot, stream, first)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS conflict (
    node TEXT NOT NULL, boot INTEGER NOT NULL, stream TEXT NOT NULL, seq INTEGER NOT NULL,
    data BLOB NOT NULL, PRIMARY KEY (node, boot, stream, seq, data)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uplink_sequence (
    node TEXT NOT NULL, key_id TEXT NOT NULL, last INTEGER NOT NULL,
    PRIMARY KEY (node, key_id)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Ingested:
    """What became of a batch of frames. Counts."""

    new: int
    duplicate: int
    rejected: int
    """No frames: damaged on the way, or garbage."""
    conflicting: int
    """Another frame is archived under their identity: kept aside, counted, reported by the ledger check."""
    touched: frozenset[tuple[str, int, Stream]]
    """(node, boot, stream) of all frames that were read: what to acknowledge now."""


class Archive:
    """An open archive. Made by `Archive.open`, or by `Archive.read` where it is only read."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Archive:
        """Open an archive, or make one out of nothing or an empty file, and check it.

        Raises
        ------
        PenumbraError
            The directory is missing or not writable, or the file is damaged or no archive. It is left as
            it is: what the ground has is for people to repair, not for a program to move away.
        """
        return cls._opened(path, str(path))

    @classmethod
    def read(cls, path: Path) -> Archive:
        """Open an archive that is there to be read only, and check it; a station may be writing it.

        Raises
        ------
        PenumbraError
            There is no such file, or it is empty, damaged or no archive. It is left as it is.
        """
        if not path.is_file():
            problem = "not a regular file" if path.exists() else "no such file"
            raise PenumbraError(f"archive {path}: {problem}", "give the archive of a station or a flight")
        # Without a write-ahead log, SQLite needs no place to write: of read-only media it must be said.
        still = not os.access(path.absolute().parent, os.W_OK) and not Path(f"{path}-wal").exists()
        uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if still else ''}"
        return cls._opened(path, uri, reads=True)

    @classmethod
    def _opened(cls, path: Path, database: str, *, reads: bool = False) -> Archive:
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(database, uri=reads, isolation_level=None, check_same_thread=False)
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
            if "frame" not in tables and (reads or tables):
                # Before anything is written: it may be another program's.
                raise sqlite3.DatabaseError("it has no table of frames" if tables else "it is empty")
            if not reads:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
            findings = connection.execute("PRAGMA quick_check(1)").fetchall()
            if findings != [("ok",)]:
                raise sqlite3.DatabaseError(findings[0][0])
            for statement in [] if reads else _SCHEMA.split(";"):
                connection.execute(statement)
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise PenumbraError(
                f"archive {path}: {error}",
                "give the archive of a station or a flight; if this is one and damaged, repair a copy of it"
                if reads
                else "check that its directory exists and is writable; if the file is damaged, move it away; "
                "if it is no archive, name another",
            ) from None
        return cls(path, connection)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if is_full(error):
                    raise StoreFull(f"archive {self.path}: {error}") from error
                raise

    def next_sequence(self, node: str, key_id: str) -> int:
        """Return a sequence number for a telecommand, from 1, that was never returned before; durable."""
        with self._transaction() as connection:
            row = connection.execute(
                "INSERT INTO uplink_sequence VALUES (?, ?, 1) "
                "ON CONFLICT (node, key_id) DO UPDATE SET last = last + 1 RETURNING last",
                (node, key_id),
            ).fetchone()
        return int(row[0])

    def ingest(self, frames: Iterable[bytes]) -> Ingested:
        """Archive frames. When it returns, they are durable and may be acknowledged.

        Raises
        ------
        StoreFull
            The disk is full; none of the batch is archived, and none may be acknowledged.
        """
        new = duplicate = rejected = conflicting = 0
        touched: set[tuple[str, int, Stream]] = set()
        with self._transaction() as connection:
            for data in frames:
                try:
                    frame = decode_frame(data)
                except FrameError:
                    rejected += 1
                    continue
                touched.add((frame.node, frame.boot, frame.stream))
                known = connection.execute(
                    "SELECT data FROM frame WHERE node = ? AND stream = ? AND boot = ? AND seq = ?",
                    (frame.node, frame.stream.value, frame.boot, frame.seq),
                ).fetchone()
                if known is None:
                    _insert(connection, frame, data)
                    new += 1
                elif known[0] == data:
                    duplicate += 1
                else:
                    connection.execute(
                        "INSERT OR IGNORE INTO conflict VALUES (?, ?, ?, ?, ?)",
                        (frame.node, frame.boot, frame.stream.value, frame.seq, data),
                    )
                    conflicting += 1
        return Ingested(new, duplicate, rejected, conflicting, frozenset(touched))

    def sequences(self, node: str) -> dict[Key, Ranges]:
        """Return the archived sequence numbers as ranges (first, last), by (boot, stream)."""
        found: dict[Key, Ranges] = {}
        with self._lock:
            rows = self._connection.execute(
                "SELECT boot, stream, first, last FROM coverage WHERE node = ? ORDER BY boot, stream, first",
                (node,),
            ).fetchall()
        for boot, stream, first, last in rows:
            found.setdefault((boot, Stream(stream)), []).append((first, last))
        return found

    def acks(self, node: str, only: Iterable[Key] | None = None) -> list[Ack]:
        """Return what may be acknowledged to a node: one for each (boot, stream), or for `only` those."""
        wanted = None if only is None else set(only)
        return [
            _ack(node, boot, stream, ranges)
            for (boot, stream), ranges in self.sequences(node).items()
            if wanted is None or (boot, stream) in wanted
        ]

    def counts(self, node: str) -> dict[Key, int]:
        """Return the number of archived records by (boot, stream), counted from the records themselves."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT boot, stream, COUNT(*) FROM frame WHERE node = ? GROUP BY boot, stream", (node,)
            ).fetchall()
        return {(boot, Stream(stream)): count for boot, stream, count in rows}

    def conflicts(self, node: str) -> int:
        """Return how many frames came under an identity that was already used by another."""
        with self._lock:
            (count,) = self._connection.execute(
                "SELECT COUNT(*) FROM conflict WHERE node = ?", (node,)
            ).fetchone()
        return int(count)

    def nodes(self) -> list[str]:
        """Return the names of all nodes in the archive."""
        with self._lock:
            rows = self._connection.execute("SELECT DISTINCT node FROM coverage ORDER BY node").fetchall()
        return [name for (name,) in rows]

    def frames(self, node: str) -> list[bytes]:
        """Return the raw frames of a node in the order of their arrival."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT data FROM frame WHERE node = ? ORDER BY arrival", (node,)
            ).fetchall()
        return [data for (data,) in rows]

    def packets(self, node: str, kind: type[P]) -> list[tuple[Frame, P]]:
        """Return (frame, packet) of every packet of one type, in order of (boot, seq).

        A packet this ground cannot read is left out; its frame stays in `frames`.
        """
        with self._lock:
            rows = self._connection.execute(
                "SELECT data FROM frame WHERE node = ? AND type = ? ORDER BY boot, seq",
                (node, kind.type_name),
            ).fetchall()
        found: list[tuple[Frame, P]] = []
        for (data,) in rows:
            frame = decode_frame(data)
            try:
                packet = frame.packet()
            except FrameError:
                continue
            if isinstance(packet, kind):
                found.append((frame, packet))
        return found

    def results(self, node: str) -> dict[str, list[Result]]:
        """Return the result blocks of every job, in the order of their first token."""
        jobs: dict[str, list[Result]] = {}
        for _, result in self.packets(node, Result):
            jobs.setdefault(result.job, []).append(result)
        for blocks in jobs.values():
            blocks.sort(key=lambda block: block.first)
        return jobs

    def last_ledger(self, node: str) -> Ledger | None:
        """Return the ledger the node generated last, or None."""
        ledgers = self.packets(node, Ledger)
        return ledgers[-1][1] if ledgers else None


def _insert(connection: sqlite3.Connection, frame: Frame, data: bytes) -> None:
    stream = frame.stream.value
    connection.execute(
        "INSERT INTO frame (node, boot, stream, seq, type, data) VALUES (?, ?, ?, ?, ?, ?)",
        (frame.node, frame.boot, stream, frame.seq, frame.type, data),
    )
    key = (frame.node, frame.boot, stream)
    first = last = frame.seq
    before = connection.execute(
        "SELECT first, last FROM coverage WHERE node = ? AND boot = ? AND stream = ? AND first < ? "
        "ORDER BY first DESC LIMIT 1",
        (*key, frame.seq),
    ).fetchone()
    if before is not None and before[1] == frame.seq - 1:
        first = before[0]
    after = connection.execute(
        "SELECT last FROM coverage WHERE node = ? AND boot = ? AND stream = ? AND first = ?",
        (*key, frame.seq + 1),
    ).fetchone()
    if after is not None:
        last = after[0]
        connection.execute(
            "DELETE FROM coverage WHERE node = ? AND boot = ? AND stream = ? AND first = ?",
            (*key, frame.seq + 1),
        )
    connection.execute("INSERT OR REPLACE INTO coverage VALUES (?, ?, ?, ?, ?)", (*key, first, last))


def _ack(node: str, boot: int, stream: Stream, ranges: Ranges) -> Ack:
    """Return the acknowledgement of ascending ranges; beyond `MAX_GAPS` gaps it covers less."""
    gaps: Ranges = []
    upto = 0
    for first, last in ranges:
        if first > upto:
            if len(gaps) == MAX_GAPS:
                break
            gaps.append((upto, first - 1))
        upto = last + 1
    return Ack(node=node, boot=boot, stream=stream, upto=upto, gaps=gaps)
