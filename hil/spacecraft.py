"""The simulated spacecraft at work: runs the plant in mission time and speaks for it on the bus.

Mission time is held at the start of the flight until `FlightClock.start`: the time a node takes to load its
model is not flown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from hil.plant.plant import Plant, PlantState
from hil.record import PlantSample
from hil.sensor_faults import SensorBench
from telemetry import topics
from telemetry.bus import BusEps, BusLoad, BusMessage, BusTime, decode, encode
from telemetry.link import LinkDown, MqttLink

_log = logging.getLogger(__name__)

TICK_S = 0.1
"""Interval of the plant's steps, physical s."""
PERIOD_S = {"time": 0.5, "eps": 0.2, "thermal": 0.5, "contact": 0.5, "orbit": 2.0}
"""Intervals of the bus channels, physical s (assumed: telemetry rates of small power units)."""
SAMPLE_S = 0.2
"""Interval of the recorded samples, physical s."""
LOAD_SILENT_S = 3.0
"""Silence of the board after which it counts as idle, physical s."""
HOLD_RATE = 1e-3
"""Rate of mission time while it is held: a clock that stands still could not be told from a broken one."""
HOLD_LEAD_S = 0.2
"""How far before the start mission time is held, s: it must not get there by itself."""
NS = 1_000_000_000


class FlightClock:
    """Mission time of the bench.

    Parameters
    ----------
    start_ns
        Mission time at the start of the flight, UTC ns.
    speed
        Mission seconds a physical second once started.
    """

    def __init__(self, start_ns: int, speed: float) -> None:
        self.start_ns = start_ns
        self.speed = speed
        self.start_host_ns: int | None = None
        """CLOCK_REALTIME at the start; None while mission time is held."""
        self._held_s = time.monotonic()
        self._started_s = 0.0

    def start(self) -> None:
        """Let mission time run."""
        self.start_host_ns = time.time_ns()
        self._started_s = time.monotonic()

    @property
    def rate(self) -> float:
        """Mission seconds a physical second, now."""
        return HOLD_RATE if self.start_host_ns is None else self.speed

    @property
    def elapsed_s(self) -> float:
        """Mission time since the start, s; negative by a little while held."""
        now_s = time.monotonic()
        if self.start_host_ns is None:
            return min(0.0, (now_s - self._held_s) * HOLD_RATE - HOLD_LEAD_S)
        return (now_s - self._started_s) * self.speed

    @property
    def now_ns(self) -> int:
        """Mission time, UTC ns."""
        return self.start_ns + round(self.elapsed_s * NS)


@dataclass
class _Load:
    power_w: float
    heard_s: float


class Spacecraft:
    """The plant and its bus.

    Parameters
    ----------
    url
        Broker of the bus.
    node
        Name of the node on the bus.
    plant, clock
        The truth, and when it is.
    idle_w
        Draw of the board when it does not say, W.
    sensors
        Sensors of the power unit; None: it says the truth.
    on_state
        Called with every new state, in flight only.

    Attributes
    ----------
    samples
        The truth over the flight.
    garbage
        Messages of the node on `bus/load` that could not be read.
    """

    def __init__(
        self,
        url: str,
        node: str,
        plant: Plant,
        clock: FlightClock,
        *,
        idle_w: float,
        sensors: SensorBench | None = None,
        on_state: Callable[[PlantState], None] = lambda state: None,
    ) -> None:
        self.samples: list[PlantSample] = []
        self.garbage = 0
        self._node = node
        self._plant = plant
        self._clock = clock
        self._idle_w = idle_w
        self._sensors = sensors
        self._on_state = on_state
        self._load = _Load(idle_w, 0.0)
        self._sent_s: dict[str, float] = {}
        self._sampled_s = 0.0
        self._messages: asyncio.Queue[tuple[str, BusMessage]] = asyncio.Queue(maxsize=64)
        self._link = MqttLink(url, f"bus-{node}", [topics.bus(node, "load")], self._on_message)

    @property
    def load_w(self) -> float:
        """Draw of the payload computer: what it says, or its idle draw when it has been silent."""
        silent = time.monotonic() - self._load.heard_s > LOAD_SILENT_S
        return self._idle_w if silent else self._load.power_w

    async def run(self) -> None:
        """Step and speak until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run(), name="hil.spacecraft.link")
            group.create_task(self._publish(), name="hil.spacecraft.publish")
            group.create_task(self._step_each_tick(), name="hil.spacecraft.step")

    def _on_message(self, topic: str, payload: bytes) -> None:
        try:
            message = decode("load", payload)
        except ValueError as error:
            self.garbage += 1
            _log.info("garbage on %s: %s", topic, error)
            return
        if isinstance(message, BusLoad):
            self._load = _Load(message.power_w, time.monotonic())

    async def _step_each_tick(self) -> None:
        while True:
            self._tick(time.monotonic())
            await asyncio.sleep(TICK_S)

    def _tick(self, now_s: float) -> None:
        state = self._plant.state
        flying = self._clock.start_host_ns is not None
        if flying:
            state = self._plant.step(self._clock.now_ns, self.load_w)
            if now_s - self._sampled_s >= SAMPLE_S - TICK_S / 2:
                self._sampled_s = now_s
                self.samples.append(sample(state, self._clock.start_ns))
            self._on_state(state)
        messages: dict[str, BusMessage] = {**state.messages(self._clock.rate), "orbit": self._plant.orbit}
        for channel, truth in messages.items():
            message = truth
            if isinstance(truth, BusEps) and self._sensors is not None:
                message = self._sensors.read(truth)
            if now_s - self._sent_s.get(channel, 0.0) >= PERIOD_S[channel] - TICK_S / 2:
                self._sent_s[channel] = now_s
                if not self._messages.full():  # a broker that is away gets no burst of old values later
                    self._messages.put_nowait((channel, message))

    async def _publish(self) -> None:
        while True:
            channel, message = await self._messages.get()
            if channel == "time":
                # The time of sending: what waited in the queue is old.
                message = BusTime(t_ns=self._clock.now_ns, rate=self._clock.rate)
            try:
                await self._link.publish(topics.bus(self._node, channel), encode(message))
            except LinkDown as error:
                _log.info("bus/%s not sent: %s", channel, error)


def sample(state: PlantState, start_ns: int) -> PlantSample:
    """Return what is recorded of a state of the plant."""
    return PlantSample(
        t_s=(state.t_ns - start_ns) / NS,
        soc=state.eps.battery_soc,
        array_w=state.eps.array_w,
        load_w=state.payload_w,
        platform_w=state.platform_w,
        sunlit=state.sunlit,
        board_c=state.thermal.board_c,
    )
