"""How ONNX Runtime lays packed weights out, undone: the original matrix from its packed bytes.

ONNX Runtime does not load packed weights without the matrix they were packed from: it packs that again and
compares. So that images need not hold both, the original is rebuilt from the packed bytes at loading.

The layout (MatMulNBits on AVX2, 4 and 8 bits, accuracy level 4; found by packing numbered matrices):

- rows in groups of four, columns in strips of 64, the last strip shorter; a group is stored strip by strip,
  in each strip its four rows. Rows left over by groups of four follow one after another, whole;
- in 4 bits, byte ``j`` of a strip holds column ``j`` in its low half and column ``32 + j`` in its high half;
  in the original, columns ``2 j`` and ``2 j + 1``;
- then sums of blocks, for rows rounded up to 16, then the scales, in the order of the weights; each part
  begins at a multiple of 64 bytes.

Other CPUs have other layouts. The builder tries every tensor and stores the originals of those that do not
come back as they were.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

_GROUP: Final = 4
"""Rows stored together."""
_STRIP: Final = 64
"""Columns stored together."""
_SUM_ROWS: Final = 16
_ALIGNMENT: Final = 64
_SCALE_BYTES: Final = 4
_CHUNK_ROWS: Final = 1024
"""Rows undone at a time, so that they stay in the CPU's cache."""


class PackedMatrix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A matrix whose original is rebuilt."""

    weight: str
    """Name of its weights in the graph; the packed tensor has this name and `manifest.PACKED`."""
    scale: str
    """Name of its scales in the graph."""
    rows: int
    columns: int
    bits: int
    """4 or 8."""
    block: int
    """Columns that share a scale."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of weights."""
        return self.columns * self.bits // 8

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return self.columns // self.block

    @property
    def original_bytes(self) -> int:
        """Bytes of weights and scales."""
        return self.rows * (self.row_bytes + _SCALE_BYTES * self.blocks)


class Original(NamedTuple):
    """A matrix as a graph has it."""

    codes: NDArray[np.uint8]
    """Shape ``(rows, blocks, bytes of a block)``."""
    scales: NDArray[np.float32]
    """Shape ``(rows, blocks)``."""


def can_hold(matrix: PackedMatrix, length: int) -> bool:
    """Tell whether packed bytes of that length can be in the layout known here."""
    strips_fit = matrix.columns % _STRIP == 0 if matrix.bits == 4 else matrix.bits == 8
    blocks_fit = _STRIP % matrix.block == 0
    return (
        strips_fit
        and blocks_fit
        and _scales_at(matrix) + matrix.rows * matrix.blocks * _SCALE_BYTES <= length
    )


def unpack(packed: NDArray[np.uint8], matrix: PackedMatrix, into: NDArray[np.uint8]) -> Original:
    """Rebuild the original of a packed matrix.

    Parameters
    ----------
    packed
        Its packed bytes; `can_hold` must say that they can be.
    matrix
        What it is.
    into
        Where to write, uint8, shape ``(matrix.original_bytes,)``, aligned to 4 bytes.

    Returns
    -------
    Views of `into`.
    """
    rows, row_bytes, blocks = matrix.rows, matrix.row_bytes, matrix.blocks
    codes = into[: rows * row_bytes].reshape(rows, row_bytes)
    scales = into[rows * row_bytes :].view(np.float32).reshape(rows, blocks)
    strip_bytes = _STRIP * matrix.bits // 8
    at = _scales_at(matrix)
    packed_scales = packed[at : at + scales.nbytes].view(np.float32)
    for start in range(0, rows, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, rows)
        chunk = packed[start * row_bytes : stop * row_bytes]
        _ungroup(chunk, codes[start:stop], strip_bytes)
        if matrix.bits == 4:
            _unfold(codes[start:stop].reshape(-1, strip_bytes))
        _ungroup(packed_scales[start * blocks : stop * blocks], scales[start:stop], _STRIP // matrix.block)
    return Original(codes.reshape(rows, blocks, -1), scales)


def _scales_at(matrix: PackedMatrix) -> int:
    sum_rows = -(-matrix.rows // _SUM_ROWS) * _SUM_ROWS
    return _align(matrix.rows * matrix.row_bytes) + _align(sum_rows * matrix.blocks * _SCALE_BYTES)


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _ungroup(flat: NDArray[Any], into: NDArray[Any], strip: int) -> None:
    """Write rows that are stored by groups of four and by strips as a plain matrix."""
    rows, columns = into.shape
    count, strips = rows // _GROUP, columns // strip
    grouped, even = count * _GROUP, strips * strip
    groups = flat[: grouped * columns].reshape(count, _GROUP * columns)
    out = into[:grouped].reshape(count, _GROUP, columns)
    whole = groups[:, : _GROUP * even].reshape(count, strips, _GROUP, strip)
    out[:, :, :even].reshape(count, _GROUP, strips, strip)[...] = whole.transpose(0, 2, 1, 3)
    out[:, :, even:] = groups[:, _GROUP * even :].reshape(count, _GROUP, columns - even)
    into[grouped:] = flat[grouped * columns :].reshape(rows - grouped, columns)


def _unfold(strips: NDArray[np.uint8]) -> None:
    """Bring 4-bit columns into the order of the original, in place; a row is a strip of 32 bytes."""
    pairs = strips.view(np.uint16)
    half = pairs.shape[1]
    low = (pairs & np.uint16(0x000F)) | ((pairs >> np.uint16(4)) & np.uint16(0x00F0))
    high = ((pairs >> np.uint16(4)) & np.uint16(0x000F)) | ((pairs >> np.uint16(8)) & np.uint16(0x00F0))
    strips[:, :half], strips[:, half:] = low, high
