from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from memory_link import MemoryLink
from waiting import until

from node import power_service as module
from node.boards import BoardReading, Offer
from node.bus_view import STALE_S, BusView
from node.clock import MissionClock
from node.config import NodeConfig
from node.inference import protocol
from node.power.governor import Setpoint
from node.power.operating_point import OperatingPoint
from node.power_service import PowerService
from telemetry import bus
from telemetry.errors import PenumbraError
from telemetry.packets import PowerPlan, Severity

EXAMPLE = Path(__file__).parents[2] / "docs" / "node-example.toml"
ISS = bus.BusOrbit(
    line1="1 25544U 98067A   08264.51782528 -.00002182  00000-0 -11606-4 0  2927",
    line2="2 25544  51.6416 247.4627 0006703 130.5360 325.0288 15.72125391563537",
)
EPOCH_NS = 1_221_913_540 * 1_000_000_000
EPS = bus.BusEps(
    t_ns=0,
    battery_soc=0.9,
    battery_v=14.0,
    battery_a=0.0,
    battery_wh=80.0,
    array_w=60.0,
    array_sun_w=60.0,
    platform_w=10.0,
    soc_floor=0.5,
)


class Posted:
    """Stands for the recorder."""

    def __init__(self) -> None:
        self.packets: list[PowerPlan] = []
        self.events: list[str] = []
        self.t_ns = EPOCH_NS

    def now_ns(self) -> int:
        return self.t_ns

    def event(self, severity: Severity, name: str, text: str, evidence: object) -> None:
        self.events.append(name)

    def post(self, packet: PowerPlan) -> None:
        self.packets.append(packet)


class FixedBoard:
    def __init__(self) -> None:
        self.points: list[OperatingPoint] = []
        self.refuses = False

    name = "fixed"
    power_w = 6.0

    def range_w(self) -> tuple[float, float]:
        return 4.0, 12.0

    identity = "of the tests"
    measures = False

    def draw_w(self, cpu_share: float) -> float:
        return 4.0 + 4.0 * cpu_share

    def set_worker(self, pid: int | None) -> None:
        return None

    def operate(self, point: OperatingPoint) -> None:
        self.points.append(point)
        if self.refuses:
            raise PenumbraError("power mode '10W' is not in force", "reboot")

    def probe(self) -> list[Offer]:
        return []

    def read(self) -> BoardReading:
        return BoardReading(power_w=self.power_w, board_c=None)


class Rig:
    def __init__(self) -> None:
        self.view = BusView()
        self.link = MemoryLink()
        self.posted = Posted()
        self.sent: list[protocol.Message] = []
        self.sunlit: list[float] = []
        self.blocked = False
        self.redundant = False
        self.resized = 0
        self.config = NodeConfig.load(EXAMPLE)
        self.board = FixedBoard()
        recorder: Any = self.posted
        self.service = PowerService(
            self.config,
            board=self.board,
            view=self.view,
            clock=MissionClock(EPOCH_NS, 0),
            link=self.link,
            recorder=recorder,
            send=self.send,
            busy=lambda: True,
            blocked=lambda: self.blocked,
            redundant=lambda: self.redundant,
            on_batch=self.on_batch,
            on_sunlit=self.sunlit.append,
            cap_w=None,
        )

    def on_batch(self) -> None:
        # By now the worker has been told, and the service shows the new point.
        assert self.pace.batch == self.service.point.batch
        self.resized += 1

    def send(self, message: protocol.Message) -> bool:
        self.sent.append(message)
        return True

    @property
    def pace(self) -> protocol.Pace:
        pace = self.sent[-1]
        assert isinstance(pace, protocol.Pace)
        return pace


def test_each_turn_paces_the_worker_and_a_plan_is_sent_on_change_only() -> None:
    rig = Rig()
    for turn in range(8):
        rig.service._turn(turn * 0.25)
    assert len(rig.sent) == 8
    assert [p.reason for p in rig.posted.packets] == ["unknown_bus"]
    assert rig.posted.packets[0].battery_soc is None
    rig.view.handle(EPS, 2.0)
    for turn in range(8, 16):
        rig.service._turn(turn * 0.25)
    assert rig.posted.packets[-1].reason == "board"
    assert rig.posted.packets[-1].battery_soc == 0.9
    assert len(rig.posted.packets) == 2


