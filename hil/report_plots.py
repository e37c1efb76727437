"""The report's figures, as inline SVG: sharp on screen and on paper, no request to anywhere."""

from __future__ import annotations

import io
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hil.faults import Fate, StrikeFate, Target
from hil.record import FlightRecord, Window

INK, FAINT, GRID = "#1d2733", "#6b7785", "#e3e8ee"
SUN, SHADOW, CONTACT = "#e0a100", "#dfe6f2", "#d9f0df"
BLUE, RED, GREEN, VIOLET, TEAL = "#2f6fb3", "#c8402f", "#2f8f5b", "#7a55a8", "#16858a"
REGION = {Target.WEIGHTS: BLUE, Target.KV: VIOLET}
WIDTH_IN = 10.6
RATE_OVER_S = 5.0
"""Physical time over which tokens/s are averaged, s: several blocks."""
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": "#b6c0cb",
    "axes.labelcolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.fonttype": "none",
}


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure as an `svg` element without prolog, metadata, or references outside of itself."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and nothing refers to them
    # Width and height go, the view box stays: the page decides the size.
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))


def orbit_figure(record: FlightRecord) -> str:
    """Draw battery, power, tokens/s and backlog over the flight, eclipse and contacts shaded."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, 8.6), layout="constrained")
        battery, power, tokens, backlog = figure.subplots(4, 1, sharex=True, height_ratios=[1, 1.25, 1, 0.85])
        _battery(battery, record)
        _power(power, record)
        _tokens(tokens, record)
        _backlog(backlog, record)
        for axes in (battery, power, tokens, backlog):
            _shade(axes, record.umbrae, SHADOW)
            axes.set_xlim(0, max(record.flown_s, 1.0) / 60)
        backlog.set_xlabel("mission time, min")
        figure.align_ylabels()
        return to_svg(figure, "orbit")


def _shade(axes: Axes, windows: Sequence[Window], colour: str, zorder: float = 0.0) -> None:
    for window in windows:
        axes.axvspan(window.start_s / 60, window.end_s / 60, color=colour, lw=0, zorder=zorder)


def _battery(axes: Axes, record: FlightRecord) -> None:
    t = [s.t_s / 60 for s in record.plant]
    soc = [s.soc * 100 for s in record.plant]
    floor = record.limits.soc_floor * 100
    axes.plot(t, soc, color=GREEN, lw=1.6)
    axes.axhline(floor, color=RED, lw=1.0, ls="--")
    axes.annotate(
        f"floor {floor:.0f} %", (0.995, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom",
        color=RED, fontsize=8, xytext=(0, 2), textcoords="offset points",
    )  # fmt: skip
    for plan in record.plans:
        ends = [(each.end_ns - record.start_ns) / 6e10 for each in plan.packet.horizon]
        told = plan.packet.battery_soc
        if ends and told is not None:
            expected = [told * 100, *(each.battery_soc * 100 for each in plan.packet.horizon)]
            here = [(at, soc_pct) for at, soc_pct in zip([plan.t_s / 60, *ends], expected, strict=True)
                    if at <= record.flown_s / 60]  # fmt: skip
            axes.plot(*zip(*here, strict=True), color=VIOLET, lw=0.6, alpha=0.35)
    axes.set_ylabel("battery, %")
    low, high = min([*soc, floor]), max([*soc, floor])
    axes.set_ylim(low - 0.12 * (high - low) - 0.5, high + 0.12 * (high - low) + 0.5)


def _power(axes: Axes, record: FlightRecord) -> None:
    t = [s.t_s / 60 for s in record.plant]
    hk = [h.t_s / 60 for h in record.housekeeping]
    axes.plot(t, [s.array_w for s in record.plant], color=SUN, lw=1.2, label="solar array")
    axes.plot(hk, [h.packet.ceiling_w for h in record.housekeeping], color=RED, lw=1.1, ls="--",
              drawstyle="steps-post", label="ceiling (node)")  # fmt: skip
    axes.plot(t, [s.load_w for s in record.plant], color=BLUE, lw=1.1, label="payload draw")
    axes.set_ylabel("power, W")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=3, bbox_to_anchor=(1.0, 1.17))


def _tokens(axes: Axes, record: FlightRecord) -> None:
    t, rate = token_rate(record)
    axes.plot([at / 60 for at in t], rate, color=TEAL, lw=1.5)
    top = max([*rate, 1.0]) * 1.18
    for fate in record.fates:
        at = record.host_to_s(fate.strike.t_ns) / 60
        axes.plot([at, at], [top * 0.94, top], color=REGION[fate.strike.target], lw=1.0)
    axes.annotate("flips", (0.003, 0.93), xycoords="axes fraction", va="top", color=FAINT, fontsize=8)
    axes.set_ylabel("tokens/s")
    axes.set_ylim(0, top)


def token_rate(record: FlightRecord) -> tuple[list[float], list[float]]:
    """Return tokens released a second of physical time, over `RATE_OVER_S`, against mission time.

    Tokens are released a block at a time, so a rate from one housekeeping packet to the next is all spikes.
    """
    half_s = RATE_OVER_S / 2 * record.speed
    times = [h.t_s for h in record.housekeeping]
    counts = [h.packet.tokens_released for h in record.housekeeping]
    rates = []
    for at in times:
        first = bisect_left(times, at - half_s)
        last = bisect_right(times, at + half_s) - 1
        span_s = (times[last] - times[first]) / record.speed
        rates.append((counts[last] - counts[first]) / span_s if span_s > 0 else 0.0)
    return times, rates


def _backlog(axes: Axes, record: FlightRecord) -> None:
    _shade(axes, record.contacts, CONTACT, zorder=0.1)
    axes.plot([h.t_s / 60 for h in record.housekeeping],
              [h.packet.spool_records for h in record.housekeeping], color=INK, lw=1.1)  # fmt: skip
    axes.set_ylabel("records waiting")
    axes.set_ylim(bottom=0)
    for contact in record.contacts:
        axes.annotate(
            contact.name, (contact.start_s / 60, 0.97), xycoords=("data", "axes fraction"), va="top",
            color=GREEN, fontsize=8, xytext=(2, 0), textcoords="offset points", annotation_clip=True,
        )  # fmt: skip


def fault_figure(record: FlightRecord) -> str:
    """Draw each fault from strike to repair, the distribution of the latencies, and both by tensor role."""
    answered = [f for f in record.fates if f.detect_ms is not None]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, 5.4), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[2.1, 1], height_ratios=[1.15, 1])
        timeline = figure.add_subplot(grid[:, 0])
        _timeline(timeline, record, answered)
        _histogram(figure.add_subplot(grid[0, 1]), answered)
        _by_role(figure.add_subplot(grid[1, 1]), answered)
        return to_svg(figure, "faults")


def _timeline(axes: Axes, record: FlightRecord, answered: Sequence[StrikeFate]) -> None:
    _shade(axes, record.umbrae, SHADOW)
    for target, colour in REGION.items():
        mine = [f for f in answered if f.strike.target is target]
        t = [record.host_to_s(f.strike.t_ns) / 60 for f in mine]
        detect = [f.detect_ms or 0.0 for f in mine]
        axes.vlines(t, 0, detect, color=colour, lw=1.0, alpha=0.7)
        axes.plot(t, detect, "o", color=colour, ms=4, label=f"{target.value}: strike to detection")
        repaired = [(a, f.repair_ms) for a, f in zip(t, mine, strict=True) if f.repair_ms is not None]
        axes.plot([a for a, _ in repaired], [ms for _, ms in repaired], "_", color=GREEN, ms=9, mew=1.6,
                  label="repaired" if target is Target.KV else None)  # fmt: skip
    for fate in record.fates:
        if fate.detect_ms is None:
            at = record.host_to_s(fate.strike.t_ns) / 60
            axes.plot([at], [0], "x", color=RED if fate.fate is Fate.MISSED else FAINT, ms=6, clip_on=False)
    for fault in record.process_faults:
        axes.axvline(fault.t_s / 60, color=RED, lw=1.0)
        axes.annotate(
            fault.name, (fault.t_s / 60, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top",
            ha="right", color=RED, fontsize=8,
        )  # fmt: skip
    axes.set_xlim(0, max(record.flown_s, 1.0) / 60)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("mission time of the strike, min")
    axes.set_ylabel("physical time since the strike, ms")
    if answered:
        axes.legend(loc="upper left", ncols=3, bbox_to_anchor=(0.0, 1.09))


def _histogram(axes: Axes, answered: Sequence[StrikeFate]) -> None:
    by_region = {
        target: [f.repair_ms for f in answered if f.strike.target is target and f.repair_ms is not None]
        for target in REGION
    }
    every = [ms for times in by_region.values() for ms in times]
    if every:
        edges = np.linspace(0, max(every) * 1.0001, 17).tolist()
        axes.hist(list(by_region.values()), bins=edges, stacked=True, color=list(REGION.values()),
                  label=[t.value for t in REGION], edgecolor="white", linewidth=0.5)  # fmt: skip
        axes.legend(loc="upper right")
    axes.set_xlabel("strike to repair, ms")
    axes.set_ylabel("flips")


def _by_role(axes: Axes, answered: Sequence[StrikeFate]) -> None:
    roles = sorted({f.strike.role for f in answered}, key=lambda r: (r in {"k", "v"}, r), reverse=True)
    for row, role in enumerate(roles):
        mine = [f for f in answered if f.strike.role == role and f.repair_ms is not None]
        times = [f.repair_ms for f in mine]
        colours = [REGION[f.strike.target] for f in mine]
        axes.scatter(times, np.full(len(times), row), c=colours, s=12, alpha=0.8)  # type: ignore[arg-type]
    axes.set_yticks(range(len(roles)), roles)
    axes.set_ylim(-0.6, max(len(roles) - 0.4, 0.6))
    axes.set_xlim(left=0)
    axes.set_xlabel("strike to repair by tensor role, ms")
