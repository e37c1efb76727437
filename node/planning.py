"""Plans the watts of the node: gathers what the planner needs, and has it plan when that has changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from node.boards import Board
from node.bus_view import BusView, Eclipses
from node.config import NodeConfig
from node.power.ceiling import threshold_share
from node.power.curve import PowerCurve, Setting
from node.power.ephemeris import PropagationError
from node.power.forecast import Times
from node.power.lp import Array
from node.power.operating_point import OperatingPoint
from node.power.plan import Backlog, Plan, PlanInputs, Source
from node.power.planner import Planner
from node.power.profile import load_profile
from node.power.wear import WearMeter
from node.scheduler import Task
from telemetry.bus import BusEps
from telemetry.commands import DEFAULT_PRIORITY

_log = logging.getLogger(__name__)

REPLAN_S: Final = 1.0
"""Shortest time between two plans, s of physical time (assumed: ten times what one takes, and more)."""
ASSUMED_TOKENS_S: Final = 60.0
"""Rate of the whole board until the worker has told one (assumed)."""
RATE_CHANGE: Final = 0.15
"""Relative change of the measured rate with which the curve is drawn anew."""
LOW_ORBIT_S: Final = 5_600.0
"""Period assumed while none is known."""
NEAR_EDGE_S: Final = 10.0
"""Around an edge nobody can tell how much of the Sun the array sees."""
DEFAULT_SIGMA: Final = 0.005
NS_PER_S: Final = 1_000_000_000
LOWEST_PRIORITY, HIGHEST_PRIORITY = 0, 9


class Planning:
    """Holds the models and the plan of this node.

    Parameters
    ----------
    config
        Sections model, worker, power and planner.
    board
        For the range of its draw, and to refuse another board's profile.
    view
        The bus.
    tasks
        Returns the open jobs.
    tokens_s
        Returns the rate of the worker while it computes, all jobs together; 0 when unknown.
    rate
        Returns mission seconds a physical second: on an accelerated bench an orbit sees fewer tokens.

    Raises
    ------
    PenumbraError
        The profile cannot be read, or was measured on another board.
    """

    def __init__(
        self,
        config: NodeConfig,
        *,
        board: Board,
        view: BusView,
        tasks: Callable[[], Sequence[Task]],
        tokens_s: Callable[[], float],
        rate: Callable[[], float],
    ) -> None:
        self.plan: Plan | None = None
        """The last plan; None before the first, and while the bus is unknown."""
        self.least_priority = LOWEST_PRIORITY
        """Jobs below it are shed."""
        self.eclipses = Eclipses((), None, 0.0, "unknown")
        self.wear = WearMeter(config.planner.battery)
        self._config = config
        self._settings = config.planner
        self._view = view
        self._tasks = tasks
        self._tokens_s = tokens_s
        self._rate = rate
        self._planner = Planner(config.planner)
        self._configured_w = board.range_w()
        profile = config.planner.profile
        self.profile: PowerCurve | None = (
            load_profile(Path(profile), board, threads=config.model.threads, batch=config.worker.batch)
            if profile
            else None
        )
        self._measured = (ASSUMED_TOKENS_S, 1.0)
        self.curve = self._drawn()
        """Tokens a second of mission time by watts."""
        self._chosen: OperatingPoint | None = None
        self._planned_for: object = None
        self._planned_s = -math.inf

    @property
    def soc_sigma(self) -> float:
        """Error of the state of charge, 0 to 1."""
        return min(self._planner.soc.sigma, 1.0)

    def range_w(self) -> tuple[float, float]:
        """Return the draw when idle and the most it can be, W: measured by the profile, else configured."""
        if self.profile is not None:
            return self.profile.idle_w, self.profile.most_w
        return self._configured_w

    def observe(self, t_ns: int, eps: BusEps, *, board_c: float | None, power_w: float | None) -> BusEps:
        """Learn from a reading; return it with the state of charge that is to be planned with."""
        self.eclipses = self._view.eclipses(t_ns)
        told = self._view.soc
        filtered = self._planner.observe(
            t_ns,
            eps,
            soc_sigma=DEFAULT_SIGMA if told is None else told.sigma,
            sunlit=self._surely_sunlit(t_ns),
            incidence=self._incidence_now(t_ns),
            board_c=board_c,
            power_w=self.range_w()[0] if power_w is None else power_w,
        )
        self.wear.take(filtered.battery_soc)
        return filtered

    def predict_die_c(self, power_w: float | None) -> float | None:
        """Return the die's temperature some time ahead at a draw, degC; None while nothing is known."""
        ahead_s = self._settings.thermal.ahead_s
        return None if power_w is None else self._planner.heat.predict_c(power_w, ahead_s)

    def watts(self, t_ns: int, eps: BusEps, cap_w: float | None, now_s: float) -> float | None:
        """Return the watts planned for now, W; None when the rules are to decide.

        Parameters
        ----------
        t_ns
            Mission time.
        eps
            What `observe` returned.
        cap_w
            Commanded cap, W.
        now_s
            Physical time, monotonic, s.
        """
        if self._settings.policy == "rules":
            return None
        idle_w, most_w = self.range_w()
        least_w = idle_w + self._config.power.min_duty * (most_w - idle_w)
        if self._settings.policy == "threshold":
            share = threshold_share(eps.battery_soc, eps.soc_floor)
            return least_w + share * (most_w - least_w)
        tasks = self._tasks()
        if not tasks:
            # Nothing to plan: the next job has all the board can give until there is a plan for it.
            self.plan, self.least_priority = None, LOWEST_PRIORITY
            return most_w
        if self.eclipses.source == "unknown":
            # Not to know of an eclipse is not to have none: the rules reckon with one at any time.
            self.plan, self.least_priority = None, LOWEST_PRIORITY
            return None
        self._follow_rate()
        basis = (
            tuple(sorted(task.job for task in tasks)),
            cap_w,
            self.eclipses.source,
            () if self._view.contact is None else tuple(self._view.contact.windows),
            self.curve,
        )
        due = self._planner.due(self.plan, t_ns, eps.battery_soc, basis != self._planned_for)
        if due and now_s - self._planned_s >= REPLAN_S:
            self._planned_for, self._planned_s = basis, now_s
            self.plan = self._make(t_ns, eps, least_w, cap_w, tasks)
            self.least_priority = self._least_priority(self.plan)
        return None if self.plan is None else self.plan.watts_at(t_ns)

    def _make(
        self, t_ns: int, eps: BusEps, least_w: float, cap_w: float | None, tasks: Sequence[Task]
    ) -> Plan:
        """Return a plan; of the rules, with the reason, when planning itself is at fault.

        A defect in planning must cost the plan, and neither the loop that holds the ceiling nor the node.
        """
        try:
            return self._planner.handle(self._inputs(t_ns, eps, least_w, cap_w, tasks))
        except Exception as error:
            _log.exception("planning failed")
            note = f"planning failed: {type(error).__name__}: {error}"
            return Plan(source=Source.RULES, made_ns=t_ns, note=note[:200])

    def choose(self, ceiling_w: float, duty: float) -> OperatingPoint:
        """Return the operating point that carries a ceiling out at the duty the governor holds it with."""
        least = self._config.power.min_duty
        if self.profile is None:
            model, worker = self._config.model, self._config.worker
            return OperatingPoint(threads=model.threads, batch=worker.batch, duty=duty)
        chosen = self._chosen = self.profile.choose(ceiling_w, min_duty=least, held=self._chosen)
        idle_w, most_w = self.range_w()
        # What the governor's loop adds to its own model of the duty is added to that of the point as well.
        correction = duty - (ceiling_w - idle_w) / max(most_w - idle_w, 1e-9)
        return msgspec.structs.replace(chosen, duty=min(max(chosen.duty + correction, least), 1.0))

    def _inputs(
        self, t_ns: int, eps: BusEps, least_w: float, cap_w: float | None, tasks: Sequence[Task]
    ) -> PlanInputs:
        groups: dict[tuple[int, int | None], float] = {}
        for task in tasks:
            if not task.cancel:
                key = (task.priority, task.deadline_ns)
                groups[key] = groups.get(key, 0.0) + task.tokens_left
        contact = self._view.contact
        return PlanInputs(
            t_ns=t_ns,
            eps=eps,
            soc_sigma=self.soc_sigma,
            passes=self.eclipses.passes,
            period_s=self.eclipses.period_s or LOW_ORBIT_S,
            edge_margin_s=self.eclipses.edge_margin_s,
            curve=self.curve,
            least_w=least_w,
            cap_w=cap_w,
            jobs=tuple(
                Backlog(tokens=tokens, value=self._value(priority), deadline_ns=deadline_ns)
                for (priority, deadline_ns), tokens in groups.items()
            ),
            contacts=() if contact is None else tuple((w.start_ns, w.end_ns) for w in contact.windows),
            contacts_until_ns=None if contact is None else contact.known_until_ns,
            incidence=self._incidence(),
        )

    def _incidence(self) -> Callable[[Times], Array] | None:
        """Return the incidence on the array by time, None where it does not change within an orbit."""
        forecast = self._view.forecast
        if self._settings.array.mount != "zenith" or forecast is None or self.eclipses.source != "forecast":
            return None
        return forecast.zenith_incidence

    def _incidence_now(self, t_ns: int) -> float:
        of = self._incidence()
        try:
            return 1.0 if of is None else float(of(np.asarray([t_ns], dtype=np.int64))[0])
        except PropagationError:
            return 1.0

    def _value(self, priority: int) -> float:
        return float(self._settings.value_base ** (priority - DEFAULT_PRIORITY))

    def _least_priority(self, plan: Plan) -> int:
        if plan.source is Source.RULES or plan.least_value <= 0:
            return LOWEST_PRIORITY
        near = plan.least_value * (1 - 1e-9)
        every = range(LOWEST_PRIORITY, HIGHEST_PRIORITY + 1)
        return next((p for p in every if self._value(p) >= near), LOWEST_PRIORITY)

    def _follow_rate(self) -> None:
        """Draw the curve anew when worker or clock have another rate."""
        tokens_s, _ = self._measured
        told = self._tokens_s()
        if self.profile is None and told > 0 and abs(told - tokens_s) > RATE_CHANGE * tokens_s:
            tokens_s = told
        measured = (tokens_s, max(self._rate(), 1.0))
        if measured != self._measured:
            self._measured = measured
            self.curve = self._drawn()

    def _drawn(self) -> PowerCurve:
        tokens_s, clock = self._measured
        if self.profile is not None:
            return self.profile.scaled(1.0 / clock)
        point = OperatingPoint(threads=self._config.model.threads, batch=self._config.worker.batch, duty=1.0)
        idle_w, most_w = self._configured_w
        return PowerCurve(idle_w, [Setting(point, max(most_w, idle_w + 1e-3), tokens_s / clock)])

    def _surely_sunlit(self, t_ns: int) -> float | None:
        """Return 1 in sunlight, 0 in umbra, 0.5 near the edges; None when it is not known."""
        if self.eclipses.source == "unknown":
            return None
        near_ns = round((NEAR_EDGE_S + self.eclipses.edge_margin_s) * NS_PER_S)
        for each in self.eclipses.passes[:1]:
            if each.entry_ns + near_ns < t_ns < each.exit_ns - near_ns:
                return 0.0
            if each.penumbra_entry_ns - near_ns < t_ns < each.penumbra_exit_ns + near_ns:
                return 0.5
        return 1.0
