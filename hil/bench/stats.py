"""Figures of a noisy machine: spreads over runs, and costs from many short pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

import numpy as np

from telemetry.figures import PairedCost, Spread

_RESAMPLES: Final = 4000
_SEED: Final = 20261124
"""Resampling has its own fixed seed: the same pairs always give the same interval."""


def spread(values: Sequence[float]) -> Spread:
    """Return median, smallest and largest of one or more runs."""
    return Spread(median=statistics.median(values), min=min(values), max=max(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of ratios taken run by run: what drifts for both of a run falls out.

    Parameters
    ----------
    above, below
        One figure for each run, in the same order.
    """
    return spread([a / b for a, b in zip(above, below, strict=True)])


def paired_cost(with_s: Sequence[float], without_s: Sequence[float]) -> PairedCost:
    """Return what the first of each pair costs over the second, percent, with a 95 % interval.

    The interval is the percentile bootstrap of the median over pairs: it says how well the median is
    known, min and max say how far single pairs lie apart.

    Parameters
    ----------
    with_s, without_s
        Time of the same work with and without, for each pair, s. At least two pairs.
    """
    costs = (np.asarray(with_s, np.float64) / np.asarray(without_s, np.float64) - 1.0) * 100.0
    if len(costs) < 2:
        raise ValueError(f"{len(costs)} pairs; an interval takes two or more")
    chosen = np.random.default_rng(_SEED).integers(0, len(costs), (_RESAMPLES, len(costs)))
    low, high = np.percentile(np.median(costs[chosen], axis=1), [2.5, 97.5])
    return PairedCost(
        median=float(np.median(costs)),
        min=float(costs.min()),
        max=float(costs.max()),
        low95=float(low),
        high95=float(high),
        pairs=len(costs),
    )
