"""The governors that are compared. Each is asked each step how many watts the payload may draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from node.power.ceiling import GovernorSettings, Limits, PowerInputs, threshold_share
from node.power.curve import PowerCurve
from node.power.forecast import UmbraPass
from node.power.plan import Backlog, Plan, PlanInputs, Source
from node.power.planner import Planner, PlannerSettings
from telemetry.bus import BusEps

NS_PER_S: Final = 1_000_000_000
DARK: Final = 0.02
"""An array under this share of its power is dark."""


@dataclass(slots=True)
class View:
    """What a governor is told at a moment."""

    t_ns: int
    eps: BusEps
    umbra: UmbraPass | None
    """Forecast pass under way or next."""
    passes: tuple[UmbraPass, ...]
    """All forecast passes from now on."""
    jobs: tuple[Backlog, ...]
    new_jobs: bool
    board_c: float
    load_w: float


@dataclass(frozen=True)
class Craft:
    """What a governor knows of the spacecraft once for all."""

    curve: PowerCurve
    least_w: float
    period_s: float
    soc_sigma: float
    edge_margin_s: float


class PowerGovernor(Protocol):
    """Decides watts."""

    def watts(self, view: View) -> float:
        """Return the draw allowed now, W."""

    def quota(self) -> tuple[float, ...] | None:
        """Return the tokens/s planned now for each of the jobs told last; None: by value, then deadline."""


class Simple:
    """A governor that is a formula of what it is told."""

    def __init__(self, craft: Craft, share: Callable[[View], float]) -> None:
        self._craft = craft
        self._share = share

    def watts(self, view: View) -> float:
        """Return the share of the span above bare service."""
        craft = self._craft
        share = min(max(self._share(view), 0.0), 1.0)
        return craft.least_w + share * (craft.curve.most_w - craft.least_w)

    def quota(self) -> None:
        """By value."""
        return


def _above_floor(view: View) -> float:
    """Return how full the battery is between its floor and full, 0 to 1."""
    return (view.eps.battery_soc - view.eps.soc_floor) / (1.0 - view.eps.soc_floor)


def greedy(_view: View) -> float:
    """Give everything, always."""
    return 1.0


def sun_only(view: View) -> float:
    """Give everything in sunlight, bare service in eclipse."""
    return 1.0 if view.eps.array_w > DARK * view.eps.array_sun_w else 0.0


def soc_threshold(view: View) -> float:
    """Choose one of four levels by the state of charge."""
    return threshold_share(view.eps.battery_soc, view.eps.soc_floor)


def barrier(view: View) -> float:
    """Weigh the worth of watts against a cost that grows without bound towards the floor.

    After Equinox (reference/power.md, section 2), with one marginal cost: 1 / fullness - 1.
    """
    full = max(_above_floor(view), 1e-3)
    return 1.25 - 0.3 * (1.0 / full - 1.0)


class Flight:
    """The node's own: limits, and a planner unless it is switched off.

    Parameters
    ----------
    craft
        What is known.
    planned
        False: the rules alone.
    """

    def __init__(self, craft: Craft, planned: bool, settings: PlannerSettings | None = None) -> None:
        self._craft = craft
        self._limits = Limits(GovernorSettings())
        self._planner = Planner(settings or PlannerSettings()) if planned else None
        self._plan: Plan | None = None
        self._plan_t_ns = 0
        self.plans = 0
        """Plans made."""
        self.fallbacks = 0
        """Plans that could not be made."""

    def watts(self, view: View) -> float:
        """Return the ceiling."""
        craft = self._craft
        planned_w, eps, sigma = None, view.eps, craft.soc_sigma
        if self._planner is not None:
            eps = self._observe(self._planner, view)
            sigma = self._planner.soc.sigma
            planned_w = self._planned(self._planner, view, eps)
        inputs = PowerInputs(
            t_ns=view.t_ns,
            eps=eps,
            umbra=view.umbra,
            period_s=craft.period_s,
            load_w=view.load_w,
            board_c=view.board_c,
            idle_w=craft.curve.idle_w,
            max_w=craft.curve.most_w,
            planned_w=planned_w,
            soc_sigma=sigma,
        )
        return self._limits.handle(inputs).ceiling_w

    def quota(self) -> tuple[float, ...] | None:
        """Return what the plan has for each job."""
        plan = self._plan
        index = None if plan is None else plan.index_at(self._plan_t_ns)
        if plan is None or index is None:
            return None
        seconds = (plan.edges_ns[index + 1] - plan.edges_ns[index]) / NS_PER_S
        return tuple(row[index] / seconds for row in plan.shares)

    def _observe(self, planner: Planner, view: View) -> BusEps:
        """Let the planner learn; return what it makes of the readings."""
        # Near the edges of an eclipse its forecast does not tell how much of the Sun is seen.
        near_ns = (10.0 + 3 * self._craft.edge_margin_s) * NS_PER_S
        umbra = view.umbra
        lit = umbra is None or not (umbra.penumbra_entry_ns - near_ns < view.t_ns < umbra.penumbra_exit_ns)
        dark = umbra is not None and umbra.entry_ns + near_ns < view.t_ns < umbra.exit_ns - near_ns
        sunlit = 1.0 if lit else 0.0 if dark else 0.5
        return planner.observe(
            view.t_ns,
            view.eps,
            soc_sigma=self._craft.soc_sigma,
            sunlit=sunlit,
            board_c=view.board_c,
            power_w=view.load_w,
        )

    def _planned(self, planner: Planner, view: View, eps: BusEps) -> float | None:
        craft = self._craft
        self._plan_t_ns = view.t_ns
        if planner.due(self._plan, view.t_ns, eps.battery_soc, view.new_jobs):
            self.plans += 1
            self._plan = planner.handle(
                PlanInputs(
                    t_ns=view.t_ns,
                    eps=eps,
                    soc_sigma=planner.soc.sigma,
                    passes=view.passes,
                    period_s=craft.period_s,
                    edge_margin_s=craft.edge_margin_s,
                    curve=craft.curve,
                    least_w=craft.least_w,
                    jobs=view.jobs,
                )
            )
            self.fallbacks += self._plan.source is Source.RULES
        return self._plan.watts_at(view.t_ns) if self._plan is not None else None


GOVERNORS: Final[dict[str, Callable[[Craft], PowerGovernor]]] = {
    "planner": lambda craft: Flight(craft, planned=True),
    "rules": lambda craft: Flight(craft, planned=False),
    "barrier": lambda craft: Simple(craft, barrier),
    "threshold": lambda craft: Simple(craft, soc_threshold),
    "sun_only": lambda craft: Simple(craft, sun_only),
    "greedy": lambda craft: Simple(craft, greedy),
}
"""By name; the node's own first."""
