"""The worker's weight memory, watched and repaired: what an epoch read, and the rest in turn."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fdir.pages import BadPage
from fdir.parity import ParityFile, repair
from node.inference.manifest import PARITY, WEIGHTS, Manifest, attach_weights
from node.inference.proof import Mended

SCRUB_BLOCKS: Final = 2
"""Blocks of tables (1 MiB each) checked in turn at each check: a full pass over 200 MB in some 100 epochs."""


class ProtectedWeights:
    """Prove and repair the weights a loaded session has mapped.

    Parameters
    ----------
    image_dir
        Directory of the image slot.
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
        self._file = image_dir / WEIGHTS
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "penumbra-scan")
        self._next_scrub = 0
        self._pass_started_s = time.monotonic()
        self.scrub_pass_s: float | None = None
        """Time the last full pass over the tables took, s; None before the first is done."""

    def check(
        self, tokens: Collection[int], rows: Iterable[NDArray[np.int64]] = (), positions: Collection[int] = ()
    ) -> list[Mended]:
        """Prove all pages steps read, and the next blocks of the scrub.

        Bad pages are repaired in place: from parity, else from the image file read past the page cache.

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
        found = memory.scan(
            self._pool, self._threads, blocks=self._scrub_slice(), pages=np.concatenate(pages)
        )
        return self._mend({page.page: page for page in found}) if found else []

    def _rows(
        self, fed: NDArray[np.int64], scored: NDArray[np.int64], places: NDArray[np.int64]
    ) -> list[tuple[str, NDArray[np.int64]]]:
        """Say which rows of which role were read: a tied head reads the table of the embedding."""
        if any(tensor.role == "table" for tensor in self._memory.tensors):
            return [("embed", fed), ("table", scored), ("rope", places)]
        return [("embed", np.concatenate((fed, scored))), ("rope", places)]

    def _scrub_slice(self) -> range:
        blocks = self._memory.row_blocks
        chosen = blocks[self._next_scrub : self._next_scrub + SCRUB_BLOCKS]
        self._next_scrub += SCRUB_BLOCKS
        if self._next_scrub >= len(blocks):
            now_s = time.monotonic()
            self.scrub_pass_s, self._pass_started_s = now_s - self._pass_started_s, now_s
            self._next_scrub = 0
        return chosen

    def _mend(self, bad: dict[int, BadPage]) -> list[Mended]:
        result = repair(self._memory, self._parity, bad, self._file)
        method = dict.fromkeys(result.from_parity, "parity") | dict.fromkeys(result.from_file, "golden")
        return [Mended(page, bad[page].role, method.get(page, "none")) for page in sorted(bad)]
