"""What the bench puts on shared memory, whose it is, and how what a dead bench left is cleared.

Shared memory outlives every process. Beside each arena that a bench answers for stands a mark,
`<arena>.bench`, locked for as long as that bench lives: the kernel lets the lock go, however the bench dies.
A mark that can be locked is a dead bench's; its arena goes once no worker holds that either. An arena without
a mark is some node's own and is never touched.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from node.inference.arena_layout import SHARED_MEMORY
from telemetry.errors import PenumbraError

_log = logging.getLogger(__name__)

MARK = ".bench"
_owned: set[Path] = set()


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Answer for the arena `path`, a file or directory that may not exist yet; it is gone afterwards.

    What dead benches left is cleared first.

    Raises
    ------
    PenumbraError
        Another bench answers for it, or shared memory cannot be written.
    """
    clear_left()
    mark = _mark(path)
    try:
        lock = _locked(mark, os.O_CREAT)
    except OSError as error:
        raise PenumbraError(
            f"{mark}: {error.strerror}", "make shared memory writable for this user"
        ) from None
    if lock is None:
        raise PenumbraError(f"{path} is in use by another flight", "wait for its end")
    _owned.add(path)
    try:
        yield
    finally:
        _owned.discard(path)
        _remove(path)
        mark.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """Yield a directory on shared memory for arenas of the bench's own workers; it is gone afterwards."""
    folder = SHARED_MEMORY / f"penumbra-{purpose}-{os.getpid()}-{secrets.token_hex(4)}"
    with owned(folder):
        folder.mkdir(mode=0o700)
        yield folder


def remove_owned() -> None:
    """Remove all that this process answers for: it is about to end without ado."""
    for path in list(_owned):
        _remove(path)
        _mark(path).unlink(missing_ok=True)


def clear_left() -> list[Path]:
    """Remove what benches left that are no more; return the arenas that were there."""
    cleared = []
    for mark in sorted(SHARED_MEMORY.glob(f"penumbra-*{MARK}")):
        try:
            lock = _locked(mark)
        except OSError:  # another user's
            continue
        if lock is None:
            continue
        try:
            path = mark.with_name(mark.name.removesuffix(MARK))
            if _held(path):  # by a worker that is about to die
                continue
            if path.exists():
                _log.info("shared memory of a flight that is no more is cleared: %s", path)
                cleared.append(path)
            _remove(path)
            mark.unlink(missing_ok=True)
        finally:
            os.close(lock)
    return cleared


def _mark(path: Path) -> Path:
    return path.with_name(path.name + MARK)


def _locked(path: Path, flags: int = 0) -> int | None:
    """Open and lock a mark; None when it is another's, or gone."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        # Between opening and locking it may have been removed: then this is a lock on nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _held(path: Path) -> bool:
    """Return whether a worker has the arena open: it holds a lock on it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
