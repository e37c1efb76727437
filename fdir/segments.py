"""The code of a process, checked page by page against what the files hold that it was mapped from.

Checked are private mappings of files that hold code: what is executable, and what is read-only. Only pages
that are in the process count: reading others would bring them in, and they cannot be wrong before. Pages that
were written when they are first seen are left out, where they are not executable: the loader relocates them.

A bad page is written anew through ``/proc/PID/mem``, with what the disk holds past the page cache, if that
has the digest of the manifest. Needs Linux, and the right to trace the process (its own, or its child).
"""

from __future__ import annotations

import errno
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from fdir.code_manifest import CodeManifest
from fdir.golden import PAGE_SIZE, read_golden
from fdir.regions import Damage, Kind

PIECE_PAGES: Final = 64
"""Pages of a piece: read and hashed in some 0.2 ms (measured, AMD Zen 3)."""
_PRESENT: Final = 1 << 63
_OF_FILE: Final = 1 << 61
"""Bits of a page that is in memory; that is the file's own, not a written copy. Source: Linux,
``Documentation/admin-guide/mm/pagemap.rst``."""
_UNSEEN, _WATCHED, _LEFT_OUT = 0, 1, 2


class CodeMapping(NamedTuple):
    """A private read-only mapping of a file."""

    address: int
    length: int
    """Bytes."""
    offset: int
    """First byte in the file."""
    path: str
    """File, as the kernel names it."""
    executable: bool
    deleted: bool
    """The file was removed or replaced since."""


def code_mappings(maps: str) -> list[CodeMapping]:
    """Find the read-only mappings of files that hold code.

    Parameters
    ----------
    maps
        Text in the form of ``/proc/PID/maps``.

    Returns
    -------
    In order of address; those that are not executable only of files that have an executable one as well.
    """
    found = [mapping for rights, mapping in _mappings(maps) if rights in {"r-xp", "r--p"}]
    code = {mapping.path for mapping in found if mapping.executable}
    return [mapping for mapping in found if mapping.path in code]


def file_mappings(maps: str, name: str) -> list[CodeMapping]:
    """Find the mappings of files of a name, whatever their rights, in order of address."""
    return [mapping for _, mapping in _mappings(maps) if mapping.path.rpartition("/")[2] == name]


def _mappings(maps: str) -> list[tuple[str, CodeMapping]]:
    """Return rights and place of every mapping of a file."""
    found: list[tuple[str, CodeMapping]] = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/"):
            continue
        start, end = (int(part, 16) for part in fields[0].split("-"))
        path = fields[5].removesuffix(" (deleted)").replace("\\012", "\n")
        deleted, rights = fields[5].endswith(" (deleted)"), fields[1]
        mapping = CodeMapping(start, end - start, int(fields[2], 16), path, rights == "r-xp", deleted)
        found.append((rights, mapping))
    return found


@dataclass(slots=True)
class _Watched:
    """A mapping, and which of its pages are watched."""

    mapping: CodeMapping
    seen: bytearray
    first_seen: dict[int, int]
    """Digests as first seen, by page of the mapping, where the file is no longer there."""


