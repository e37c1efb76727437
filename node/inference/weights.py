"""The worker's weight memory, watched and repaired: what an epoch read, and the rest in turn."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from fdir.pages import BLOCK_PAGES, PAGE_SIZE, BadPage, PageTable
from fdir.parity import ParityFile, repair
from node.inference.manifest import PARITY, SLOTS, WEIGHTS, Manifest, attach_weights, load_page_table
from node.inference.proof import Mended
from telemetry.errors import PenumbraError

SCRUB_S: Final = 0.001
"""Time for the rolling scrub at the proof of an epoch, s: a full pass takes some 12 epochs (measured, Gemma 3
270M), for a thousandth of the time."""
IDLE_SCRUB_S: Final = 0.004
"""The same at a proof with no job running."""

_BLOCK_BYTES: Final = BLOCK_PAGES * PAGE_SIZE


class ProtectedWeights:
    """Prove and repair the weights a loaded session has mapped.

    Every proof covers what steps read whole and what is named; all other mapped pages are proven in turn, a
    little at each proof, so that a full pass takes a bounded time whether jobs run or not.

    Parameters
    ----------
    image_dir
        Directory of the image slot. Where it is one of two, pages may be restored from the other one.
    manifest
        Its manifest.
    threads
        Threads that hash.
    checked
        Whether the model is a checked one.

    Raises
    ------
    PenumbraError
        Digests are missing or damaged, or a tensor is not mapped (load the model first).
    """

    def __init__(self, image_dir: Path, manifest: Manifest, threads: int, *, checked: bool = False) -> None:
        self._memory = attach_weights(image_dir, manifest, checked=checked)
        self._parity = ParityFile(image_dir / PARITY, self._memory.table)
        self._image_dir, self._manifest = image_dir, manifest
        self._spares = [image_dir.with_name(slot) for slot in SLOTS if image_dir.name in SLOTS]
        self._spares = [spare for spare in self._spares if spare != image_dir]
        self._references = _digest(self._memory.table)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "penumbra-scan")
        memory = self._memory
        self._turn = range(len(memory.live_blocks), memory.block_count)
        """Blocks that are proven in turn."""
        self._next_scrub = 0
        self._block_s: float | None = None
        """Time a whole block takes in a proof, s, as measured last."""
        self._pass_started_s = time.monotonic()
        self.scrub_pass_s: float | None = None
        """Time the last full pass over what is proven in turn took, s; None before the first is done."""

    def check(
        self, tokens: Collection[int], rows: Iterable[NDArray[np.int64]] = (), positions: Collection[int] = ()
    ) -> list[Mended]:
        """Prove all pages steps read, and the next blocks of the scrub.

        Bad pages are repaired in place: from parity, else from the image file read past the page cache, else
        from that of the other slot, and then the own file is mended, too.

        Parameters
        ----------
        tokens
            Tokens that were fed: their rows of the embedding are proven.
        rows
            Rows of its table the head read, in any number of arrays.
        positions
            Positions that were fed: their rows of the rotary tables are proven.

        Returns
        -------
        list of Mended
            Every page that was bad, in order of page; `method` is `none` for one that still is.
        """
        fed = np.fromiter(tokens, np.int64, len(tokens))
        scored = np.unique(np.concatenate([np.empty(0, np.int64), *rows]))
        places = np.fromiter(positions, np.int64, len(positions))
        memory = self._memory
        pages = [memory.row_pages(role, numbers) for role, numbers in self._rows(fed, scored, places)]
        chosen = self._scrub_slice(SCRUB_S if tokens else IDLE_SCRUB_S)
        started_s = time.perf_counter()
        found = memory.scan(self._pool, self._threads, blocks=chosen, pages=np.concatenate(pages))
        blocks = memory.live_bytes / _BLOCK_BYTES + len(chosen)
        self._block_s = (time.perf_counter() - started_s) / blocks
        return self._mend(found, time.time_ns()) if found else []

    def _rows(
        self, fed: NDArray[np.int64], scored: NDArray[np.int64], places: NDArray[np.int64]
    ) -> list[tuple[str, NDArray[np.int64]]]:
        """Say which rows of which role were read: a tied head reads the table of the embedding."""
        if any(tensor.role == "table" for tensor in self._memory.tensors):
            return [("embed", fed), ("table", scored), ("rope", places)]
        return [("embed", np.concatenate((fed, scored))), ("rope", places)]

    def _scrub_slice(self, budget_s: float) -> range:
        """Return the next blocks to prove in turn: as many as the time allows, and one at least."""
        count = 1 if not self._block_s else max(1, int(budget_s / self._block_s))
        chosen = self._turn[self._next_scrub : self._next_scrub + count]
        self._next_scrub += len(chosen)
        if self._next_scrub >= len(self._turn):
            now_s = time.monotonic()
            self.scrub_pass_s, self._pass_started_s = now_s - self._pass_started_s, now_s
            self._next_scrub = 0
        return chosen

    def _mend(self, found: Sequence[BadPage], found_ns: int) -> list[Mended]:
        """Make bad pages whole; but first the digests they were found bad by, if those were struck."""
        mended = self._mend_references(found_ns)
        if mended:
            found = self._memory.scan_pages([page.page for page in found])
        bad = {page.page: page for page in found}
        spares = [spare / WEIGHTS for spare in self._spares]
        result = repair(self._memory, self._parity, bad, self._image_dir / WEIGHTS, spares)
        method = dict.fromkeys(result.from_parity, "parity") | dict.fromkeys(result.from_file, "golden")
        method |= dict.fromkeys(result.from_spare, "other_slot")
        whole_ns = time.time_ns()
        for page in sorted(bad):
            file_mended = page in result.rewritten if page in result.from_spare else None
            how = method.get(page, "none")
            mended.append(Mended(page, bad[page].role, how, file_mended, found_ns, whole_ns))
        return mended

    def _mend_references(self, found_ns: int) -> list[Mended]:
        """Read the digests anew if those in memory are not what they were."""
        table = self._memory.table
        if _digest(table) == self._references:
            return []
        for image in (self._image_dir, *self._spares):
            try:
                fresh = load_page_table(image, self._manifest)
            except (PenumbraError, OSError):
                continue  # struck as well, or another image: the manifest in memory tells
            differing = np.flatnonzero(fresh.pages != table.pages)
            table.pages[:], table.parity[:] = fresh.pages, fresh.parity
            self._references = _digest(table)
            first = int(differing[0]) if len(differing) else 0
            return [Mended(first, "digests", "golden", None, found_ns, time.time_ns())]
        return []


def _digest(table: PageTable) -> tuple[int, int]:
    return xxhash.xxh3_64_intdigest(table.pages.data), xxhash.xxh3_64_intdigest(table.parity.data)
