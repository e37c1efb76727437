"""Strata of a worker's memory: which bytes of the image are weights, scales, norms, embedding, head.

A campaign that strikes memory uniformly strikes little but integer weights, which forgive most flips, and
looks good for the wrong reason (reference/faults.md 1.1). So every kind of memory gets as many strikes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from fdir.pages import PAGE_SIZE, MappedTensor
from fdir.parity import group_count
from node.inference.manifest import PACKED, Manifest

MATRIX_ROLES: Final = frozenset({"attn_qkv", "attn_output", "ffn_gate_up", "ffn_down"})


class Stratum(StrEnum):
    """Kinds of memory."""

    WEIGHTS = "weights"
    """Integer codes of the matrices of the trunk."""
    SCALES = "scales"
    """Their block scales and block sums."""
    NORMS = "norms"
    """Gains of the norms, and of the embedding."""
    EMBEDDING = "embedding"
    """Rows of the embedding, codes and scales, of tokens that are being fed."""
    HEAD = "head"
    """The screen of the head: codes, scales, row bounds, sums and rotation."""
    ROPE = "rope"
    """Rows of the rotary tables, of positions that are being fed."""
    KV = "kv"
    """Rows of the KV cache in use."""


BY_ROW: Final = frozenset({Stratum.EMBEDDING, Stratum.ROPE})
"""Strata of which an epoch reads some rows only."""


@dataclass(frozen=True)
class ImageSite:
    """One bit of `weights.bin`."""

    tensor: MappedTensor
    offset: int
    """Byte in the file."""
    bit: int

    @property
    def page(self) -> int:
        """Page of the file."""
        return self.offset // PAGE_SIZE


@dataclass(frozen=True)
class _Stretch:
    tensor: MappedTensor
    start: int
    length: int
    """Bytes of the file; of a table by row, of one row."""


class Strata:
    """The strata of an image.

    Parameters
    ----------
    manifest
        Of the image.
    checked
        Whether the worker runs with compute checks.
    only
        Strata to be struck; empty: all that the image has.

    Attributes
    ----------
    here
        Strata that are struck, in fixed order; `KV` always, unless left out.
    groups
        Parity groups of the image; page `p` is in group `p % groups`.
    """

    def __init__(self, manifest: Manifest, *, checked: bool = False, only: Collection[Stratum] = ()) -> None:
        self.groups = group_count(manifest.weight_pages, manifest.parity_data)
        self._stretches: dict[Stratum, list[_Stretch]] = {stratum: [] for stratum in Stratum}
        codes = {
            matrix.weight + PACKED: matrix.rows * matrix.row_bytes
            for matrices in manifest.rebuilt.values()
            for matrix in matrices
        }
        # In every layout the codes come first. Where the original is stored too, it tells how many there are.
        codes |= {original.name + PACKED: original.length for original in manifest.originals}
        for tensor in manifest.mapped(checked):
            if tensor.read:
                self._sort(tensor, codes.get(tensor.name))
        self._ends = {
            stratum: np.cumsum([stretch.length * 8 for stretch in stretches], dtype=np.int64)
            for stratum, stretches in self._stretches.items()
        }
        self.here = tuple(s for s in only or Stratum if s is Stratum.KV or self._stretches[s])

    def bits(self, stratum: Stratum) -> int:
        """Return the number of bits of a stratum of the image; of one by row, the bits of a row."""
        ends = self._ends[stratum]
        return int(ends[-1]) if len(ends) else 0

    def locate(self, stratum: Stratum, where: float, row: int = 0) -> ImageSite:
        """Return the bit at a fraction of a stratum of the image.

        Parameters
        ----------
        stratum
            Not `KV`.
        where
            0 to 1 (1 excluded): uniform over bits.
        row
            Token or position, of a stratum by row.

        Raises
        ------
        ValueError
            The image has no such stratum.
        """
        bits = self.bits(stratum)
        if not bits:
            raise ValueError(f"the image has no {stratum.value}")
        at = min(int(where * bits), bits - 1)
        index = int(np.searchsorted(self._ends[stratum], at, side="right"))
        stretch = self._stretches[stratum][index]
        byte, bit = divmod(at - (int(self._ends[stratum][index]) - stretch.length * 8), 8)
        start = stretch.start + (row * stretch.length if stretch.tensor.rows else 0)
        return ImageSite(stretch.tensor, start + byte, bit)

    def pages_of_rows(self, stratum: Stratum, rows: Iterable[int]) -> set[int]:
        """Return the pages of the file that rows of a stratum by row lie on."""
        numbers = np.fromiter(set(rows), np.int64)
        pages: set[int] = set()
        for stretch in self._stretches[stratum]:
            start = stretch.start + numbers * stretch.length
            last = (start + stretch.length - 1) // PAGE_SIZE
            for first, end in zip((start // PAGE_SIZE).tolist(), last.tolist(), strict=True):
                pages.update(range(first, end + 1))
        return pages

    def _sort(self, tensor: MappedTensor, code_bytes: int | None) -> None:
        if tensor.rows:
            by_row = {"embed": Stratum.EMBEDDING, "rope": Stratum.ROPE}.get(tensor.role)
            if by_row is not None:
                self._add(by_row, tensor, tensor.offset, tensor.length // tensor.rows)
        elif tensor.role in {"norm", "embed"}:
            self._add(Stratum.NORMS, tensor, tensor.offset, tensor.length)
        elif tensor.role == "head":
            self._add(Stratum.HEAD, tensor, tensor.offset, tensor.length)
        elif tensor.role in MATRIX_ROLES:
            codes = tensor.length if code_bytes is None else code_bytes
            self._add(Stratum.WEIGHTS, tensor, tensor.offset, codes)
            self._add(Stratum.SCALES, tensor, tensor.offset + codes, tensor.length - codes)

    def _add(self, stratum: Stratum, tensor: MappedTensor, start: int, length: int) -> None:
        if length > 0:
            self._stretches[stratum].append(_Stretch(tensor, start, length))
