"""The head: the largest logits of a hidden state, exact and proven to be the largest.

A logit is defined to the bit. Weights are ``(code - 128) * scale``. The hidden state is rounded per block
to 39 bits below its largest magnitude (a float32 loses nothing, but in elements more than 2^15 times
smaller than the largest of their block), so that each block's sum of products fits float64 and is exact in
any order. Block sums times scales are added in float64 in a fixed order, and the total is rounded to
float32. A logit is thus a function of its row and the hidden state only, whatever is computed beside it, on
any number of threads.

`ScreenedHead.top` runs the screen (`node.inference.screen` proves its bound), computes the most promising
rows exactly, and has in the k-th best of them a threshold: a row whose bound is below it cannot be among
the k largest. Rows at or above it are computed by falling bound, which may raise the threshold, until none
is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from node.inference.arithmetic import UNIT, allowed_roundings
from node.inference.screen_bounds import ScreenBounds

FIRST: Final = 24
"""Rows computed exactly, beyond those asked for, before a threshold is known (measured: 8 to 64 alike)."""
CHUNK: Final = 256
"""Rows computed at a time: their codes, as float64, stay in the cache (measured best of 32 to 2048)."""
_EXACT_BITS: Final = 39
"""Bits of a hidden state's element: 39 + 8 of a code + 5 of 32 additions stay below the 53 of float64."""
_LARGEST_BLOCK: Final = 32
_SMALLEST_SCALE: Final = 1e-30
"""Of an input block; elements below 127 times this count as 0. Keeps the scale a normal float32."""
_LOWEST: Final = np.finfo(np.float32).min
"""Below every bound, but not below minus infinity, which marks rows already computed."""
_LOGIT_ERROR: Final = 2.0**-23
"""Relative error of an exact logit by its rounding to float32, at most."""
_SUM_ERROR: Final = 2.0**-20
"""Of the sum of all bounds: 16 roundings, for states to which all rows are alike (largest measured: 6)."""
_STATE_ERROR: Final = 2.0**-36
"""Its other error, over the norms of row and state, at most: an element is off by 2^-39 of the largest of its
block, hence 32 of them by 2^-36.5 of the block's norm; float64 sums of up to 2^12 blocks add far less."""
_Reals = NDArray[np.float64]


class HeadFault(Exception):
    """A logit outside its proven bounds, or no number: memory or arithmetic failed. The epoch is dirty.

    Parameters
    ----------
    reason
        What is wrong, in words.
    rows
        Rows of the table that gave it: the proof that follows has to look at them.
    """

    def __init__(self, reason: str, rows: NDArray[np.int64] | None = None) -> None:
        super().__init__(reason)
        self.rows = np.empty(0, np.int64) if rows is None else rows


@dataclass(frozen=True)
class Wanted:
    """What is asked of the head for one hidden state."""

    k: int
    """How many of the largest logits are to be proven, 1 or more."""
    lowered: AbstractSet[int] = frozenset()
    """Tokens whose logits will be lowered, and which therefore do not count among the `k`: every one of them
    that has a larger logit than the last of the `k` is found besides."""


