"""The planner: watts over the next orbits, and why.

Pure. Each call takes what is known of the spacecraft, the eclipses ahead and the jobs, and solves a linear
programme (`node.power.lp`) over at least two orbits. It plans to the last umbra entry of its horizon, where
the battery must hold what the eclipse after it takes at least. What it cannot know it holds a margin for: the
error of the state of charge, of the forecast, and of the array, of which it also learns.

When the solver fails, or its plan does not stand against the battery model, the answer is a plan of the
rules (`node.power.governor`), and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from node.power.array import ArrayModel, ArraySettings
from node.power.battery import BatteryModel, BatterySettings
from node.power.curve import PowerCurve
from node.power.horizon import dark_after, groups, incidence_at, last_segment, segments
from node.power.lp import Array, Demand, Problem, Solution, SolverFailed, solve
from node.power.plan import Backlog, Binding, Plan, PlanInputs, Source
from node.power.soc_filter import FilterSettings, SocFilter
from node.power.thermal import HeatObserver, ThermalSettings
from telemetry.bus import BusEps

NS_PER_S: Final = 1_000_000_000
TOUCHING: Final = 0.004
"""A state of charge this close to a bound rests on it."""
BEND: Final = 0.02
PIECES: Final = 4
"""How much an even draw is preferred in eclipse (`PowerCurve.smooth_lines`), where a high one costs the
battery its resistance: by less than any other loss. In sunlight work is done as it comes."""
EMPTY: Final = "bare service alone empties the battery within the horizon"
FILTER_REACH: Final = 3.0
"""Errors of its sensor that the filtered state of charge may lie from it."""
NEAR: Final = 1e-3
"""Relative difference under which two draws are one."""


class PlannerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[planner]` table. Every default is assumed."""

    policy: Literal["planner", "rules", "threshold"] = "planner"
    """Who decides the watts: the planner, the rules it falls back on, or four levels by state of charge (what
    many satellites do; for comparison)."""
    profile: Annotated[str, Meta(max_length=4096)] = ""
    """Operating points of this board, written by `penumbra calibrate --json`; empty: one point, assumed."""
    orbits: Annotated[float, Meta(ge=2, le=6)] = 2.0
    """Least length of the horizon."""
    segment_s: Annotated[float, Meta(ge=10, le=1800)] = 300.0
    """Longest segment, mission time."""
    replan_s: Annotated[float, Meta(ge=1, le=7200)] = 600.0
    """A plan is made anew at least this often, mission time; besides, when what it rests on has changed."""
    soc_drift: Annotated[float, Meta(gt=0, le=1)] = 0.005
    """Difference of the state of charge from the plan's that asks for a new one."""
    time_limit_s: Annotated[float, Meta(ge=0.005, le=10)] = 0.25
    """Time the solver may take, physical time."""
    soc_margin: Annotated[float, Meta(ge=0, le=0.5)] = 0.006
    """State of charge above the floor that the plan leaves untouched."""
    soc_sigmas: Annotated[float, Meta(ge=0, le=10)] = 1.5
    """Errors of the state of charge that are left untouched besides."""
    array_margin: Annotated[float, Meta(gt=0, le=1)] = 0.98
    """Share of the expected array power that is counted on."""
    end_share: Annotated[float, Meta(ge=0, le=1)] = 0.9
    """What a joule at the end of the horizon is worth, by what it gives at the highest rate."""
    eclipse_extra_w: Annotated[float, Meta(ge=0, le=10_000)] = 0.0
    """What the platform draws more in eclipse (heaters), W."""
    die_limit_c: Annotated[float, Meta(ge=0, le=150)] = 80.0
    """Die temperature the plan stays under."""
    value_base: Annotated[float, Meta(ge=1, le=100)] = 2.0
    """A token of a job is worth this to the power of its priority less 5."""
    soc: FilterSettings = FilterSettings()
    battery: BatterySettings = BatterySettings()
    array: ArraySettings = ArraySettings()
    thermal: ThermalSettings = ThermalSettings()


