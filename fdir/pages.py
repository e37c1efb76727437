"""Digests of the memory pages a file is mapped to, and the scan that finds the bad ones.

A file that a library maps privately (weights, say) lives in this process as ordinary writable memory. The
digests of its 4 KiB pages, taken when the file was made, tell at any time whether that memory still holds
what it should.

Hash: xxh3_64 of the page. Beside one digest a page there is one for each block of up to `BLOCK_PAGES`
pages of a tensor, so that proving sound memory costs few long hash calls; single pages are hashed only
inside a block that fails. A random change goes unseen with probability 2^-64 a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from telemetry.errors import PenumbraError

PAGE_SIZE = 4096
"""Bytes of a page."""
BLOCK_PAGES = 256
"""Pages of a block: 1 MiB, long enough for the hash to run at memory speed and release the interpreter
lock."""


_DENSE_PAGES = 48
"""Pages of a block from which on hashing all of it takes less time than hashing these (assumed: a call for a
page takes about a sixtieth of the time a whole block does)."""


class MappedTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tensor that lies in a mapped file, on pages of its own."""

    name: str
    role: str
    """What it does: attn_qkv, attn_output, ffn_gate_up, ffn_down, norm, head, embed, table, check, scale,
    rope or other."""
    layer: int | None
    offset: int
    """First byte in the file; a multiple of the page size."""
    length: int
    """Bytes; the rest of the last page is zero."""
    first_page: int
    page_count: int
    rows: int = 0
    """Rows it has, where a step reads only some of them, such as those of the tokens in use: see
    `WeightMemory.row_pages`. 0: a step reads it whole."""
    read: bool
    """False if it is read while loading only, never in a step: what happens to it later cannot matter."""
    mapped_by: str = ""
    """Name of the graph whose session maps it. Empty: the loader maps it itself."""


class Span(NamedTuple):
    """A stretch of a process's memory backed by a file."""

    address: int
    file_offset: int
    length: int


class BadPage(NamedTuple):
    """A page that does not hash to its digest."""

    page: int
    """Number in the file."""
    address: int
    """Where it is in this process."""
    tensor: str
    role: str
    layer: int | None


def live_mappings(path: Path, pid: int | str = "self") -> list[Span]:
    """Find where a process has mapped a file.

    Parameters
    ----------
    path
        The file.
    pid
        The process; ``"self"`` is this one.

    Returns
    -------
    Spans by file offset; neighbours in both memory and file are joined. Empty if the file is not mapped.

    Raises
    ------
    OSError
        There is no such process, or its mappings may not be read.
    """
    wanted = str(path.resolve()).replace("\n", "\\012")
    found: list[Span] = []
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == wanted:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            found.append(Span(start, int(fields[2], 16), end - start))
    joined: list[Span] = []
    for span in sorted(found):
        last = joined[-1] if joined else None
        if (
            last
            and last.address + last.length == span.address
            and last.file_offset + last.length == span.file_offset
        ):
            joined[-1] = last._replace(length=last.length + span.length)
        else:
            joined.append(span)
    return sorted(joined, key=lambda span: span.file_offset)


def page_digests(data: memoryview) -> NDArray[np.uint64]:
    """Hash each page of a buffer.

    Parameters
    ----------
    data
        Contiguous bytes; a last page that is not full counts as padded with zeros.

    Returns
    -------
    uint64, shape ``(pages,)``.
    """
    whole, rest = divmod(len(data), PAGE_SIZE)
    starts = range(0, whole * PAGE_SIZE, PAGE_SIZE)
    digests = [xxhash.xxh3_64_intdigest(data[at : at + PAGE_SIZE]) for at in starts]
    if rest:
        digests.append(xxhash.xxh3_64_intdigest(bytes(data[-rest:]).ljust(PAGE_SIZE, b"\0")))
    return np.array(digests, np.uint64)


