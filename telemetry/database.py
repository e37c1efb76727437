"""One SQLite database owned by one thread, with group commit.

The event loop never touches the disk: `Database.run` hands a function to the thread that owns the connection
and waits for its result. Requests that queue up meanwhile share one transaction, each in a savepoint of its
own, so one failing does not undo the others. WAL with synchronous=FULL: when `run` returns, what the function
wrote survives SIGKILL and power loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from telemetry.database_files import DatabaseFiles, DiskState, is_full
from telemetry.errors import PenumbraError
from telemetry.salvage import Salvage, SalvageError, salvage

T = TypeVar("T")
log = logging.getLogger("penumbra.database")

GROUP_MAX = 256
"""Most requests of one transaction (assumed: bounds what one lost transaction costs)."""
KEPT_PAGES = 16
"""Pages that what adds much leaves to the commands that free room: two or three each (assumed)."""
CLOSE_TIMEOUT_S = 5.0
"""How long `close` waits for queued requests, s (assumed)."""
_SIDE_FILES = ("-wal", "-shm")


__all__ = ["Database", "DiskState", "StoreFull", "check_kept_pages", "is_full"]


class StoreFull(Exception):
    """The database may not grow any more: disk full, or `max_bytes` reached. Nothing was written."""


def check_kept_pages(connection: sqlite3.Connection) -> None:
    """Check that this transaction leaves the room that is kept for what frees room.

    Raises
    ------
    StoreFull
        Less than `KEPT_PAGES` would be left.
    """
    most, held, unused = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("max_page_count", "page_count", "freelist_count")
    )
    left = most - held + unused
    if left < KEPT_PAGES:
        raise StoreFull(f"it would leave {left} pages of the database, {KEPT_PAGES} are kept")


@dataclass(frozen=True)
class _Request:
    function: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop

    def settle(self, result: Any, error: Exception | None) -> None:
        """Deliver the outcome on the loop that asked; nobody may be left there to take it."""

        def deliver() -> None:
            if self.future.done():
                return
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)

        try:
            self.loop.call_soon_threadsafe(deliver)
        except RuntimeError:
            log.debug("a database request outlived its event loop")


class Database:
    """A connection, its thread and its lock file. Made by `Database.open`.

    Attributes
    ----------
    recovered_from
        Where a corrupt database was moved to at open, None if the database was sound. The caller reports it,
        and must not reuse a boot number: the counter may be lost.
    salvaged
        What could be saved of the corrupt database and is in this one; None if nothing, or if it was sound.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path = path
        self.recovered_from: Path | None = None
        self.salvaged: Salvage | None = None
        self._damage: str | None = None
        self._files = DatabaseFiles(path, max_bytes)
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._closed = False
        self._leave = False
        self._connection: sqlite3.Connection
        """That of the owning thread; another one when the disk is left for memory, or taken again."""
        self._thread = threading.Thread(target=self._own, name=f"database.{path.name}", daemon=True)
        self._opened: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    async def open(cls, path: Path, *, max_bytes: int | None = None) -> Database:
        """Open or create a database and check it.

        A corrupt file is moved aside as `<name>.corrupt-<n>`, in the place of the one moved before, and a new
        one begun with what can be saved of it: a node in orbit must come up. See `recovered_from` and
        `salvaged`.

        Parameters
        ----------
        path
            The file. Its directory must exist and be writable. It is locked against a second process.
        max_bytes
            Most bytes of all files of the database: its own, its log with its index, and a reserve, which is
            let go when the disk is full; beyond its share a write raises `StoreFull`. With a bound it opens
            on a full disk as well, see `disk`. None: bounded by the disk.

        Raises
        ------
        PenumbraError
            The directory is missing or not writable, or another process holds the database.
        """
        database = cls(path, max_bytes)
        database._loop = asyncio.get_running_loop()
        database._opened = database._loop.create_future()
        database._thread.start()
        await database._opened
        return database

    @property
    def damage(self) -> str | None:
        """What a request met that only damage to the open database explains; None if nothing.

        Such requests go on to fail. To mend it the database must be opened anew: restart the node.
        """
        return self._damage

    @property
    def disk(self) -> DiskState:
        """What the disk has room for."""
        return self._files.state

    async def leave_disk(self) -> None:
        """Go on in memory with a copy of what is on the disk, until that has room.

        For a disk so full that not even the reserve helps. Until `disk` is another state again, nothing that
        is committed survives the process.
        """
        self._leave = True
        with contextlib.suppress(StoreFull):
            await self.run(lambda _: None)

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run `function(connection)` in a transaction; return its result once that is durable.

        All effects of `function` must be in the database: it is run a second time when the transaction it
        shared was lost. Cancelling the wait does not undo it.

        Raises
        ------
        StoreFull
            The database may not grow; what the function wrote is undone.
        RuntimeError
            The database is closed.
        Exception
            Whatever the function raises; what it wrote is undone.
        """
        if self._closed:
            raise RuntimeError(f"database {self.path} is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._requests.put(_Request(function, future, loop))
        return await future

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Finish queued requests and close; at most `timeout_s`, then leave the thread behind with a warning.

        A thread left behind holds no promise: every request it has not answered is not committed.
        """
        self._closed = True
        self._requests.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join, timeout_s)
        if self._thread.is_alive():
            log.warning("database %s is still busy %.1f s after close", self.path, timeout_s)

    # What follows runs in the owning thread.

    def _own(self) -> None:
        try:
            lock = self._lock()
            self._connection = self._open_sound()
        except Exception as error:
            self._report_open(error)
            return
        self._report_open(None)
        try:
            self._serve()
        finally:
            self._files.close(self._connection)
            os.close(lock)

    def _report_open(self, error: Exception | None) -> None:
        opened, loop = self._opened, self._loop
        if opened is None or loop is None:  # pragma: no cover - `open` sets both before the thread starts
            return
        _Request(lambda _: None, opened, loop).settle(None, error)

    def _lock(self) -> int:
        lock_path = self.path.with_name(self.path.name + ".lock")
        try:
            descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise PenumbraError(
                f"database {self.path}: cannot write in its directory: {error.strerror}",
                f"make sure {self.path.parent} exists and is writable",
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise PenumbraError(
                f"database {self.path}: another process is using it",
                "stop the other node, or give this one its own state directory",
            ) from None
        return descriptor

    def _open_sound(self) -> sqlite3.Connection:
        try:
            return self._files.open()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
                raise PenumbraError(
                    f"database {self.path}: {error}", "check the disk and its rights"
                ) from None
            self.recovered_from = self._move_aside()
            log.error("database %s was corrupt (%s), moved to %s", self.path, error, self.recovered_from)
            self._salvage(self.recovered_from)
            return self._files.open()

    def _salvage(self, aside: Path) -> None:
        """Put what can be saved of `aside` in place; leave nothing there when that is not possible."""
        fresh = self.path.with_name(self.path.name + ".salvaged")
        fresh.unlink(missing_ok=True)
        try:
            self.salvaged = salvage(aside, fresh)
        except SalvageError as error:
            log.error("nothing could be saved of it: %s", error)
            return
        fresh.rename(self.path)
        log.warning("saved of it: %s; not whole: %s", self.salvaged.rows, self.salvaged.incomplete)

    def _move_aside(self) -> Path:
        before = list(self.path.parent.glob(f"{self.path.name}.corrupt-*"))
        number = 1 + max((_number(path) for path in before), default=0)
        aside = self.path.with_name(f"{self.path.name}.corrupt-{number}")
        for suffix in _SIDE_FILES:
            side = self.path.with_name(self.path.name + suffix)
            if side.exists():
                side.rename(aside.with_name(aside.name + suffix))
        self.path.rename(aside)
        # One is kept: each is as large as a database may be, and nothing bounds how often one is damaged.
        for path in before:
            path.unlink(missing_ok=True)
        return aside

    def _serve(self) -> None:
        running = True
        while running:
            group: list[_Request] = []
            request = self._requests.get()
            while True:
                if request is None:
                    running = False
                    break
                group.append(request)
                if len(group) == GROUP_MAX:
                    break
                try:
                    request = self._requests.get_nowait()
                except queue.Empty:
                    break
            if self._leave:
                self._leave = False
                self._connection = self._files.leave_disk(self._connection)
            if group:
                self._run_group(group)
                self._connection = self._files.recover(self._connection)

    def _run_group(self, group: list[_Request], *, relieve: bool = True) -> None:
        connection = self._connection
        outcomes: list[tuple[_Request, Any, Exception | None]] = []
        again = False
        try:
            self._begin(connection)
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            for request in group:
                outcomes.append((request, *_run_one(connection, request.function)))
                if not connection.in_transaction:
                    break
            lost = not connection.in_transaction
            if not lost:
                self._commit(connection, pages)
        except (sqlite3.Error, StoreFull) as error:
            lost = True
            outcomes = [(request, None, _translate(error)) for request in group]
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if relieve and isinstance(error, sqlite3.Error):
                relieved = self._files.relieve(connection, error)
                if relieved is not None:
                    self._connection, again = relieved, True
        if lost and (again or len(group) > 1):
            # The disk is full, and a little room was made, or SQLite gave up the whole transaction for the
            # sake of one request: let each stand alone.
            for request in group:
                self._run_group([request], relieve=not again)
            return
        for request, result, error_ in outcomes:
            if self._damage is None and isinstance(error_, sqlite3.Error) and _is_damage(error_):
                self._damage = str(error_)
                log.error("database %s is damaged: %s", self.path, error_)
            request.settle(result, error_)

    def _begin(self, connection: sqlite3.Connection) -> None:
        why_not = self._files.check_log(connection)
        if why_not is not None:
            raise StoreFull(why_not)
        connection.execute("BEGIN IMMEDIATE")

    def _commit(self, connection: sqlite3.Connection, pages_before: int) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        why_not = self._files.check_growth(pages - pages_before)
        if why_not is not None:
            raise StoreFull(why_not)
        connection.execute("COMMIT")


def _number(aside: Path) -> int:
    """Return the number in the name of a database that was moved aside, or of a file beside it."""
    digits = aside.name.rpartition(".corrupt-")[2].partition("-")[0]
    return int(digits) if digits.isdecimal() else 0


def _run_one(
    connection: sqlite3.Connection, function: Callable[[sqlite3.Connection], Any]
) -> tuple[Any, Exception | None]:
    connection.execute("SAVEPOINT request")
    try:
        result = function(connection)
    except Exception as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK TO request")
            connection.execute("RELEASE request")
        return None, _translate(error)
    connection.execute("RELEASE request")
    return result, None


def _translate(error: Exception) -> Exception:
    if is_full(error):
        full = StoreFull(str(error))
        full.__cause__ = error
        return full
    return error


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    # Python gives no code to a text column that is no UTF-8: only damage writes one.
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or "decode to UTF-8" in str(error)
