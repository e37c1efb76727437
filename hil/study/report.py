"""The result of the power study as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Final

from hil.study.cell import CORE_W, IDLE_W, MEASURED, PLATFORM_W, SOC_FLOOR, measured_curve
from hil.study.power import OWN, kept
from telemetry.figures import GovernorRow, PowerStudy, StudyCell

BARS: Final = ((95.0, 98.0), (88.0, 94.0))
"""Bar and stretch of the median and of the worst cell, percent of the bound."""
SPEED_BARS: Final = (20_000.0, 100_000.0)


def markdown(result: PowerStudy, command: str, plot: str | None) -> str:
    """Return the page of the study.

    Parameters
    ----------
    result
        What was found.
    command
        What to type to find it again.
    plot
        Name of the picture beside the page, None without one.
    """
    own, loss, machine = result.by_governor[0], result.with_array_loss, result.machine
    cells = [row for row in result.cells if row.array_loss == 0]
    lines = [
        "# Power study, measured\n",
        f"Written by `{command}`; do not edit. {own.cells} cells of {result.orbits} orbits each, for each of "
        f"{len(result.by_governor)} governors. Machine: {machine.cpu}, one core a run.\n",
        f"Every spacecraft here is assumed: platform {PLATFORM_W:g} W, board {IDLE_W:g} W idle and "
        f"{CORE_W:g} W for each busy core, floor {SOC_FLOOR:.0%}, 420 km. Tokens/s by busy cores are "
        "measured (docs/results/calibrate.md). The truth is the bench's plant: JPL's ephemeris, an oblate "
        "shadow, cells with resistance and a voltage curve, an array that is cold after eclipse. Governors "
        "are told of it with errors, and learn of orders (urgent ones worth 4 a token, standard ones 2, work "
        "without end 1) when they come in.\n",
        "`percent` is the value served as a share of the linear-programming optimum with everything known "
        "beforehand and no loss in the battery's resistance, ending with as much energy: no governor can "
        "reach it. Cells with a broken floor are counted apart, and their value nowhere: a governor "
        "that breaks it can outscore the optimum.\n",
        "## Bars\n",
        *_table(
            ("", "measured", "bar", "stretch", "verdict"),
            [
                ("median over the sweep", *_bar(own.percent_of_lp.median, BARS[0], "{:.2f} %")),
                ("worst cell", *_bar(own.percent_of_lp.worst, BARS[1], "{:.2f} %")),
                (
                    "cells with a broken floor, without and with a tenth of the array lost unannounced",
                    f"{own.floor_violations} of {own.cells}"
                    + ("" if loss is None else f", {loss.floor_violations} of {loss.cells}"),
                    "0",
                    "0, 0",
                    "stretch" if result.floor_violations == 0 else "falls short",
                ),
                ("simulation speed, plant and planner, one core",
                 *_bar(result.sim_speed_x, SPEED_BARS, "{:,.0f} x")),
            ],
        ),
        "## Governors\n",
        *_table(
            ("governor", "median", "worst", "floor broken in", "below the floor, min", "deepest cycle",
             "wear a year", "speed"),
            [_row(each, each.governor) for each in result.by_governor]
            + ([] if loss is None else [_row(loss, f"{OWN}, array - 10 %")]),
        ),
        "`planner` is the node's own; `rules` is what the node falls back on. `barrier` weighs watts against "
        "a cost that grows towards the floor, `threshold` has four levels by state of charge, `sun_only` "
        "serves in sunlight, `greedy` always. Depth, wear and speed are medians; wear by an assumed table of "
        "life.\n",
        "## Along each axis\n",
        "Median percent over the cells whose floor was kept; in brackets, cells in which it was broken.\n",
        *_axis(cells, "array / load", lambda row: f"{row.ratio:g}"),
        *_axis(cells, "battery, Wh", lambda row: f"{row.battery_wh:g}"),
        *_axis(cells, "beta, deg", lambda row: f"{row.beta_deg:g}"),
        *_axis(cells, "errors", lambda row: row.errors),
        "Errors, standard deviations: `good`: eclipse edges 2 s, array 2 %, state of charge 0.5 %; `poor`: "
        "edges 20 s, array 6 %; `noisy`: state of charge 1.5 %, array readings 6 %; then both.\n",
        "## Worst cells of the planner\n",
        *_table(
            ("percent", "array / load", "battery, Wh", "beta, deg", "errors", "seed", "lowest charge"),
            [
                (f"{row.percent_of_lp:.2f}", f"{row.ratio:g}", f"{row.battery_wh:g}", f"{row.beta_deg:g}",
                 row.errors, str(row.seed), f"{row.soc_min:.3f}")
                for row in sorted((r for r in cells if r.governor == OWN), key=lambda r: r.percent_of_lp)[:8]
            ],
        ),
    ]  # fmt: skip
    lines += _tokens_per_joule()
    if plot is not None:
        lines.append(f"![percent of the optimum by governor and array/load ratio]({plot})\n")
    return "\n".join(lines)


def _bar(measured: float | None, bars: tuple[float, float], form: str) -> tuple[str, str, str, str]:
    bar, stretch = bars
    verdict = "falls short"
    if measured is not None and measured >= bar:
        verdict = "stretch" if measured >= stretch else "passed"
    shown = "-" if measured is None else form.format(measured)
    return shown, form.format(bar), form.format(stretch), verdict


def _row(row: GovernorRow, name: str) -> tuple[str, ...]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} %"

    return (
        name,
        percent(row.percent_of_lp.median),
        percent(row.percent_of_lp.worst),
        f"{row.floor_violations} of {row.cells}",
        f"{row.floor_violation_s / 60:,.0f}",
        f"{row.deepest:.1%}",
        f"{row.wear_per_year:.1%}",
        f"{row.sim_speed_x:,.0f} x",
    )


def _tokens_per_joule() -> list[str]:
    """Return what batching and slowing down do to tokens per joule, by the measured operating points."""
    curve = measured_curve()
    top = curve.hull[-1]
    body = [
        (str(threads), str(batch), "1", f"{rate:.1f}", f"{IDLE_W + CORE_W * cores:.2f}",
         f"{rate / (IDLE_W + CORE_W * cores):.1f}")
        for threads, batch, rate, cores in MEASURED
    ]  # fmt: skip
    for duty in (0.75, 0.5, 0.25):
        watts = curve.idle_w + duty * (top.power_w - curve.idle_w)
        rate = duty * top.tokens_s
        point = (str(top.point.threads), str(top.point.batch), f"{duty:g}")
        body.append((*point, f"{rate:.1f}", f"{watts:.2f}", f"{rate / watts:.1f}"))
    return [
        "## Tokens per joule\n",
        "Of the whole board. Batching is worth more than anything else: eight together cost hardly more "
        "watts than one. Slowing down in eclipse costs tokens per joule, for the idle draw goes on; what it "
        "buys is that the battery lasts to the end. Rates at duty 1 are measured, watts follow from busy "
        "cores (assumed), rates at a lower duty are in proportion (half duty measured: 0.47 of the rate).\n",
        *_table(("threads", "together", "duty", "tokens/s", "W", "tokens/J"), body),
    ]


def _axis(cells: Sequence[StudyCell], name: str, key: Callable[[StudyCell], str]) -> list[str]:
    values = list(dict.fromkeys(key(row) for row in cells))
    if len(values) < 2:
        return []
    names = list(dict.fromkeys(row.governor for row in cells))
    order = sorted(values, key=lambda v: float(v) if v.replace(".", "").isdigit() else values.index(v))
    body = []
    for value in order:
        line = [value]
        for governor in names:
            rows = [row for row in cells if row.governor == governor and key(row) == value]
            good = kept(rows)
            text = f"{statistics.median(good):.1f}" if good else "-"
            line.append(text if len(good) == len(rows) else f"{text} ({len(rows) - len(good)})")
        body.append(tuple(line))
    return _table((name, *names), body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in body), ""]
