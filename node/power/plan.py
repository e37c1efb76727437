"""A plan of watts over the next orbits, and what it is made from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from enum import StrEnum

import msgspec
import numpy as np
from numpy.typing import NDArray

from node.power.curve import PowerCurve
from node.power.forecast import UmbraPass
from telemetry.bus import BusEps


class Source(StrEnum):
    """Where a ceiling comes from (`telemetry.packets.PowerPlan.source`)."""

    PLANNER = "planner"
    RULES = "rules"


class Binding(StrEnum):
    """What keeps the plan from more watts now (`telemetry.packets.PowerPlan.binding`)."""

    BOARD = "board"
    CAP = "cap"
    DEMAND = "demand"
    BATTERY_FLOOR = "battery_floor"
    NEXT_ECLIPSE = "next_eclipse"
    THERMAL = "thermal"
    WORTH = "worth"
    NONE = "none"


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """Open jobs that are worth the same and due together."""

    tokens: float
    """Still to be decoded."""
    value: float
    """Of a token."""
    deadline_ns: int | None = None
    """Mission time after which they are worth nothing."""


class PlanInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner knows at one moment."""

    t_ns: int
    """Mission time, UTC."""
    eps: BusEps
    soc_sigma: float
    """Error of the state of charge, 0 to 1."""
    passes: tuple[UmbraPass, ...]
    """Umbra passes under way or ahead, as far as they are known."""
    period_s: float
    """Of the orbit."""
    edge_margin_s: float = 0.0
    """Error of the forecast edges."""
    curve: PowerCurve
    least_w: float
    """Draw at the least duty."""
    cap_w: float | None = None
    """Commanded cap."""
    jobs: tuple[Backlog, ...] | None = None
    """Open jobs; None: work without end, all worth the same."""
    contacts: tuple[tuple[int, int], ...] = ()
    """Contact windows ahead, (start, end): what is due between two of them must be done by the end of the
    first, or it comes down too late."""
    contacts_until_ns: int | None = None
    """Time up to which all windows are known; None: it is not known of any that there is no other."""
    incidence: Callable[[NDArray[np.int64]], NDArray[np.float64]] | None = None
    """Cosine of the Sun's incidence on the array at mission times, by its mean; None: always the mean."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Watts over the horizon."""

    source: Source
    made_ns: int
    start_soc: float = 0.0
    edges_ns: tuple[int, ...] = ()
    """Bounds of the segments, one more than there are; none of a plan of the rules."""
    watts: tuple[float, ...] = ()
    soc: tuple[float, ...] = ()
    """Expected at the end of each segment."""
    shares: tuple[tuple[float, ...], ...] = ()
    """Tokens of each group of `PlanInputs.jobs` in each segment."""
    binding: Binding = Binding.NONE
    binds_at_ns: int | None = None
    """When the bound is reached that binds now."""
    tokens: float = 0.0
    """Planned to the end of the horizon."""
    value: float = 0.0
    least_value: float = 0.0
    """Jobs worth less a token are not to run now: there is no energy for them."""
    backlog_tokens: float = 0.0
    backlog_clear_ns: int | None = None
    """When the open jobs will be done; None when not within the horizon."""
    array_gain: float = 1.0
    """Measured array power by expected power."""
    note: str = ""
    """Why the rules decide."""

    def index_at(self, t_ns: int) -> int | None:
        """Return the segment of a moment, None outside of the plan."""
        if not self.edges_ns or not self.edges_ns[0] <= t_ns < self.edges_ns[-1]:
            return None
        return bisect_right(self.edges_ns, t_ns) - 1

    def watts_at(self, t_ns: int) -> float | None:
        """Return the planned draw, W; None outside of the plan, and of a plan of the rules."""
        index = self.index_at(t_ns)
        return None if index is None else self.watts[index]

    def soc_at(self, t_ns: int) -> float | None:
        """Return the state of charge expected at a moment, None outside of the plan."""
        index = self.index_at(t_ns)
        if index is None:
            return None
        low, high = self.edges_ns[index], self.edges_ns[index + 1]
        before = self.start_soc if index == 0 else self.soc[index - 1]
        return before + (self.soc[index] - before) * (t_ns - low) / (high - low)
