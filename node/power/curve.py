"""Tokens per second of watts: the concave curve a set of operating points spans.

Between two operating points a board can be anywhere on the line, by sharing the time between them; so what
matters of the points is their upper hull. A point under it is never worth its watts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from msgspec import structs

from node.power.operating_point import OperatingPoint

WITHIN_W: Final = 1e-6
KEEP: Final = 0.95
"""Share of the best rate with which a setting is kept (assumed)."""


@dataclass(frozen=True)
class Setting:
    """One operating point and what it costs and gives."""

    point: OperatingPoint
    power_w: float
    """Mean draw of the whole board, W."""
    tokens_s: float
    """Proven tokens of all jobs together."""


class PowerCurve:
    """Upper hull of settings, from the idle board to the highest rate.

    Parameters
    ----------
    idle_w
        Draw at no tokens.
    settings
        Operating points at duty 1; those at other duties only confirm the lines between.

    Raises
    ------
    ValueError
        No setting gives tokens for watts above idle.
    """

    def __init__(self, idle_w: float, settings: Iterable[Setting]) -> None:
        useful = sorted(
            (each for each in settings if each.power_w > idle_w and each.tokens_s > 0),
            key=lambda each: (each.power_w, each.tokens_s),
        )
        hull: list[Setting] = []
        for each in useful:
            if hull and each.tokens_s <= hull[-1].tokens_s:
                continue
            while hull:
                before_w, before_rate = (
                    (hull[-2].power_w, hull[-2].tokens_s) if len(hull) > 1 else (idle_w, 0.0)
                )
                slope = (hull[-1].tokens_s - before_rate) / max(hull[-1].power_w - before_w, 1e-9)
                onward = (each.tokens_s - before_rate) / (each.power_w - before_w)
                if onward < slope:
                    break
                hull.pop()
            hull.append(each)
        if not hull:
            raise ValueError(f"no operating point gives tokens for more than the idle {idle_w:g} W")
        self.idle_w = idle_w
        self.hull: tuple[Setting, ...] = tuple(hull)
        """Efficient settings, by rising watts."""

    @property
    def most_w(self) -> float:
        """Draw at the highest rate, W."""
        return self.hull[-1].power_w

    def scaled(self, factor: float) -> PowerCurve:
        """Return the curve of a clock by which the board is that much faster."""
        settings = [replace(each, tokens_s=each.tokens_s * factor) for each in self.hull]
        return PowerCurve(self.idle_w, settings)

    def lines(self) -> list[tuple[float, float]]:
        """Return (tokens/s a watt, tokens/s at 0 W) of each piece; the rate is their minimum."""
        knots = [(self.idle_w, 0.0), *((each.power_w, each.tokens_s) for each in self.hull)]
        pieces = []
        for (low_w, low), (high_w, high) in pairwise(knots):
            slope = (high - low) / (high_w - low_w)
            pieces.append((slope, low - slope * low_w))
        return [*pieces, (0.0, knots[-1][1])]

    def smooth_lines(self, bend: float, pieces: int) -> list[tuple[float, float]]:
        """Return lines of a curve bent a little, so that an even draw is worth more than a changing one.

        Parameters
        ----------
        bend
            Change of the slope from the mean to either end, as a share of the mean slope.
        pieces
            Lines between idle and the most, at least.
        """
        span_w, most = self.most_w - self.idle_w, self.hull[-1].tokens_s
        steps = {self.idle_w + span_w * n / pieces for n in range(pieces + 1)}
        at = sorted({*steps, *(each.power_w for each in self.hull)})
        knots = []
        for power_w in at:
            share = (power_w - self.idle_w) / span_w
            knots.append((power_w, self.rate(power_w) + bend * most * share * (1.0 - share)))
        lines = []
        for (low_w, low), (high_w, high) in pairwise(knots):
            slope = (high - low) / (high_w - low_w)
            lines.append((slope, low - slope * low_w))
        return [*lines, (0.0, most)]

    def rate(self, power_w: float) -> float:
        """Return tokens/s at a draw, W; 0 at idle and below."""
        return max(0.0, min(slope * power_w + offset for slope, offset in self.lines()))

    def choose(
        self, power_w: float, *, min_duty: float, held: OperatingPoint | None = None
    ) -> OperatingPoint:
        """Return the operating point that gives the most tokens within a draw.

        That is an efficient setting, paced down to the draw: pacing acts at once, and costs nothing against
        the line between idle and the setting. Threads, batch and power mode come down only where a smaller
        setting is the more efficient one at this draw.

        Parameters
        ----------
        power_w
            Draw allowed. Below what the least duty takes, the setting that takes the least is returned.
        min_duty
            Share of time that service never goes below, above 0.
        held
            The point until now: its setting is kept while another would give hardly more, for a change of
            batch parks jobs, and one of power mode takes time.
        """

        def paced(each: Setting) -> tuple[float, float, OperatingPoint]:
            span_w = each.power_w - self.idle_w
            duty = min(max((power_w - self.idle_w) / span_w, min_duty), 1.0)
            point = structs.replace(each.point, duty=duty)
            return duty * each.tokens_s, self.idle_w + duty * span_w, point

        found = [paced(each) for each in self.hull]
        within = [each for each in found if each[1] <= power_w + WITHIN_W]
        if not within:
            return min(found, key=lambda each: each[1])[2]
        best = max(within, key=lambda each: each[0])
        for rate, _, point in within:
            same = held is not None and structs.replace(point, duty=held.duty) == held
            if same and rate >= KEEP * best[0]:
                return point
        return best[2]
