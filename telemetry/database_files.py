"""The files of a database on a disk that may be full: bounded together, opened all the same, and given room.

While the disk is full the database does not grow: `StoreFull` is then met by the statement that wants a page,
where the policy of the spool gives way, and not at the commit, where nothing can. The room of the reserve is
for the log, so that what gives way and what is acknowledged can be committed. Without any room at all the
database goes on in memory, as a copy of what is on the disk, until there is room.

All of this runs in the thread that owns the connection.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from telemetry.disk_room import (
    WAL_FRAME_BYTES,
    WAL_HEADER_BYTES,
    Reserve,
    Shares,
    file_bytes,
    free_bytes,
    take_what_is_left,
)

log = logging.getLogger("penumbra.database")

LOOK_S = 1.0
"""How often room is looked for while the disk is full, s (assumed)."""
SHRINK_S = 60.0
"""How often a database that is mostly empty is made smaller for it, at most, s (assumed)."""
_NO_ROOM_BYTES = 64 << 10
"""Free room below which a failed write means a full disk (assumed: SQLite names it for some writes only)."""
_CHANGE = 0.25
"""Change of what the disk has for the database after which that is divided anew (assumed)."""
_WORKING_PAGES = 128
"""Pages that a database has at least, where the disk has room (assumed: the tables, and some telemetry)."""
_MAYBE_FULL = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


class DiskState(StrEnum):
    """What the disk of a database has room for."""

    ROOM = "room"
    """The database may grow to its bound, and the reserve is held."""
    FULL = "full"
    """The database does not grow; what is committed is durable."""
    MEMORY = "memory"
    """The disk takes nothing: what is committed is in memory alone."""


def is_full(error: BaseException) -> bool:
    """Return whether SQLite failed because the database may not grow (SQLite reports ENOSPC so too)."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


