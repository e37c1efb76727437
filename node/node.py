"""One boot of the node: the components, wired, run together, and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import platform
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdir.boot import BootDecision, BootMode
from fdir.table import Table
from node import clock as mission_clock
from node import clock_events, contacts, modes, state
from node.boards import Board
from node.bus_view import BusView
from node.commanding import Commanding
from node.config import NodeConfig, tls_files
from node.downlink import Downlink, DownlinkWindow
from node.fdir_acts import Orders
from node.fdir_wiring import Fdir, Parts
from node.housekeeping import HousekeepingService, Sources
from node.inference.manifest import image_id, load_manifest
from node.intake import Intake
from node.job_runner import JobRunner
from node.jobs import JobQueue
from node.power_service import PowerService
from node.pulse import Pulse
from node.recorder import Recorder
from node.schedule import Schedule
from node.transfer_wiring import TransferParts
from node.worker_service import WorkerService
from telemetry import commands
from telemetry.ack import Ack
from telemetry.authenticator import Authenticator
from telemetry.bus import BusMessage, BusTime
from telemetry.commands import Arguments
from telemetry.database import Database, StoreFull
from telemetry.errors import PenumbraError
from telemetry.keys import KeyRing
from telemetry.link import MqttLink
from telemetry.packets import BootReport, Event, FlightRecord, Mode, Severity
from telemetry.spool import Spool

_log = logging.getLogger(__name__)

FLUSH_S = 2.0
"""Bound on the final write, s."""
CANCEL_S = 2.0
"""Bound on ending the tasks and closing the links, s."""
CLOCK_TICK_S = 0.25
"""How often the silence of the bus clock is looked at, s."""


@dataclass(frozen=True)
class Identity:
    """Facts of this boot."""

    config: NodeConfig
    boot: state.BootState
    """As found, before the boot manager's decision."""
    decision: BootDecision
    table: Table
    table_refused: str
    """Why the configured table was refused, and the one of the boot before is used; empty if it was not."""
    recovered_from: Path | None


