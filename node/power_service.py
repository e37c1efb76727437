"""The power loop: read board and bus, ask the governor, pace the worker, tell the bus the draw."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from node.boards import Board, BoardReading
from node.bus_view import BusView, Eclipses
from node.clock import MissionClock
from node.config import NodeConfig
from node.inference import protocol
from node.planning import Planning
from node.power.ceiling import PowerInputs, Reason
from node.power.forecast import UmbraPass
from node.power.governor import Governor, Setpoint
from node.power.operating_point import OperatingPoint
from node.power.plan import Plan
from node.pulse import Pulse
from node.recorder import Evidence, Recorder, Throttle
from node.scheduler import Task
from telemetry import bus, topics
from telemetry.errors import PenumbraError
from telemetry.link import Link, LinkDown
from telemetry.packets import PlanSegment, PowerPlan, Severity

_log = logging.getLogger(__name__)

PERIOD_S = 0.25
"""Period of the loop, s of physical time (assumed: a mission second at 4 times real time)."""
REST_DUTY = 0.01
"""Duty of a worker that is to rest: the lowest there is."""
PLAN_CHANGE = 0.05
"""Relative change of the ceiling that is reported (packets.PowerPlan)."""
OLD_MARGIN_S = 10.0
"""Error of an edge from which on it is told: elements of a week."""
FAILURE_PERIOD_S = 10.0
"""Time between two events about failures of the loop, s (assumed)."""
PLAN_PERIOD_S = 1.0
"""Shortest time between two plan packets, s of physical time (assumed)."""


class PowerService:
    """Runs the governor.

    Parameters
    ----------
    config
        Sections node and power.
    board, view, clock
        What is known: the draw, the bus, the time.
    link
        The bus link, where the draw is published.
    recorder
        For plan packets.
    send
        Sends to the worker.
    busy
        Tells whether the worker has a job.
    blocked
        Tells whether results cannot be stored: the worker is then paced down.
    redundant
        Tells whether every epoch is to be decoded twice now.
    on_batch
        Called when the batch of the operating point has changed, or jobs are shed, or no more.
    tasks, tokens_s
        The open jobs, and the worker's rate while it computes: what is planned for.
    on_sunlit
        Called with the forecast sunlit fraction at each turn, when it is known.
    cap_w
        Commanded cap at the start, W.
    """

    def __init__(
        self,
        config: NodeConfig,
        *,
        board: Board,
        view: BusView,
        clock: MissionClock,
        link: Link,
        recorder: Recorder,
        send: Callable[[protocol.Message], bool],
        busy: Callable[[], bool],
        blocked: Callable[[], bool],
        redundant: Callable[[], bool],
        on_batch: Callable[[], None],
        tasks: Callable[[], Sequence[Task]] = tuple,
        tokens_s: Callable[[], float] = lambda: 0.0,
        on_sunlit: Callable[[float], None],
        cap_w: float | None,
    ) -> None:
        self.cap_w = cap_w
        self.reading = BoardReading(power_w=None, board_c=None)
        self.setpoint: Setpoint | None = None
        self.sunlit: float | None = None
        self.umbra: UmbraPass | None = None
        self.point = OperatingPoint(
            threads=config.model.threads, batch=config.worker.batch, duty=config.power.min_duty
        )
        """Operating point of the worker now."""
        self.planning = Planning(
            config, board=board, view=view, tasks=tasks, tokens_s=tokens_s, rate=lambda: clock.rate
        )
        """Models and plan."""
        self.choose: Callable[[Setpoint], OperatingPoint] = self._by_plan
        """Which operating point carries a setpoint out, asked at each turn. Threads and batch must not be
        above those configured: the worker has room for no more."""
        self._config = config
        self._board = board
        self._view = view
        self._clock = clock
        self._link = link
        self._recorder = recorder
        self._send = send
        self._busy = busy
        self._blocked = blocked
        self._redundant = redundant
        self._on_batch = on_batch
        self._on_sunlit = on_sunlit
        self._governor = Governor(config.power)
        self.on_reading: Callable[[BoardReading, float | None], None] = lambda _reading, _board_c: None
        """Called with each reading of the board, and its temperature, degC."""
        self._rest_until_s = 0.0
        self._failures = Throttle(FAILURE_PERIOD_S)
        self._least_priority = 0
        self._eclipses_from: str | None = None
        self._asked: tuple[int, str | None] | None = None
        self._to_operate: asyncio.Queue[OperatingPoint] = asyncio.Queue()
        self._reported_plan: Plan | None = None
        self._planned: tuple[Setpoint, float] | None = None
        self.pulse = Pulse("power")
        """Health of the governing task, which turns by itself."""

    async def run(self) -> None:
        """Govern until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._govern(), name="node.power.govern")
            group.create_task(self._publish_load(), name="node.power.load")
            group.create_task(self._operate_board(), name="node.power.board")

    def board_c(self, now_s: float) -> float | None:
        """Return the board's temperature, from its own sensor or from the bus."""
        own = self.reading.board_c
        return self._view.board_c(now_s) if own is None else own

    def rest(self, for_s: float) -> None:
        """Let the worker rest for a time, s: the draw of an idle board is judged for a latch-up."""
        self._rest_until_s = time.monotonic() + for_s

    async def _govern(self) -> None:
        while True:
            self.pulse.beat()
            self._turn(time.monotonic())
            await asyncio.sleep(PERIOD_S)

    def _turn(self, now_s: float) -> None:
        try:
            self._decide(now_s)
        except Exception as error:
            # What the bus said is at fault, in a way nobody foresaw: the loop goes on as with a silent bus.
            # A failure also without it is a defect of the node.
            self._view.forget()
            self._report_failure(error, now_s)
            self._decide(now_s)

    def _report_failure(self, error: Exception, now_s: float) -> None:
        count = self._failures.admit(now_s)
        if count is None:
            return
        _log.error("the power loop failed on what the bus said", exc_info=error)
        what = f"{type(error).__name__}: {error}"[:200]
        evidence: Evidence = {"error": what, "since_last_report": count}
        text = f"the power loop failed on what the bus said, which is dropped: {what}"
        self._recorder.event(Severity.MEDIUM, "power.failed", text, evidence)

    def _decide(self, now_s: float) -> None:
        t_ns = self._recorder.now_ns()
        self.reading = self._board.read()
        self.sunlit = self._view.sunlit(t_ns)
        self.umbra = self._view.next_umbra(t_ns)
        if self.sunlit is not None:
            self._on_sunlit(self.sunlit)
        idle_w, max_w = self.planning.range_w()
        board_c, power_w = self.board_c(now_s), self.reading.power_w
        self.on_reading(self.reading, board_c)
        eps, planned_w = self._view.eps, None
        if eps is not None:
            eps = self.planning.observe(t_ns, eps, board_c=board_c, power_w=power_w)
            planned_w = self.planning.watts(t_ns, eps, self.cap_w, now_s)
        self._shed(self.planning.least_priority)
        self._tell_eclipses(self.planning.eclipses)
        die_c = self.planning.predict_die_c(power_w)
        inputs = PowerInputs(
            t_ns=t_ns,
            rate=self._clock.rate,
            eps=eps,
            eps_age_s=self._view.eps_age_s(now_s),
            umbra=self.umbra,
            period_s=self._view.eclipses(t_ns).period_s,
            load_w=power_w,
            board_c=board_c if die_c is None or board_c is None else max(board_c, die_c),
            planned_w=planned_w,
            soc_sigma=self.planning.soc_sigma if eps is not None else 0.0,
            cap_w=self.cap_w,
            idle_w=idle_w,
            max_w=max_w,
            busy=self._busy(),
        )
        self.setpoint = self._governor.handle(inputs, now_s)
        self._operate(self.choose(self.setpoint))
        self._report(self.setpoint, now_s)

    def _by_plan(self, setpoint: Setpoint) -> OperatingPoint:
        """Carry a setpoint out: by pacing alone, unless a profile of the board knows something better."""
        return self.planning.choose(setpoint.ceiling_w, setpoint.duty)

    def _tell_eclipses(self, eclipses: Eclipses) -> None:
        """Tell when the forecast is less sure, or made without elements, and when it is good again."""
        how: str = eclipses.source
        if how == "forecast" and eclipses.edge_margin_s > OLD_MARGIN_S:
            how = "forecast, from old elements"
        before = self._eclipses_from
        if how == before or (before is None and how == "unknown"):
            return  # at the start elements are still to come
        self._eclipses_from = how
        if before is None and how == "forecast":
            return
        evidence: Evidence = {"source": how, "edge_margin_s": eclipses.edge_margin_s}
        text = f"eclipses: {how}; edges are taken as good to {eclipses.edge_margin_s:.0f} s"
        if self._view.forecast_fault:
            evidence["fault"] = self._view.forecast_fault[:200]
            text += "; the elements are dropped, for the forecast fails on them"
        severity = Severity.INFO if how == "forecast" else Severity.LOW
        self._recorder.event(severity, "power.eclipses", text, evidence)

    def _shed(self, least_priority: int) -> None:
        """Tell when jobs are shed for want of energy, and when no more."""
        before, self._least_priority = self._least_priority, least_priority
        if before == least_priority:
            return
        evidence: Evidence = {"least_priority": least_priority, "before": before}
        if least_priority > 0:
            text = f"jobs of a priority below {least_priority} wait: there is no energy for them"
            self._recorder.event(Severity.LOW, "power.shed", text, evidence)
        else:
            self._recorder.event(Severity.INFO, "power.unshed", "no job waits for want of energy", evidence)
        self._on_batch()

    def _operate(self, point: OperatingPoint) -> None:
        resized = point.batch != self.point.batch
        self.point = point
        if (point.threads, point.power_mode) != self._asked:
            self._asked = point.threads, point.power_mode
            self._to_operate.put_nowait(point)
        duty = self._config.power.min_duty if self._blocked() else point.duty
        if time.monotonic() < self._rest_until_s:
            duty = min(duty, REST_DUTY)
        self._send(
            protocol.Pace(duty=duty, threads=point.threads, batch=point.batch, redundant=self._redundant())
        )
        if resized:
            self._on_batch()

    async def _operate_board(self) -> None:
        """Hold the board to the points chosen, apart from the governor: a power mode takes time to set."""
        while True:
            point = await self._to_operate.get()
            try:
                await asyncio.to_thread(self._board.operate, point)
            except PenumbraError as error:
                evidence: Evidence = {"threads": point.threads, "power_mode": point.power_mode}
                self._recorder.event(Severity.MEDIUM, "power.point_refused", error.what, evidence)

    def _report(self, setpoint: Setpoint, now_s: float) -> None:
        plan = self.planning.plan
        fresh = plan is not None and plan is not self._reported_plan
        if self._planned is not None:
            before, at_s = self._planned
            moved = abs(setpoint.ceiling_w - before.ceiling_w) > PLAN_CHANGE * before.ceiling_w
            if now_s - at_s < PLAN_PERIOD_S or not (fresh or moved or setpoint.reason is not before.reason):
                return
        self._planned, self._reported_plan = (setpoint, now_s), plan
        self._recorder.post(self._packet(setpoint, plan if fresh else None, now_s))

    def _packet(self, setpoint: Setpoint, fresh: Plan | None, now_s: float) -> PowerPlan:
        """Return what is told of a setpoint, with the horizon of a plan that was not told yet."""
        eps, planning = self._view.fresh_eps(now_s), self.planning
        plan, policy = planning.plan, self._config.planner.policy
        if setpoint.reason is Reason.UNKNOWN_BUS:
            plan = None
        rules = "rules" if policy == "planner" else policy
        segments = [] if fresh is None else [
            PlanSegment(end_ns=end_ns, ceiling_w=watts, battery_soc=soc)
            for end_ns, watts, soc in zip(fresh.edges_ns[1:], fresh.watts, fresh.soc, strict=True)
        ]  # fmt: skip
        return PowerPlan(
            ceiling_w=setpoint.ceiling_w,
            duty=setpoint.duty,
            reason=setpoint.reason,
            battery_soc=None if eps is None else eps.battery_soc,
            soc_floor=0.0 if eps is None else eps.soc_floor,
            eclipse_entry_ns=None if self.umbra is None else self.umbra.entry_ns,
            eclipse_exit_ns=None if self.umbra is None else self.umbra.exit_ns,
            source=rules if plan is None else plan.source,
            binding="none" if plan is None else plan.binding,
            binds_at_ns=None if plan is None else plan.binds_at_ns,
            note="" if plan is None else plan.note,
            eclipse_source=planning.eclipses.source,
            edge_margin_s=planning.eclipses.edge_margin_s,
            soc_sigma=planning.soc_sigma,
            array_gain=1.0 if plan is None else plan.array_gain,
            die_c=planning.predict_die_c(self.reading.power_w),
            least_priority=planning.least_priority,
            backlog_tokens=0 if plan is None else round(plan.backlog_tokens),
            backlog_clear_ns=None if plan is None else plan.backlog_clear_ns,
            battery_cycles=planning.wear.cycles,
            battery_wear=planning.wear.wear,
            horizon=segments,
        )

    async def _publish_load(self) -> None:
        """Tell the bus the draw, apart from the governor: a link that hangs must not hold it up."""
        topic = topics.bus(self._config.node.name, "load")
        while True:
            await self._link.connected.wait()
            power_w = self.reading.power_w
            if power_w is not None:  # a meter that is silent says nothing, rather than 0
                load = bus.BusLoad(t_ns=self._recorder.now_ns(), power_w=max(0.0, power_w))
                try:
                    await self._link.publish(topic, bus.encode(load))
                except LinkDown as error:
                    _log.debug("draw not published: %s", error)
            await asyncio.sleep(PERIOD_S)