class DatabaseFiles:
    """The database file, its log and the log's index, and the reserve.

    Parameters
    ----------
    path
        The database file.
    max_bytes
        Most bytes of all files together, or what the disk has for them if that is less. None: there is no
        bound, and no reserve.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path = path
        self.state = DiskState.ROOM
        self.shares: Shares | None = None
        """How they share the bound, once the database is open; None without one."""
        self._max_bytes = max_bytes
        self._bound_bytes = 0
        self._wal = path.with_name(path.name + "-wal")
        self._reserve = Reserve(path.with_name(path.name + ".reserve"), 0)
        self._page_bytes = 0
        self._look_at_s = self._shrink_at_s = 0.0

    def open(self) -> sqlite3.Connection:
        """Open or create the database, check it, and make the reserve.

        Raises
        ------
        sqlite3.Error, UnicodeDecodeError
            It is damaged, or cannot be opened for another reason than a full disk.
        """
        try:
            connection = self._connect()
        except sqlite3.OperationalError as error:
            if self._max_bytes is None or not self._disk_is_full(error):
                raise
            connection = self._open_on_full_disk(error)
        if self.state is DiskState.ROOM:
            if self._reserve.make():
                self._take_pages(connection)
            else:
                log.error("the disk of database %s is full: no room for a reserve", self.path)
                self.state = DiskState.FULL
                self._set_limits(connection)
        return connection

    def _open_on_full_disk(self, error: sqlite3.OperationalError) -> sqlite3.Connection:
        self.state = DiskState.FULL
        self._reserve.release()
        # Locked for this process alone, the index of the log is in memory and not on the disk.
        for exclusive in (False, True):
            try:
                return self._connect(exclusive=exclusive)
            except sqlite3.OperationalError as again:
                if not self._disk_is_full(again):
                    raise
        if self.path.exists() and self.path.stat().st_size:
            raise error  # What is on the disk must not be lost by a copy that is empty.
        return self.leave_disk(None)

    def _connect(self, *, exclusive: bool = False) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None)
        try:
            if exclusive:
                connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("PRAGMA journal_mode=WAL")
            self._set_up(connection)
            # Not quick_check: a struck index, or a key struck in its table, would stop the node later.
            findings = connection.execute("PRAGMA integrity_check(1)").fetchall()
            if findings != [("ok",)]:
                raise sqlite3.DatabaseError(f"integrity_check: {findings[0][0]}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA synchronous=FULL")
        # What undoes a statement within a savepoint: as a file, it took half the time of an insert.
        connection.execute("PRAGMA temp_store=MEMORY")
        # Some builds overwrite what is deleted: an acknowledgement of large records then fills the log.
        connection.execute("PRAGMA secure_delete=OFF")
        if self._max_bytes is None:
            return
        (self._page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        self._share(self._max_bytes)
        self._set_limits(connection)

    def _share(self, max_bytes: int) -> None:
        """Divide the bound, or what the disk has if that is less and has changed by much."""
        names = ("", "-wal", "-shm", ".reserve")
        own = sum(file_bytes(self.path.with_name(self.path.name + name)) for name in names)
        found = own + free_bytes(self.path.parent)
        bound = max_bytes if self.state is DiskState.MEMORY else min(max_bytes, found)
        if self.state is DiskState.ROOM and abs(bound - self._bound_bytes) < _CHANGE * self._bound_bytes:
            return
        self._bound_bytes = bound
        self.shares = Shares.of(bound, self._page_bytes)
        self._reserve = Reserve(self._reserve.path, self.shares.reserve_bytes)

    def _set_limits(self, connection: sqlite3.Connection) -> None:
        """Bound the database by its share, or, on a full disk, by the pages it has."""
        if self.shares is None:
            return
        full = self.state is DiskState.FULL
        log_pages = self.shares.log_pages
        # A bound below the pages there are is taken as those.
        connection.execute(f"PRAGMA max_page_count={1 if full else self.shares.data_pages}")
        # On a full disk the log begins anew at each transaction, and keeps the room it has.
        connection.execute(f"PRAGMA wal_autocheckpoint={1 if full else log_pages}")
        limit = -1 if full else WAL_HEADER_BYTES + log_pages * (self._page_bytes + WAL_FRAME_BYTES)
        connection.execute(f"PRAGMA journal_size_limit={limit}")
        if full and not self._reserve.path.exists():
            # Zeros at its end are no frames. What the log does not hold now, others take.
            take_what_is_left(self._wal, self.shares.reserve_bytes, self._page_bytes)

    def _disk_is_full(self, error: sqlite3.Error) -> bool:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return is_full(error) or (code in _MAYBE_FULL and free_bytes(self.path.parent) < _NO_ROOM_BYTES)

    def relieve(self, connection: sqlite3.Connection, error: sqlite3.Error) -> sqlite3.Connection | None:
        """Make room for a transaction that could not be committed.

        Return the connection to try it once more with, or None. There must be no transaction under way.
        """
        if self.shares is None or self.state is DiskState.MEMORY or not self._disk_is_full(error):
            return None
        if self.state is DiskState.ROOM:
            self.state = DiskState.FULL
            log.error("the disk of database %s is full: %s", self.path, error)
        self._reserve.release()
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as stuck:
            # The database file cannot take what is in the log: that has no end but in memory.
            return self.leave_disk(connection) if self._disk_is_full(stuck) else None
        self._set_limits(connection)
        return connection

    def check_growth(self, grown_pages: int) -> str | None:
        """Return why a transaction that grows the database by so many pages must not be committed, or None.

        Once committed they have to get from the log into the database file, or the log can never begin anew.
        """
        if self.shares is None or self.state is DiskState.MEMORY or grown_pages <= self.shares.growth_pages:
            return None
        need, free = 2 * grown_pages * self._page_bytes, free_bytes(self.path.parent)
        if free >= need:
            return None
        return f"a transaction of {grown_pages} new pages needs {need} bytes of the disk, {free} are free"

    def check_log(self, connection: sqlite3.Connection) -> str | None:
        """Bring a log that is above its share back; return why nothing may be added to it, or None.

        Only a reader in another process can hold it back.
        """
        if self.shares is None or self.state is not DiskState.ROOM:
            return None
        # One page more: that of the commit.
        most_pages = self.shares.log_pages + 1
        if file_bytes(self._wal) <= WAL_HEADER_BYTES + most_pages * (self._page_bytes + WAL_FRAME_BYTES):
            return None
        _, pages, done = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if done < pages and pages > self.shares.data_pages:
            return f"the log has {pages} pages, and another process that reads the database holds it back"
        return None

    def leave_disk(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        """Go on in memory with a copy of what can be read of the disk; return the connection to that."""
        memory = sqlite3.connect(":memory:", isolation_level=None)
        if connection is not None:
            connection.backup(memory)
            connection.close()
        self.state = DiskState.MEMORY
        self._set_up(memory)
        log.error("the disk of database %s takes nothing: it goes on in memory", self.path)
        return memory

    def recover(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        """Look, once in a while, whether there is room again; return the connection to go on with.

        There must be no transaction under way.
        """
        now_s = time.monotonic()
        if self._max_bytes is None or self.shares is None or now_s < self._look_at_s:
            return connection
        self._look_at_s = now_s + LOOK_S
        try:
            if self.state is DiskState.MEMORY:
                return self._return_to_disk(connection, self.shares)
            self._shrink(connection, self.shares, now_s)
        except sqlite3.Error as error:
            log.warning("database %s: %s", self.path, error)
        if self.state is DiskState.FULL or self._bound_bytes != self._max_bytes:
            self._share(self._max_bytes)
            if self._reserve.make() and self.state is DiskState.FULL:
                self.state = DiskState.ROOM
                log.info("the disk of database %s has room again", self.path)
                self._take_pages(connection)
            self._set_limits(connection)
        return connection

    def _take_pages(self, connection: sqlite3.Connection) -> None:
        """Grow a small database to the pages it works with when the disk is full and it may not grow."""
        if self.shares is None:
            return
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        # Each is in the log as well, for a while.
        room_pages = free_bytes(self.path.parent) // (2 * self._page_bytes)
        missing = min(min(_WORKING_PAGES, self.shares.data_pages) - pages, room_pages) - 2
        if missing <= 0:
            return
        # In two transactions: pages that are used and freed in one are not written, and take no room.
        with suppress(sqlite3.Error):
            connection.execute("CREATE TABLE room (filler BLOB)")
            connection.execute("INSERT INTO room VALUES (zeroblob(?))", ((missing - 1) * self._page_bytes,))
        with suppress(sqlite3.Error):
            connection.execute("DROP TABLE IF EXISTS room")
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def _shrink(self, connection: sqlite3.Connection, shares: Shares, now_s: float) -> None:
        """Give back pages that are not used any more, if that is most of them and their room is wanted."""
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        wanted = self.state is DiskState.FULL or pages > shares.data_pages
        if not wanted or now_s < self._shrink_at_s:
            return
        (unused,) = connection.execute("PRAGMA freelist_count").fetchone()
        # It has to be worth it: room for the reserve, and for the pages it then works with.
        wanted_bytes = 2 * (shares.reserve_bytes + _WORKING_PAGES * self._page_bytes)
        if 2 * unused < pages or unused * self._page_bytes < wanted_bytes:
            return
        self._shrink_at_s = now_s + SHRINK_S
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._set_limits(connection)
        log.info("database %s made smaller by %d pages", self.path, unused)

    def _return_to_disk(self, memory: sqlite3.Connection, shares: Shares) -> sqlite3.Connection:
        (pages,) = memory.execute("PRAGMA page_count").fetchone()
        need = 2 * pages * (self._page_bytes + WAL_FRAME_BYTES) + 2 * shares.reserve_bytes
        if free_bytes(self.path.parent) < need:
            return memory
        disk = self._connect()
        try:
            memory.backup(disk)
        except BaseException:
            disk.close()
            raise
        memory.close()
        # The next look makes the reserve, and lets it grow.
        self.state = DiskState.FULL
        self._set_limits(disk)
        log.info("database %s is on its disk again", self.path)
        return disk

    def close(self, connection: sqlite3.Connection) -> None:
        """Close, and hold the room that the log gives back for the next boot."""
        if self.state is DiskState.MEMORY and self.shares is not None:
            with suppress(sqlite3.Error):
                connection = self._return_to_disk(connection, self.shares)
        connection.close()
        if self.state is not DiskState.MEMORY and self.shares is not None:
            self._reserve.make_of_what_is_left()
