"""The horizon of a plan: its segments between the edges of eclipses, and what is due in which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from node.power.lp import Array
from node.power.plan import Backlog, PlanInputs

NS_PER_S: Final = 1_000_000_000
MAX_DEMANDS: Final = 12
"""Groups of jobs a plan tells apart; of more, those of least value share one."""


def segments(inputs: PlanInputs, *, orbits: float, segment_s: float) -> tuple[list[int], Array]:
    """Return the bounds of the segments, ns, and the share of each that is sunlit.

    Parameters
    ----------
    inputs
        When the plan begins, and the eclipses.
    orbits
        Least length of the horizon.
    segment_s
        Longest segment, s.

    Notes
    -----
    Eclipses are taken longer by the error of their edges on both sides. The horizon ends at the last umbra
    entry within one orbit after its least length, or there when none comes.
    """
    start = inputs.t_ns
    least_ns = round(orbits * inputs.period_s * NS_PER_S)
    margin = round(inputs.edge_margin_s * NS_PER_S)
    dark = [(each.entry_ns - margin, each.exit_ns + margin) for each in inputs.passes]
    dark = [(entry, leave) for entry, leave in dark if leave > start]
    latest = start + least_ns + round(inputs.period_s * NS_PER_S)
    entries = [entry for entry, _ in dark if start + least_ns <= entry <= latest]
    end = entries[0] if entries else start + least_ns
    marks = sorted({start, end, *(m for pair in dark for m in pair if start < m < end)})
    edges: list[int] = []
    for low, high in pairwise(marks):
        parts = max(1, math.ceil((high - low) / NS_PER_S / segment_s))
        edges += [low + (high - low) * k // parts for k in range(parts)]
    edges.append(end)
    middle = [(low + high) // 2 for low, high in pairwise(edges)]
    lit = [0.0 if any(entry <= m < leave for entry, leave in dark) else 1.0 for m in middle]
    return edges, np.asarray(lit)


def groups(inputs: PlanInputs) -> list[Backlog]:
    """Return what is wanted, in at most `MAX_DEMANDS` groups."""
    if inputs.jobs is None:
        return [Backlog(tokens=math.inf, value=1.0)]
    jobs = sorted(inputs.jobs, key=lambda each: -each.value)
    if len(jobs) <= MAX_DEMANDS:
        return jobs
    rest = jobs[MAX_DEMANDS - 1 :]
    tokens = sum(each.tokens for each in rest)
    value = sum(each.tokens * each.value for each in rest) / max(tokens, 1e-9)
    due = [each.deadline_ns for each in rest]
    latest = None if None in due else max(each for each in due if each is not None)
    return [*jobs[: MAX_DEMANDS - 1], Backlog(tokens=tokens, value=value, deadline_ns=latest)]


def last_segment(inputs: PlanInputs, each: Backlog, edges_ns: Sequence[int]) -> int | None:
    """Return the last segment in which tokens are still in time, None when all are."""
    due = each.deadline_ns
    if due is None:
        return None
    if inputs.contacts_until_ns is not None and due <= inputs.contacts_until_ns:
        ends = [end for start, end in inputs.contacts if start < due]
        due = min(due, max(ends, default=due))
    return int(np.searchsorted(np.asarray(edges_ns), due, side="right")) - 2


def dark_after(inputs: PlanInputs, end_ns: int) -> float:
    """Return how long the eclipse at the end of the horizon lasts, s; 0 without one."""
    margin_s = inputs.edge_margin_s
    for each in inputs.passes:
        if abs(each.entry_ns - end_ns) <= (margin_s + 1.0) * NS_PER_S:
            return each.duration_s + 2 * margin_s
    return 0.0


def incidence_at(inputs: PlanInputs, edges_ns: Sequence[int]) -> Array:
    """Return the incidence on the array in the middle of each segment, by its mean, shape (segments,)."""
    middle = np.asarray([(low + high) // 2 for low, high in pairwise(edges_ns)], dtype=np.int64)
    return np.ones(len(middle)) if inputs.incidence is None else inputs.incidence(middle)