@dataclass(frozen=True)
class Candidates:
    """The largest logits of one hidden state.

    Parameters
    ----------
    ids
        int64, shape ``(n,)``: token ids by falling logit, the lower id first where two are equal. Down to
        the k-th that counts (see `Wanted`) none of the vocabulary is missing.
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
        self._vocab = vocab
        self._session = session
        self._largest = _Run(session, _arrays(1, vocab, bounds))
        self._runs: dict[int, _Run] = {}
        """By batch size; all of them share the arrays of the largest."""
        quiet = self._run(1)
        quiet.high[:] = quiet.low[:] = 0
        session.run_with_iobinding(quiet.binding)
        self._row_bound: NDArray[np.float32] = quiet.bound[0].copy()

    @np.errstate(over="ignore", invalid="ignore")  # what damage makes infinite or no number, checks refuse
    def top(
        self, hidden: NDArray[np.float32], k: Sequence[int | Wanted], totals: Sequence[bool] | None = None
    ) -> list[Candidates]:
        """Return the largest logits of each hidden state.

        Parameters
        ----------
        hidden
            float32, shape ``(B, width)``.
        k
            What is to be proven of each, B times; a number, 1 to vocab, is `Wanted` with nothing lowered.
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
        split = self._split(hidden)
        grouped = run.bound.reshape(*run.peak.shape, -1)
        asked = [each if isinstance(each, Wanted) else Wanted(each) for each in k]
        count = min(max(each.k for each in asked) + FIRST, self._vocab)
        firsts = np.stack([_best(*parts, count, count) for parts in zip(grouped, run.peak, strict=True)])
        first_logits = self._exact(*split, firsts)
        found = []
        for number in range(len(hidden)):
            state = _State(
                split[0][number],
                split[1][number],
                run.bound[number],
                run.peak[number],
                float(norms[number]),
                float(slack[number]),
            )
            with_total = totals is not None and totals[number]
            found.append(self._select(state, firsts[number], first_logits[number], asked[number], with_total))
        return found

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
        blocks, offsets = self._split(hidden[np.newaxis])
        logits: NDArray[np.float32] = self._exact(blocks, offsets, rows[np.newaxis])[0]
        return logits

    def _split(self, hidden: NDArray[np.float32]) -> tuple[_Reals, _Reals]:
        """Return the states in blocks, rounded, shape (B, blocks, block); and 128 times each block's sum."""
        blocks = hidden.astype(np.float64).reshape(-1, *self._codes.shape[1:])
        _, exponents = np.frexp(np.abs(blocks).max(axis=2, keepdims=True))
        exponents -= _EXACT_BITS
        rounded: _Reals = np.ldexp(np.rint(np.ldexp(blocks, -exponents)), exponents)
        return rounded, 128.0 * rounded.sum(axis=2)

    def _exact(self, blocks: _Reals, offsets: _Reals, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the exact logits of `rows`, shape (B, n), each line for the state of that number."""
        logits = np.empty(rows.shape, np.float32)
        step = max(1, CHUNK // len(rows))
        for first in range(0, rows.shape[1], step):
            part = rows[:, first : first + step]
            codes = self._codes[part].astype(np.float64).swapaxes(1, 2)
            sums = np.matmul(codes, blocks[:, :, :, np.newaxis])[:, :, :, 0].swapaxes(1, 2)
            terms = (sums - offsets[:, np.newaxis]) * self._scales[part]
            logits[:, first : first + step] = _fixed_sum(terms)
        return logits

    def _run(self, batch: int) -> _Run:
        if batch > len(self._largest.bound):
            self._runs.clear()
            self._largest = _Run(self._session, _arrays(batch, self._vocab, self._bounds))
        if batch not in self._runs:
            part = {name: array[:batch] for name, array in self._largest.arrays.items()}
            self._runs[batch] = _Run(self._session, part)
        return self._runs[batch]

    def _feed(self, run: _Run, hidden: NDArray[np.float32]) -> tuple[_Reals, _Reals]:
        """Write the input of the screen; return each state's ``c``, and what is added to every bound."""
        bounds = self._bounds
        states = hidden.astype(np.float64)
        if not np.isfinite(states).all():
            raise HeadFault("a hidden state is not finite")
        rotated = np.stack([state @ self._rotation for state in states])
        norms: _Reals = np.sqrt(np.square(rotated).sum(axis=1))
        if not np.isfinite(norms).all():
            raise HeadFault("a rotated hidden state is not finite")
        norms[norms == 0] = 1
        rotated /= norms[:, np.newaxis]
        slack = (
            (bounds.skew + _STATE_ERROR) * bounds.row_norm * np.sqrt(np.square(states).sum(axis=1)) / norms
        )
        parts = (
            (run.high, rotated[:, : bounds.high], bounds.high_block, bounds.high_norm, bounds.high_scale, 8),
            (run.low, rotated[:, bounds.high :], bounds.low_block, bounds.low_norm, bounds.low_scale, 4),
        )
        blocks = sum(part.shape[1] // block for _, part, block, *_ in parts)
        for target, part, block, row_norm, scale, bits in parts:
            quantize_input(part, block, target)
            slack += row_norm * np.sqrt(np.square(part - target).sum(axis=1))
            magnitude = 2 * 2**bits * scale * np.abs(target).sum(axis=1, dtype=np.float64)
            slack += allowed_roundings(blocks) * UNIT * (magnitude + bounds.row_bound)
        return norms, slack

    def sum_errors(self, hidden: NDArray[np.float32]) -> _Reals:
        """Return how far the sum of all bounds is off, beyond what grows with the sum itself.

        Parameters
        ----------
        hidden
            float32, shape ``(B, width)``, finite.

        Returns
        -------
        Shape ``(B,)``, in the units of `ScreenBounds.sum_limit`, which is what sound ones are below.
        """
        run = self._run(len(hidden))
        self._feed(run, hidden)
        self._session.run_with_iobinding(run.binding)
        return self._sum_errors(run)

    @staticmethod
    def _sum_errors(run: _Run) -> _Reals:
        expected = run.expected[:, 0].astype(np.float64)
        difference = np.abs(run.total.sum(axis=1, dtype=np.float64) - expected)
        errors: _Reals = difference - _SUM_ERROR * np.abs(expected)
        return errors

    def _check_sums(self, run: _Run) -> None:
        errors = self._sum_errors(run)
        # "not <=": what is no number is a fault.
        if not (errors <= self._bounds.sum_limit).all():
            raise HeadFault(f"the bounds of the screen are off their sum by {float(errors.max()):.3g}")

    def _select(
        self,
        state: _State,
        rows: NDArray[np.int64],
        logits: NDArray[np.float32],
        asked: Wanted,
        with_total: bool,
    ) -> Candidates:
        """Complete the rows already computed to all that can be asked for."""
        self._prove(state, rows, logits)
        grouped = state.bound.reshape(len(state.peak), -1)
        counting = _counting(rows, logits, asked)
        while len(counting) < asked.k and len(rows) < self._vocab:
            count = min(2 * len(rows), self._vocab - len(rows))
            part = _best(grouped, state.peak, count, count + len(rows))
            rows, logits = self._extend(state, rows, logits, part)
            counting = _counting(rows, logits, asked)
        cut = state.cut(counting, asked.k)
        groups = np.flatnonzero(state.peak >= cut)
        inside, places = np.nonzero(grouped[groups] >= cut)
        rest = groups[inside] * grouped.shape[1] + places
        if len(rest) > CHUNK:
            rest = rest[np.argsort(-state.bound[rest], kind="stable")]
        for first in range(0, len(rest), CHUNK):
            part = rest[first : first + CHUNK]
            part = part[state.bound[part] >= cut]
            if not len(part):
                break
            rows, logits = self._extend(state, rows, logits, part)
            cut = state.cut(_counting(rows, logits, asked), asked.k)
        log_total = self._log_total(state, rows, logits) if with_total else None
        order = np.lexsort((rows, -logits))
        return Candidates(rows[order], logits[order], np.sort(rows), log_total)

    def _extend(
        self, state: _State, rows: NDArray[np.int64], logits: NDArray[np.float32], part: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        more = self._exact(state.blocks[np.newaxis], state.offsets[np.newaxis], part[np.newaxis])[0]
        self._prove(state, part, more)
        return np.concatenate((rows, part)), np.concatenate((logits, more))

    def _prove(self, state: _State, rows: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Check that exact logits are between their proven bounds; mark the rows as done."""
        value = logits.astype(np.float64) / state.norm
        upper = state.bound[rows].astype(np.float64)
        lower = upper - 2.0 * self._row_bound[rows]
        room = state.slack + _LOGIT_ERROR * np.abs(value)
        if not (np.isfinite(value) & (value <= upper + room) & (value >= lower - room)).all():
            raise HeadFault("a logit is outside the bounds the screen proved for it", rows)
        state.bound[rows] = -np.inf

    def _log_total(self, state: _State, rows: NDArray[np.int64], logits: NDArray[np.float32]) -> float:
        largest = float(logits.max())
        estimate = (state.bound - self._row_bound) * np.float32(state.norm) - np.float32(largest)
        others = float(np.exp(estimate, out=estimate).sum(dtype=np.float64))
        return largest + math.log(others + float(np.exp(logits.astype(np.float64) - largest).sum()))


@dataclass(frozen=True)
class _State:
    """One hidden state, and what the screen says of it. Bounds are in units of `norm`."""

    blocks: _Reals
    offsets: _Reals
    bound: NDArray[np.float32]
    """Minus infinity for rows that were computed."""
    peak: NDArray[np.float32]
    norm: float
    slack: float
    """Added to every bound."""

    def cut(self, logits: NDArray[np.float32], k: int) -> np.float32:
        """Return the least bound of a row that can be among the k largest, given the logits of some rows.

        It is rounded down to float32, so that comparing it with bounds is exact.
        """
        if len(logits) < k:
            return _LOWEST
        value = float(np.partition(logits, -k)[-k]) / self.norm
        least = value - self.slack - _LOGIT_ERROR * abs(value)
        return max(np.nextafter(np.float32(least), _LOWEST), _LOWEST)


class _Run:
    """Input and output arrays of one batch size, bound to the session."""

    def __init__(self, session: ort.InferenceSession, arrays: dict[str, NDArray[np.float32]]) -> None:
        self.arrays = arrays
        self.high, self.low = arrays["high"], arrays["low"]
        self.bound, self.peak = arrays["bound"], arrays["peak"]
        self.total, self.expected = arrays["total"], arrays["expected"]
        self.binding: Any = session.io_binding()
        for name, array in arrays.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            if name in {"high", "low"}:
                self.binding.bind_ortvalue_input(name, value)
            else:
                self.binding.bind_ortvalue_output(name, value)


def _arrays(batch: int, vocab: int, bounds: ScreenBounds) -> dict[str, NDArray[np.float32]]:
    groups = vocab // bounds.group
    lengths = {"high": bounds.high, "low": bounds.low, "bound": vocab, "peak": groups, "total": groups}
    return {
        name: np.zeros((batch, length), np.float32) for name, length in (lengths | {"expected": 1}).items()
    }


def quantize_input(values: _Reals, block: int, out: NDArray[np.float32]) -> None:
    """Quantise rows to the grid on which MatMulNBits (accuracy_level 4) computes with the very same numbers.

    Each block becomes integers -127 to 127, one of magnitude 127, times a scale of 12 significant bits. The
    products are exact in float32, and so is 1/127 of the largest, which the operator takes for the scale.

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
    """Return sums over the last axis, float32. Halves are added to each other: a fixed order."""
    while (columns := terms.shape[-1]) > 1:
        half = columns // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        if columns % 2:
            folded[..., 0] += terms[..., -1]
        terms = folded
    return terms[..., 0].astype(np.float32)


def _best(
    grouped: NDArray[np.float32], peak: NDArray[np.float32], count: int, groups: int
) -> NDArray[np.int64]:
    """Return the `count` rows of largest bound, looked for in the `groups` groups of largest peak.

    `count` groups are enough, and one more for each row that was marked as done since the peaks were taken.
    """
    number = min(groups, len(peak))
    chosen = np.argpartition(peak, -number)[-number:]
    bounds = grouped[chosen].reshape(-1)
    places = np.argpartition(bounds, -count)[-count:]
    size = grouped.shape[1]
    rows: NDArray[np.int64] = chosen[places // size] * size + places % size
    return rows


def _counting(rows: NDArray[np.int64], logits: NDArray[np.float32], asked: Wanted) -> NDArray[np.float32]:
    """Return the logits of the rows that count among the `k`."""
    if not asked.lowered:
        return logits
    counts = np.fromiter((row not in asked.lowered for row in rows.tolist()), bool, len(rows))
    counting: NDArray[np.float32] = logits[counts]
    return counting