def test_a_failure_on_what_the_bus_said_costs_what_it_said_and_not_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()

    def fail(*_: object, **__: object) -> bus.BusEps:
        raise ZeroDivisionError("float division by zero")

    rig.view.handle(ISS, 0.0)
    rig.view.handle(EPS, 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(rig.service.planning, "observe", fail)
        for turn in range(20):
            rig.view.handle(EPS, turn * 0.25)
            rig.service._turn(turn * 0.25)
            assert rig.service.setpoint is not None
            assert rig.service.setpoint.reason == "unknown_bus"
    assert len(rig.sent) == 20
    assert rig.posted.events.count("power.failed") == 1
    rig.view.handle(EPS, 5.0)
    rig.service._turn(5.0)
    assert rig.service.setpoint.reason == "board"


def test_a_commanded_cap_binds_and_blocked_results_pace_to_the_minimum() -> None:
    rig = Rig()
    rig.view.handle(EPS, 0.0)
    rig.service._turn(0.0)
    rig.service.cap_w = 5.0
    rig.service._turn(1.5)
    assert rig.service.setpoint is not None
    assert rig.service.setpoint.ceiling_w == 5.0
    assert rig.posted.packets[-1].reason == "command"
    rig.blocked = True
    rig.service._turn(2.0)
    assert rig.pace.duty == rig.config.power.min_duty


def test_all_threads_and_the_whole_batch_are_used_unless_another_point_is_chosen() -> None:
    rig = Rig()
    rig.view.handle(EPS, 0.0)
    rig.service._turn(0.0)
    assert rig.service.setpoint is not None
    assert rig.pace == protocol.Pace(duty=rig.service.setpoint.duty, threads=2, batch=8, redundant=False)
    assert rig.resized == 0

    def lower(setpoint: Setpoint) -> OperatingPoint:
        return OperatingPoint(threads=1, batch=2, duty=setpoint.duty / 2)

    rig.service.choose = lower
    rig.redundant = True
    for turn in (1, 2):
        rig.service._turn(turn * 0.25)
        duty = rig.service.setpoint.duty / 2
        assert rig.pace == protocol.Pace(duty=duty, threads=1, batch=2, redundant=True)
    assert rig.resized == 1
    rig.blocked = True
    rig.service._turn(0.75)
    assert rig.pace.duty == rig.config.power.min_duty


async def test_the_board_is_asked_when_threads_or_mode_change_and_may_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0.01)
    rig = Rig()
    rig.view.handle(EPS, 0.0)
    rig.board.refuses = True
    async with asyncio.TaskGroup() as group:
        task = group.create_task(rig.service.run(), name="test.power")
        await until(lambda: "power.point_refused" in rig.posted.events)
        count = len(rig.sent)
        await until(lambda: len(rig.sent) > count + 5)
        assert len(rig.board.points) == 1, "a refusal is told once, and the worker is paced on"
        rig.board.refuses = False
        rig.service.choose = lambda setpoint: OperatingPoint(
            threads=2, batch=8, duty=setpoint.duty, power_mode="25W"
        )
        await until(lambda: len(rig.board.points) == 2)
        task.cancel()
    assert rig.posted.events == ["power.point_refused"]


def test_the_forecast_is_reported_once_the_bus_gave_an_orbit() -> None:
    rig = Rig()
    rig.service._turn(0.0)
    assert rig.sunlit == []
    assert rig.service.umbra is None
    rig.view.handle(ISS, 0.0)
    rig.service._turn(0.25)
    assert len(rig.sunlit) == 1
    assert 0 <= rig.sunlit[0] <= 1
    assert rig.service.umbra is not None
    assert rig.service.umbra.exit_ns > EPOCH_NS


def test_old_elements_are_told_with_the_margin_they_need_and_those_too_old_are_not_used() -> None:
    rig = Rig()
    rig.service._turn(0.0)
    rig.view.handle(ISS, 0.0)
    rig.view.handle(EPS, 0.0)
    rig.service._turn(0.25)
    assert rig.posted.events == []
    rig.posted.t_ns += 12 * 86_400 * 1_000_000_000
    rig.service._turn(0.5)
    assert rig.posted.events == ["power.eclipses"]
    assert 10.0 < rig.service.planning.eclipses.edge_margin_s < 60.0
    rig.posted.t_ns += 20 * 86_400 * 1_000_000_000
    rig.service._turn(0.75)
    rig.service._turn(1.0)
    assert rig.posted.events == ["power.eclipses"] * 2
    assert rig.service.planning.eclipses.source == "unknown"
    rig.posted.t_ns = EPOCH_NS
    rig.service._turn(1.25)
    assert rig.posted.events == ["power.eclipses"] * 3


async def test_the_draw_is_published_while_the_bus_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0.01)
    rig = Rig()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(rig.service.run(), name="test.power")
        await until(lambda: len(rig.link.published) >= 2)
        rig.link.failing = True
        await asyncio.sleep(0.05)
        rig.link.failing = False
        count = len(rig.link.published)
        await until(lambda: len(rig.link.published) > count)
        task.cancel()
    topic, payload = rig.link.published[-1]
    assert topic == "penumbra/penumbra-1/bus/load"
    assert bus.decode("load", payload) == bus.BusLoad(t_ns=EPOCH_NS, power_w=6.0)


def test_bus_values_grow_old() -> None:
    view = BusView()
    assert view.eps_age_s(5.0) == 0.0
    assert view.fresh_eps(5.0) is None
    view.handle(EPS, 1.0)
    assert view.eps_age_s(5.0) == 4.0
    assert view.fresh_eps(1.0 + STALE_S) == EPS
    assert view.fresh_eps(1.1 + STALE_S) is None
    view.handle(bus.BusThermal(t_ns=0, board_c=30.0, radiator_c=10.0), 1.0)
    assert view.board_c(1.0 + STALE_S) == 30.0
    assert view.board_c(1.1 + STALE_S) is None
    contact = bus.BusContact(t_ns=0, in_contact=True)
    view.handle(contact, 1.0)
    assert view.contact == contact


def test_a_bad_orbit_keeps_the_good_one_and_a_far_time_is_unknown() -> None:
    view = BusView()
    assert view.sunlit(EPOCH_NS) is None
    view.handle(ISS, 0.0)
    forecast = view.forecast
    with pytest.raises(PenumbraError, match="TLE"):
        view.handle(bus.BusOrbit(line1="1" * 69, line2="2" * 69), 0.0)
    assert view.forecast is forecast
    view.handle(ISS, 1.0)
    assert view.forecast is forecast
    decayed_ns = EPOCH_NS + 70 * 365 * 86_400 * 1_000_000_000
    assert view.sunlit(decayed_ns) is None
    assert view.next_umbra(decayed_ns) is None
