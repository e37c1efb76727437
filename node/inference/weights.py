"""The worker's weight memory, watched and repaired: what an epoch read, and the rest in turn."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from fdir.pages import BadPage
from fdir.parity import ParityFile, repair
from node.inference.manifest import PARITY, WEIGHTS, Manifest, attach_weights
from node.inference.verified import Mended

SCRUB_PAGES: Final = 512
"""Embedding pages checked in turn at each check: about 0.3 ms (measured), a full pass in some 90 epochs."""


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

    Raises
    ------
    PenumbraError
        Digests are missing or damaged, or a tensor is not mapped (load the session first).
    """

    def __init__(self, image_dir: Path, manifest: Manifest, threads: int) -> None:
        self._memory = attach_weights(image_dir, manifest)
        self._parity = ParityFile(image_dir / PARITY, self._memory.table)
        self._file = image_dir / WEIGHTS
        self._vocab = manifest.shape.vocab
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "penumbra-scan")
        self._scrub = [
            page
            for tensor in self._memory.tensors
            if tensor.sparse
            for page in range(tensor.first_page, tensor.first_page + tensor.page_count)
        ]
        self._next_scrub = 0
        self._pass_started_s = time.monotonic()
        self.scrub_pass_s: float | None = None
        """Time the last full pass over the embedding pages took, s; None before the first is done."""

    def check(self, tokens: Collection[int]) -> list[Mended]:
        """Prove all pages a step reads, the embedding pages of `tokens`, and the next pages of the scrub.

        Bad pages are repaired in place: from parity, else from the image file read past the page cache.

        Returns
        -------
        list of Mended
            Every page that was bad, in order of page; `method` is `none` for one that still is.
        """
        bad = {page.page: page for page in self._memory.scan(self._pool, self._threads)}
        if tokens:
            used = self._memory.row_pages(np.fromiter(tokens, np.int64, len(tokens)), self._vocab)
            bad |= {page.page: page for page in self._memory.scan_pages(used.tolist())}
        bad |= {page.page: page for page in self._memory.scan_pages(self._scrub_slice())}
        return self._mend(bad) if bad else []

    def _scrub_slice(self) -> list[int]:
        pages = self._scrub[self._next_scrub : self._next_scrub + SCRUB_PAGES]
        self._next_scrub += SCRUB_PAGES
        if self._next_scrub >= len(self._scrub):
            now_s = time.monotonic()
            self.scrub_pass_s, self._pass_started_s = now_s - self._pass_started_s, now_s
            self._next_scrub = 0
        return pages

    def _mend(self, bad: dict[int, BadPage]) -> list[Mended]:
        result = repair(self._memory, self._parity, bad, self._file)
        method = dict.fromkeys(result.from_parity, "parity") | dict.fromkeys(result.from_file, "golden")
        return [Mended(page, bad[page].role, method.get(page, "none")) for page in sorted(bad)]
