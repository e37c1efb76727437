"""Uploads: model images and tables on their way up, in chunks that may come in any order, over any time.

The bytes lie in a file beside the database; a chunk is counted as received in the database, with its digest,
once it is on the disk. So an upload goes on after a kill at any moment with what it had, and storage that is
struck meanwhile is found at the commit, chunk by chunk. One upload is open at a time; the ground opens it and
closes it by command.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from node.command_effects import CommandFailed
from node.pulse import Pulse
from telemetry.commands import UploadBegin
from telemetry.database import Database, StoreFull
from telemetry.dictionary.base import ArgumentCode
from telemetry.dictionary.codes import FailureCode
from telemetry.keys import KeyRing
from telemetry.packets import UploadReport
from telemetry.signed import SignedError
from telemetry.upload import Chunk, decode_chunk

_log = logging.getLogger(__name__)

MAX_WAITING: Final = 256
"""Authentic chunks that may wait for the disk; what is dropped is missing, and sent again (assumed)."""
BATCH: Final = 64
"""Chunks brought to the disk together (assumed)."""
MAX_RANGES: Final = 256
"""Missing ranges that a report names."""
MAX_TABLE_BYTES: Final = 256 * 1024
"""Largest FDIR table taken (assumed: five times the packaged one)."""
ROOM: Final = {"image": 2, "fdir_table": 1}
"""Room that must be free, in sizes of the upload: an image is unpacked beside its archive."""

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS upload (
        one INTEGER PRIMARY KEY CHECK (one = 1), sha256 TEXT NOT NULL, kind TEXT NOT NULL,
        size INTEGER NOT NULL, chunk INTEGER NOT NULL)""",
    "CREATE TABLE IF NOT EXISTS upload_chunk (number INTEGER PRIMARY KEY, digest BLOB NOT NULL)",
)


@dataclass(frozen=True)
class Upload:
    """The upload that is open."""

    sha256: str
    kind: str
    size_bytes: int
    chunk_bytes: int

    @property
    def chunks(self) -> int:
        """Number of its chunks."""
        return -(-self.size_bytes // self.chunk_bytes)

    def length(self, index: int) -> int:
        """Return the size of a chunk, bytes."""
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)

    def takes(self, chunk: Chunk) -> bool:
        """Whether a chunk is one of its."""
        return (
            chunk.sha256.hex() == self.sha256
            and chunk.index < self.chunks
            and len(chunk.data) == self.length(chunk.index)
        )