class Planner:
    """Keeps the models, and makes plans from them.

    Parameters
    ----------
    settings
        Tuning and models.
    """

    def __init__(self, settings: PlannerSettings | None = None) -> None:
        self.settings = settings or PlannerSettings()
        self.battery = BatteryModel(self.settings.battery)
        self.array = ArrayModel(self.settings.array)
        self.heat = HeatObserver(self.settings.thermal)
        self.soc = SocFilter(self.battery, self.settings.soc)

    def observe(
        self,
        t_ns: int,
        eps: BusEps,
        *,
        soc_sigma: float,
        sunlit: float | None,
        incidence: float = 1.0,
        board_c: float | None,
        power_w: float,
    ) -> BusEps:
        """Take readings between plans; return them with the state of charge that is to be planned with.

        Parameters
        ----------
        t_ns
            Mission time.
        eps
            What the power unit tells.
        soc_sigma
            Error of the state of charge it tells, 0 to 1.
        sunlit
            Expected share of the Sun's disc, None when unknown.
        incidence
            Cosine of the Sun's incidence on the array by its mean over the sunlit part of an orbit.
        board_c
            Temperature of the board, degC, None when unknown.
        power_w
            Draw of the board.
        """
        t_s = t_ns / NS_PER_S
        self.heat.observe(t_s, board_c, power_w)
        told = eps.battery_soc
        soc = self.soc.handle(
            t_s,
            soc=told,
            sigma=soc_sigma,
            battery_v=eps.battery_v,
            battery_a=eps.battery_a,
            battery_wh=eps.battery_wh,
        )
        # A count that has gone astray is held near what the sensor tells.
        reach = FILTER_REACH * max(soc_sigma, TOUCHING)
        soc = min(max(soc, told - reach, 0.0), told + reach, 1.0)
        filtered = msgspec.structs.replace(eps, battery_soc=soc)
        if sunlit is not None:
            limit_w = self.battery.charge_w(soc, eps.battery_wh)
            self.array.observe(
                t_s,
                sunlit=sunlit,
                incidence=incidence,
                array_w=eps.array_w,
                array_sun_w=eps.array_sun_w,
                soc=soc,
                taking_all=eps.battery_a * eps.battery_v < 0.9 * limit_w,
            )
        return filtered

    def handle(self, inputs: PlanInputs) -> Plan:
        """Return a plan from now on; of the rules when none can be made."""
        edges_ns, sunlit = segments(inputs, orbits=self.settings.orbits, segment_s=self.settings.segment_s)
        dt_s = np.diff(np.asarray(edges_ns, dtype=np.float64) / NS_PER_S)
        wanted = groups(inputs)
        try:
            problem = self._problem(inputs, edges_ns, dt_s, sunlit, wanted)
            solution = solve(problem, time_limit_s=self.settings.time_limit_s)
        except SolverFailed as error:
            return self._rules(inputs, error.what)
        wrong = _nonsense(problem, solution)
        if wrong:
            return self._rules(inputs, wrong)
        return self._explain(inputs, edges_ns, problem, solution, wanted)

    def due(self, plan: Plan | None, t_ns: int, soc: float, changed: bool) -> bool:
        """Tell whether a plan is to be made anew.

        Parameters
        ----------
        plan
            The last one.
        t_ns
            Mission time.
        soc
            State of charge, 0 to 1.
        changed
            Jobs, cap, or forecast are not those it was made for.
        """
        s = self.settings
        if plan is None or changed or not 0 <= t_ns - plan.made_ns < s.replan_s * NS_PER_S:
            return True
        expected = plan.soc_at(t_ns)
        return expected is not None and abs(soc - expected) > s.soc_drift

    def _rules(self, inputs: PlanInputs, note: str) -> Plan:
        return Plan(
            source=Source.RULES,
            made_ns=inputs.t_ns,
            backlog_tokens=_backlog(inputs),
            array_gain=self.array.gain,
            note=note,
        )

    def _problem(
        self,
        inputs: PlanInputs,
        edges_ns: Sequence[int],
        dt_s: Array,
        sunlit: Array,
        wanted: Sequence[Backlog],
    ) -> Problem:
        s, eps = self.settings, inputs.eps
        n = len(dt_s)
        array_w = s.array_margin * self.array.expect_w(
            dt_s, sunlit, eps.array_sun_w, incidence_at(inputs, edges_ns)
        )
        platform_w = eps.platform_w + s.eclipse_extra_w * (1.0 - sunlit)
        least_w = inputs.least_w
        most_w = inputs.curve.most_w if inputs.cap_w is None else min(inputs.curve.most_w, inputs.cap_w)
        # Service never stops, whatever the cap.
        most_w = max(most_w, least_w)
        mean_w = eps.platform_w + 0.5 * (least_w + most_w)
        eta_c, eta_d = self.battery.efficiencies(eps.battery_soc, mean_w)
        full_j = self.battery.energy_j(1.0, eps.battery_wh)
        start_j = min(self.battery.energy_j(eps.battery_soc, eps.battery_wh), full_j)
        keep = min(eps.soc_floor + s.soc_margin + s.soc_sigmas * inputs.soc_sigma, 1.0)
        floor_j = np.full(n, self.battery.energy_j(keep, eps.battery_wh))
        charge_w = self.battery.charge_w(eps.battery_soc, eps.battery_wh)
        after_s = dark_after(inputs, edges_ns[-1])
        end_j = floor_j[-1] + (eps.platform_w + s.eclipse_extra_w + least_w) * after_s / eta_d
        demands = [
            Demand(each.tokens, each.value, last=last_segment(inputs, each, edges_ns)) for each in wanted
        ]
        worth = max((each.value for each in demands), default=1.0)
        top = inputs.curve.hull[-1]
        per_joule = top.tokens_s / (top.power_w - inputs.curve.idle_w)
        problem = Problem(
            dt_s=dt_s,
            array_w=array_w,
            platform_w=platform_w,
            least_w=np.full(n, least_w),
            most_w=np.full(n, most_w),
            start_j=start_j,
            floor_j=floor_j,
            full_j=full_j,
            charge_efficiency=eta_c,
            discharge_efficiency=eta_d,
            charge_w=charge_w,
            curve=_curve(inputs.curve, sunlit),
            demands=demands,
            end_j=end_j,
            end_value=s.end_share * eta_d * per_joule * min(worth, _ordinary(demands)),
            heat=self.heat.heat(s.die_limit_c, dt_s, least_w=least_w, most_w=most_w),
        )
        # What bare service leaves: where even that goes below the floor, no plan can stay above it.
        left_j = _ride(problem, problem.least_w)
        if float(left_j.min()) <= 0.0:
            raise SolverFailed(EMPTY)
        left_j = np.maximum(left_j - 1.0, 0.0)
        return replace(problem, floor_j=np.minimum(floor_j, left_j), end_j=min(end_j, float(left_j[-1])))

    def _explain(
        self,
        inputs: PlanInputs,
        edges_ns: Sequence[int],
        problem: Problem,
        solution: Solution,
        wanted: Sequence[Backlog],
    ) -> Plan:
        wh = inputs.eps.battery_wh
        soc = tuple(self.battery.soc(float(each), wh) for each in solution.energy_j)
        binding, at = self._binding(inputs, problem, solution, soc)
        tokens, watts = solution.served.sum(axis=0), solution.payload_w.copy()
        if binding is Binding.DEMAND and float(tokens[0]) >= float(tokens.sum()) * (1 - NEAR):
            # All there is to do fits into the first segment: done sooner it takes no more energy.
            watts[0] = problem.most_w[0]
        backlog = _backlog(inputs)
        clear = None
        if inputs.jobs is not None and float(tokens.sum()) >= backlog * (1 - NEAR):
            done = np.flatnonzero(np.cumsum(tokens) >= backlog * (1 - NEAR))
            clear = edges_ns[int(done[0]) + 1] if len(done) else None
        return Plan(
            source=Source.PLANNER,
            made_ns=inputs.t_ns,
            start_soc=inputs.eps.battery_soc,
            edges_ns=tuple(edges_ns),
            watts=tuple(watts.tolist()),
            soc=soc,
            shares=tuple(tuple(row) for row in solution.served.tolist()),
            binding=binding,
            binds_at_ns=None if at is None else edges_ns[at + 1],
            tokens=float(tokens.sum()),
            value=solution.value,
            least_value=_least_value(wanted, solution, inputs),
            backlog_tokens=backlog,
            backlog_clear_ns=clear,
            array_gain=self.array.gain,
        )

    @staticmethod
    def _binding(
        inputs: PlanInputs, problem: Problem, solution: Solution, soc: Sequence[float]
    ) -> tuple[Binding, int | None]:
        """Return what keeps the first segment from more watts, and the segment in which it is met."""
        watts = float(solution.payload_w[0])
        if watts >= float(problem.most_w[0]) * (1 - NEAR):
            return (Binding.CAP if inputs.cap_w is not None and inputs.cap_w < inputs.curve.most_w
                    else Binding.BOARD), 0  # fmt: skip
        open_tokens = sum(each.tokens for each in problem.demands)
        if float(solution.served.sum()) >= open_tokens * (1 - NEAR):
            return Binding.DEMAND, None
        if solution.board_c is not None and problem.heat is not None:
            hot = np.flatnonzero(solution.board_c >= problem.heat.limit_c - 0.05)
            if len(hot):
                return Binding.THERMAL, int(hot[0])
        # What is full on the way there is free again: only a bound before that can hold watts back now.
        full = np.flatnonzero(solution.energy_j >= problem.full_j * (1 - NEAR / 10))
        horizon = int(full[0]) if len(full) else len(soc)
        room = TOUCHING * problem.full_j
        low = np.flatnonzero(solution.energy_j[:-1] <= problem.floor_j[:-1] + room)
        if len(low) and int(low[0]) <= horizon:
            return Binding.BATTERY_FLOOR, int(low[0])
        if float(solution.energy_j[-1]) <= problem.end_j + room:
            return Binding.NEXT_ECLIPSE, len(soc) - 1
        return Binding.WORTH, None


