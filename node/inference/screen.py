"""Builds the screen: a graph of 5 bits a weight that bounds every logit of the head from above.

The head's table is the largest matrix of the model, and one token asks only for its largest products. The
screen reads 55 % of the bytes and names the few rows that can be among them; `node.inference.head` computes
those exactly. What follows is why the named rows are enough.

Bound
-----
``x`` is the hidden state, ``w_i`` row ``i`` of the table. Two matrices are made, ``G = U D`` (stored as
``screen.rotation``) and ``P = U / D``: the columns of ``U`` are the principal axes of hidden states of
calibration text, strongest first, and ``D`` is a positive diagonal. ``P @ G.T`` is 1 but for rounding, so
with ``z = G.T @ x`` and ``S = P @ G.T - 1``::

    w_i . x = (w_i P) . z - w_i . (S x)

``w_i P`` is quantised to ``q_i``, the first `ScreenBounds.high` dimensions in 8 bits, the others in 4. ``z``
is divided by its norm ``c`` and quantised to ``u``, on the grid of the operator (below). Then::

    (w_i P) . z = c (q_i . u  +  (w_i P - q_i) . z/c  +  q_i . (z/c - u))

By Cauchy-Schwarz the second term is at most ``|w_i P - q_i|``, the row bound, which the graph adds as the
bias of a product. The third is at most ``high_norm |z/c - u|`` over the high dimensions plus ``low_norm
|z/c - u|`` over the low ones, and ``w_i . (S x)`` is at most ``row_norm skew |x|``: these are the same for
all rows of one hidden state, and `node.inference.head` adds them there.

Row bounds and norms are computed in float64 and rounded up to float32. The error of the float64 products
``w_i P`` and ``G.T @ x`` is at most ``width 2^-53 |w_i| |P|`` and ``width 2^-53 |x| |G|`` (Frobenius norms;
any order of addition); twice the first is added to the row bound, and four times the product of both
factors to the skew, which covers the computation of the skew itself.

``D`` makes the bound small; it cannot make it wrong. With ``a_j`` the size of column ``j`` of ``w U``,
``k_j`` the error of its quantisation and ``s_j`` the size of ``x`` along it, ``|w_i P - q_i| |z|`` is least
for ``D_j^2 = k_j a_j / s_j``.

Arithmetic of the operator
--------------------------
MatMulNBits at accuracy_level 4 quantises its input per block to ``round(127 u / m)``, ``m`` the largest
magnitude of the block, with scale ``m / 127``. `node.inference.head.quantize_input` makes ``u`` from
integers up to 127 and a scale of 12 significant bits, so that ``m`` is exactly 127 scales and the operator
finds the very same integers and scale: its sum of integers over a block is exact. What it rounds are
products and sums of one term a block (and one more for the offset of the codes), and the last additions: at
most ``4 blocks + 64`` roundings in a chain, whatever the order, each of at most 2^-24 of the sum of
magnitudes, which is at most the largest scale times the range of the codes (twice, for the offset) times
the sum of ``|u|``, plus the row bound. The build measures it (`node.inference.operators`): under 1 such
rounding on x86, up to 13 on a Cortex-A76, which multiplies 8-bit weights in float32.

Check
-----
The graph also returns the sum of the bounds of each group of rows, and what the sum over all rows must be:
the input times the column sums of ``q``. A larger difference than rounding makes is an arithmetic fault. The
limit is measured, not proven: 2^-24 of (twice the norm of the column sums, plus vocab), plus 2^-20 of the
sum; or more, where the kernels of the building machine need it (`node.inference.operators.sum_limit`). On
Gemma 3 270M on x86 it is 0.06 to 0.08 for states of text, of which the largest of 96 differed by 0.012
(standard deviation 0.003); a bound that wrongly rules out the largest logit is off by about its row bound,
0.078. States made to provoke rounding (along the column sums, along rows) reached 0.061 of a limit of 0.23.
A kernel that sums in float32, as on a Cortex-A76, may err alike in all rows: the limit is 4.9 there, and a
wrong bound of one row is noticed only if it is off by more than any logit is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from node.inference.screen_bounds import ScreenBounds
from telemetry.errors import PenumbraError

if TYPE_CHECKING:
    from node.inference.gguf_source import QuantMatrix

OPSET: Final = 20
IR_VERSION: Final = 10
HIGH_BLOCK: Final = 32
GROUP: Final = 64
"""Rows a group, if it divides the vocabulary."""
SHRINK: Final = 0.1
"""Power that is added to that of the calibration states, over theirs: half of it along the rows of the table,
as states lie near the rows they ask for, half alike in all directions. No direction then looks empty for want
of text (measured on states of another text: bound 4.39; with 0.001, and nothing along the rows, 4.96)."""
BALANCE: Final = 0.4
"""Exponent of ``k_j a_j / s_j`` in ``D``; 0.5 by the formula, 0.4 measured best (bound 3.37 against 3.56, and
10.7 at 0), as it also keeps the row bounds alike."""
HIGH_ERROR: Final = 1 / 16
"""``k_j`` of the 8-bit part, that of the 4-bit part being 1."""
_CLIPS: Final = (7.5, 8.0, 8.5, 9.0, 10.0)
"""Tried per block: its largest magnitude over its scale. The one with the least squared error is taken."""
_CHUNK: Final = 8192
_SAMPLE: Final = 8192
_MICROSOFT: Final = "com.microsoft"
_Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Screen:
    """A built screen.

    Parameters
    ----------
    model
        ``screen.onnx`` without its initialisers. Inputs ``high`` and ``low``, float32 ``[B, high]`` and
        ``[B, low]``, from `quantize_input`; outputs ``bound`` ``[B, vocab]``, ``peak`` and ``total``
        ``[B, vocab / group]`` (largest and sum of the bounds of a group), ``expected`` ``[B, 1]`` (what
        ``total`` must sum to). All are in units of ``c``.
    tensors
        Its initialisers by name (``screen.high.weight`` and so on).
    rotation
        float64, shape ``(width, width)``: tensor ``screen.rotation`` of the image, which the graph does
        not use, `ScreenedHead` does.
    bounds
        For the manifest.
    """

    model: onnx.ModelProto
    tensors: dict[str, NDArray[np.generic]]
    rotation: NDArray[np.float64]
    bounds: ScreenBounds


def build_screen(table: QuantMatrix, hidden: NDArray[np.float32]) -> Screen:
    """Build the screen of a head.

    Parameters
    ----------
    table
        The head's weights, shape ``(vocab, width)``; width a multiple of 32, at least 64.
    hidden
        Hidden states of calibration text, float32, shape ``(N, width)``, N >= 1. They decide how well the
        screen separates, never whether it is right.

    Returns
    -------
    The same bytes for the same input.

    Raises
    ------
    PenumbraError
        The width is none a screen can be built for.
    """
    vocab, width = table.codes.shape
    high, low, low_block = split_width(width)
    rotation, inverse = _axes(table, hidden, high)
    weights = _Weights(vocab, high, low, low_block)
    row_norm = 0.0
    for first in range(0, vocab, _CHUNK):
        rows = slice(first, min(first + _CHUNK, vocab))
        values = _rows(table, rows)
        norms = np.linalg.norm(values, axis=1)
        row_norm = max(row_norm, float(norms.max()))
        error = 2 * width * 2.0**-53 * float(np.linalg.norm(inverse)) * norms
        weights.quantize(rows, values @ inverse, error)
    group = next(size for size in (GROUP, 32, 16, 8, 4, 2, 1) if vocab % size == 0)
    skew = float(np.linalg.norm(inverse @ rotation.T - np.eye(width)))
    skew += 4 * width * 2.0**-53 * float(np.linalg.norm(inverse)) * float(np.linalg.norm(rotation))
    bounds = ScreenBounds(
        high=high,
        low=low,
        high_block=HIGH_BLOCK,
        low_block=low_block,
        group=group,
        high_norm=_round_up(weights.high_norm),
        low_norm=_round_up(weights.low_norm),
        high_scale=float(weights.high_scales.max()),
        low_scale=float(weights.low_scales.max()),
        row_norm=_round_up(row_norm),
        row_bound=float(weights.row_bound.max()),
        skew=_round_up(skew),
        sum_limit=2.0**-24 * (2 * float(np.linalg.norm(weights.column_sums)) + vocab),
    )
    tensors = weights.tensors(group)
    return Screen(_model(vocab, bounds), tensors, rotation, bounds)


def split_width(width: int) -> tuple[int, int, int]:
    """Return the number of 8-bit dimensions, of 4-bit ones, and the block of the latter.

    A tenth of the width, in steps of 64, is kept in 8 bits (measured best of 0, 64 and 128 for 640, in time).

    Raises
    ------
    PenumbraError
        The width is none a screen can be built for.
    """
    if width < 64 or width % 32:
        raise PenumbraError(
            f"embedding_length is {width}; it must be a multiple of 32, at least 64", "give another model"
        )
    high = max(64, (width // 10 + 32) // 64 * 64) if width >= 128 else 32
    low = width - high
    return high, low, 64 if low % 64 == 0 else 32


def _axes(table: QuantMatrix, hidden: NDArray[np.float32], high: int) -> tuple[_Reals, _Reals]:
    """Return ``U D`` and ``U / D``."""
    width = hidden.shape[1]
    states = hidden.astype(np.float64)
    rows = _rows(table, slice(0, None, max(1, table.codes.shape[0] // _SAMPLE)))
    power = states.T @ states / len(states)
    prior = (_evened(rows.T @ rows) + np.eye(width)) / 2
    power += (SHRINK * np.trace(power) / width + np.finfo(np.float32).tiny) * prior
    values, vectors = np.linalg.eigh(power)
    axes = np.ascontiguousarray(vectors[:, ::-1])
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(width)])
    columns = np.sqrt(np.square(rows @ axes).mean(axis=0))
    columns = np.maximum(columns, max(1e-6 * columns.max(), np.finfo(np.float32).tiny))
    error = np.where(np.arange(width) < high, HIGH_ERROR, 1.0)
    balance = (error * columns / np.sqrt(values[::-1])) ** BALANCE
    balance /= np.exp(np.log(balance).mean())
    return axes * balance, axes / balance


def _evened(power: _Reals) -> _Reals:
    """Scale a second moment so that its mean power of a dimension is 1, or 0 if it has none."""
    mean = float(np.trace(power)) / len(power)
    return power / mean if mean > 0 else power


def _rows(table: QuantMatrix, rows: slice) -> _Reals:
    codes, scales = table.codes[rows], table.scales[rows]
    blocks = codes.reshape(len(codes), -1, table.block).astype(np.float64) - 128.0
    return (blocks * scales[:, :, None]).reshape(codes.shape)


class _Weights:
    """The table in the screen's form, filled chunk by chunk."""

    def __init__(self, vocab: int, high: int, low: int, low_block: int) -> None:
        self.high, self.low, self.low_block = high, low, low_block
        self.high_codes = np.empty((vocab, high // HIGH_BLOCK, HIGH_BLOCK), np.uint8)
        self.high_scales = np.empty((vocab, high // HIGH_BLOCK), np.float32)
        self.low_codes = np.empty((vocab, low // low_block, low_block // 2), np.uint8)
        self.low_scales = np.empty((vocab, low // low_block), np.float32)
        self.row_bound = np.empty(vocab, np.float32)
        self.column_sums = np.zeros(high + low)
        self.high_norm = self.low_norm = 0.0

    def quantize(self, rows: slice, values: _Reals, error: _Reals) -> None:
        """Quantise rows of ``w P``, which may be off by `error`, and take their part in bounds and sums."""
        high = values[:, : self.high].reshape(len(values), -1, HIGH_BLOCK)
        scales = (np.abs(high).max(axis=2) / 127).astype(np.float32)
        codes = np.rint(high / np.where(scales > 0, scales, 1)[:, :, None])
        codes = np.clip(codes, -127, 127)
        self.high_codes[rows] = codes + 128
        self.high_scales[rows] = scales
        high_part = (codes * scales[:, :, None]).reshape(len(values), -1)

        low = values[:, self.high :].reshape(len(values), -1, self.low_block)
        codes, scales = _four_bits(low)
        nibbles = (codes + 8).astype(np.uint8)
        self.low_codes[rows] = nibbles[:, :, 0::2] | (nibbles[:, :, 1::2] << np.uint8(4))
        self.low_scales[rows] = scales
        low_part = (codes * scales.astype(np.float64)[:, :, None]).reshape(len(values), -1)

        kept = np.concatenate((high_part, low_part), axis=1)
        bound = (np.linalg.norm(values - kept, axis=1) + error).astype(np.float32)
        self.row_bound[rows] = np.nextafter(bound, np.float32(np.inf))
        self.column_sums += kept.sum(axis=0)
        self.high_norm = max(self.high_norm, _largest_norm(high_part))
        self.low_norm = max(self.low_norm, _largest_norm(low_part))

    def tensors(self, group: int) -> dict[str, NDArray[np.generic]]:
        """Return the initialisers of the graph."""
        sums = self.column_sums.astype(np.float32)[:, np.newaxis]
        return {
            "screen.high.weight": self.high_codes,
            "screen.high.scale": self.high_scales,
            "screen.low.weight": self.low_codes,
            "screen.low.scale": self.low_scales,
            "screen.row_bound": self.row_bound,
            "screen.high.sum": sums[: self.high],
            "screen.low.sum": sums[self.high :],
            "screen.row_bound.sum": np.array([self.row_bound.sum(dtype=np.float64)], np.float32),
            "screen.groups": np.array([0, -1, group], np.int64),
            "screen.group.axis": np.array([2], np.int64),
        }


def _four_bits(blocks: _Reals) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return codes -8 to 7 and the scales that leave the least squared error of each block."""
    values = blocks.astype(np.float32)
    largest = np.abs(values).max(axis=2)
    best_codes = np.zeros_like(values)
    best_scales = np.zeros_like(largest)
    best_error = np.full_like(largest, np.inf)
    for clip in _CLIPS:
        scales = largest / np.float32(clip)
        codes = values / np.where(scales > 0, scales, 1)[:, :, None]
        np.clip(np.rint(codes, out=codes), -8, 7, out=codes)
        error = np.square(codes * scales[:, :, None] - values).sum(axis=2)
        better = error < best_error
        best_codes[better] = codes[better]
        best_scales[better] = scales[better]
        best_error[better] = error[better]
    return best_codes, best_scales


def _largest_norm(rows: _Reals) -> float:
    return float(np.linalg.norm(rows, axis=1).max())


def _round_up(value: float) -> float:
    """Return the next float32 above the nearest one: over the true value even if float64 fell short of it."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def _model(vocab: int, bounds: ScreenBounds) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []

    def add(op: str, name: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name=f"screen.{name}", domain=domain, **attributes))
        return name

    def product(part: str, bits: int, length: int, block: int, bias: list[str]) -> str:
        inputs = [part, f"screen.{part}.weight", f"screen.{part}.scale", *bias]
        return add(
            "MatMulNBits",
            f"{part}.product",
            inputs,
            _MICROSOFT,
            K=length,
            N=vocab,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )

    high = product("high", 8, bounds.high, bounds.high_block, ["", "", "screen.row_bound"])
    low = product("low", 4, bounds.low, bounds.low_block, [])
    bound = add("Add", "bound", [high, low])
    grouped = add("Reshape", "grouped", [bound, "screen.groups"])
    add("ReduceMax", "peak", [grouped, "screen.group.axis"], keepdims=0)
    add("ReduceSum", "total", [grouped, "screen.group.axis"], keepdims=0)
    sums = [add("MatMul", f"{part}.expected", [part, f"screen.{part}.sum"]) for part in ("high", "low")]
    add("Sum", "expected", [*sums, "screen.row_bound.sum"])

    def value(name: str, length: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", length])

    groups = vocab // bounds.group
    body = helper.make_graph(
        nodes,
        "screen",
        [value("high", bounds.high), value("low", bounds.low)],
        [value("bound", vocab), value("peak", groups), value("total", groups), value("expected", 1)],
    )
    return helper.make_model(
        body,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)],
        ir_version=IR_VERSION,
    )