class Uploads:
    """Takes uploads in.

    Parameters
    ----------
    node
        Chunks for other nodes are refused.
    ring
        Keys of the ground.
    directory
        For the file; it exists.
    images
        Directory of the image slots, for the room an image needs; it need not exist.
    database
        Where chunks are counted.
    """

    def __init__(self, node: str, ring: KeyRing, directory: Path, images: Path, database: Database) -> None:
        self.refused = 0
        """Messages that were not taken, since boot."""
        self._node = node
        self._ring = ring
        self._directory = directory
        self._images = images
        self._database = database
        self._waiting: asyncio.Queue[Chunk | None] = asyncio.Queue(MAX_WAITING)
        """Chunks; None wakes the task to answer a health ping."""
        self.pulse = Pulse("uploads", self._wake)
        """Health of the task that brings chunks to the disk."""
        self._changed = asyncio.Event()

    def path(self, upload: Upload) -> Path:
        """Return the file of an upload."""
        return self._directory / f"upload-{upload.sha256[:16]}.part"

    def begin(self, connection: sqlite3.Connection, asked: UploadBegin) -> None:
        """Open an upload, or find it open. Raises `CommandFailed`."""
        wanted = Upload(asked.sha256, asked.kind, asked.size_bytes, asked.chunk_bytes)
        known = current(connection)
        if known == wanted:
            return
        if known is not None:
            raise CommandFailed(
                FailureCode.UPLOAD_OPEN,
                f"upload {known.sha256} of kind {known.kind} is open: commit or abort it first",
            )
        if wanted.kind == "fdir_table" and wanted.size_bytes > MAX_TABLE_BYTES:
            raise CommandFailed(
                ArgumentCode.BAD_ARGUMENT, f"an FDIR table of more than {MAX_TABLE_BYTES} bytes"
            )
        for place in (self._directory, self._images):
            need = wanted.size_bytes * ROOM[wanted.kind]
            free = shutil.disk_usage(place).free if place.is_dir() else need
            if free < need:
                raise CommandFailed(
                    FailureCode.NO_ROOM, f"{need} bytes are needed on {place}, {free} are free"
                )
        connection.execute(
            "INSERT INTO upload VALUES (1, ?, ?, ?, ?)",
            (wanted.sha256, wanted.kind, wanted.size_bytes, wanted.chunk_bytes),
        )

    def close(self, connection: sqlite3.Connection) -> None:
        """Close the open upload, committed or not; its file goes with `sweep`."""
        for table in ("upload", "upload_chunk"):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - two fixed names

    def abort(self, connection: sqlite3.Connection) -> None:
        """Drop the open upload. Raises `CommandFailed` if there is none."""
        _open(connection)
        self.close(connection)

    def report(self, connection: sqlite3.Connection) -> UploadReport:
        """Return what has arrived of the open upload."""
        upload = current(connection)
        if upload is None:
            return UploadReport(sha256="", refused=self.refused)
        (received,) = connection.execute("SELECT COUNT(*) FROM upload_chunk").fetchone()
        return UploadReport(
            sha256=upload.sha256,
            kind=upload.kind,
            chunks=upload.chunks,
            received=received,
            missing=_missing(connection, upload),
            refused=self.refused,
        )

    def complete(self, connection: sqlite3.Connection, sha256: str) -> Upload:
        """Return the open upload if it is the one that is meant, and nothing is missing.

        Raises
        ------
        CommandFailed
            It is not.
        """
        upload = _open(connection)
        if upload.sha256 != sha256:
            raise CommandFailed(FailureCode.WRONG_UPLOAD, f"upload {upload.sha256} is open, not {sha256}")
        (received,) = connection.execute("SELECT COUNT(*) FROM upload_chunk").fetchone()
        if received < upload.chunks:
            raise CommandFailed(
                FailureCode.INCOMPLETE, f"{upload.chunks - received} of {upload.chunks} chunks are missing"
            )
        return upload

    async def find_complete(self, sha256: str) -> Upload:
        """As `complete`, for who has no transaction."""
        return await self._database.run(lambda c: self.complete(c, sha256))

    def offer(self, payload: bytes) -> None:
        """Take a message of the topic of uploads. Nobody without a key gets further. Raises `SignedError`."""
        try:
            self._waiting.put_nowait(decode_chunk(payload, self._ring, self._node))
        except SignedError:
            self.refused += 1
            raise
        except asyncio.QueueFull:
            self.refused += 1

    def _wake(self) -> None:
        # A full queue is being worked off, and the task beats at each batch.
        if not self._waiting.full():
            self._waiting.put_nowait(None)

    def look(self) -> None:
        """Tell that an upload was closed."""
        self._changed.set()

    async def run(self) -> None:
        """Bring chunks to the disk, and remove files, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write_chunks(), name="node.uploads.write")
            group.create_task(self._sweep_always(), name="node.uploads.sweep")

    async def _sweep_always(self) -> None:
        while True:
            await self.sweep()
            await self._changed.wait()
            self._changed.clear()

    async def _write_chunks(self) -> None:
        while True:
            waiting = [await self._waiting.get()]
            self.pulse.beat()
            while len(waiting) < BATCH and not self._waiting.empty():
                waiting.append(self._waiting.get_nowait())
            chunks = [chunk for chunk in waiting if chunk is not None]
            try:
                await self._take(chunks)
            except (StoreFull, sqlite3.Error, OSError) as error:
                self.refused += len(chunks)
                _log.error("%d chunks of an upload are not taken: %s", len(chunks), error)

    async def _take(self, chunks: Sequence[Chunk]) -> None:
        upload = await self._database.run(current)
        mine = [] if upload is None else [chunk for chunk in chunks if upload.takes(chunk)]
        self.refused += len(chunks) - len(mine)
        if upload is None or not mine:
            return
        await asyncio.to_thread(_write, self.path(upload), upload, mine)

        def count(connection: sqlite3.Connection) -> None:
            if current(connection) == upload:
                connection.executemany(
                    "INSERT OR REPLACE INTO upload_chunk VALUES (?, ?)",
                    [(chunk.index, xxhash.xxh3_64_digest(chunk.data)) for chunk in mine],
                )

        await self._database.run(count)

    async def prove(self, upload: Upload) -> None:
        """Read a complete upload back, and compare it with what arrived.

        Raises
        ------
        CommandFailed
            Chunks are damaged, which are missing again then; or the whole is not what the ground said.
        OSError
            Its file cannot be read.
        """
        digests = await self._database.run(
            lambda c: dict(c.execute("SELECT number, digest FROM upload_chunk").fetchall())
        )
        bad, sha256 = await asyncio.to_thread(_compare, self.path(upload), upload, digests)
        if bad:

            def forget(connection: sqlite3.Connection) -> None:
                connection.executemany(
                    "DELETE FROM upload_chunk WHERE number = ?", [(index,) for index in bad]
                )

            text = f"{len(bad)} chunks were damaged on board, {bad[0]} the first: they are missing again"
            raise CommandFailed(FailureCode.DAMAGED, text, forget)
        if sha256 != upload.sha256:
            text = f"SHA-256 {sha256}, {upload.sha256} announced: what was sent is not what was meant"
            raise CommandFailed(FailureCode.WRONG_CONTENT, f"{text}; abort it")

    async def content(self, upload: Upload) -> bytes:
        """Return the bytes of a small upload. Raises `OSError`."""
        return (await asyncio.to_thread(self.path(upload).read_bytes))[: upload.size_bytes]

    async def sweep(self) -> None:
        """Remove the files of uploads that are not open."""

        def remove(kept: Path | None) -> None:
            for path in self._directory.glob("upload-*.part"):
                if path != kept:
                    path.unlink(missing_ok=True)

        try:
            upload = await self._database.run(current)
            await asyncio.to_thread(remove, None if upload is None else self.path(upload))
        except (StoreFull, sqlite3.Error, OSError) as error:
            _log.error("files of uploads are not removed: %s", error)


def create(connection: sqlite3.Connection) -> None:
    """Create the tables where they are missing."""
    for statement in _SCHEMA:
        connection.execute(statement)


def current(connection: sqlite3.Connection) -> Upload | None:
    """Return the upload that is open, None if there is none."""
    row = connection.execute("SELECT sha256, kind, size, chunk FROM upload").fetchone()
    return None if row is None else Upload(*row)


def _open(connection: sqlite3.Connection) -> Upload:
    upload = current(connection)
    if upload is None:
        raise CommandFailed(FailureCode.NO_UPLOAD, "no upload is open")
    return upload


def _missing(connection: sqlite3.Connection, upload: Upload) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for gap in _gaps(connection, upload):
        if len(found) == MAX_RANGES:
            break
        found.append(gap)
    return found


def _gaps(connection: sqlite3.Connection, upload: Upload) -> Iterator[tuple[int, int]]:
    expected = 0
    for (index,) in connection.execute("SELECT number FROM upload_chunk ORDER BY number"):
        if index > expected:
            yield expected, index - 1
        expected = index + 1
    if expected < upload.chunks:
        yield expected, upload.chunks - 1


def _write(path: Path, upload: Upload, chunks: Sequence[Chunk]) -> None:
    """Write chunks; they are on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for chunk in chunks:
            if os.pwrite(descriptor, chunk.data, chunk.index * upload.chunk_bytes) != len(chunk.data):
                raise OSError(0, "the disk takes no more", str(path))
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _compare(path: Path, upload: Upload, digests: dict[int, bytes]) -> tuple[list[int], str]:
    """Return the chunks whose bytes are not those that arrived, and the SHA-256 of the whole."""
    bad: list[int] = []
    whole = hashlib.sha256()
    if not path.exists():
        # Its directory was struck, or never reached the disk: all of it is missing again.
        return list(range(upload.chunks)), ""
    with path.open("rb") as file:
        for index in range(upload.chunks):
            data = file.read(upload.length(index))
            whole.update(data)
            if xxhash.xxh3_64_digest(data) != digests.get(index):
                bad.append(index)
    return bad, whole.hexdigest()