def _curve(curve: PowerCurve, sunlit: Array) -> list[tuple[Array, Array]]:
    """Return the lines of the rate in each segment, bent in eclipse."""
    bent = curve.smooth_lines(BEND, PIECES)
    straight = curve.lines()
    straight += [straight[-1]] * (len(bent) - len(straight))
    lit = sunlit > 0
    return [
        (np.where(lit, one[0], other[0]), np.where(lit, one[1], other[1]))
        for one, other in zip(straight, bent, strict=True)
    ]


def _backlog(inputs: PlanInputs) -> float:
    """Return the tokens of open jobs that have an end."""
    return sum(each.tokens for each in inputs.jobs or () if math.isfinite(each.tokens))


def _ordinary(demands: Sequence[Demand]) -> float:
    """Return what a token is worth that is always wanted: the least of those that are open."""
    return min((each.value for each in demands), default=1.0)


def _ride(problem: Problem, payload_w: Array) -> Array:
    """Return the energy in the battery after each segment of a draw, J, not below 0."""
    surplus = problem.array_w - problem.platform_w - payload_w
    charged = np.minimum(surplus, problem.charge_w) * problem.charge_efficiency
    steps = np.where(surplus >= 0, charged, surplus / problem.discharge_efficiency) * problem.dt_s
    energy, held = np.empty(len(steps)), problem.start_j
    for k, step in enumerate(steps.tolist()):
        held = min(max(held + step, 0.0), problem.full_j)
        energy[k] = held
    return energy


