"""The head: the largest logits of a hidden state, exact and proven to be the largest.

A logit is defined to the bit. Weights are ``(code - 128) * scale``; the hidden state is rounded per block to
39 bits below its largest magnitude (a float32 loses nothing but in elements 2^16 times smaller than the largest
of their block), so that each block's sum of products fits float64 and is exact in any order. Block sums times
scales are then added in float64 in a fixed order, and the total is rounded to float32. A logit is thus a
function of its row and the hidden state only, whatever is computed beside it, on any number of threads.

`ScreenedHead.top` runs the screen (`node.inference.screen` proves its bound), computes the most promising rows
exactly, and has in the k-th best of them a threshold: a row whose bound is below it cannot be among the k
largest. Rows at or above it are computed by falling bound, which may raise the threshold, until none is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from node.inference.screen_bounds import ScreenBounds

FIRST: Final = 24
"""Rows computed exactly, beyond those asked for, before a threshold is known (measured: 8 to 64 alike)."""
CHUNK: Final = 512
"""Rows computed at a time."""
_EXACT_BITS: Final = 39
"""Bits of a hidden state's element: 39 + 8 of a code + 5 of 32 additions stay below the 53 of float64."""
_LARGEST_BLOCK: Final = 32
_SMALLEST_SCALE: Final = 1e-30
"""Of an input block; elements below 127 times this count as 0. Keeps the scale a normal float32."""
_UNIT: Final = 2.0**-24
"""Largest relative error of one float32 rounding."""
_LOGIT_ERROR: Final = 2.0**-23
"""Largest relative error of an exact logit: one rounding to float32, and far less in float64."""
_Reals = NDArray[np.float64]


class HeadFault(Exception):
    """A logit outside its proven bounds, or no number: memory or arithmetic failed. The epoch is dirty."""


