"""What the node plans with: jobs, contacts, rates, profiles; and what it does when they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ephemeris import JUNE_NS, LINES
from test_node_power_service import EXAMPLE, FixedBoard

from hil.bench.machine import describe_machine
from node.boards import BoardSettings, open_board
from node.bus_view import BusView
from node.config import NodeConfig
from node.planning import REPLAN_S, Planning
from node.power.curve import PowerCurve, Setting
from node.power.operating_point import OperatingPoint as PowerPoint
from node.power.plan import Binding, Source
from node.power.profile import load_profile
from node.scheduler import Park, Start, Task, plan
from telemetry.bus import BusContact, BusEps, BusOrbit, ContactSpan
from telemetry.errors import PenumbraError
from telemetry.figures import Calibration, OperatingPoint

NS = 1_000_000_000
EPS = BusEps(
    t_ns=JUNE_NS, battery_soc=0.9, battery_v=7.9, battery_a=0.2, battery_wh=24.0, array_w=25.0,
    array_sun_w=25.0, platform_w=4.0, soc_floor=0.7,
)  # fmt: skip


class Rig:
    """A planning of the example configuration, and what it asks for."""

    def __init__(self, config: NodeConfig | None = None, **planner: Any) -> None:
        config = config or NodeConfig.load(EXAMPLE)
        config = msgspec.structs.replace(config, planner=msgspec.structs.replace(config.planner, **planner))
        self.view = BusView()
        self.view.handle(BusOrbit(line1=LINES[0], line2=LINES[1]), 0.0)
        self.tasks: list[Task] = []
        self.tokens_s, self.rate, self.now_s = 0.0, 1.0, 0.0
        self.planning = Planning(
            config, board=FixedBoard(), view=self.view, tasks=lambda: self.tasks,
            tokens_s=lambda: self.tokens_s, rate=lambda: self.rate,
        )  # fmt: skip

    def watts(self, t_s: float = 0.0, *, cap_w: float | None = None, later_s: float = 2.0) -> float | None:
        self.now_s += later_s
        t_ns = JUNE_NS + round(t_s * NS)
        eps = self.planning.observe(t_ns, EPS, board_c=25.0, power_w=8.0)
        return self.planning.watts(t_ns, eps, cap_w, self.now_s)


def task(job: str, tokens: int, **changes: Any) -> Task:
    return Task(job, len(job), tokens_left=tokens, **changes)


def test_without_jobs_nothing_is_planned_and_the_next_one_has_the_whole_board() -> None:
    rig = Rig()
    assert rig.watts() == 12.0
    assert rig.planning.plan is None
    rig.tasks = [task("a", 100_000)]
    assert rig.watts() is not None
    assert rig.planning.plan is not None
    assert rig.planning.plan.source is Source.PLANNER
    assert rig.planning.plan.backlog_tokens == 100_000


def test_without_any_knowledge_of_eclipses_the_rules_decide() -> None:
    rig = Rig()
    rig.tasks = [task("a", 100_000)]
    much_later_s = 40 * 86_400.0
    assert rig.watts(much_later_s) is None
    assert rig.planning.eclipses.source == "unknown"
    assert rig.planning.plan is None


def test_a_change_of_jobs_cap_or_contact_makes_a_new_plan_but_not_at_once() -> None:
    rig = Rig()
    rig.tasks = [task("a", 100_000)]
    rig.watts()
    first = rig.planning.plan
    rig.watts(1.0)
    assert rig.planning.plan is first
    rig.tasks.append(task("bb", 50_000))
    rig.watts(2.0, later_s=REPLAN_S / 2)
    second = rig.planning.plan
    assert second is not first
    rig.watts(2.5, cap_w=6.0, later_s=REPLAN_S / 2)
    assert rig.planning.plan is second, "a plan a second is enough"
    rig.watts(3.0, cap_w=6.0, later_s=REPLAN_S)
    third = rig.planning.plan
    assert third is not None
    assert max(third.watts) <= 6.0 + 1e-6
    contact = BusContact(
        t_ns=JUNE_NS,
        in_contact=False,
        windows=[ContactSpan(start_ns=JUNE_NS + NS, end_ns=JUNE_NS + 2 * NS)],
    )
    rig.view.handle(contact, 0.0)
    rig.watts(4.0, cap_w=6.0)
    assert rig.planning.plan is not third


def test_planning_that_fails_costs_the_plan_and_not_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.tasks = [task("a", 100_000)]

    def defect(inputs: object) -> object:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(rig.planning._planner, "handle", defect)
    assert rig.watts() is None
    assert rig.planning.plan is not None
    assert rig.planning.plan.source is Source.RULES
    assert rig.planning.plan.note == "planning failed: ZeroDivisionError: of the test"
    monkeypatch.undo()
    rig.tasks.append(task("bb", 10))
    assert rig.watts(1.0) is not None


def test_an_array_that_looks_away_from_earth_is_planned_by_its_incidence() -> None:
    config = NodeConfig.load(EXAMPLE)
    array = msgspec.structs.replace(config.planner.array, mount="zenith")
    tilted, turned = Rig(array=array), Rig()
    for rig in (tilted, turned):
        rig.tasks = [task("a", 10_000_000)]
        rig.watts()
    assert tilted.planning.plan is not None
    assert turned.planning.plan is not None
    assert tilted.planning.plan.soc != turned.planning.plan.soc
    assert turned.planning._incidence() is None


def test_an_accelerated_clock_and_the_rate_of_the_worker_are_reckoned_with() -> None:
    rig = Rig()
    rig.tasks = [task("a", 60_000)]
    rig.watts()
    assert rig.planning.curve.hull[-1].tokens_s == pytest.approx(60.0)
    rig.tokens_s, rig.rate = 150.0, 60.0
    rig.watts(1.0)
    assert rig.planning.curve.hull[-1].tokens_s == pytest.approx(2.5)
    plan_ = rig.planning.plan
    assert plan_ is not None
    assert plan_.backlog_clear_ns is None, "60,000 tokens at 2.5 a second of mission time take seven hours"
    rig.tokens_s = 155.0
    rig.watts(2.0)
    assert rig.planning.curve.hull[-1].tokens_s == pytest.approx(2.5), "a small change is none"


@pytest.mark.parametrize(("soc", "watts"), [(0.99, 12.0), (0.88, 4.4 + 0.66 * 7.6), (0.72, 4.4)])
def test_the_threshold_policy_knows_the_charge_alone(soc: float, watts: float) -> None:
    rig = Rig(policy="threshold")
    rig.tasks = [task("a", 100_000)]
    eps = msgspec.structs.replace(EPS, battery_soc=soc)
    assert rig.planning.watts(JUNE_NS, eps, None, 1.0) == pytest.approx(watts)
    assert Rig(policy="rules").watts() is None


def test_jobs_of_least_worth_are_shed_and_get_no_place() -> None:
    rig = Rig()
    rig.rate = 20.0
    rig.tokens_s = 160.0
    due = JUNE_NS + 5_000 * NS
    rig.tasks = [
        task("precious", 60_000, priority=9, deadline_ns=due),
        task("cheap", 60_000, priority=2, deadline_ns=due),
    ]
    rig.watts()
    plan_ = rig.planning.plan
    assert plan_ is not None
    assert rig.planning.least_priority == 9
    actions = plan([rig.tasks[1]], [rig.tasks[0]], 8, JUNE_NS, least_priority=9)
    assert actions == [Park("cheap"), Start("precious")]
    rig.tasks = []
    rig.watts()
    assert rig.planning.least_priority == 0


def test_a_hot_board_is_predicted() -> None:
    rig = Rig()
    assert rig.planning.predict_die_c(8.0) is None
    for t_s in range(0, 3_000, 10):
        rig.planning.observe(JUNE_NS + t_s * NS, EPS, board_c=50.0, power_w=8.0)
    assert rig.planning.predict_die_c(8.0) == pytest.approx(58.0, abs=0.2)
    assert rig.planning.predict_die_c(12.0) > 62.0  # type: ignore[operator]
    assert rig.planning.predict_die_c(None) is None


# Profiles.


def calibration(**changes: Any) -> Calibration:
    board = open_board(BoardSettings())
    points = [
        OperatingPoint(threads=t, batch=b, duty=d, tokens_s=rate, cpu_share=cpu, power_w=None, seconds=5.0)
        for t, b, d, rate, cpu in ((1, 8, 1.0, 90.0, 1.0), (2, 8, 1.0, 160.0, 1.9), (2, 1, 0.5, 30.0, 0.9))
    ]
    fields: dict[str, Any] = {
        "machine": describe_machine(2, peers=False, load_before=0.0), "board": board.name,
        "identity": board.identity, "board_measures": False, "image_id": "x", "checked": False,
        "idle_w": None, "points": points, "duty_half_share": 0.5, "reloads": 0,
    }  # fmt: skip
    return Calibration(**(fields | changes))


ALL = {"threads": 2, "batch": 8}


def written(path: Path, found: Calibration) -> Path:
    path.write_bytes(msgspec.json.encode(found))
    return path


def test_a_profile_gives_watts_by_the_boards_own_formula_where_nothing_is_measured(tmp_path: Path) -> None:
    curve = load_profile(written(tmp_path / "c.json", calibration()), open_board(BoardSettings()), **ALL)
    assert [s.power_w for s in curve.hull] == pytest.approx([8.0, 11.6])
    assert [s.tokens_s for s in curve.hull] == [90.0, 160.0]


def test_points_beyond_the_threads_and_batch_of_the_node_are_left_out(tmp_path: Path) -> None:
    board = open_board(BoardSettings())
    path = written(tmp_path / "c.json", calibration())
    assert [s.point.threads for s in load_profile(path, board, threads=1, batch=8).hull] == [1]
    with pytest.raises(PenumbraError, match="of up to 2 threads and 4 jobs together, no operating point"):
        load_profile(path, board, threads=2, batch=4)


@given(st.floats(0, 20), st.floats(0.01, 0.2))
def test_a_point_chosen_is_within_the_draw_and_no_other_gives_more(power_w: float, least: float) -> None:
    rows = [(1, 1, 6.0, 35.0), (1, 8, 8.0, 100.0), (2, 4, 10.0, 130.0), (2, 8, 12.0, 160.0)]
    settings_ = [Setting(PowerPoint(threads=t, batch=b, duty=1.0), watts, rate) for t, b, watts, rate in rows]
    curve = PowerCurve(4.0, settings_)
    found = curve.choose(power_w, min_duty=least)
    chosen = next(s for s in curve.hull if (s.point.threads, s.point.batch) == (found.threads, found.batch))
    drawn_w = 4.0 + found.duty * (chosen.power_w - 4.0)
    assert drawn_w <= max(power_w, 4.0 + least * 8.0) + 1e-6
    if power_w >= 4.0 + least * 8.0:
        assert found.duty * chosen.tokens_s >= 0.75 * curve.rate(power_w)


def test_a_profile_of_another_board_or_no_profile_is_refused(tmp_path: Path) -> None:
    board = open_board(BoardSettings())
    other = written(tmp_path / "o.json", calibration(identity="another, 64 threads"))
    with pytest.raises(PenumbraError, match=r"measured on board 'sim' .another, 64 threads"):
        load_profile(other, board, **ALL)
    warmer = open_board(BoardSettings(core_w=9.0))
    with pytest.raises(PenumbraError, match="9 W a core"):
        load_profile(written(tmp_path / "w.json", calibration()), warmer, **ALL)
    with pytest.raises(PenumbraError, match="cannot be read"):
        load_profile(tmp_path / "none.json", board, **ALL)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(PenumbraError, match="no calibration"):
        load_profile(tmp_path / "bad.json", board, **ALL)
    with pytest.raises(PenumbraError, match="no operating point"):
        load_profile(written(tmp_path / "e.json", calibration(points=[])), board, **ALL)


def test_a_profile_chooses_threads_and_duty_and_the_loop_corrects_them(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    identity = FixedBoard.identity
    written(path, calibration(board="fixed", identity=identity))
    rig = Rig(profile=str(path))
    assert rig.planning.range_w() == (4.0, pytest.approx(11.6))
    chosen = rig.planning.choose(6.0, 0.5)
    model = (6.0 - 4.0) / (11.6 - 4.0)
    assert (chosen.threads, chosen.batch) == (1, 8)
    assert chosen.duty == pytest.approx(0.5 + 0.5 - model)
    assert rig.planning.choose(11.6, 1.0).threads == 2
    rig.tasks = [task("a", 1_000_000)]
    rig.watts()
    assert rig.planning.plan is not None
    assert rig.planning.plan.binding in set(Binding)
