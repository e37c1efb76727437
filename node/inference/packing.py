"""How ONNX Runtime lays packed weights out, undone: the original matrix from its packed bytes.

ONNX Runtime does not load packed weights without the matrix they were packed from: it packs that again and
compares. So that images need not hold both, the original is rebuilt from the packed bytes at loading.

The layouts (MatMulNBits, 4 and 8 bits, accuracy level 4; found by packing numbered matrices):

- rows in groups of four, columns in strips of 64 (AVX2) or 128 (AVX-512); a group is stored strip by strip,
  in each strip its four rows. Columns left over are one shorter strip (64), or strips of one block each
  (128). Rows left over by groups of four follow one after another, whole;
- in 4 bits, byte ``j`` of a strip of ``n`` columns holds column ``j`` in its low half and column
  ``n / 2 + j`` in its high half; in the original, columns ``2 j`` and ``2 j + 1``;
- then sums of blocks, for rows rounded up to 16, then the scales, in the order of the weights; each part
  begins at a multiple of 64 bytes.

Other CPUs may have other layouts. The builder tries every tensor and stores the originals of those that do
not come back as they were.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

_GROUP: Final = 4
"""Rows stored together."""
STRIPS: Final = (64, 128)
"""Columns stored together: of the layouts that are known."""
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
    strip: int = 64
    """Columns stored together, one of `STRIPS`."""

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
    """Tell whether packed bytes of that length can be in the layout the matrix names."""
    if matrix.bits == 4:
        strips_fit = matrix.columns % matrix.strip == 0 if matrix.strip == STRIPS[0] else matrix.block >= 32
    else:
        strips_fit = matrix.bits == 8
    blocks_fit = matrix.strip % matrix.block == 0
    return (
        matrix.strip in STRIPS
        and strips_fit
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
    even = matrix.columns // matrix.strip * matrix.strip
    rest = matrix.columns - even if matrix.strip == STRIPS[0] else matrix.block
    at = _scales_at(matrix)
    packed_scales = packed[at : at + scales.nbytes].view(np.float32)
    for start in range(0, rows, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, rows)
        chunk = packed[start * row_bytes : stop * row_bytes]
        some = codes[start:stop]
        _ungroup(chunk, some, matrix.strip * matrix.bits // 8, rest * matrix.bits // 8)
        if matrix.bits == 4:
            _unfold(some[:, : even // 2].reshape(len(some), -1, matrix.strip // 2))
            if even < matrix.columns:
                _unfold(some[:, even // 2 :].reshape(len(some), -1, rest // 2))
        of_scales = packed_scales[start * blocks : stop * blocks]
        _ungroup(of_scales, scales[start:stop], matrix.strip // matrix.block, rest // matrix.block)
    return Original(codes.reshape(rows, blocks, -1), scales)


def _scales_at(matrix: PackedMatrix) -> int:
    sum_rows = -(-matrix.rows // _SUM_ROWS) * _SUM_ROWS
    return _align(matrix.rows * matrix.row_bytes) + _align(sum_rows * matrix.blocks * _SCALE_BYTES)


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _ungroup(flat: NDArray[Any], into: NDArray[Any], strip: int, rest: int) -> None:
    """Write rows that are stored by groups of four and by strips as a plain matrix; `rest`: a short strip."""
    rows, columns = into.shape
    count, even = rows // _GROUP, columns // strip * strip
    grouped = count * _GROUP
    groups = flat[: grouped * columns].reshape(count, _GROUP * columns)
    out = into[:grouped].reshape(count, _GROUP, columns)
    for first, last, width in ((0, even, strip), (even, columns, rest)):
        if first < last:
            strips = (last - first) // width
            stored = groups[:, _GROUP * first : _GROUP * last].reshape(count, strips, _GROUP, width)
            out[:, :, first:last].reshape(count, _GROUP, strips, width)[...] = stored.transpose(0, 2, 1, 3)
    into[grouped:] = flat[grouped * columns :].reshape(rows - grouped, columns)


def _unfold(strips: NDArray[np.uint8]) -> None:
    """Bring 4-bit columns into the order of the original, in place; the last axis is a strip."""
    pairs = strips.view(np.uint16)
    half = pairs.shape[-1]
    low = (pairs & np.uint16(0x000F)) | ((pairs >> np.uint16(4)) & np.uint16(0x00F0))
    high = ((pairs >> np.uint16(4)) & np.uint16(0x000F)) | ((pairs >> np.uint16(8)) & np.uint16(0x00F0))
    strips[..., :half], strips[..., half:] = low, high