@dataclass(frozen=True)
class PageTable:
    """Digests of a file, of its parity file, and of the blocks of its tensors.

    Parameters
    ----------
    pages
        uint64, one a page of the file.
    parity
        uint64, one a page of the parity file.
    blocks
        For each tensor uint64, one for each `BLOCK_PAGES` pages from its first page on; the last may be
        shorter.
    """

    pages: NDArray[np.uint64]
    parity: NDArray[np.uint64]
    blocks: tuple[NDArray[np.uint64], ...]

    @classmethod
    def build(cls, data: memoryview, parity: memoryview, tensors: Sequence[MappedTensor]) -> PageTable:
        """Take the digests of a file whose length is a multiple of the page size, and of its parity file."""
        blocks = tuple(
            np.array(
                [xxhash.xxh3_64_intdigest(data[start:end]) for start, end in _block_ranges(tensor)], np.uint64
            )
            for tensor in tensors
        )
        return cls(page_digests(data), page_digests(parity), blocks)

    @classmethod
    def from_bytes(
        cls, raw: bytes, pages: int, parity_pages: int, tensors: Sequence[MappedTensor]
    ) -> PageTable:
        """Read what `to_bytes` wrote.

        Raises
        ------
        PenumbraError
            The number of digests is not that of these pages and tensors.
        """
        counts = [-(-tensor.page_count // BLOCK_PAGES) for tensor in tensors]
        expected = 8 * (pages + parity_pages + sum(counts))
        if len(raw) != expected:
            raise PenumbraError(f"page digests: {len(raw)} bytes, {expected} needed", "build the image again")
        values = np.frombuffer(raw, "<u8").astype(np.uint64)
        bounds = np.cumsum([pages, parity_pages, *counts])[:-1]
        first, second, *blocks = np.split(values, bounds)
        return cls(first, second, tuple(blocks))

    def to_bytes(self) -> bytes:
        """Return all digests, little-endian: pages, parity pages, then blocks tensor by tensor."""
        return np.concatenate((self.pages, self.parity, *self.blocks)).astype("<u8").tobytes()

    def page_is_good(self, page: int, data: memoryview | bytes) -> bool:
        """Tell whether bytes are those of a page of the file."""
        return xxhash.xxh3_64_intdigest(data) == int(self.pages[page])

    def parity_is_good(self, page: int, data: memoryview | bytes) -> bool:
        """Tell whether bytes are those of a page of the parity file."""
        return xxhash.xxh3_64_intdigest(data) == int(self.parity[page])


def _block_ranges(tensor: MappedTensor) -> Iterator[tuple[int, int]]:
    """Yield the byte range in the file of each block of a tensor."""
    last = tensor.first_page + tensor.page_count
    for first in range(tensor.first_page, last, BLOCK_PAGES):
        yield first * PAGE_SIZE, min(first + BLOCK_PAGES, last) * PAGE_SIZE


class _Block(NamedTuple):
    view: memoryview
    digest: int
    first_page: int


class WeightMemory:
    """The tensors of a file as this process has mapped them: checked, and open to repair in place.

    Blocks are numbered: first those of tensors that every step reads whole (`live_blocks`), then those of
    tensors read by row (`row_blocks`), then those read while loading only.

    Make one with `attach`. It is valid as long as the mapping, so keep the session that made it alive.
    """

    def __init__(self, tensors: Sequence[MappedTensor], addresses: Sequence[int], table: PageTable) -> None:
        self.tensors = tuple(tensors)
        self.table = table
        self._address = {
            tensor.first_page: address for tensor, address in zip(tensors, addresses, strict=True)
        }
        self._owner = np.full(len(table.pages), -1, np.int32)
        self._views: list[memoryview] = []
        live: list[_Block] = []
        by_row: list[_Block] = []
        unread: list[_Block] = []
        for index, tensor in enumerate(self.tensors):
            self._owner[tensor.first_page : tensor.first_page + tensor.page_count] = index
            whole = memory_view(self._address[tensor.first_page], tensor.page_count * PAGE_SIZE)
            self._views.append(whole)
            chosen = unread if not tensor.read else by_row if tensor.rows else live
            for (start, end), digest in zip(_block_ranges(tensor), table.blocks[index], strict=True):
                view = whole[start - tensor.offset : end - tensor.offset]
                chosen.append(_Block(view, int(digest), start // PAGE_SIZE))
        self._blocks = live + by_row + unread
        self._block_of = np.full(len(table.pages), -1, np.int32)
        for number, block in enumerate(self._blocks):
            self._block_of[block.first_page : block.first_page + len(block.view) // PAGE_SIZE] = number
        self.live_blocks = range(len(live))
        self.row_blocks = range(len(live), len(live) + len(by_row))
        self.live_bytes = sum(len(block.view) for block in live)
        """Bytes one `scan` hashes."""

    @classmethod
    def attach(cls, path: Path, tensors: Sequence[MappedTensor], table: PageTable) -> WeightMemory:
        """Find the tensors of a file in this process.

        Parameters
        ----------
        path
            The mapped file.
        tensors
            What should be mapped from it.
        table
            The digests of that file.

        Raises
        ------
        PenumbraError
            A tensor is not mapped, or is mapped more than once (then one copy would go unprotected).
        """
        spans = live_mappings(path)
        addresses: list[int] = []
        for tensor in tensors:
            end = (tensor.first_page + tensor.page_count) * PAGE_SIZE
            found = [
                span.address + tensor.offset - span.file_offset
                for span in spans
                if span.file_offset <= tensor.offset and end <= span.file_offset + span.length
            ]
            if len(found) != 1:
                state = f"mapped {len(found)} times" if found else "not mapped"
                raise PenumbraError(
                    f"{path}: tensor {tensor.name} (pages {tensor.first_page} to {end // PAGE_SIZE - 1}) "
                    f"is {state} in this process",
                    "load exactly one session from this image, and keep it while its memory is in use",
                )
            addresses.append(found[0])
        return cls(tensors, addresses, table)

    @property
    def block_count(self) -> int:
        """Number of blocks of all tensors."""
        return len(self._blocks)

    def scan(
        self,
        pool: Executor | None = None,
        parts: int = 1,
        *,
        blocks: Sequence[int] = (),
        pages: NDArray[np.int64] | Sequence[int] = (),
    ) -> list[BadPage]:
        """Check everything that every step reads, and what else is named.

        Parameters
        ----------
        pool
            Where to run; None runs all in this thread.
        parts
            Number of pieces given to the pool.
        blocks
            Other blocks, such as the next few of a rolling scrub.
        pages
            Other pages, such as those of rows in use. A block many of them lie in is checked as a whole.

        Returns
        -------
        The bad pages in file order; empty if the memory is sound.
        """
        numbers = np.unique(np.asarray(pages, np.int64))
        used, counts = np.unique(self._block_of[numbers], return_counts=True)
        dense = used[counts >= _DENSE_PAGES]
        single = numbers[~np.isin(self._block_of[numbers], dense)]
        wanted = [*self.live_blocks, *sorted({*blocks, *dense.tolist()} - {*self.live_blocks})]
        if pool is None:
            return sorted({*self.scan_blocks(wanted), *self.scan_pages(single)})
        pieces = [pool.submit(self.scan_blocks, wanted[part::parts]) for part in range(parts)]
        found = self.scan_pages(single)
        return sorted({*found, *chain.from_iterable(piece.result() for piece in pieces)})

    def scan_blocks(self, numbers: Iterable[int]) -> list[BadPage]:
        """Check some blocks, such as the next few of a rolling scrub; returns the bad pages in file order."""
        bad: list[BadPage] = []
        for number in numbers:
            block = self._blocks[number]
            if xxhash.xxh3_64_intdigest(block.view) != block.digest:
                count = len(block.view) // PAGE_SIZE
                bad += self.scan_pages(range(block.first_page, block.first_page + count))
        return sorted(bad)

    def scan_pages(self, pages: NDArray[np.int64] | Sequence[int]) -> list[BadPage]:
        """Check single pages, such as those of the embedding rows in use.

        Parameters
        ----------
        pages
            Page numbers, each of a mapped tensor.

        Returns
        -------
        The bad ones, in file order.
        """
        numbers = np.unique(np.asarray(pages, np.int64))
        owners = self._owner[numbers]
        bad: list[BadPage] = []
        for index in np.unique(owners).tolist():
            mine, view = numbers[owners == index], self._views[index]
            starts = ((mine - self.tensors[index].first_page) * PAGE_SIZE).tolist()
            digests = [xxhash.xxh3_64_intdigest(view[at : at + PAGE_SIZE]) for at in starts]
            wrong = np.array(digests, np.uint64) != self.table.pages[mine]
            bad += [self._bad_page(page) for page in mine[wrong].tolist()]
        return sorted(bad)

    def row_pages(self, role: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pages that rows of the tensors of a role lie on.

        Parameters
        ----------
        role
            Their role; those of it that a step reads whole are left to `scan`.
        rows
            Row numbers, such as token ids, any shape.

        Returns
        -------
        Page numbers, sorted, each once.
        """
        found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for tensor in self.tensors:
            if tensor.rows and tensor.role == role:
                row_bytes = tensor.length // tensor.rows
                start = tensor.offset + np.unique(rows) * row_bytes
                first, last = start // PAGE_SIZE, (start + row_bytes - 1) // PAGE_SIZE
                longest = int((last - first).max(initial=0))
                found += [np.minimum(first + step, last) for step in range(longest + 1)]
        return np.unique(np.concatenate(found))

    def holds(self, page: int) -> bool:
        """Tell whether a page of the file belongs to a mapped tensor."""
        return 0 <= page < len(self._owner) and int(self._owner[page]) >= 0

    def page_address(self, page: int) -> int:
        """Return where a page of the file is in this process.

        Raises
        ------
        KeyError
            The page belongs to no tensor.
        """
        tensor = self.tensor_of(page)
        return self._address[tensor.first_page] + (int(page) - tensor.first_page) * PAGE_SIZE

    def page_view(self, page: int) -> NDArray[np.uint8]:
        """Return the live page, uint8, shape ``(4096,)``; writing to it changes what is computed on."""
        return np.frombuffer(memory_view(self.page_address(page), PAGE_SIZE), np.uint8)

    def address(self, offset: int) -> int:
        """Return where a byte of the file is in this process."""
        page, rest = divmod(offset, PAGE_SIZE)
        return self.page_address(page) + rest

    def tensor_of(self, page: int) -> MappedTensor:
        """Return the tensor a page belongs to.

        Raises
        ------
        KeyError
            It belongs to none.
        """
        if not self.holds(page):
            raise KeyError(page)
        return self.tensors[int(self._owner[page])]

    def _bad_page(self, page: int) -> BadPage:
        tensor = self.tensor_of(page)
        return BadPage(int(page), self.page_address(page), tensor.name, tensor.role, tensor.layer)


def memory_view(address: int, length: int) -> memoryview:
    """Return memory of this process as a writable view, without a copy.

    Parameters
    ----------
    address
        Where it begins; the caller vouches that it is mapped, and for as long as the view is used.
    length
        Bytes.
    """
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
