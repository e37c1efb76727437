"""The linear programme of watts over time: how much value an array, a battery and a set of jobs can give.

One formulation serves two ends: the planner solves it over the next orbits with what it expects, and the
bench solves it over a whole simulation with what truly happened, which bounds every controller from above.

In each segment k the payload draws p watts, the battery takes c watts or gives d watts at the bus, and ends
with e joules; jobs j get y tokens::

    platform + p + c - d <= array                      (the rest of the array is not drawn)
    e[k] = e[k-1] + eta_c * c * dt - d * dt / eta_d    floor[k] <= e[k] <= full
    sum over j of y[j, k] <= (a * p + b) * dt          for each line of the concave curve tokens/s of watts
    sum over k of y[j, k] <= tokens[j]                 only between the arrival and the deadline of j
    maximise  sum of value[j] * y[j, k] + end_value * e[last]

and, where heat can bind, the board's temperature follows p with one lag and stays under its limit.
Solved by HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from telemetry.errors import PenumbraError

Array = NDArray[np.float64]

EARLY: Final = 0.02
"""Value a token loses from the first segment to the last: what can be served now is not put off."""
TASTE: Final = 1e-4
"""Of plans that are equal but for this share, the one that cycles the battery less and charges it earlier is
taken: it is the safer one when things turn out otherwise."""
COLDEST_C: Final = -273.15


class SolverFailed(PenumbraError):
    """HiGHS gave no optimal plan: no time left, or no plan there is."""


@dataclass(frozen=True)
class Demand:
    """Tokens that are wanted, all worth the same and due together."""

    tokens: float
    value: float
    """Of a token, above 0."""
    first: int = 0
    """Segment from which on they can be served."""
    last: int | None = None
    """Last segment in which they are worth anything; None: to the end."""


@dataclass(frozen=True)
class Heat:
    """One thermal node: dT/dt = (p - conductance * (T - sink)) / capacity."""

    start_c: float
    limit_c: Array
    """At the end of each segment."""
    sink_c: float
    conductance_w_k: float
    capacity_j_k: float


@dataclass(frozen=True)
class Problem:
    """What is to be planned. Arrays have one value a segment, shape (segments,)."""

    dt_s: Array
    array_w: Array
    """Most the array can deliver."""
    platform_w: Array
    """Draw beside the payload."""
    least_w: Array
    """Payload draw that service never goes below."""
    most_w: Array
    start_j: float
    """Energy in the battery."""
    floor_j: Array
    full_j: float
    charge_efficiency: float
    discharge_efficiency: float
    charge_w: float
    """Most the battery takes, at the bus."""
    curve: Sequence[tuple[Array | float, Array | float]]
    """Lines (tokens/s a watt, tokens/s at 0 W) whose minimum is the rate; of all segments, or one of each."""
    demands: Sequence[Demand]
    end_j: float = 0.0
    """Energy there must be at the end."""
    end_value: float = 0.0
    """Of a joule at the end."""
    heat: Heat | None = None
    early: float = EARLY
    taste: float = TASTE
    """Both 0: the best value, however it comes about."""


@dataclass(frozen=True)
class Solution:
    """The best plan."""

    payload_w: Array
    energy_j: Array
    """At the end of each segment."""
    board_c: Array | None
    served: Array
    """Tokens of each demand in each segment, shape (demands, segments)."""
    value: float
    """Sum of value times tokens, without what the end is worth."""


class _Rows:
    """Rows of the programme, gathered as triplets."""

    def __init__(self) -> None:
        self.count = 0
        self._row: list[NDArray[np.int32]] = []
        self._column: list[NDArray[np.int32]] = []
        self._value: list[Array] = []
        self._lower: list[Array] = []
        self._upper: list[Array] = []

    def add(
        self, size: int, lower: Array | float, upper: Array | float, *terms: tuple[NDArray[np.int32], object]
    ) -> None:
        """Add `size` rows; each term has one column and one coefficient a row."""
        rows = np.arange(self.count, self.count + size, dtype=np.int32)
        for columns, values in terms:
            self._row.append(rows)
            self._column.append(columns)
            self._value.append(np.broadcast_to(np.asarray(values, dtype=np.float64), size))
        self._lower.append(np.broadcast_to(np.asarray(lower, dtype=np.float64), size))
        self._upper.append(np.broadcast_to(np.asarray(upper, dtype=np.float64), size))
        self.count += size

    def extend(self, rows: NDArray[np.int32], columns: NDArray[np.int32]) -> None:
        """Add a term of coefficient 1 to rows that are there, one column each."""
        self._row.append(rows)
        self._column.append(columns)
        self._value.append(np.ones(len(columns)))

    def matrix(self) -> tuple[NDArray[np.int32], NDArray[np.int32], Array]:
        """Return starts, columns and values by row."""
        row, column = np.concatenate(self._row), np.concatenate(self._column)
        value = np.concatenate(self._value)
        order = np.argsort(row, kind="stable")
        starts = np.zeros(self.count + 1, dtype=np.int32)
        np.cumsum(np.bincount(row, minlength=self.count), out=starts[1:])
        return starts, column[order], value[order]

    def bounds(self) -> tuple[Array, Array]:
        """Return lower and upper bounds by row."""
        return np.concatenate(self._lower), np.concatenate(self._upper)


def solve(problem: Problem, *, time_limit_s: float = 10.0) -> Solution:
    """Return the best plan.

    Raises
    ------
    SolverFailed
        No optimal plan within the time limit.
    """
    n = len(problem.dt_s)
    dt_s = problem.dt_s
    infinity = np.inf
    p, c, d, e = (np.arange(i * n, (i + 1) * n, dtype=np.int32) for i in range(4))
    columns = 4 * n
    t = np.arange(columns, columns + n, dtype=np.int32) if problem.heat is not None else None
    columns += 0 if t is None else n
    spans = [
        (each.first, n if each.last is None else max(each.first, min(each.last + 1, n)))
        for each in problem.demands
    ]
    y = []
    for first, end in spans:
        size = max(0, end - first)
        y.append(np.arange(columns, columns + size, dtype=np.int32))
        columns += size

    cost = np.zeros(columns)
    lower = np.zeros(columns)
    upper = np.full(columns, infinity)
    lower[p], upper[p] = problem.least_w, np.maximum(problem.most_w, problem.least_w)
    upper[c] = problem.charge_w
    floor_j = problem.floor_j.copy()
    floor_j[-1] = max(floor_j[-1], problem.end_j)
    lower[e], upper[e] = np.minimum(floor_j, problem.full_j), problem.full_j
    cost[e] = problem.taste * problem.end_value / n
    cost[e[-1]] = problem.end_value
    cost[d] = -problem.taste * problem.end_value * dt_s
    early = 1.0 - problem.early * np.arange(n) / n
    for each, (first, end), mine in zip(problem.demands, spans, y, strict=True):
        cost[mine] = each.value * early[first:end]

    rows = _Rows()
    rows.add(n, -infinity, problem.array_w - problem.platform_w, (p, 1.0), (c, 1.0), (d, -1.0))
    gain, loss = problem.charge_efficiency * dt_s, dt_s / problem.discharge_efficiency
    rows.add(1, problem.start_j, problem.start_j, (e[:1], 1.0), (c[:1], -gain[:1]), (d[:1], loss[:1]))
    rows.add(n - 1, 0.0, 0.0, (e[1:], 1.0), (e[:-1], -1.0), (c[1:], -gain[1:]), (d[1:], loss[1:]))
    for slope, offset in problem.curve:
        base = rows.count
        rows.add(n, -infinity, offset * dt_s, (p, -slope * dt_s))
        for (first, _), mine in zip(spans, y, strict=True):
            for_rows = np.arange(base + first, base + first + len(mine), dtype=np.int32)
            rows.extend(for_rows, mine)
    for each, mine in zip(problem.demands, y, strict=True):
        if len(mine) and np.isfinite(each.tokens):
            rows.add(1, -infinity, each.tokens)
            rows.extend(np.full(len(mine), rows.count - 1, dtype=np.int32), mine)
    if t is not None and problem.heat is not None:
        lower[t], upper[t] = COLDEST_C, problem.heat.limit_c
        _add_heat(rows, problem.heat, dt_s, p, t)

    found = _run(cost, lower, upper, rows, time_limit_s)
    served = np.zeros((len(spans), n))
    for index, ((first, end), mine) in enumerate(zip(spans, y, strict=True)):
        if len(mine):
            served[index, first:end] = found[mine]
    values = np.array([each.value for each in problem.demands])
    return Solution(
        payload_w=found[p],
        energy_j=found[e],
        board_c=None if t is None else found[t],
        served=served,
        value=float((values @ served).sum()) if spans else 0.0,
    )


def _add_heat(rows: _Rows, heat: Heat, dt_s: Array, p: NDArray[np.int32], t: NDArray[np.int32]) -> None:
    """Add what the board's temperature follows, exact over a segment of constant draw."""
    keep = np.exp(-dt_s * heat.conductance_w_k / heat.capacity_j_k)
    per_w = (1.0 - keep) / heat.conductance_w_k
    sink_c = (1.0 - keep) * heat.sink_c
    first_c = sink_c[:1] + keep[:1] * heat.start_c
    rows.add(1, first_c, first_c, (t[:1], 1.0), (p[:1], -per_w[:1]))
    rows.add(len(t) - 1, sink_c[1:], sink_c[1:], (t[1:], 1.0), (t[:-1], -keep[1:]), (p[1:], -per_w[1:]))


def _run(cost: Array, lower: Array, upper: Array, rows: _Rows, time_limit_s: float) -> Array:
    """Return the columns that maximise the cost."""
    import highspy  # noqa: PLC0415 - 5 MB that safe mode does without

    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(cost), rows.count
    model.sense_ = highspy.ObjSense.kMaximize
    model.col_cost_, model.col_lower_, model.col_upper_ = cost, lower, upper
    model.row_lower_, model.row_upper_ = rows.bounds()
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = rows.matrix()
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", time_limit_s)
    solver.passModel(model)
    solver.run()
    status = solver.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        raise SolverFailed(f"HiGHS found no plan: {solver.modelStatusToString(status)}")
    return np.asarray(solver.getSolution().col_value, dtype=np.float64)
