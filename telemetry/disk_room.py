"""What a database may take of its disk, and a reserve of it that is let go when the disk is full.

A database in WAL mode is three files. Its log holds what was committed since the last checkpoint, and then
one transaction more, which writes each page of the database once at most. So with a checkpoint at `log_pages`
and `data_pages` in the database, the log never has more than the sum of both, and one page for the commit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

WAL_FRAME_BYTES, WAL_HEADER_BYTES = 24, 32
"""What the log adds to each page, and what it begins with (SQLite's file format, section 4.1)."""
SHM_BLOCK_BYTES, SHM_BLOCK_FRAMES = 32_768, 4062
"""The index of the log grows in blocks, each for so many frames at least (the same, section 4.2)."""
LOG_PAGES = 1000
"""Pages of the log at which it is written into the database, at most (SQLite's own default)."""


def _shm_bytes(frames: int) -> int:
    return -(-frames // SHM_BLOCK_FRAMES) * SHM_BLOCK_BYTES


@dataclass(frozen=True)
class Shares:
    """How the files of a database share its bound."""

    data_pages: int
    """Most pages of the database file."""
    log_pages: int
    """Pages of the log from which on it is written into the database."""
    reserve_bytes: int
    """Size of the reserve."""
    growth_pages: int
    """Pages by which one transaction may grow the database without a look at the disk.

    Until a checkpoint they are in the log alone: the reserve has room for them, and for those of the log.
    """

    @classmethod
    def of(cls, max_bytes: int, page_bytes: int) -> Shares:
        """Divide `max_bytes` among database, log, index of the log, and reserve."""
        log = max(1, min(LOG_PAGES, max_bytes // page_bytes // 16))
        reserve = 2 * log * page_bytes + SHM_BLOCK_BYTES
        frame = page_bytes + WAL_FRAME_BYTES
        index = _shm_bytes((max_bytes // page_bytes + log) // 2 + 1)
        fixed = reserve + index + WAL_HEADER_BYTES + (log + 1) * frame
        # Each page of the database may be in the log as well.
        data = (max_bytes - fixed) // (page_bytes + frame)
        return cls(max(1, data), log, reserve, log)

    def most_bytes(self, page_bytes: int) -> int:
        """Return what all files take together at most."""
        frames = self.data_pages + self.log_pages + 1
        log = WAL_HEADER_BYTES + frames * (page_bytes + WAL_FRAME_BYTES)
        return self.data_pages * page_bytes + log + _shm_bytes(frames) + self.reserve_bytes


class Reserve:
    """A file that holds room on the disk, and is removed when the room is needed.

    Parameters
    ----------
    path
        The file.
    size_bytes
        Its size; 0: there is none.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self._size_bytes = size_bytes

    @property
    def held(self) -> bool:
        """Whether the room is held, as far as there is to be any."""
        return file_bytes(self.path) == self._size_bytes

    def release(self) -> bool:
        """Let the room go; return whether there was any."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True

    def make(self) -> bool:
        """Hold the room, if the disk has twice as much; return whether it is held."""
        if self.held:
            return True
        # Twice: a reserve that takes the last block is let go by the next write.
        if free_bytes(self.path.parent) + file_bytes(self.path) < 2 * self._size_bytes:
            return False
        return self._allocate(self._size_bytes)

    def make_of_what_is_left(self) -> None:
        """Hold the room, or all of it that the disk still has: what the next boot begins with."""
        if not self.make():
            self.release()
            self._allocate(min(self._size_bytes, free_bytes(self.path.parent)))

    def _allocate(self, size_bytes: int) -> bool:
        self.release()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            self.release()
            return False
        return True


def take_what_is_left(path: Path, size_bytes: int, step_bytes: int) -> None:
    """Have a file take room on the disk up to a size, or as much of it as there is."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        held = os.fstat(descriptor).st_size
        wanted = min(size_bytes, held + free_bytes(path.parent))
        # What is free by its count may not all be had.
        for size in range(wanted, held, -step_bytes):
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError:
                continue
            break
    finally:
        os.close(descriptor)


def file_bytes(path: Path) -> int:
    """Return the size of a file; 0 without it."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def free_bytes(directory: Path) -> int:
    """Return what this user may still write on the disk of a directory; 0 when that cannot be found out."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize
