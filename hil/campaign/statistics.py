"""Counts as rates with exact intervals, and latencies as percentiles.

Rates of a fault campaign lie near 0 or 1, where the usual normal interval has no width and says nothing
(reference/faults.md section 5); Clopper-Pearson is exact there. It is the inverse of the binomial
distribution, found here by bisection, so that no statistics package is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
import numpy as np

CONFIDENCE: Final = 0.95
_BISECTIONS: Final = 60
"""Halvings of 0 to 1: the bound is exact to 1e-18."""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """A count out of trials, with its two-sided Clopper-Pearson interval."""

    count: int
    trials: int
    low: float
    """Lower bound of the true rate, 0 to 1."""
    high: float
    """Upper bound of the true rate, 0 to 1."""
    confidence: float = CONFIDENCE

    @property
    def value(self) -> float:
        """Observed rate, 0 to 1; no number without trials."""
        return self.count / self.trials if self.trials else math.nan


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Order statistics of a sample; all None for an empty one."""

    count: int
    p50: float | None = None
    p99: float | None = None
    max: float | None = None


def clopper_pearson(count: int, trials: int, confidence: float = CONFIDENCE) -> Rate:
    """Return a rate with its exact two-sided interval.

    Parameters
    ----------
    count
        Trials with the outcome, 0 to `trials`.
    trials
        All of them, 0 or more; without any the interval is 0 to 1.
    confidence
        Chance that the interval covers the true rate, at least, 0 to 1, both excluded.

    Raises
    ------
    ValueError
        An argument is out of range.
    """
    _check(count, trials, confidence)
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else _solve(lambda p: 1 - _cdf(count - 1, trials, p), tail)
    high = 1.0 if count == trials else _solve(lambda p: -_cdf(count, trials, p), -tail)
    return Rate(count=count, trials=trials, low=low, high=high, confidence=confidence)


def proven_at_least(misses: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Return the success rate that is claimed with one-sided confidence after so many misses.

    0 misses in 2,995 trials claim 99.9 % at 95 % confidence. 0 without trials.
    """
    _check(misses, trials, confidence)
    if misses == trials:
        return 0.0
    return 1 - _solve(lambda p: -_cdf(misses, trials, p), confidence - 1)


def percentiles(values: Sequence[float]) -> Percentiles:
    """Return order statistics: the 99th percentile is a value of the sample, never below the true rank."""
    if not values:
        return Percentiles(count=0)
    p50, p99 = (float(np.percentile(values, q, method="inverted_cdf")) for q in (50, 99))
    return Percentiles(count=len(values), p50=p50, p99=p99, max=float(max(values)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def percent(count: int, trials: int, digits: int = 2) -> str:
    """Return a rate with its exact 95 % interval, in percent."""
    rate = clopper_pearson(count, trials)
    if not trials:
        return "-"
    return f"{100 * rate.value:.{digits}f} ({100 * rate.low:.{digits}f} to {100 * rate.high:.{digits}f})"


def milliseconds(values: Sequence[float]) -> str:
    """Return median, 99th percentile and maximum, in the unit of the values."""
    found = percentiles(values)
    if found.p50 is None:
        return "-"
    return f"{found.p50:.1f} / {found.p99:.1f} / {found.max:.1f}"


def _check(count: int, trials: int, confidence: float) -> None:
    if not (0 <= count <= trials and 0 < confidence < 1):
        raise ValueError(f"{count} of {trials} trials at confidence {confidence}")


def _cdf(count: int, trials: int, p: float) -> float:
    """Return the chance of at most `count` of `trials` at a rate `p`."""
    if count < 0:
        return 0.0
    if count >= trials or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    k = np.arange(count + 1, dtype=np.float64)
    # log C(n, k) as a running sum of log((n - k + 1) / k): exact enough for any n used here.
    steps = np.log((trials - k[1:] + 1) / k[1:])
    choose = np.concatenate(([0.0], np.cumsum(steps)))
    terms = choose + k * math.log(p) + (trials - k) * math.log1p(-p)
    top = float(terms.max())
    return min(1.0, math.exp(top) * float(np.exp(terms - top).sum()))


def _solve(rising: Callable[[float], float], target: float) -> float:
    """Return where a rising function of 0 to 1 meets a value."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
