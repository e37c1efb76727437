"""What regions of memory hold now, by name, for a dump to the ground.

Nothing here takes an address: a region is what a process has mapped from its own code, its model image or
its KV arena, or the encoded form of a table in use. Heap and stack, where keys are, are no region.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fdir.segments import CodeMapping, code_mappings, file_mappings
from node.inference.manifest import WEIGHTS
from telemetry.packets import ProductPart

WORKER_WEIGHTS = "worker.weights"
WORKER_KV = "worker.kv"


class DumpError(ValueError):
    """A region that cannot be dumped now, or has no such bytes."""


@dataclass(frozen=True)
class Dump:
    """What a region held, from `first_byte` on."""

    content: bytes
    parts: list[ProductPart]


class MemoryRegions:
    """The regions of a node.

    Parameters
    ----------
    worker_pid
        Returns the worker's process id, None while there is none.
    arena
        File of the KV arena.
    tables
        Returns, by name, what encodes a table in use.
    code
        Names of the code of supervisor and worker.
    """

    def __init__(
        self,
        *,
        worker_pid: Callable[[], int | None],
        arena: Path,
        tables: Callable[[], Mapping[str, Callable[[], bytes]]],
        code: tuple[str, str],
    ) -> None:
        self._worker_pid = worker_pid
        self._arena = arena
        self._tables = tables
        self._supervisor_code, self._worker_code = code

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all regions."""
        return (
            *(self._supervisor_code, self._worker_code, WORKER_WEIGHTS, WORKER_KV),
            *self._tables(),
        )

    def read(self, region: str, first_byte: int, size_bytes: int) -> Dump:
        """Read at most so many bytes of a region; blocks.

        Raises
        ------
        DumpError
            It is not there now, or ends before `first_byte`.
        OSError
            It cannot be read.
        """
        table = self._tables().get(region)
        if table is not None:
            return _cut(region, table(), first_byte, size_bytes)
        if region == WORKER_KV:
            return self._read_arena(first_byte, size_bytes)
        pid = os.getpid() if region == self._supervisor_code else self._worker_pid()
        if pid is None:
            raise DumpError(f"{region}: there is no worker now")
        try:
            maps = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
        except ProcessLookupError:
            raise DumpError(f"{region}: the worker has just ended") from None
        found = file_mappings(maps, WEIGHTS) if region == WORKER_WEIGHTS else code_mappings(maps)
        return _read_mappings(region, pid, found, first_byte, size_bytes)

    def _read_arena(self, first_byte: int, size_bytes: int) -> Dump:
        try:
            with self._arena.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                _check(WORKER_KV, size, first_byte)
                content = os.pread(file.fileno(), size_bytes, first_byte)
        except FileNotFoundError:
            raise DumpError(f"{WORKER_KV}: no worker has made it yet") from None
        return Dump(content, [])


def _read_mappings(
    region: str, pid: int, mappings: list[CodeMapping], first_byte: int, size_bytes: int
) -> Dump:
    """Read mappings as if they lay one behind the other, in order of address."""
    _check(region, sum(mapping.length for mapping in mappings), first_byte)
    pieces: list[bytes] = []
    parts: list[ProductPart] = []
    done, begin = 0, 0
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in mappings:
            skip = max(0, first_byte - begin)
            begin += mapping.length
            size = min(mapping.length - skip, size_bytes - done)
            if size <= 0:
                continue
            content = os.pread(memory.fileno(), size, mapping.address + skip)
            if len(content) != size:
                raise DumpError(f"{region}: it changed while it was read: try again")
            pieces.append(content)
            parts.append(
                ProductPart(first_byte=done, size_bytes=size, file=mapping.path, offset=mapping.offset + skip)
            )
            done += size
    return Dump(b"".join(pieces), parts)


def _cut(region: str, content: bytes, first_byte: int, size_bytes: int) -> Dump:
    _check(region, len(content), first_byte)
    return Dump(content[first_byte : first_byte + size_bytes], [])


def _check(region: str, size: int, first_byte: int) -> None:
    if first_byte >= size:
        raise DumpError(f"{region}: it has {size} bytes, byte {first_byte} is none of them")
