"""`penumbra study power`: every governor over a sweep of spacecraft, held against the clairvoyant optimum."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from typing import Final

import msgspec

from hil.bench.machine import describe_machine, load_average
from hil.study.cell import BOTH, GOOD, NOISY, POOR, Cell, Errors, measured_curve
from hil.study.governors import GOVERNORS
from hil.study.simulate import run, world
from telemetry.errors import PenumbraError
from telemetry.figures import GovernorRow, PercentOfBound, PowerStudy, StudyCell

OWN: Final = "planner"
"""The governor of the node."""
BETAS_DEG: Final[tuple[float, ...]] = (0.0, 40.0, 65.0)
RATIOS: Final[tuple[float, ...]] = (0.75, 0.9, 1.05, 1.25, 1.5)
BATTERIES_WH: Final[tuple[float, ...]] = (24.0, 36.0, 60.0)
ERRORS: Final = (GOOD, POOR, NOISY, BOTH)
ARRAY_LOSS: Final = 0.1
ORBITS: Final = 12
YEAR_S: Final = 365.25 * 86_400.0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    cell: Cell
    governor: str
    orbits: int


def sweep(seeds: Sequence[int], quick: bool) -> list[Cell]:
    """Return the cells of the sweep; a quick one has every other value of each axis."""
    every = slice(None, None, 2) if quick else slice(None)
    errors: tuple[Errors, ...] = (GOOD, BOTH) if quick else ERRORS
    return [
        Cell(beta_deg=beta, ratio=ratio, battery_wh=wh, errors=error, seed=seed)
        for beta, ratio, wh in product(BETAS_DEG[every], RATIOS[every], BATTERIES_WH[every])
        for error, seed in product(errors, seeds)
    ]


def study_power(
    *,
    orbits: int = ORBITS,
    seeds: Sequence[int] = (1,),
    governors: Sequence[str] = tuple(GOVERNORS),
    quick: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PowerStudy:
    """Run the sweep.

    Parameters
    ----------
    orbits
        Length of each run.
    seeds
        Orders and errors are drawn anew for each.
    governors
        By name; the node's own is always among them.
    quick
        Every other value of each axis.
    workers
        Processes.
    progress
        Called with runs done and runs in all.

    Raises
    ------
    PenumbraError
        One of the processes was killed.
    """
    load_before = load_average()
    cells = sweep(seeds, quick)
    names = [OWN, *(name for name in governors if name != OWN)]
    lossy = [msgspec.structs.replace(cell, array_loss=ARRAY_LOSS) for cell in cells]
    tasks = [Task(cell=cell, governor=name, orbits=orbits) for name in names for cell in cells]
    tasks += [Task(cell=cell, governor=OWN, orbits=orbits) for cell in lossy]
    # Runs of one sky together: it is computed once a process.
    tasks.sort(key=lambda task: (task.cell.beta_deg, task.cell.array_loss))
    rows: list[StudyCell] = []
    if workers == 1:
        for task in tasks:
            rows.append(one(task))
            progress(len(rows), len(tasks))
    else:
        try:
            with ProcessPoolExecutor(max_workers=workers) as pool:
                for row in pool.map(one, tasks, chunksize=8):
                    rows.append(row)
                    progress(len(rows), len(tasks))
        except BrokenProcessPool:
            raise PenumbraError(
                f"a process of the study was killed after {len(rows)} of {len(tasks)} runs",
                "run it again, with fewer --workers",
            ) from None
    whole = [row for row in rows if row.array_loss == 0]
    by_governor = [_summary(name, [row for row in whole if row.governor == name]) for name in names]
    with_loss = _summary(OWN, [row for row in rows if row.array_loss > 0])
    return PowerStudy(
        machine=describe_machine(1, peers=False, load_before=load_before),
        orbits=orbits,
        percent_of_lp=by_governor[0].percent_of_lp,
        floor_violations=by_governor[0].floor_violations + with_loss.floor_violations,
        sim_speed_x=by_governor[0].sim_speed_x,
        by_governor=by_governor,
        with_array_loss=with_loss,
        cells=rows,
    )


def one(task: Task) -> StudyCell:
    """Run one cell under one governor."""
    cell = task.cell
    out = run(world(cell, task.orbits, measured_curve()), GOVERNORS[task.governor])
    return StudyCell(
        governor=task.governor,
        beta_deg=cell.beta_deg,
        ratio=cell.ratio,
        battery_wh=cell.battery_wh,
        errors=cell.errors.name,
        array_loss=cell.array_loss,
        seed=cell.seed,
        percent_of_lp=out.percent,
        tokens=out.tokens,
        value=out.value,
        floor_violation_s=out.floor_violation_s,
        soc_min=out.soc_min,
        deepest=out.deepest,
        wear=out.wear * YEAR_S / out.mission_s,
        payload_mean_w=out.payload_mean_w,
        eclipse_mean_w=None if math.isnan(out.eclipse_mean_w) else out.eclipse_mean_w,
        board_max_c=out.board_max_c,
        plans=out.plans,
        fallbacks=out.fallbacks,
        sim_speed_x=out.speed_x,
    )


def kept(rows: Iterable[StudyCell]) -> list[float]:
    """Return the percentages of the cells in which the floor was kept."""
    return [row.percent_of_lp for row in rows if row.floor_violation_s == 0]


def _summary(name: str, rows: Sequence[StudyCell]) -> GovernorRow:
    good = kept(rows)
    return GovernorRow(
        governor=name,
        percent_of_lp=PercentOfBound(
            median=statistics.median(good) if good else None, worst=min(good, default=None)
        ),
        cells=len(rows),
        floor_violations=len(rows) - len(good),
        floor_violation_s=sum(row.floor_violation_s for row in rows),
        deepest=statistics.median(row.deepest for row in rows),
        wear_per_year=statistics.median(row.wear for row in rows),
        sim_speed_x=statistics.median(row.sim_speed_x for row in rows),
    )