class ProcessCode:
    """The code of one process as a region.

    Parameters
    ----------
    name
        Name of the region.
    process
        What the process is called in evidence.
    pid
        The process; None is this one.
    manifest
        Digests of the files.

    Attributes
    ----------
    mapped_bytes
        Bytes of the mappings, of which `size` are in memory and watched.
    uncovered
        Files that cannot be read, and why: their mappings are not checked.

    Raises
    ------
    OSError
        There is no such process, or it may not be traced.
    """

    def __init__(self, name: str, process: str, pid: int | None, manifest: CodeManifest) -> None:
        self.mapped_bytes = 0
        self.uncovered: dict[str, str] = {}
        self._name = name
        self._process = process
        self._manifest = manifest
        self._watched: list[_Watched] = []
        self._pieces: list[tuple[_Watched, int]] = []
        self._size = self._size_so_far = 0
        # Open files go on meaning this process, also when its number is given to another one.
        self._folder = os.open(f"/proc/{'self' if pid is None else pid}", os.O_RDONLY | os.O_DIRECTORY)
        self._files: list[int] = []
        try:
            self._mem = self._open("mem", os.O_RDWR)
            self._pagemap = self._open("pagemap", os.O_RDONLY)
        except OSError:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Name of the region."""
        return self._name

    @property
    def kind(self) -> Kind:
        """`CODE`."""
        return Kind.CODE

    @property
    def size(self) -> int:
        """Bytes checked in the last pass, or so far in the first."""
        return self._size or self._size_so_far

    def refresh(self) -> int:
        """Read the mappings anew; return the number of pieces.

        Raises
        ------
        OSError
            The process is gone.
        """
        mappings = self._mappings()
        known = {watched.mapping: watched for watched in self._watched}
        self._watched = [
            known.get(mapping) or _Watched(mapping, bytearray(mapping.length // PAGE_SIZE), {})
            for mapping in mappings
        ]
        self._pieces = [
            (watched, first)
            for watched in self._watched
            for first in range(0, watched.mapping.length // PAGE_SIZE, PIECE_PAGES)
        ]
        self.mapped_bytes = sum(mapping.length for mapping in mappings)
        self._size, self._size_so_far = self._size_so_far, 0
        return len(self._pieces)

    def check(self, piece: int) -> list[Damage]:
        """Check a piece, and write bad pages anew.

        Raises
        ------
        OSError
            The process is gone.
        """
        watched, first = self._pieces[piece]
        mapping = watched.mapping
        expected = self._expected(watched)
        if expected is None:
            return []
        damages: list[Damage] = []
        for start, end in self._present(watched, first):
            content = memoryview(self._read(mapping.address + start * PAGE_SIZE, (end - start) * PAGE_SIZE))
            self._size_so_far += len(content)
            for page in range(start, end):
                at = (page - start) * PAGE_SIZE
                digest = xxhash.xxh3_64_intdigest(content[at : at + PAGE_SIZE])
                if digest != self._right(watched, expected, page, digest):
                    damages += self._mend(watched, page, content[at : at + PAGE_SIZE])
        return damages

    def recompute(self) -> None:
        """Forget which pages were seen, and read the mappings anew; the files stay the baseline."""
        self._watched = []

    def close(self) -> None:
        """Let go of the process."""
        for descriptor in (*self._files, self._folder):
            os.close(descriptor)
        self._files = []

    def _open(self, name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_CLOEXEC, dir_fd=self._folder)
        self._files.append(descriptor)
        return descriptor

    def _mappings(self) -> list[CodeMapping]:
        try:
            descriptor = os.open("maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._folder)
            with open(descriptor, encoding="utf-8", errors="surrogateescape") as file:
                found = code_mappings(file.read())
        except (FileNotFoundError, ProcessLookupError):
            raise self._gone() from None
        if not found:  # it has ended, and nobody has taken note of it yet
            raise self._gone()
        return found

    def _gone(self) -> ProcessLookupError:
        return ProcessLookupError(errno.ESRCH, f"the {self._process} has ended")

    def _expected(self, watched: _Watched) -> array[int] | None:
        """Return the digests of a mapping's file, none if it is gone; None if it cannot be read."""
        mapping = watched.mapping
        if mapping.deleted:
            return array("Q")
        try:
            return self._manifest.digests(mapping.path)
        except OSError as error:
            self.uncovered[mapping.path] = error.strerror or str(error)
            return None

    def _right(self, watched: _Watched, expected: array[int], page: int, found: int) -> int:
        if watched.mapping.deleted:
            return watched.first_seen.setdefault(page, found)
        number = watched.mapping.offset // PAGE_SIZE + page
        return expected[number] if number < len(expected) else found

    def _present(self, watched: _Watched, first: int) -> list[tuple[int, int]]:
        """Return the pages of a piece that are watched and in memory, as runs (first, one past the last)."""
        mapping, seen = watched.mapping, watched.seen
        last = min(first + PIECE_PAGES, len(seen))
        at = mapping.address // PAGE_SIZE + first
        raw = os.pread(self._pagemap, (last - first) * 8, at * 8)
        if len(raw) != (last - first) * 8:
            raise self._gone()
        runs: list[tuple[int, int]] = []
        for page, entry in enumerate(array("Q", raw), first):
            if not entry & _PRESENT:
                continue
            if seen[page] == _UNSEEN:
                seen[page] = _WATCHED if mapping.executable or entry & _OF_FILE else _LEFT_OUT
            if seen[page] == _WATCHED:
                if runs and runs[-1][1] == page:
                    runs[-1] = (runs[-1][0], page + 1)
                else:
                    runs.append((page, page + 1))
        return runs

    def _read(self, address: int, length: int) -> bytes:
        content = os.pread(self._mem, length, address)
        if len(content) != length:
            raise self._gone()
        return content

    def _mend(self, watched: _Watched, page: int, found: memoryview) -> list[Damage]:
        """Write a bad page anew; returns nothing if it is not there any more."""
        mapping = watched.mapping
        address = mapping.address + page * PAGE_SIZE
        if mapping not in self._mappings():
            return []  # unloaded since; whatever is there now is none of ours
        offset = mapping.offset + page * PAGE_SIZE
        evidence: dict[str, str | int | float | bool | None] = {
            "process": self._process, "file": mapping.path, "offset": offset, "address": f"{address:#x}",
        }  # fmt: skip
        right = self._source(watched, page)
        if isinstance(right, str):
            return [Damage(self._name, Kind.CODE, False, "none", evidence | {"reason": right})]
        differing = int.from_bytes(found, "little") ^ int.from_bytes(right, "little")
        evidence["bits"] = differing.bit_count()
        evidence["first_byte"] = ((differing & -differing).bit_length() - 1) // 8
        try:
            os.pwrite(self._mem, right, address)
            whole = self._read(address, PAGE_SIZE) == right
        except ProcessLookupError:
            raise
        except OSError as error:
            whole, evidence["reason"] = False, f"cannot be written: {error.strerror}"
        return [Damage(self._name, Kind.CODE, whole, "file" if whole else "none", evidence)]

    def _source(self, watched: _Watched, page: int) -> bytes | str:
        """Return what a page should hold, or why nobody knows."""
        mapping = watched.mapping
        if mapping.deleted:
            return "the file was removed or replaced"
        offset = mapping.offset + page * PAGE_SIZE
        try:
            content = read_golden(Path(mapping.path), offset, PAGE_SIZE)
        except OSError as error:
            return f"the file cannot be read: {error.strerror}"
        right = self._manifest.digests(mapping.path)[offset // PAGE_SIZE]
        if xxhash.xxh3_64_intdigest(content) != right:
            return "the file on the disk is damaged, too"
        return content
