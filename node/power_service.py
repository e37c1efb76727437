"""The power loop: read board and bus, ask the governor, pace the worker, tell the bus the draw."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from node.boards import Board, BoardReading
from node.bus_view import BusView
from node.clock import MissionClock
from node.config import NodeConfig
from node.inference import protocol
from node.power.ceiling import PowerInputs
from node.power.forecast import UmbraPass
from node.power.governor import Governor, Setpoint
from node.power.operating_point import OperatingPoint
from node.pulse import Pulse
from node.recorder import Recorder
from telemetry import bus, topics
from telemetry.link import Link, LinkDown
from telemetry.packets import PowerPlan

_log = logging.getLogger(__name__)

PERIOD_S = 0.25
"""Period of the loop, s of physical time (assumed: a mission second at 4 times real time)."""
REST_DUTY = 0.01
"""Duty of a worker that is to rest: the lowest there is."""
PLAN_CHANGE = 0.05
"""Relative change of the ceiling that is reported (packets.PowerPlan)."""
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
        Called when the batch of the operating point has changed.
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
        on_sunlit: Callable[[float], None],
        cap_w: float | None,
    ) -> None:
        self.cap_w = cap_w
        self.reading = BoardReading(power_w=board.range_w()[0], board_c=None)
        self.setpoint: Setpoint | None = None
        self.sunlit: float | None = None
        self.umbra: UmbraPass | None = None
        self.point = OperatingPoint(
            threads=config.model.threads, batch=config.worker.batch, duty=config.power.min_duty
        )
        """Operating point of the worker now."""
        self.choose: Callable[[Setpoint], OperatingPoint] = self._by_duty
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
        self._planned: tuple[Setpoint, float] | None = None
        self.pulse = Pulse("power")
        """Health of the governing task, which turns by itself."""

    async def run(self) -> None:
        """Govern until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._govern(), name="node.power.govern")
            group.create_task(self._publish_load(), name="node.power.load")

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
        t_ns = self._recorder.now_ns()
        self.reading = self._board.read()
        self.sunlit = self._view.sunlit(t_ns)
        self.umbra = self._view.next_umbra(t_ns)
        if self.sunlit is not None:
            self._on_sunlit(self.sunlit)
        idle_w, max_w = self._board.range_w()
        forecast = self._view.forecast
        self.on_reading(self.reading, self.board_c(now_s))
        inputs = PowerInputs(
            t_ns=t_ns,
            rate=self._clock.rate,
            eps=self._view.eps,
            eps_age_s=self._view.eps_age_s(now_s),
            umbra=self.umbra,
            period_s=None if forecast is None else forecast.period_s,
            load_w=self.reading.power_w,
            board_c=self.board_c(now_s),
            cap_w=self.cap_w,
            idle_w=idle_w,
            max_w=max_w,
            busy=self._busy(),
        )
        self.setpoint = self._governor.handle(inputs, now_s)
        self._operate(self.choose(self.setpoint))
        self._report(self.setpoint, now_s)

    def _by_duty(self, setpoint: Setpoint) -> OperatingPoint:
        """Carry a setpoint out by pacing alone, with all threads and the whole batch."""
        return OperatingPoint(
            threads=self._config.model.threads, batch=self._config.worker.batch, duty=setpoint.duty
        )

    def _operate(self, point: OperatingPoint) -> None:
        resized = point.batch != self.point.batch
        self.point = point
        duty = self._config.power.min_duty if self._blocked() else point.duty
        if time.monotonic() < self._rest_until_s:
            duty = min(duty, REST_DUTY)
        self._send(
            protocol.Pace(duty=duty, threads=point.threads, batch=point.batch, redundant=self._redundant())
        )
        if resized:
            self._on_batch()

    def _report(self, setpoint: Setpoint, now_s: float) -> None:
        if self._planned is not None:
            before, at_s = self._planned
            moved = abs(setpoint.ceiling_w - before.ceiling_w) > PLAN_CHANGE * before.ceiling_w
            if now_s - at_s < PLAN_PERIOD_S or not (moved or setpoint.reason is not before.reason):
                return
        self._planned = (setpoint, now_s)
        eps = self._view.fresh_eps(now_s)
        self._recorder.post(
            PowerPlan(
                ceiling_w=setpoint.ceiling_w,
                duty=setpoint.duty,
                reason=setpoint.reason,
                battery_soc=None if eps is None else eps.battery_soc,
                soc_floor=0.0 if eps is None else eps.soc_floor,
                eclipse_entry_ns=None if self.umbra is None else self.umbra.entry_ns,
                eclipse_exit_ns=None if self.umbra is None else self.umbra.exit_ns,
            )
        )

    async def _publish_load(self) -> None:
        """Tell the bus the draw, apart from the governor: a link that hangs must not hold it up."""
        topic = topics.bus(self._config.node.name, "load")
        while True:
            await self._link.connected.wait()
            load = bus.BusLoad(t_ns=self._recorder.now_ns(), power_w=max(0.0, self.reading.power_w))
            try:
                await self._link.publish(topic, bus.encode(load))
            except LinkDown as error:
                _log.debug("draw not published: %s", error)
            await asyncio.sleep(PERIOD_S)
