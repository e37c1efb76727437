"""The linear programme and the planner on it: against brute force, case by case, and whatever comes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.power import planner as module
from node.power.curve import PowerCurve, Setting
from node.power.forecast import UmbraPass
from node.power.horizon import segments
from node.power.lp import Demand, Heat, Problem, SolverFailed, solve
from node.power.operating_point import OperatingPoint
from node.power.plan import Backlog, Binding, Plan, PlanInputs, Source
from node.power.planner import EMPTY, Planner, PlannerSettings
from telemetry.bus import BusEps

NS = 1_000_000_000
PERIOD_S, SUN_S = 5_600, 3_500
PATIENT = PlannerSettings(time_limit_s=10)
"""Plans do not hang on how busy the machine is."""


def point(threads: int = 2, batch: int = 8) -> OperatingPoint:
    return OperatingPoint(threads=threads, batch=batch, duty=1.0)


CURVE = PowerCurve(4.0, [Setting(point(), 12.0, 160.0)])
LEAST_W = 4.4
EPS = BusEps(
    t_ns=0, battery_soc=0.95, battery_v=8.1, battery_a=0.0, battery_wh=24.0, array_w=25.0, array_sun_w=25.0,
    platform_w=4.0, soc_floor=0.7,
)  # fmt: skip


def passes(count: int = 5, first_s: int = SUN_S, dark_s: int = PERIOD_S - SUN_S) -> tuple[UmbraPass, ...]:
    return tuple(
        UmbraPass(
            penumbra_entry_ns=(at - 8) * NS, entry_ns=at * NS, exit_ns=(at + dark_s) * NS,
            penumbra_exit_ns=(at + dark_s + 8) * NS,
        )
        for at in range(first_s, first_s + count * PERIOD_S, PERIOD_S)
    )  # fmt: skip


def inputs(**changes: Any) -> PlanInputs:
    fields: dict[str, Any] = {
        "t_ns": 0, "eps": EPS, "soc_sigma": 0.005, "passes": passes(), "period_s": float(PERIOD_S),
        "curve": CURVE, "least_w": LEAST_W,
    }  # fmt: skip
    return PlanInputs(**(fields | changes))


def with_eps(**changes: Any) -> BusEps:
    return msgspec.structs.replace(EPS, **changes)


def made(**changes: Any) -> Plan:
    plan = Planner(PATIENT).handle(inputs(**changes))
    assert plan.source is Source.PLANNER, plan.note
    return plan


# The curve.


def test_the_curve_is_the_upper_hull_and_chooses_within_the_draw() -> None:
    settings_ = [
        Setting(point(1, 1), 8.0, 35.0), Setting(point(1, 8), 8.0, 100.0), Setting(point(2, 1), 11.4, 65.0),
        Setting(point(2, 8), 12.0, 160.0),
    ]  # fmt: skip
    curve = PowerCurve(4.0, settings_)
    assert [(s.point.threads, s.point.batch) for s in curve.hull] == [(1, 8), (2, 8)]
    assert curve.rate(3.0) == 0.0
    assert curve.rate(6.0) == pytest.approx(50.0)
    assert curve.rate(10.0) == pytest.approx(130.0)
    assert curve.rate(99.0) == 160.0
    half = curve.choose(6.0, min_duty=0.05)
    assert (half.threads, half.batch, half.duty) == (1, 8, pytest.approx(0.5))
    assert curve.choose(11.9, min_duty=0.05).threads == 2
    assert curve.choose(1.0, min_duty=0.05) == msgspec.structs.replace(point(1, 8), duty=0.05)
    # Near where two settings give the same, the one that is held is kept.
    near_w = 10.0
    one, two = (curve.choose(near_w, min_duty=0.05, held=point(t, 8)) for t in (1, 2))
    assert curve.choose(near_w, min_duty=0.05, held=two).threads == 2
    assert (one.threads, curve.choose(6.0, min_duty=0.05, held=two).threads) == (2, 1)
    with pytest.raises(ValueError, match="no operating point"):
        PowerCurve(4.0, [Setting(point(), 4.0, 10.0)])


@given(
    st.lists(st.tuples(st.floats(4.1, 60), st.floats(0.1, 500)), min_size=1, max_size=8),
    st.floats(0, 80),
)
def test_no_setting_lies_above_its_curve_and_the_bent_one_differs_little(
    found: list[tuple[float, float]], at_w: float
) -> None:
    curve = PowerCurve(4.0, [Setting(point(), watts, rate) for watts, rate in found])
    for watts, rate in found:
        assert curve.rate(watts) >= rate * (1 - 1e-9)
    bent = min(slope * at_w + offset for slope, offset in curve.smooth_lines(0.02, 4))
    if curve.idle_w <= at_w <= curve.most_w:
        assert curve.rate(at_w) - 1e-6 <= bent <= curve.rate(at_w) + 0.005 * curve.hull[-1].tokens_s + 1e-6


# The linear programme.


def small(**changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "dt_s": np.full(3, 100.0), "array_w": np.array([20.0, 0.0, 0.0]), "platform_w": np.full(3, 2.0),
        "least_w": np.full(3, 4.0), "most_w": np.full(3, 12.0), "start_j": 1_000.0,
        "floor_j": np.full(3, 100.0), "full_j": 1_500.0, "charge_efficiency": 0.9,
        "discharge_efficiency": 0.9, "charge_w": 10.0, "curve": [(20.0, -80.0), (10.0, 0.0)],
        "demands": [Demand(math.inf, 1.0)], "early": 0.0, "taste": 0.0,
    }  # fmt: skip
    return Problem(**(fields | changes))


def test_the_optimum_is_that_of_brute_force() -> None:
    problem = small()
    best = 0.0
    levels = np.linspace(4.0, 12.0, 41)
    for draws in itertools.product(levels, repeat=3):
        held, value, kept = problem.start_j, 0.0, True
        for k, watts in enumerate(draws):
            surplus = problem.array_w[k] - 2.0 - watts
            gained = min(surplus, 10.0) * 0.9 if surplus >= 0 else surplus / 0.9
            held = min(held + 100.0 * gained, 1_500.0)
            kept = kept and held >= 100.0
            value += 100.0 * min(20.0 * watts - 80.0, 10.0 * watts)
        best = max(best, value if kept else 0.0)
    found = solve(problem).value
    assert best * (1 - 1e-9) <= found <= best * 1.02


def test_deadlines_arrivals_and_values_are_kept() -> None:
    demands = [Demand(2_000, 1.0), Demand(3_000, 5.0, last=0), Demand(500, 9.0, first=2)]
    found = solve(small(demands=demands, start_j=1_500.0))
    assert found.served.sum(axis=1) == pytest.approx([2_000, 3_000, 500], rel=1e-3)
    assert found.served[1, 1:].sum() == 0
    assert found.served[2, :2].sum() == 0


def test_a_thermal_limit_is_kept_to_the_end_of_each_segment() -> None:
    heat = Heat(20.0, np.full(3, 28.0), 10.0, 0.5, 100.0)
    found = solve(small(heat=heat, array_w=np.full(3, 40.0)))
    assert found.board_c is not None
    assert found.board_c.max() <= 28.0 + 1e-6
    board_c = 20.0
    for watts in found.payload_w:
        for _ in range(1_000):
            board_c += 0.1 * (watts - 0.5 * (board_c - 10.0)) / 100.0
        assert board_c <= 28.05


def test_what_cannot_be_is_an_error_and_a_solver_without_time_too() -> None:
    with pytest.raises(SolverFailed):
        solve(small(start_j=0.0))
    with pytest.raises(SolverFailed):
        solve(small(), time_limit_s=0.0)


# The planner.


def test_segments_meet_the_edges_with_their_margin_and_end_at_an_umbra_entry() -> None:
    edges, lit = segments(inputs(edge_margin_s=10.0), orbits=2.0, segment_s=300.0)
    assert len(lit) == len(edges) - 1
    assert edges[-1] == (SUN_S + 2 * PERIOD_S - 10) * NS
    for each in passes(2):
        assert each.entry_ns - 10 * NS in edges
        assert each.exit_ns + 10 * NS in edges
    dark_s = sum((b - a) / NS for a, b, light in zip(edges[:-1], edges[1:], lit, strict=True) if light == 0)
    assert dark_s == pytest.approx(2 * (PERIOD_S - SUN_S + 20))
    assert max(b - a for a, b in itertools.pairwise(edges)) <= 300 * NS
    none, lit = segments(inputs(passes=()), orbits=2.0, segment_s=300.0)
    assert none[-1] == 2 * PERIOD_S * NS
    assert np.all(lit == 1.0)


def test_a_rich_array_and_battery_let_the_whole_board_run() -> None:
    plan = made(eps=with_eps(array_sun_w=60.0, battery_wh=200.0))
    assert plan.watts == pytest.approx([12.0] * len(plan.watts))
    assert plan.binding is Binding.BOARD


def test_a_small_battery_binds_in_eclipse_and_the_floor_is_kept() -> None:
    plan = made(t_ns=SUN_S * NS, passes=passes())
    assert plan.binding is Binding.BATTERY_FLOOR
    assert plan.binds_at_ns is not None
    assert abs(plan.binds_at_ns - passes()[0].exit_ns) <= 400 * NS
    assert min(plan.soc) >= 0.7 + 0.006 + 1.5 * 0.005 - 1e-6
    dark = [w for w, e in zip(plan.watts, plan.edges_ns, strict=False) if e < passes()[0].exit_ns]
    assert max(dark) - min(dark) < 2.1, "an even draw is preferred"


def test_in_sunlight_work_is_done_as_it_comes() -> None:
    rich = with_eps(battery_soc=0.9)
    few = made(eps=rich, jobs=(Backlog(tokens=9_000.0, value=1.0),))
    assert few.binding in {Binding.DEMAND, Binding.BOARD}
    assert few.watts[0] == pytest.approx(12.0)
    more = made(eps=rich, jobs=(Backlog(tokens=100_000.0, value=1.0),))
    assert more.watts[:2] == pytest.approx((12.0, 12.0))
    assert more.backlog_clear_ns is not None
    assert more.backlog_clear_ns <= 900 * NS


def test_a_commanded_cap_is_planned_with() -> None:
    plan = made(cap_w=6.0)
    assert max(plan.watts) <= 6.0 + 1e-6
    assert made(cap_w=6.0, eps=with_eps(array_sun_w=60.0)).binding is Binding.CAP


def test_valuable_jobs_go_first_and_those_there_is_no_energy_for_are_shed() -> None:
    poor = with_eps(array_sun_w=15.5, battery_soc=0.78)
    jobs = (
        Backlog(tokens=400_000.0, value=8.0, deadline_ns=PERIOD_S * NS),
        Backlog(tokens=50_000.0, value=1.0, deadline_ns=PERIOD_S * NS),
    )
    plan = made(eps=poor, jobs=jobs)
    assert plan.least_value == 8.0
    assert sum(plan.shares[1]) < 1.0 < sum(plan.shares[0])
    rich = made(eps=with_eps(array_sun_w=60.0, battery_wh=200.0), jobs=jobs)
    assert rich.least_value == 0.0


def test_what_is_due_between_two_contacts_must_be_done_by_the_first() -> None:
    jobs = (Backlog(tokens=30_000.0, value=1.0, deadline_ns=5_000 * NS),)
    free = made(jobs=jobs)
    windows = ((900 * NS, 1_000 * NS), (9_000 * NS, 9_500 * NS))
    bound = made(jobs=jobs, contacts=windows, contacts_until_ns=9_500 * NS)
    after = [end_ns > 1_000 * NS for end_ns in bound.edges_ns[1:]]
    late = [share for share, is_late in zip(bound.shares[0], after, strict=True) if is_late]
    assert sum(late) == 0
    assert sum(free.shares[0]) == pytest.approx(30_000.0)
    # Where it is not said that these are all, another one may come in time.
    assert made(jobs=jobs, contacts=windows).shares == free.shares
    assert made(jobs=jobs, contacts=windows, contacts_until_ns=4_000 * NS).shares == free.shares


def test_the_recovery_of_a_backlog_is_predicted_and_comes_later_under_a_cap() -> None:
    jobs = (Backlog(tokens=100_000.0, value=1.0),)
    rich = with_eps(array_sun_w=60.0, battery_wh=200.0)
    free, capped = made(eps=rich, jobs=jobs), made(eps=rich, jobs=jobs, cap_w=8.0)
    assert free.backlog_clear_ns is not None
    assert capped.backlog_clear_ns is not None
    assert free.backlog_clear_ns / NS == pytest.approx(100_000 / 160, abs=300)
    assert capped.backlog_clear_ns / NS == pytest.approx(100_000 / 80, abs=300)
    assert made(eps=rich, jobs=(Backlog(tokens=1e9, value=1.0),)).backlog_clear_ns is None


def test_a_hot_die_is_planned_around() -> None:
    planner = Planner(PATIENT)
    for k in range(200):
        planner.heat.observe(k * 10.0, 75.0, 12.0)
    plan = planner.handle(inputs(eps=with_eps(array_sun_w=60.0, battery_wh=200.0)))
    assert plan.binding is Binding.THERMAL
    assert 4.4 <= plan.watts[-1] < 12.0


@pytest.mark.parametrize("how", ["fails", "nonsense"])
def test_a_solver_that_fails_or_lies_leaves_it_to_the_rules(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(problem: Problem, *, time_limit_s: float) -> Any:
        if how == "fails":
            raise SolverFailed("HiGHS found no plan: Time limit reached")
        found = solve(problem)
        return type(found)(**{**found.__dict__, "payload_w": np.full_like(found.payload_w, 12.0)})

    monkeypatch.setattr(module, "solve", broken)
    plan = Planner(PATIENT).handle(inputs())
    assert plan.source is Source.RULES
    assert ("HiGHS" in plan.note) == (how == "fails")
    assert plan.watts_at(0) is None


def test_a_plan_is_made_anew_when_it_is_old_when_its_ground_has_changed_or_the_battery_drifts() -> None:
    planner = Planner(PATIENT)
    plan = planner.handle(inputs())
    soc = plan.soc_at(100 * NS)
    assert soc is not None
    assert planner.due(None, 0, 0.9, changed=False)
    assert not planner.due(plan, 100 * NS, soc, changed=False)
    assert planner.due(plan, 100 * NS, soc, changed=True)
    assert planner.due(plan, 100 * NS, soc - 0.01, changed=False)
    assert planner.due(plan, 600 * NS, soc, changed=False)
    assert planner.due(plan, -1 * NS, soc, changed=False)


any_eps = st.builds(
    BusEps, t_ns=st.just(0), battery_soc=st.floats(0, 1), battery_v=st.just(7.6), battery_a=st.just(0.0),
    battery_wh=st.floats(1, 500), array_w=st.floats(0, 100), array_sun_w=st.floats(0, 100),
    platform_w=st.floats(0, 50), soc_floor=st.floats(0, 1),
)  # fmt: skip
any_jobs = st.none() | st.lists(
    st.builds(
        Backlog,
        tokens=st.floats(0, 1e6),
        value=st.floats(0.01, 100),
        deadline_ns=st.none() | st.integers(-(10**12), 3 * 10**13),
    ),
    max_size=20,
).map(tuple)


@given(
    eps=any_eps,
    jobs=any_jobs,
    more=st.fixed_dictionaries({
        "soc_sigma": st.floats(0, 0.2), "cap_w": st.none() | st.floats(0, 30),
        "edge_margin_s": st.floats(0, 60),
    }),
    dark=st.tuples(st.integers(-2_000, 9_000), st.integers(0, 2_200)),
    board_c=st.none() | st.floats(-40, 120),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_whatever_comes_there_is_a_plan_that_service_and_board_can_follow(
    eps: BusEps, jobs: Any, more: dict[str, Any], dark: tuple[int, int], board_c: float | None
) -> None:
    planner = Planner(PATIENT)
    for k in range(3):
        planner.heat.observe(k * 30.0, board_c, 8.0)
    eclipses = passes(first_s=dark[0], dark_s=dark[1])
    plan = planner.handle(inputs(eps=eps, jobs=jobs, passes=eclipses, **more))
    if plan.source is Source.RULES:
        assert plan.note == EMPTY
        return
    cap_w = more["cap_w"]
    most_w = 12.0 if cap_w is None else max(min(cap_w, 12.0), LEAST_W)
    assert all(LEAST_W - 0.02 <= watts <= most_w + 0.02 for watts in plan.watts)
    assert all(a < b for a, b in itertools.pairwise(plan.edges_ns))
    assert plan.watts_at(0) is not None
    assert 0.0 <= min(plan.soc) <= max(plan.soc) <= 1.0
