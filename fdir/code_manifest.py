"""What the files hold that code is mapped from: a digest of each page, taken when the software first starts.

The digests are taken from the disk, past the page cache, and kept in a file; what is mapped later, in this
start and in all that follow, is compared with them. A strike changes neither size nor time of a file, a new
version of the software does: then they are taken anew, and that is told.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from fdir.golden import PAGE_SIZE, read_golden
from telemetry.durable_file import replace_file

FORMAT: Final = 1
"""Version of the file's layout; one of another version is made anew."""
_CHUNK: Final = 1 << 20
"""Bytes read at once."""


class CodeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that code is mapped from."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of its last change."""
    digests: bytes
    """xxh3_64 of each page, 8 bytes little-endian each; what is past the end of the file counts as zeros."""


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    files: dict[str, CodeFile]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    xxh3: int
    body: bytes


class CodeManifest:
    """The manifest, in memory and in its file.

    Parameters
    ----------
    path
        Its file; it need not exist.
    note
        Takes a sentence when the manifest is not what an earlier start left: damaged, or software changed.
    """

    def __init__(self, path: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self.path = path
        self._note = note
        self._files: dict[str, CodeFile] = {}
        self._known: dict[str, array[int]] = {}
        """Digests of files compared with the disk's size and time in this start."""
        self._changed: list[str] = []
        self._dirty = False
        self._load()

    @property
    def news(self) -> bool:
        """Whether there is something to save or to note."""
        return self._dirty or bool(self._changed)

    def __len__(self) -> int:
        return len(self._files)

    def digests(self, path: str) -> array[int]:
        """Return the digests of a file, one a page, from the manifest, else from the disk.

        Raises
        ------
        OSError
            The file cannot be read.
        """
        if (known := self._known.get(path)) is not None:
            return known
        found = os.stat(path)
        entry = self._files.get(path)
        if entry is None or (entry.size, entry.mtime_ns) != (found.st_size, found.st_mtime_ns):
            if entry is not None:
                self._changed.append(path)
            entry = CodeFile(found.st_size, found.st_mtime_ns, _digest(Path(path), found.st_size))
            self._files[path] = entry
            self._dirty = True
        self._known[path] = array("Q", entry.digests)
        return self._known[path]

    def save(self) -> None:
        """Write the file, if anything is new; what is not there any more is left out.

        Raises
        ------
        OSError
            It cannot be written; the old one stays.
        """
        if self._changed:
            names = sorted(Path(path).name for path in self._changed)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self._note(f"software changed since the last start: {', '.join(names[:3])}{more}")
            self._changed.clear()
        if not self._dirty:
            return
        self._files = {path: entry for path, entry in self._files.items() if os.path.exists(path)}
        body = msgspec.msgpack.encode(_Body(FORMAT, self._files))
        replace_file(self.path, msgspec.msgpack.encode(_Envelope(xxhash.xxh3_64_intdigest(body), body)))
        self._dirty = False

    def _load(self) -> None:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return
        try:
            envelope = msgspec.msgpack.decode(raw, type=_Envelope)
            if xxhash.xxh3_64_intdigest(envelope.body) != envelope.xxh3:
                raise ValueError("its digest does not fit")
            body = msgspec.msgpack.decode(envelope.body, type=_Body)
            if body.format != FORMAT:
                raise ValueError(f"format {body.format}, this version reads {FORMAT}")
        except (msgspec.DecodeError, ValueError) as error:
            self._note(f"code manifest {self.path.name} is made anew: {error}")
            return
        self._files = body.files


def _digest(path: Path, size: int) -> bytes:
    digests: array[int] = array("Q")
    for offset in range(0, size, _CHUNK):
        length = min(_CHUNK, -(-(size - offset) // PAGE_SIZE) * PAGE_SIZE)
        content = memoryview(read_golden(path, offset, length))
        digests.extend(
            xxhash.xxh3_64_intdigest(content[at : at + PAGE_SIZE]) for at in range(0, length, PAGE_SIZE)
        )
    return digests.tobytes()
