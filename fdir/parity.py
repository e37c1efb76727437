"""Parity pages: restore bad pages of a mapped file from good ones, without the file.

Every `DATA_PAGES` pages of the file have `PARITY_PAGES` parity pages (`fdir.erasure`): up
to that many bad pages of a group come back exactly. With ``G`` groups in a file of ``n`` pages:

- page ``p`` is member ``p // G`` of group ``p % G``, so a burst of up to ``2 G`` neighbouring pages can be
  restored;
- members past the end of the file count as zeros;
- parity page ``j`` of group ``g`` is page ``j * G + g`` of the parity file.

No page is trusted: whatever goes into a restoration, and what comes out of it, must hash to its digest. So
a result is right or is reported as lost; it is never silently wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fdir import erasure
from fdir.golden import read_golden, write_golden
from fdir.pages import PAGE_SIZE, PageTable, WeightMemory

DATA_PAGES = 16
"""Data pages of a group: with 2 parity pages, an eighth of the file (assumed: room against strength)."""
PARITY_PAGES = 2
"""Parity pages of a group, and the number of bad pages in a group that can be restored."""
_CHUNK = 256 * PAGE_SIZE
"""Bytes of each member encoded in one call."""


@dataclass(frozen=True)
class Repair:
    """What became of bad pages.

    Parameters
    ----------
    from_parity
        Pages restored from parity, now good in memory.
    from_file
        Pages restored from the file on disk, now good in memory.
    lost
        Pages nothing could restore; memory was left as it is.
    from_spare
        Pages restored from another file of the same contents, now good in memory.
    rewritten
        Those of them that are good again in the file on disk, too.
    """

    from_parity: tuple[int, ...]
    from_file: tuple[int, ...]
    lost: tuple[int, ...]
    from_spare: tuple[int, ...] = ()
    rewritten: tuple[int, ...] = ()


def group_count(pages: int, data_pages: int = DATA_PAGES) -> int:
    """Return the number of groups of a file of that many pages."""
    return -(-pages // data_pages)


def encode(
    data: memoryview,
    write: Callable[[int, bytes], object],
    progress: Callable[[float], object] = lambda _: None,
    threads: int = 1,
) -> int:
    """Compute the parity file of a file.

    Parameters
    ----------
    data
        The file; its length is a multiple of the page size.
    write
        Called with a byte position in the parity file and what belongs there, in any order.
    progress
        Called with the part done, 0 to 1.
    threads
        Threads that compute.

    Returns
    -------
    Number of parity pages.
    """
    pages = len(data) // PAGE_SIZE
    span = group_count(pages) * PAGE_SIZE

    def encode_chunk(at: int) -> tuple[erasure.Block, ...]:
        length = min(_CHUNK, span - at)
        return erasure.parity([_block(data, member * span + at, length) for member in range(DATA_PAGES)])

    starts = range(0, span, _CHUNK)
    with ThreadPoolExecutor(threads, "penumbra-parity") as pool:
        for at, parity in zip(starts, pool.map(encode_chunk, starts), strict=True):
            for number, block in enumerate(parity):
                write(number * span + at, block.tobytes())
            progress(min(1.0, (at + _CHUNK) / span))
    return PARITY_PAGES * group_count(pages)


def golden_page(path: Path, page: int) -> bytes:
    """Read a page of a file from the disk itself, past the page cache: see `fdir.golden`.

    Parameters
    ----------
    path
        The file.
    page
        Page number.

    Returns
    -------
    The page, 4096 bytes, a part past the end of the file as zeros.

    Raises
    ------
    OSError
        The file cannot be opened or read.
    """
    return read_golden(path, page * PAGE_SIZE, PAGE_SIZE)


class ParityFile:
    """The parity of a mapped file.

    Parameters
    ----------
    path
        The parity file; opened anew for each page read, so it may lie on a disk that comes and goes.
    table
        Digests of the file and of its parity.
    """

    def __init__(self, path: Path, table: PageTable) -> None:
        self.path = path
        self.table = table
        self.groups = group_count(len(table.pages))

    def restore(self, pages: Collection[int], read: Callable[[int], bytes | memoryview]) -> dict[int, bytes]:
        """Compute what bad pages should hold.

        Parameters
        ----------
        pages
            Numbers of the bad pages.
        read
            Returns a page of the file, 4096 bytes, or nothing; what it returns is checked before use.

        Returns
        -------
        Contents by page number, each checked against its digest; a page that cannot be restored is absent.
        """
        wanted: defaultdict[int, list[int]] = defaultdict(list)
        for page in pages:
            wanted[page % self.groups].append(page)
        restored: dict[int, bytes] = {}
        for group, members in wanted.items():
            blocks = self._decode(group, read)
            for page in members if blocks else ():
                content = blocks[page // self.groups].tobytes()
                if self.table.page_is_good(page, content):
                    restored[page] = content
        return restored

    def _decode(self, group: int, read: Callable[[int], bytes | memoryview]) -> list[erasure.Block]:
        """Return the members of a group, or an empty list if too few of its pages are good."""
        members: list[erasure.Block | None] = []
        for page in range(group, DATA_PAGES * self.groups, self.groups):
            inside = page < len(self.table.pages)
            content = bytes(read(page)) if inside else bytes(PAGE_SIZE)
            good = not inside or self.table.page_is_good(page, content)
            members.append(np.frombuffer(content, np.uint8) if good else None)
        pages = (self._parity_page(number * self.groups + group) for number in range(PARITY_PAGES))
        extra = {number: np.frombuffer(page, np.uint8) for number, page in enumerate(pages) if page}
        return erasure.restore(members, extra) or []

    def _parity_page(self, page: int) -> bytes:
        """Return a parity page, from the disk itself if the cached one is bad; empty if both are."""
        try:
            with self.path.open("rb") as file:
                file.seek(page * PAGE_SIZE)
                content = file.read(PAGE_SIZE)
            if not self.table.parity_is_good(page, content):
                content = golden_page(self.path, page)
        except OSError:
            return b""
        return content if self.table.parity_is_good(page, content) else b""


def repair(
    memory: WeightMemory,
    parity: ParityFile,
    pages: Collection[int],
    file: Path,
    spares: Sequence[Path] = (),
) -> Repair:
    """Make bad pages of live memory good again, in place: from parity, the file on disk, or a spare file.

    A page that neither parity nor the file has is bad in the file, too: what a spare gave is written there.

    Parameters
    ----------
    memory
        The live memory.
    parity
        The parity of the mapped file.
    pages
        Numbers of the bad pages.
    file
        The mapped file.
    spares
        Files that may hold the same, such as that of the other image slot; digests tell page by page.

    Returns
    -------
    What became of each page. A page counts as restored once its bytes *in memory* hash to its digest again.
    """
    done: dict[int, str] = {}
    rewritten: list[int] = []

    def write(page: int, content: bytes, source: str) -> None:
        view = memory.page_view(page)
        view[:] = memoryview(content)
        if memory.table.page_is_good(page, view.data):
            done[page] = source

    def read(page: int) -> bytes | memoryview:
        if memory.holds(page):
            return memory.page_view(page).data
        return next((good for name in (file, *spares) if (good := _good_page(name, page, memory.table))), b"")

    for page, content in parity.restore(pages, read).items():
        write(page, content, "parity")
    for page in pages:
        for source in (file, *spares):
            if page in done or (sound := _good_page(source, page, memory.table)) is None:
                continue
            write(page, sound, "file" if source is file else "spare")
            if source is not file and _rewrite(file, page, sound):
                rewritten.append(page)
    return Repair(
        from_parity=tuple(sorted(page for page, source in done.items() if source == "parity")),
        from_file=tuple(sorted(page for page, source in done.items() if source == "file")),
        lost=tuple(sorted(set(pages) - set(done))),
        from_spare=tuple(sorted(page for page, source in done.items() if source == "spare")),
        rewritten=tuple(sorted(rewritten)),
    )


def _good_page(file: Path, page: int, table: PageTable) -> bytes | None:
    """Return a page from the disk, None if it cannot be read or is not what it should be."""
    try:
        content = golden_page(file, page)
    except OSError:
        return None
    return content if table.page_is_good(page, content) else None


def _rewrite(file: Path, page: int, content: bytes) -> bool:
    """Write a page to the disk; False where the disk does not take it (memory is whole all the same)."""
    try:
        return write_golden(file, page * PAGE_SIZE, content)
    except OSError:
        return False


def _block(data: memoryview, start: int, length: int) -> erasure.Block:
    """Return a stretch of the file, what is past its end as zeros."""
    piece = np.frombuffer(data[start : start + length], np.uint8)
    return piece if piece.size == length else np.pad(piece, (0, length - piece.size))
