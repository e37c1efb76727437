"""The result of the power study as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from hil.study.power import OWN, kept
from telemetry.errors import PenumbraError
from telemetry.figures import PowerStudy


def draw(result: PowerStudy, path: Path) -> None:
    """Draw percent of the optimum over the array/load ratio, every governor.

    Raises
    ------
    PenumbraError
        The file cannot be written.
    """
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1.0))
    names = [row.governor for row in result.by_governor]
    cells = [row for row in result.cells if row.array_loss == 0]
    ratios = sorted({row.ratio for row in cells})
    for name in names:
        mine = [row for row in cells if row.governor == name]
        at = [[row for row in mine if row.ratio == ratio] for ratio in ratios]
        middle = [statistics.median(kept(rows)) if kept(rows) else float("nan") for rows in at]
        style = {"linewidth": 2.2, "zorder": 5} if name == OWN else {"linewidth": 1.0}
        (line,) = left.plot(ratios, middle, marker="o", markersize=4, label=name, **style)
        low = [min(kept(rows), default=float("nan")) for rows in at]
        left.plot(ratios, low, linestyle=":", color=line.get_color(), linewidth=0.9)
    left.set_xlabel("mean array power by the most that platform and payload draw")
    left.set_ylabel("value, % of the clairvoyant optimum")
    left.set_title("median (line) and worst (dots) of the cells whose floor was kept", fontsize=9)
    left.legend(fontsize=8, frameon=False)
    left.grid(color="#e3e8ee", linewidth=0.6)
    broken = [row.floor_violations for row in result.by_governor]
    right.barh(names[::-1], broken[::-1], color="#c8402f", height=0.6)
    right.set_xlabel(f"cells of {result.by_governor[0].cells} in which the floor was broken")
    right.set_title("floor violations", fontsize=9)
    for index, number in enumerate(broken[::-1]):
        right.text(number, index, f" {number}", va="center", fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise PenumbraError(
            f"{path}: cannot be written: {error.strerror}", "choose a writable place"
        ) from None