class Node:
    """One boot of the node: all components, wired.

    Parameters
    ----------
    identity
        Configuration and what the boot found.
    database
        Open; closed by the caller.
    spool, jobs, authenticator, schedule
        Their tables exist, the authenticator is loaded.
    ring
        Keys of the ground.
    board
        Driver of this board.
    command
        Worker command line, see `runtime.worker_command`.
    on_overrun
        Called when tasks do not end although cancelled: the process is then to be ended.
    on_restart
        Called with a reason when the node is to end in order, and to be started again.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        database: Database,
        spool: Spool,
        jobs: JobQueue,
        authenticator: Authenticator,
        schedule: Schedule,
        ring: KeyRing,
        board: Board,
        command: Sequence[str],
        on_overrun: Callable[[], None],
        on_restart: Callable[[str], None],
    ) -> None:
        config, name = identity.config, identity.config.node.name
        self._identity = identity
        self._on_overrun = on_overrun
        self._database = database
        self._spool = spool
        self._jobs = jobs
        self._clock = mission_clock.MissionClock(time.time_ns(), time.monotonic_ns())
        self._modes = modes.ModeMachine()
        self._view = BusView()
        self.recorder = Recorder(database, spool, lambda: self._clock.now_ns(time.monotonic_ns()))
        self._worker = WorkerService(
            config,
            command=command,
            restarts_s=identity.boot.restarts_s,
            recorder=self.recorder,
            database=database,
            board=board,
        )
        self._runner = JobRunner(
            database,
            jobs,
            self.recorder,
            batch=lambda: self._power.point.batch,
            least_priority=lambda: self._power.planning.least_priority,
            mission_ns=self._acting_ns,
            send=self._worker.send,
            on_fault=self._worker.report_fault,
        )
        self._worker.on_ready = self._on_worker_ready
        self._worker.on_gone = self._on_worker_gone
        self._worker.on_job_message = self._runner.offer
        self._transfers = TransferParts(
            config,
            identity.boot.boot,
            identity.decision.slot,
            ring=ring,
            worker=self._worker,
            runner=self._runner,
            database=database,
            spool=spool,
            recorder=self.recorder,
            tables=lambda: self._fdir.tables,
            reporter=lambda: self._commanding,
        )
        self._commanding = Commanding(
            database=database,
            spool=spool,
            jobs=jobs,
            authenticator=authenticator,
            recorder=self.recorder,
            on_executed=self._on_executed,
            schedule=schedule,
            mission_ns=self._mission_ns,
            acting_ns=self._acting_ns,
            check=lambda connection, arguments: self._fdir.check(connection, arguments),  # noqa: PLW0108 - made later
            take_other=self._transfers.commands.take,
            on_begun=self._transfers.long_commands.begin,
        )
        self._intake = Intake(
            name,
            ring,
            self.recorder,
            on_command=self._commanding.offer,
            on_upload=self._transfers.uploads.offer,
            on_ack=self._on_ack,
            on_flow=lambda flow: self._downlink.on_flow(flow),  # noqa: PLW0108 - made later
            on_bus=self._on_bus,
            on_retained=self._on_retained,
        )
        take = self._intake.on_message
        self._bus_link = MqttLink(
            config.bus.url,
            f"penumbra-{name}-bus",
            self._intake.bus_topics,
            take,
            tls=tls_files(config.bus),
            on_retained=self._intake.on_retained,
        )
        self._space_link = MqttLink(
            config.link.url,
            f"penumbra-{name}-link",
            self._intake.link_topics,
            take,
            tls=tls_files(config.link),
        )
        window = DownlinkWindow(config.link.max_unacked, config.telemetry.retransmit_s)
        self._downlink = Downlink(
            name, database, spool, self._space_link, window, batch_bytes=config.link.batch_bytes
        )
        self._power = PowerService(
            config,
            board=board,
            view=self._view,
            clock=self._clock,
            link=self._bus_link,
            recorder=self.recorder,
            send=self._worker.send,
            busy=lambda: bool(self._runner.running),
            blocked=lambda: self._runner.blocked,
            redundant=lambda: self._modes.mode in config.worker.redundant_modes,
            on_batch=self._runner.look,
            tasks=lambda: () if self._modes.mode is Mode.SAFE else self._runner.tasks,
            tokens_s=lambda: self._worker.counters.tokens_s,
            on_sunlit=lambda fraction: self._change_mode(modes.Sunlight(fraction)),
            cap_w=identity.boot.cap_w,
        )
        self._housekeeping = HousekeepingService(
            config.telemetry,
            database=database,
            spool=spool,
            jobs=jobs,
            recorder=self.recorder,
            sources=lambda: sources,
            rates=identity.boot.rates,
        )
        self._mode_actions: asyncio.Queue[modes.ModeAction | None] = asyncio.Queue()
        self._mode_pulse = Pulse("modes", lambda: self._mode_actions.put_nowait(None))
        services = (
            *(self.recorder, self._worker, self._runner, self._commanding),
            *(self._power, self._housekeeping, self._downlink),
        )
        self._fdir = Fdir(
            config,
            identity.table,
            identity.boot,
            identity.decision,
            parts=Parts(
                worker=self._worker,
                slots=self._transfers.slots,
                power=self._power,
                view=self._view,
                clock=self._clock,
                authenticator=authenticator,
                spool=spool,
                repairs={"key": lambda: ring.repairs, "mode": lambda: self._modes.repairs},
                store=lambda: self._housekeeping.store,
            ),
            pulses=[
                self._mode_pulse,
                *(service.pulse for service in services),
                *self._transfers.pulses,
            ],
            database=database,
            recorder=self.recorder,
            link=self._bus_link,
            orders=Orders(self._enter_safe, on_restart, lambda: self._fdir.service.resets),
        )
        sources = Sources(
            clock=self._clock,
            modes=self._modes,
            view=self._view,
            power=self._power,
            worker=self._worker,
            runner=self._runner,
            intake=self._intake,
            authenticator=authenticator,
            commanding=self._commanding,
            link=self._space_link,
            fdir=self._fdir,
            boot=identity.boot,
        )

    def flight_record(self, reason: str) -> FlightRecord:
        """Return the last stimuli and actions of the FDIR, for a crash."""
        return self._fdir.service.dump(reason, None)

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set, then stop in order.

        Stages of the stop, each bounded: intake closed (at once), worker stopped
        (``stop_timeout_s + REAP_S``), final write (`FLUSH_S`), tasks ended and links closed (`CANCEL_S`).
        With the default ``stop_timeout_s`` of 3 s that is 9 s at worst.
        """
        await self._report_boot()
        async with asyncio.TaskGroup() as group:
            services = [
                group.create_task(coroutine, name=name)
                for name, coroutine in (
                    ("node.recorder.write", self.recorder.run()),
                    ("node.modes.act", self._act_on_modes()),
                    ("node.clock.watch", self._watch_clock()),
                    ("node.worker.run", self._worker.run()),
                    ("node.jobs.run", self._runner.run()),
                    ("node.commanding.run", self._commanding.run()),
                    ("node.power.run", self._power.run()),
                    ("node.housekeeping.run", self._housekeeping.run()),
                    ("node.downlink.run", self._downlink.run()),
                    ("node.link.bus", self._bus_link.run()),
                    ("node.link.space", self._space_link.run()),
                    ("node.boot.settle", self._settle()),
                    *self._transfers.tasks(),
                    *self._fdir.tasks(),
                )
            ]
            ordered = False
            try:
                self._fdir.report_boot(self._identity.table_refused)
                if not self._identity.decision.entered_safe:
                    self._change_mode(modes.Restored(self._identity.decision.mode is BootMode.SAFE))
                await stop.wait()
                await self._shut_down()
                ordered = True
            finally:
                await self._fdir.close(ordered=ordered)
                # Also after a defect, when the group has cancelled them already.
                await self._end(services)

    async def _shut_down(self) -> None:
        self.recorder.event(Severity.INFO, "node.stopping", "ordered stop")
        self._fdir.stopping()
        self._intake.close()
        await self._worker.stop()
        try:
            async with asyncio.timeout(FLUSH_S):
                await self.recorder.flush()
                await self._housekeeping.sample()
                await self._housekeeping.account()
                await self._database.run(state.end_boot)
        except (TimeoutError, StoreFull, sqlite3.Error) as error:
            _log.error("final write not complete: %s", error or "timeout")

    async def _end(self, services: list[asyncio.Task[None]]) -> None:
        """Cancel the services until they are gone; give up after `CANCEL_S`.

        Once is not enough: Python 3.11's `asyncio.wait_for`, which aiomqtt connects with, loses a cancel that
        comes together with its result.
        """
        deadline_s = time.monotonic() + CANCEL_S
        left = {service for service in services if not service.done()}
        while left and time.monotonic() < deadline_s:
            for service in left:
                service.cancel()
            _, left = await asyncio.wait(left, timeout=CANCEL_S / 4)
        if left:
            self._on_overrun()

    async def _report_boot(self) -> None:
        config, boot, decision = self._identity.config, self._identity.boot, self._identity.decision
        image_dir = config.image_dir if decision.slot is None else config.slot_dir(decision.slot)
        active = await self._database.run(self._jobs.active)
        image: str | None = None
        trouble: list[Event] = []
        try:
            image = image_id(await asyncio.to_thread(load_manifest, image_dir))
        except PenumbraError as error:
            trouble.append(Event(severity=Severity.HIGH, name="image.unreadable", text=error.what))
        if self._identity.recovered_from is not None:
            text = f"the database was corrupt and lost; it lies at {self._identity.recovered_from}"
            trouble.append(Event(severity=Severity.HIGH, name="database.lost", text=text))
        report = BootReport(
            software=_version("penumbra-node") or "unknown",
            boot=boot.boot,
            clean_shutdown=boot.clean_shutdown,
            config_sha256=config.sha256,
            image_id=image,
            board=config.board.kind,
            python=platform.python_version(),
            onnxruntime=_version("onnxruntime"),
            resumed_job=active[0] if active else None,
            resumed_jobs=active,
            mode=Mode.SAFE if decision.mode is BootMode.SAFE else Mode.NOMINAL,
            slot=decision.slot,
            reasons=list(decision.reasons),
            unintended_reboots=decision.unintended,
            resets=boot.resets,
            repaired_state=list(boot.repaired),
            fdir_sha256=self._identity.table.sha256,
        )
        _log.info("boot %d, state %s, image %s", boot.boot, config.state_dir, image)
        for packet in (report, *trouble):
            self.recorder.post(packet)

    def _mission_ns(self) -> int | None:
        """Return mission time for what commands ask for; None before the bus has given it."""
        return self.recorder.now_ns() if self._clock.known else None

    def _acting_ns(self) -> int | None:
        """Return mission time for what cannot be undone: deadlines of jobs, and the schedule.

        A job that is ended too early is lost work: none is on the host's idea of the time, nor while the bus
        gives another time than the clock.
        """
        return None if self._clock.holding else self._mission_ns()

    def _on_ack(self, ack: Ack) -> None:
        self._downlink.on_ack(ack)

    def _on_bus(self, message: BusMessage) -> None:
        if isinstance(message, BusTime):
            self._steer_clock(message)
        else:
            self._view.handle(message, time.monotonic())
            self._look_for_contact()

    def _on_retained(self, message: BusMessage) -> str | None:
        return self._view.handle_retained(message, time.monotonic(), self._mission_ns(), self._clock.rate)

    def _steer_clock(self, event: BusTime | mission_clock.Tick) -> None:
        for action in self._clock.handle(event, time.monotonic_ns()):
            self.recorder.event(*clock_events.describe(action))
            if isinstance(action, mission_clock.ClockStepped):
                self._commanding.follow_step(round(action.error_s * 1e9))

    def _look_for_contact(self) -> None:
        view, now_ns = self._view, self.recorder.now_ns()
        self._space_link.expect(
            contacts.is_expected(view.contact, view.contact_heard_s, now_ns, time.monotonic())
        )

    async def _watch_clock(self) -> None:
        while True:
            await asyncio.sleep(CLOCK_TICK_S)
            self._steer_clock(mission_clock.Tick())
            self._look_for_contact()

    def _enter_safe(self, reason: str) -> None:
        self._change_mode(modes.FdirSafe(reason))

    def _on_worker_ready(self) -> None:
        self._runner.worker_ready()
        self._fdir.worker_ready()

    def _on_worker_gone(self) -> None:
        self._runner.worker_gone()
        self._fdir.worker_gone()

    async def _settle(self) -> None:
        """Note that the boot is good, once it has served long enough."""
        await asyncio.sleep(self._identity.config.fdir.stable_s)
        with contextlib.suppress(StoreFull, sqlite3.Error):
            await self._database.run(state.note_good_boot)

    def _on_executed(self, arguments: Arguments) -> None:
        """Carry out what of a command is not durable, after its commit."""
        match arguments:
            case commands.Infer() | commands.Cancel():
                self._runner.look()
            case commands.SetMode(mode=mode):
                self._change_mode(modes.Command(Mode(mode)))
            case commands.SetPowerCap(power_w=power_w):
                self._power.cap_w = power_w
            case commands.ReportLedger():
                self._housekeeping.report_ledger()
            case commands.SetRates(housekeeping_s=housekeeping_s, ledger_s=ledger_s):
                self._housekeeping.set_rates(state.Rates(housekeeping_s, ledger_s))
            case _:
                self._transfers.commands.executed(arguments)
                self._fdir.execute(arguments)

    def _change_mode(self, event: modes.ModeEvent) -> None:
        for action in self._modes.handle(event, self.recorder.now_ns()):
            self._mode_actions.put_nowait(action)
        self._fdir.set_mode(self._modes.mode)

    async def _act_on_modes(self) -> None:
        while True:
            action = await self._mode_actions.get()
            self._mode_pulse.beat()
            match action:
                case modes.PersistSafe(safe):
                    await self._persist_safe(safe)
                case modes.AllowInference(rearm):
                    self._worker.allow(rearm=rearm)
                case modes.ForbidInference():
                    self._worker.forbid()
                case modes.Announce(before, after, trigger, reason):
                    severity = Severity.HIGH if after is Mode.SAFE else Severity.INFO
                    text = f"mode {before} to {after}: {reason}"
                    evidence = {"before": before.value, "after": after.value, "trigger": trigger.value}
                    self.recorder.event(severity, "mode.changed", text, {**evidence})

    async def _persist_safe(self, safe: bool) -> None:
        try:
            await self._database.run(lambda c: state.set_safe(c, safe))
        except (StoreFull, sqlite3.Error) as error:
            _log.error("safe mode not persisted: %s", error)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