@dataclass(frozen=True)
class Candidates:
    """The largest logits of one hidden state.

    Parameters
    ----------
    ids
        int64, shape ``(n,)``, n >= k: token ids by falling logit, the lower id first where two are equal.
        The first k are the k largest of the vocabulary.
    logits
        float32, shape ``(n,)``: exact logits of `ids`.
    rows
        int64, shape ``(m,)``, ascending: rows of the table that were read.
    log_total
        Logarithm of the sum of the exponentials of all logits of the vocabulary; None if not asked for. Rows
        that were read enter with their logits, the others with the screen's estimate.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    rows: NDArray[np.int64]
    log_total: float | None = None


class ScreenedHead:
    """Runs the screen, then computes exactly what it does not rule out.

    Parameters
    ----------
    session
        A session of ``screen.onnx``.
    codes
        uint8, shape ``(vocab, blocks, block)``, block at most 32: the head's weights are
        ``(codes - 128) * scales``.
    scales
        float32, shape ``(vocab, blocks)``.
    rotation
        float64, shape ``(width, width)``: tensor ``screen.rotation``.
    bounds
        From the manifest.

    Raises
    ------
    ValueError
        The shapes do not fit each other.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        rotation: NDArray[np.float64],
        bounds: ScreenBounds,
    ) -> None:
        vocab, blocks, block = codes.shape
        width = blocks * block
        if block > _LARGEST_BLOCK or scales.shape != (vocab, blocks):
            raise ValueError(f"codes {codes.shape} and scales {scales.shape} do not fit each other")
        if rotation.shape != (width, width) or bounds.high + bounds.low != width:
            raise ValueError(f"rotation {rotation.shape} and bounds do not fit a width of {width}")
        self._codes, self._scales, self._rotation, self._bounds = codes, scales, rotation, bounds
        self._vocab, self._width = vocab, width
        self._session = session
        self._runs: dict[int, _Run] = {}
        quiet = self._run(1)
        quiet.high[:] = quiet.low[:] = 0
        session.run_with_iobinding(quiet.binding)
        self._row_bound: NDArray[np.float32] = quiet.bound[0].copy()

    def top(
        self, hidden: NDArray[np.float32], k: Sequence[int], totals: Sequence[bool] | None = None
    ) -> list[Candidates]:
        """Return the largest logits of each hidden state.

        Parameters
        ----------
        hidden
            float32, shape ``(B, width)``.
        k
            How many of each are to be proven, 1 to vocab; B numbers.
        totals
            Which need `Candidates.log_total`; B flags, None for none.

        Raises
        ------
        HeadFault
            See there.
        """
        run = self._run(len(hidden))
        norms, slack = self._feed(run, hidden)
        self._session.run_with_iobinding(run.binding)
        self._check_sums(run)
        return [
            self._select(
                hidden[row],
                run.bound[row],
                run.peak[row],
                float(norms[row]),
                float(slack[row]),
                k[row],
                totals is not None and totals[row],
            )
            for row in range(len(hidden))
        ]

    def exact(self, hidden: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the exact logits of some rows of the table.

        Each is a function of its row and of `hidden` only, to the bit, whatever is computed beside it.

        Parameters
        ----------
        hidden
            float32, shape ``(width,)``, finite.
        rows
            int64, shape ``(n,)``.
        """
        return self._exact(*self._split(hidden), rows)

    def _split(self, hidden: NDArray[np.float32]) -> tuple[_Reals, _Reals]:
        """Return the hidden state in blocks, rounded, and 128 times each block's sum."""
        blocks = hidden.astype(np.float64).reshape(self._codes.shape[1:])
        _, exponents = np.frexp(np.abs(blocks).max(axis=1, keepdims=True))
        exponents -= _EXACT_BITS
        rounded: _Reals = np.ldexp(np.rint(np.ldexp(blocks, -exponents)), exponents)
        return rounded[:, :, np.newaxis], 128.0 * rounded.sum(axis=1)

    def _exact(self, blocks: _Reals, offsets: _Reals, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = np.empty(len(rows), np.float32)
        for first in range(0, len(rows), CHUNK):
            part = rows[first : first + CHUNK]
            codes = self._codes[part].astype(np.float64).transpose(1, 0, 2)
            sums = np.matmul(codes, blocks)[:, :, 0].T
            terms = (sums - offsets) * self._scales[part]
            logits[first : first + CHUNK] = _fixed_sum(terms)
        return logits

    def _run(self, batch: int) -> _Run:
        if batch not in self._runs:
            self._runs[batch] = _Run(self._session, batch, self._vocab, self._bounds)
        return self._runs[batch]

    def _feed(self, run: _Run, hidden: NDArray[np.float32]) -> tuple[_Reals, _Reals]:
        """Write the input of the screen; return each state's ``c``, and what is added to every bound."""
        bounds = self._bounds
        states = hidden.astype(np.float64)
        rotated = states @ self._rotation
        norms: _Reals = np.sqrt(np.square(rotated).sum(axis=1))
        if not np.isfinite(norms).all():
            raise HeadFault("a hidden state is not finite")
        norms[norms == 0] = 1
        rotated /= norms[:, np.newaxis]
        slack = bounds.skew * bounds.row_norm * np.sqrt(np.square(states).sum(axis=1)) / norms
        parts = (
            (run.high, rotated[:, : bounds.high], bounds.high_block, bounds.high_norm, bounds.high_scale, 8),
            (run.low, rotated[:, bounds.high :], bounds.low_block, bounds.low_norm, bounds.low_scale, 4),
        )
        blocks = sum(part.shape[1] // block for _, part, block, *_ in parts)
        for target, part, block, row_norm, scale, bits in parts:
            quantize_input(part, block, target)
            slack += row_norm * np.sqrt(np.square(part - target).sum(axis=1))
            magnitude = 2 * 2**bits * scale * np.abs(target).sum(axis=1, dtype=np.float64)
            slack += (4 * blocks + 64) * _UNIT * (magnitude + bounds.row_bound)
        return norms, slack

    def _check_sums(self, run: _Run) -> None:
        difference = run.total.sum(axis=1, dtype=np.float64) - run.expected[:, 0]
        if not (np.abs(difference) <= self._bounds.sum_limit).all():
            raise HeadFault(
                f"the bounds of the screen are off their sum by {float(np.abs(difference).max()):.3g}; "
                f"{self._bounds.sum_limit:.3g} is allowed"
            )

    def _select(
        self,
        hidden: NDArray[np.float32],
        bound: NDArray[np.float32],
        peak: NDArray[np.float32],
        norm: float,
        slack: float,
        k: int,
        with_total: bool,
    ) -> Candidates:
        split = self._split(hidden)
        grouped = bound.reshape(len(peak), -1)
        rows = _best(grouped, peak, min(k + FIRST, self._vocab))
        logits = self._checked(split, bound, rows, norm, slack)
        cut = _cut(logits, k, norm, slack)
        groups = np.flatnonzero(peak >= cut)
        inside, places = np.nonzero(grouped[groups] >= cut)
        rest = groups[inside] * grouped.shape[1] + places
        rest = rest[~np.isin(rest, rows)]
        if len(rest) > CHUNK:
            rest = rest[np.argsort(-bound[rest], kind="stable")]
        for first in range(0, len(rest), CHUNK):
            part = rest[first : first + CHUNK]
            part = part[bound[part] >= cut]
            if not len(part):
                break
            rows = np.concatenate((rows, part))
            logits = np.concatenate((logits, self._checked(split, bound, part, norm, slack)))
            cut = _cut(logits, k, norm, slack)
        order = np.lexsort((rows, -logits))
        log_total = self._log_total(bound, rows, logits, norm) if with_total else None
        return Candidates(rows[order], logits[order], np.sort(rows), log_total)

    def _checked(
        self,
        split: tuple[_Reals, _Reals],
        bound: NDArray[np.float32],
        rows: NDArray[np.int64],
        norm: float,
        slack: float,
    ) -> NDArray[np.float32]:
        """Return exact logits, each between its proven bounds."""
        logits = self._exact(*split, rows)
        value = logits / norm
        upper = bound[rows].astype(np.float64)
        lower = upper - 2.0 * self._row_bound[rows]
        room = slack + _LOGIT_ERROR * np.abs(value)
        if not ((value <= upper + room) & (value >= lower - room)).all():
            raise HeadFault("a logit is outside the bounds the screen proved for it")
        return logits

    def _log_total(
        self, bound: NDArray[np.float32], rows: NDArray[np.int64], logits: NDArray[np.float32], norm: float
    ) -> float:
        largest = float(logits.max())
        estimate = (bound - self._row_bound) * np.float32(norm) - np.float32(largest)
        np.exp(estimate, out=estimate)
        estimate[rows] = np.exp(logits - np.float32(largest))
        return largest + math.log(float(estimate.sum(dtype=np.float64)))


class _Run:
    """Input and output arrays of one batch size, bound to the session."""

    def __init__(self, session: ort.InferenceSession, batch: int, vocab: int, bounds: ScreenBounds) -> None:
        groups = vocab // bounds.group
        self.high = np.zeros((batch, bounds.high), np.float32)
        self.low = np.zeros((batch, bounds.low), np.float32)
        self.bound = np.empty((batch, vocab), np.float32)
        self.peak = np.empty((batch, groups), np.float32)
        self.total = np.empty((batch, groups), np.float32)
        self.expected = np.empty((batch, 1), np.float32)
        self.binding: Any = session.io_binding()
        for name in ("high", "low"):
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(getattr(self, name)))
        for name in ("bound", "peak", "total", "expected"):
            self.binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(getattr(self, name)))


def quantize_input(values: _Reals, block: int, out: NDArray[np.float32]) -> None:
    """Quantise rows to the grid on which MatMulNBits, accuracy_level 4, computes with the very same numbers.

    Each block becomes integers -127 to 127, one of them of magnitude 127, times a scale of 12 significant bits.
    The products are exact in float32, and so is 1/127 of the largest, which the operator takes for the scale.

    Parameters
    ----------
    values
        float64, shape ``(B, length)``.
    block
        Elements that share a scale; the operator's ``block_size``.
    out
        float32, shape ``(B, length)``: receives the result.
    """
    blocks = values.reshape(len(values), -1, block)
    mantissa, exponent = np.frexp(np.abs(blocks).max(axis=2, keepdims=True) / 127)
    scale = np.ldexp(np.ceil(mantissa * 4096) / 4096, exponent)
    scale = np.where(scale > _SMALLEST_SCALE, scale, np.inf)
    codes = np.rint(blocks / scale)
    out[:] = (codes * np.where(np.isinf(scale), 0, scale)).reshape(out.shape)


def _fixed_sum(terms: _Reals) -> NDArray[np.float32]:
    """Return the sum of each row, float32: halves are added to each other, so the order is the same for all."""
    while (columns := terms.shape[1]) > 1:
        half = columns // 2
        folded = terms[:, :half] + terms[:, half : 2 * half]
        if columns % 2:
            folded[:, 0] += terms[:, -1]
        terms = folded
    return terms[:, 0].astype(np.float32)


def _best(grouped: NDArray[np.float32], peak: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the `count` rows of largest bound: they lie in the `count` groups of largest peak."""
    number = min(count, len(peak))
    groups = np.argpartition(peak, -number)[-number:]
    bounds = grouped[groups].reshape(-1)
    places = np.argpartition(bounds, -count)[-count:]
    size = grouped.shape[1]
    return groups[places // size] * size + places % size


def _cut(logits: NDArray[np.float32], k: int, norm: float, slack: float) -> float:
    """Return the least bound a row must have to be among the k largest, given logits of k rows or more."""
    worst = float(np.partition(logits, -k)[-k])
    value = worst / norm
    return value - slack - _LOGIT_ERROR * abs(value)
