"""One flight, conducted: every part of the bench started in order, flown, and ended in order.

    hold     broker, link, ground, spacecraft, node; mission time stands until the worker computes
    fly      contacts open and shut the link, jobs go up, faults strike
    land     no more faults; every strike gets its proof, a contact under way drains
    stop     the node stops in order, then everything else

Ctrl-C at any moment goes on with `stop`. Worst-case time from there to the end: the node's bound
(`node_process.STOP_BOUND_S` + orphans) and a few seconds for links and broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hil import faults as fault_list
from hil.accounts import newest_packet
from hil.broker import EmbeddedBroker
from hil.ground import GroundStation
from hil.injector import Injector
from hil.link_faults import faults_at
from hil.link_proxy import LinkProxy
from hil.live import LiveState, LiveView
from hil.live_feed import RUNNING, LiveFeed
from hil.memory import WorkerMemory
from hil.node_process import STOP_BOUND_S, NodeProcess, log_tail
from hil.plant.plant import Plant, PlantState, UmbraEvent
from hil.record import Happening, PlantSample, Window
from hil.run_dir import RunDir, write_inputs
from hil.scenario import Fault as ProcessFault
from hil.scenario import FaultKind, Scenario
from hil.sensor_faults import SensorBench
from hil.shared_memory import owned
from hil.spacecraft import FlightClock, Spacecraft
from node.config import NodeConfig
from telemetry.archive import Archive
from telemetry.errors import PenumbraError
from telemetry.keys import KeyRing
from telemetry.packets import Housekeeping, Mode

_log = logging.getLogger(__name__)

READY_BOUND_S = 90.0
"""Longest time from the node's start to a computing worker, s; this and the next two, and that of the node's
stop, times `patience` of the scenario."""
SETTLE_BOUND_S = 15.0
"""Longest wait for the proofs after the last strike, s."""
IDLE_CHECKS_S = 3.0
"""An idle worker checks its memory every second: two checks, and some room, s."""
DRAIN_BOUND_S = 5.0
"""Longest wait for a contact under way to take down what is waiting, s."""
POLL_S = 0.1


@dataclass(frozen=True)
class Flown:
    """What the bench has in hand after a flight."""

    start_host_ns: int
    wall_s: float
    flown_s: float
    interrupted: bool
    stopped_how: str
    samples: Sequence[PlantSample]
    strikes: Sequence[fault_list.Strike]
    commits: Sequence[fault_list.Commit]
    worker_deaths: dict[int, int]
    watch_end_ns: int
    not_injected: int
    node_restarts: int
    orphans_killed: int
    process_faults: Sequence[Happening]
    happenings: Sequence[Happening]
    ground_garbage: int


def merged_contacts(plant: Plant, start_ns: int, end_ns: int) -> list[Window]:
    """Return the contacts of a flight as the link opens: overlapping passes are one, named after both."""
    merged: list[Window] = []
    for window in sorted(plant.contact_windows, key=lambda w: w.start_ns):
        if window.start_ns >= end_ns:
            continue
        start_s, end_s = (window.start_ns - start_ns) / 1e9, (window.end_ns - start_ns) / 1e9
        if merged and start_s <= merged[-1].end_s:
            last = merged.pop()
            start_s, end_s = last.start_s, max(last.end_s, end_s)
            merged.append(Window(start_s=start_s, end_s=end_s, name=f"{last.name}, {window.station}"))
        else:
            merged.append(Window(start_s=start_s, end_s=end_s, name=window.station))
    return merged


def light_profile(
    umbrae: Sequence[UmbraEvent], start_ns: int, duration_s: float, points: int = 1000
) -> list[float]:
    """Return the sunlight over a flight at evenly spaced points: 1 sunlight, 0.5 penumbra, 0 umbra."""
    profile = []
    for point in range(points):
        t_ns = start_ns + round((point + 0.5) / points * duration_s * 1e9)
        dark = any(e.entry_ns <= t_ns < e.exit_ns for e in umbrae)
        dim = any(e.penumbra_entry_ns <= t_ns < e.penumbra_exit_ns for e in umbrae)
        profile.append(0.0 if dark else 0.5 if dim else 1.0)
    return profile


class Flight:
    """A flight of one scenario.

    Parameters
    ----------
    scenario
        Checked.
    source
        Its text, for the run directory.
    run
        Run directory, new.
    images_dir
        Holds the model image.
    plant
        The spacecraft, not stepped yet.
    broker
        Not started yet.
    """

    def __init__(
        self,
        scenario: Scenario,
        source: str,
        run: RunDir,
        *,
        images_dir: Path,
        plant: Plant,
        broker: EmbeddedBroker,
    ) -> None:
        flight = scenario.scenario
        self.scenario = scenario
        self.run_dir = run
        self.contacts = merged_contacts(plant, scenario.start_ns, scenario.end_ns)
        self.live = LiveState(
            scenario=flight.name,
            speed=flight.speed,
            profile=light_profile(plant.umbra_events(), scenario.start_ns, scenario.duration_s),
            duration_s=scenario.duration_s,
            contacts=self.contacts,
            soc_floor=scenario.spacecraft.battery.soc_floor,
            board_max_w=scenario.board.idle_w + scenario.board.core_w * scenario.board.cores,
        )
        self.kill_now: Callable[[], None] = lambda: None
        """Kills what runs, and waits for nothing: the bench is about to end."""
        self._source = source
        self._images_dir = images_dir
        self._plant = plant
        self._broker = broker
        self._clock = FlightClock(scenario.start_ns, flight.speed)
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._happenings: list[Happening] = []
        self._process_faults: list[Happening] = []
        self._jobs = deque(scenario.jobs.listed())
        self._contacts_begun = 0

    def stop(self) -> None:
        """End the flight early, in order. A signal handler may call it at any moment of the flight."""
        if self._loop is None:
            self._stop.set()
        else:
            with contextlib.suppress(RuntimeError):  # the flight has just ended
                self._loop.call_soon_threadsafe(self._stop.set)

    async def fly(self, console: Console, *, live: bool) -> Flown:
        """Fly, from the first start to the last stop.

        Raises
        ------
        PenumbraError
            Something the user must mend: a port in use, a node that does not come up.
        """
        self._loop = asyncio.get_running_loop()
        archive = Archive.open(self.run_dir.archive)
        try:
            async with self._broker, LinkProxy(self._broker.port, seed=self.scenario.scenario.seed) as link:
                self._link = link
                write_inputs(
                    self.run_dir,
                    self.scenario,
                    self._source,
                    images_dir=self._images_dir,
                    bus_url=self._broker.url,
                    link_url=link.url,
                )
                config = NodeConfig.load(self.run_dir.node_config)
                with owned(config.arena_path):
                    return await self._fly(archive, config, console, live=live)
        finally:
            archive.close()

    async def _fly(self, archive: Archive, node_config: NodeConfig, console: Console, *, live: bool) -> Flown:
        name, clock = self.scenario.node.name, self._clock
        self._feed = LiveFeed(self.live, clock, self.run_dir.database)
        self._ground = GroundStation(
            self._broker.url,
            name,
            archive,
            KeyRing.load(self.run_dir.keys),
            now_ns=lambda: clock.now_ns,
            on_packet=self._feed.on_packet,
        )
        self._spacecraft = Spacecraft(
            self._broker.url,
            name,
            self._plant,
            clock,
            idle_w=self.scenario.board.idle_w,
            on_state=self._on_state,
            sensors=SensorBench(self.scenario.scenario.seed),
        )
        self._node = NodeProcess(
            [sys.executable, "-m", "hil.cli", "node", str(self.run_dir.node_config)],
            self.run_dir.node_log,
            on_event=self._on_process_event,
        )
        self.kill_now = self._node.kill_now
        memory = WorkerMemory(node_config.image_dir, node_config.arena_path)
        drawn = draw(self.scenario)
        fault_list.save_faults(drawn, self.run_dir.faults)
        self.live.flips_planned = len(drawn)
        self._injector = Injector(
            memory,
            drawn,
            worker_pid=self._node.worker_pid,
            computing=lambda: self._feed.computing,
            elapsed_s=lambda: clock.elapsed_s,
            on_strike=self._feed.on_strike,
        )
        view = LiveView(self.live, console, live=live)
        parts: dict[str, Coroutine[None, None, None]] = {
            "hil.ground.run": self._ground.run(),
            "hil.spacecraft.run": self._spacecraft.run(),
            "hil.node.run": self._node.run(),
            "hil.live.feed": self._feed.run(lambda: self._ground.counts.archived),
            "hil.live.view": view.run(),
        }
        flown: Flown | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(part, name=task) for task, part in parts.items()]
                flown = await self._conduct(group)
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        if flown is None:
            raise RuntimeError("the flight ended without a result")
        return flown

    async def _conduct(self, group: asyncio.TaskGroup) -> Flown:
        ready = await self._hold()
        self._clock.start()
        start_host_ns = self._clock.start_host_ns or 0
        started_s = time.monotonic()
        watch = group.create_task(self._injector.run(), name="hil.injector.run")
        strikes = group.create_task(self._strike_processes(), name="hil.flight.process-faults")
        if ready:
            await self._cruise()
        flown_s = min(self._clock.elapsed_s, self.scenario.duration_s)
        wall_s = time.monotonic() - started_s
        strikes.cancel()
        self._injector.injecting = False
        interrupted = self._stop.is_set()
        if not interrupted:
            self._enter("landing")
            await self._settle()
            await self._drain()
        self._enter("stopping")
        stopped_how = await self._node.stop(STOP_BOUND_S * self.scenario.node.patience)
        self._link.shut()
        watch.cancel()
        return Flown(
            start_host_ns=start_host_ns,
            wall_s=wall_s,
            flown_s=flown_s,
            interrupted=interrupted,
            stopped_how=stopped_how,
            samples=[s for s in self._spacecraft.samples if s.t_s <= flown_s],
            strikes=self._injector.strikes,
            commits=self._injector.commits,
            worker_deaths=self._injector.worker_deaths,
            watch_end_ns=time.time_ns(),
            not_injected=self._injector.not_injected,
            node_restarts=self._node.restarts,
            orphans_killed=self._node.orphans_killed,
            process_faults=self._process_faults,
            happenings=self._happenings,
            ground_garbage=self._ground.counts.garbage + self._spacecraft.garbage,
        )

    async def _hold(self) -> bool:
        """Wait until the worker computes; return False when the flight was stopped before."""
        self._enter("loading the model")
        deadline = time.monotonic() + READY_BOUND_S * self.scenario.node.patience
        while not self._stop.is_set():
            found = await asyncio.to_thread(newest_packet, self.run_dir.database, Housekeeping)
            if found is not None and found[1].worker_state == RUNNING and found[1].clock_locked:
                return True
            gave_up = found is not None and found[1].mode is Mode.SAFE
            if gave_up or time.monotonic() > deadline:
                logs = "\n".join(
                    f"the end of {path}:\n{log_tail(path)}"
                    for path in (self.run_dir.node_log, self.run_dir.worker_log)
                )
                raise PenumbraError(
                    f"the worker does not come up; {logs}",
                    "mend what the logs name; `penumbra model verify` checks the image",
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), POLL_S)
        return False

    async def _cruise(self) -> None:
        self._enter("flying")
        self._happen("flight.begin", f"flight begins, x{self._clock.speed:g}")
        while not self._stop.is_set() and self._clock.elapsed_s < self.scenario.duration_s:
            await self._follow_contact()
            left_s = (self.scenario.duration_s - self._clock.elapsed_s) / self._clock.speed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), min(max(left_s, 0.0), POLL_S / 2))

    async def _follow_contact(self) -> None:
        now_s = self._clock.elapsed_s
        self._link.faults = faults_at(self.scenario.link_faults, now_s)
        contact = next((c for c in self.contacts if c.start_s <= now_s < c.end_s), None)
        if contact is not None and not self._ground.in_contact:
            await self._link.open()
            self._ground.in_contact = True
            jobs = self.scenario.jobs
            count = jobs.per_contact if self._contacts_begun else jobs.first_contact
            self._contacts_begun += 1
            batch = [self._jobs.popleft() for _ in range(min(count, len(self._jobs)))]
            now_ns = self._clock.now_ns
            self._ground.uplink.queue([job.command(now_ns) for job in batch])
            text = f"contact with {contact.name} begins, {len(batch)} jobs to send"
            self._happen("contact.begin", text, source="ground")
        elif contact is None and self._ground.in_contact:
            self._ground.in_contact = False
            self._link.shut()
            self._happen("contact.end", "contact ends, the link is cut", source="ground")
        self.live.in_contact = self._ground.in_contact
        self.live.station = contact.name if contact is not None else ""

    async def _strike_processes(self) -> None:
        """Let the scenario's process faults happen in their time; one that finds no process waits for it."""
        coming = deque(sorted(self.scenario.faults, key=lambda f: f.at_s))
        while coming:
            if self._clock.elapsed_s >= coming[0].at_s and self._cause(coming[0]):
                coming.popleft()
            await asyncio.sleep(POLL_S / 2)

    def _cause(self, fault: ProcessFault) -> bool:
        causes = {
            FaultKind.KILL_NODE: (self._node.kill_node, "SIGKILL to the node"),
            FaultKind.KILL_WORKER: (self._node.kill_worker, "SIGKILL to the worker"),
            FaultKind.STOP_WORKER: (self._node.stop_worker, "SIGSTOP to the worker"),
        }
        cause, text = causes[fault.kind]
        if not cause():
            return False
        self._process_faults.append(self._happen(fault.kind.value, text, severity=3))
        return True

    async def _settle(self) -> None:
        """Wait until a proof must have seen every strike: two epochs committed, or two checks while idle."""
        since_ns, since_s = time.time_ns(), time.monotonic()
        patience = self.scenario.node.patience
        while not self._stop.is_set() and time.monotonic() - since_s < SETTLE_BOUND_S * patience:
            await self._follow_contact()
            waited_s = time.monotonic() - since_s
            if self._injector.epochs_since(since_ns) >= 2 or (
                self._injector.idle and waited_s > IDLE_CHECKS_S
            ):
                return
            await asyncio.sleep(POLL_S)

    async def _drain(self) -> None:
        """Let a contact that is under way take down what is waiting."""
        deadline = time.monotonic() + DRAIN_BOUND_S
        while self._ground.in_contact and not self._stop.is_set() and time.monotonic() < deadline:
            await self._follow_contact()
            await asyncio.sleep(POLL_S)

    def _enter(self, phase: str) -> None:
        self.live.phase = phase
        _log.info("phase: %s", phase)

    def _on_process_event(self, name: str, text: str) -> None:
        self._happen(name, text, severity=1 if name == "node.started" else 2)

    def _on_state(self, state: PlantState) -> None:
        self.live.soc = state.eps.battery_soc
        self.live.battery_w = state.eps.battery_a * state.eps.battery_v
        self.live.load_w = state.payload_w
        self.live.board_c = state.thermal.board_c

    def _happen(self, name: str, text: str, *, source: str = "bench", severity: int = 1) -> Happening:
        happened = Happening(
            t_s=max(0.0, self._clock.elapsed_s), source=source, name=name, text=text, severity=severity
        )
        self._happenings.append(happened)
        self.live.t_s = happened.t_s
        self.live.note(text, severity)
        _log.info("%s: %s", name, text)
        return happened


def draw(scenario: Scenario) -> list[fault_list.Fault]:
    """Draw the bit flips of a scenario."""
    radiation = scenario.radiation
    seed = scenario.scenario.seed if radiation.seed is None else radiation.seed
    return fault_list.draw_faults(
        seed,
        rate_hz=radiation.upsets_per_orbit / scenario.period_s,
        duration_s=scenario.duration_s,
        kv_share=radiation.kv_share,
    )


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what to tell the user: a `PenumbraError` if there is one, else the first failure."""
    known, others = failures.split(PenumbraError)
    group = known or others or failures
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
