"""The code a process runs, compared with what the files hold from which it was mapped.

The baseline is a manifest with a digest of each 4 KiB page of the executable segments of each file, made when
the software is first started, from the disk past the page cache.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class CodeMapping(NamedTuple):
    """An executable mapping of a file in a process."""

    address: int
    length: int
    """Bytes."""
    offset: int
    """First byte in the file."""
    path: str
    """File, as the kernel names it."""
    deleted: bool
    """The file was removed or replaced since."""


class CodeSegment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Digests of an executable stretch of a file."""

    offset: int
    """First byte in the file; a multiple of the page size."""
    digests: bytes
    """xxh3_64 of each page, 8 bytes little-endian each; past the end of the file are zeros."""


class CodeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that code is mapped from."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of its last change: one that is another was replaced on purpose; a strike does not set it."""
    segments: tuple[CodeSegment, ...]
