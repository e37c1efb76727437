"""Files read from the disk itself, past the page cache.

A clean private mapping *is* the page cache, so a plain read could return the very page that was struck.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

PAGE_SIZE: Final = 4096
"""Bytes of a page; direct reads begin and end at one."""


def read_golden(path: Path, offset: int, length: int) -> bytes:
    """Read a stretch of a file from the disk.

    It uses ``O_DIRECT``; where the file system refuses that (tmpfs has nothing but the cache), it drops the
    stretch from the cache first, as far as the kernel does so.

    Parameters
    ----------
    path
        The file.
    offset, length
        First byte, and number of bytes; multiples of the page size.

    Returns
    -------
    `length` bytes, what is past the end of the file as zeros.

    Raises
    ------
    OSError
        The file cannot be opened or read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return _read_after_drop(path, offset, length)
    try:
        with mmap.mmap(-1, length) as buffer:
            count = os.preadv(descriptor, [buffer], offset)
            while 0 < count < length and not count % PAGE_SIZE:
                with memoryview(buffer) as view, view[count:] as rest:
                    more = os.preadv(descriptor, [rest], offset + count)
                if not more:
                    break
                count += more
            return buffer[:count].ljust(length, b"\0")
    except OSError:
        return _read_after_drop(path, offset, length)
    finally:
        os.close(descriptor)


def _read_after_drop(path: Path, offset: int, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
        content = b""
        while more := os.pread(descriptor, length - len(content), offset + len(content)):
            content += more
        return content.ljust(length, b"\0")
    finally:
        os.close(descriptor)


def write_golden(path: Path, offset: int, content: bytes | memoryview) -> bool:
    """Write a stretch of a file to the disk, and prove that it got there.

    Returns
    -------
    bool
        Whether the disk gives back what was written.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if os.pwrite(descriptor, content, offset) != len(content):
            return False
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return read_golden(path, offset, len(content)) == bytes(content)