def _nonsense(problem: Problem, solution: Solution) -> str:
    """Return what is wrong with a solution when it is held against the models; empty when it stands."""
    p = solution.payload_w
    if not (np.all(np.isfinite(p)) and np.all(np.isfinite(solution.energy_j))):
        return "the plan has values that are not finite"
    slack_w = 1e-3 * (1.0 + float(problem.most_w.max()))
    if np.any(p < problem.least_w - slack_w) or np.any(
        p > np.maximum(problem.most_w, problem.least_w) + slack_w
    ):
        return "the plan asks for a draw the board cannot have"
    ridden = _ride(problem, p)
    if np.any(ridden < np.minimum(problem.floor_j, problem.full_j) - 2e-3 * problem.full_j):
        return "the plan takes the battery below its floor"
    return ""


def _least_value(wanted: Sequence[Backlog], solution: Solution, inputs: PlanInputs) -> float:
    """Return the value under which jobs are shed now.

    Jobs are shed when some of them will not be served in time while others of more value are: then those
    not served at all within the horizon, and worth less than all that is served now, wait.
    """
    if inputs.jobs is None or len(wanted) < 2:
        return 0.0
    served = solution.served.sum(axis=1)
    starved = [g.value for g, got in zip(wanted, served, strict=True) if got < NEAR * max(g.tokens, 1.0)]
    running = [g.value for g, got in zip(wanted, served, strict=True) if got >= NEAR * max(g.tokens, 1.0)]
    if not starved or not running or min(running) <= max(starved):
        return 0.0
    return min(running)
