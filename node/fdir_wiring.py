"""The parts of the FDIR, wired to the components of the node: who finds, who samples, who carries out."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fdir import sensors
from fdir.boot import BootDecision
from fdir.guarded import Superseded
from fdir.table import ACTS_IN_WORKER, Action, RowState, Table, decode_table, load_table
from node import state
from node.bus_view import BusView
from node.clock import MissionClock
from node.command_effects import CommandFailed
from node.config import NodeConfig
from node.fdir_acts import Acts, Orders
from node.fdir_items import ItemSources, Value, sample
from node.fdir_service import FdirService
from node.findings import Finding
from node.health_service import HealthService
from node.image_slots import ImageSlots
from node.latchup_service import LatchupService
from node.power_service import PowerService
from node.pulse import Pulse
from node.recorder import Recorder
from node.scrubber import SUPERVISOR_CODE, WORKER_CODE, Scrubber
from node.state import BootState
from node.worker_service import WorkerService
from telemetry import commands
from telemetry.authenticator import Authenticator
from telemetry.commands import Arguments
from telemetry.database import Database
from telemetry.dictionary.codes import FailureCode
from telemetry.errors import PenumbraError
from telemetry.link import Link
from telemetry.packets import Mode, Severity
from telemetry.spool import Spool

CONFIG_REGION = "config"
TABLE_REGION = "fdir.table"
RESTORE_S = 5.0
"""Longest wait of the scrub for the event loop to take a table, s (assumed: above `loop.lag`'s limit)."""
REGIONS = (SUPERVISOR_CODE, WORKER_CODE, CONFIG_REGION, TABLE_REGION)
"""Regions of memory that `scrub_now` takes."""


def load_configured(config: NodeConfig) -> Table:
    """Return the FDIR table that the configuration names. Raises as `load_table`."""
    return load_table(Path(config.fdir.table) if config.fdir.table else None)


@dataclass(frozen=True)
class Parts:
    """Components that find, are sampled, or are asked."""

    worker: WorkerService
    slots: ImageSlots
    power: PowerService
    view: BusView
    clock: MissionClock
    authenticator: Authenticator
    spool: Spool
    repairs: Mapping[str, Callable[[], int]]
    """Struck copies of values held in triplicate that were written anew, by what they are of."""
    store: Callable[[], tuple[int, float] | None]
    """Returns the jobs queued and the filled share of the spool, as of the last housekeeping."""


class Fdir:
    """All of the node's FDIR.

    Parameters
    ----------
    config, table, boot, decision
        Configuration, FDIR table, what was persisted, and what the boot manager made of it.
    parts
        Components of the node.
    pulses
        Ends of the health pings of its tasks.
    database, recorder, link
        Store, reports, and the link of the bus.
    orders
        What only the node can do.

    Raises
    ------
    PenumbraError
        A watchdog or the profile of the board that the configuration names cannot be used.
    """

    def __init__(
        self,
        config: NodeConfig,
        table: Table,
        boot: BootState,
        decision: BootDecision,
        *,
        parts: Parts,
        pulses: Sequence[Pulse],
        database: Database,
        recorder: Recorder,
        link: Link,
        orders: Orders,
    ) -> None:
        self._boot = boot
        self._decision = decision
        self._parts = parts
        self._database = database
        self._recorder = recorder
        self._damage_told = False
        self._config = config
        self._table_bytes = table.encode()
        """Of the table that is meant to be in force."""
        self._loaded: Table | None = None
        """A table that a command has loaded, on its way into force."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._repairs = dict.fromkeys(parts.repairs, 0)
        self._lag_s = 0.0
        self._still: frozenset[str] = frozenset()
        """Sensors of the board that stand still, as reported."""
        settings, worker = config.fdir, parts.worker
        acts = Acts(
            config, parts.slots, worker=worker, recorder=recorder, database=database, link=link,
            orders=Orders(orders.enter_safe, self._restart_node, lambda: self.service.resets),
        )  # fmt: skip
        self._end_node = orders.restart
        self.service = FdirService(
            table,
            boot,
            database=database,
            recorder=recorder,
            max_resets=settings.max_resets,
            sample_s=settings.sample_s,
            sample=self._sample,
            acts=acts,
            safe=boot.safe,
        )
        self.health = HealthService.open(
            settings, config.watchdog, [*pulses, self.service.pulse], recorder, self._task_lost
        )
        self.scrubber = Scrubber(
            config.state_dir / "code.manifest",
            on_damage=self._damaged,
            on_note=lambda text: recorder.event(Severity.INFO, "scrub.note", text),
            budget_s=settings.scrub_budget_s,
            period_s=settings.scrub_period_s,
        )
        self.tables: dict[str, Callable[[], bytes]] = {
            CONFIG_REGION: lambda: msgspec.msgpack.encode(config, order="deterministic"),
            TABLE_REGION: lambda: self.service.table.encode(),  # noqa: PLW0108 - of the one in force
        }
        """What encodes the tables in use, by name of their region."""
        self.scrubber.protect(CONFIG_REGION, self.tables[CONFIG_REGION])
        self.scrubber.protect(TABLE_REGION, self.tables[TABLE_REGION], self._restore_table)
        self.latchup = LatchupService(
            Path(settings.latchup_profile) if settings.latchup_profile else None,
            worker_pid=lambda: worker.pid,
            find=self.service.find,
            recorder=recorder,
            on_quiet=parts.power.rest,
        )
        parts.power.on_reading = self.latchup.take
        worker.on_finding = self.service.find
        worker.on_recovered = self.service.recovered
        worker.on_started = self.service.worker_started
        worker.on_machine = lambda event, actions: self.service.note("worker", event, list(actions))
        worker.mend(self.service.may_mend())
        self._sources = ItemSources(
            worker=worker,
            power=parts.power,
            view=parts.view,
            clock=parts.clock,
            health=self.health,
            scrubber=self.scrubber,
            authenticator=parts.authenticator,
            store=parts.store,
            residual_w=lambda: self.latchup.residual_w,
        )

    def take_lag_ms(self) -> float:
        """Return the longest lag of the event loop since the last call, ms."""
        lag_s, self._lag_s = self._lag_s, 0.0
        return 1e3 * lag_s

    def tasks(self) -> list[tuple[str, Coroutine[None, None, None]]]:
        """Return the tasks to run, with their names. To be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        return [
            ("node.fdir.run", self.service.run()),
            ("node.health.run", self.health.run()),
            ("node.scrubber.run", self.scrubber.run()),
        ]

    def report_boot(self, refused: str = "") -> None:
        """Tell what the boot found. Before the mode is restored: it may ask for safe mode.

        Parameters
        ----------
        refused
            Why the file of the FDIR table was refused, and the one before is in force; empty if it was not.
        """
        boot = self._boot
        if refused:
            text = f"the FDIR table of the boot before stays in force: {refused}"
            self._recorder.event(Severity.HIGH, "fdir.table_refused", text[:500])
        for name in boot.repaired:
            reason = f"a copy of {name} was struck, outvoted and written anew"
            self.service.find(Finding("memory.state", reason, {"value": name}))
        for name in boot.lost:
            text = f"{name} was struck beyond a vote and has its default"
            self._recorder.event(Severity.HIGH, "state.lost", text, {"value": name})
        if self._decision.entered_safe:
            reason = f"{self._decision.unintended} unintended reboots in a row"
            self.service.find(Finding("boot.unintended", reason, {"unintended": self._decision.unintended}))

    def worker_ready(self) -> None:
        """Take that a worker is ready: what was wrong with the one before is over."""
        self.scrubber.watch_worker(self._parts.worker.pid)
        self.service.recovered_all(Action.RESTART_WORKER)

    def worker_gone(self) -> None:
        """Take that the worker is gone."""
        self.scrubber.watch_worker(None)

    def set_mode(self, mode: Mode) -> None:
        """Take the mode of the node."""
        self.service.set_mode(mode)

    def check(self, connection: sqlite3.Connection, arguments: Arguments) -> None:
        """Check a telecommand against the table, in its transaction; called from the thread of the database.

        Raises
        ------
        CommandFailed
            There is no such row or region, the row cannot be in that state, or a table is refused.
        """
        match arguments:
            case commands.SetFdirRow(row=row) | commands.RearmFdir(row=row) if row != "*":
                if row not in self.service.table:
                    raise CommandFailed(FailureCode.UNKNOWN_ROW, f"no row {row!r} in the FDIR table")
        match arguments:
            case commands.SetFdirRow(row=row, state="passive") if row in ACTS_IN_WORKER:
                raise CommandFailed(
                    FailureCode.NOT_PASSIVE,
                    f"{row} acts inside the worker before it reports: enable or disable it",
                )
            case commands.ScrubNow(region=region) | commands.RecomputeBaseline(region=region) if (
                region not in REGIONS
            ):
                known = ", ".join(REGIONS)
                raise CommandFailed(FailureCode.UNKNOWN_REGION, f"no region {region!r}; there are {known}")
            case commands.LoadFdir(source=source):
                self._load(connection, state.TableSource(source))
            case _:
                pass

    def execute(self, arguments: Arguments) -> None:
        """Carry out what of a telecommand follows its commit."""
        match arguments:
            case commands.SetFdirRow(row=row, state=state):
                self.service.set_row(None if row == "*" else row, RowState(state))
                self._parts.worker.mend(self.service.may_mend())
            case commands.RearmFdir(row=row):
                self.service.rearm(None if row == "*" else row)
            case commands.ExternalControl(on=on):
                self.service.set_external_control(on)
            case commands.ResetCounters():
                self.service.reset_counters()
            case commands.LoadFdir():
                self._use_loaded()
            case commands.QueryFdir(recorder=recorder):
                self._recorder.post(self.service.status())
                if recorder:
                    self._recorder.post(self.service.dump("asked for by command", None))
            case commands.ScrubNow(region=region):
                self._scrub(region)
            case commands.RecomputeBaseline(region=region):
                self._recompute(region)
            case commands.RestartWorker():
                self._parts.worker.restart("command", "asked for by command")
            case _:
                pass

    def stopping(self) -> None:
        """Tell that an ordered stop has begun."""
        self.health.stopping()

    async def close(self, *, ordered: bool) -> None:
        """Let go of the watchdogs; disarmed only after an ordered stop."""
        await self.health.close(ordered=ordered)

    def _load(self, connection: sqlite3.Connection, source: state.TableSource) -> None:
        """Read a table that a command puts in force, and keep it. Raises `CommandFailed`."""
        try:
            if source is state.TableSource.CONFIGURED:
                self._loaded = load_configured(self._config)
            else:
                encoded = state.other_table(connection, source)
                if not encoded:
                    raise CommandFailed(FailureCode.NO_TABLE, f"there is no {source} table on board")
                self._loaded = decode_table(encoded)
        except PenumbraError as error:
            raise CommandFailed(FailureCode.TABLE_REFUSED, error.what) from None
        state.change_table(connection, self._loaded.encode(), source)

    def _use_loaded(self) -> None:
        table, self._loaded = self._loaded, None
        if table is None:
            return
        self._table_bytes = table.encode()
        self.service.use(table)
        self._parts.worker.mend(self.service.may_mend())
        text = f"FDIR table {table.sha256[:16]} of {len(table.rows)} rows is in force"
        self._recorder.event(Severity.MEDIUM, "fdir.table_loaded", text, {"sha256": table.sha256})

    def _restore_table(self, sound: bytes) -> None:
        """Put the table in force again from sound bytes; called from the scrub's thread."""
        if self._loop is None:
            raise RuntimeError("the FDIR does not run")

        async def restore() -> None:
            if sound != self._table_bytes:
                raise Superseded
            self.service.use(decode_table(sound))

        asyncio.run_coroutine_threadsafe(restore(), self._loop).result(RESTORE_S)

    def _scrub(self, region: str) -> None:
        try:
            self.scrubber.scrub_now(region)
        except PenumbraError as error:
            self._recorder.event(Severity.LOW, "scrub.refused", error.what, {"region": region})

    def _recompute(self, region: str) -> None:
        try:
            self.scrubber.recompute(region)
        except PenumbraError as error:
            self._recorder.event(Severity.LOW, "scrub.refused", error.what, {"region": region})
        else:
            text = f"what {region} holds counts as sound from now on"
            self._recorder.event(Severity.MEDIUM, "scrub.recomputed", text, {"region": region})

    def _restart_node(self, reason: str) -> None:
        self.health.request_restart(reason)
        self._end_node(reason)

    def _task_lost(self, task: str, reason: str) -> None:
        self.service.find(Finding("task.ping", f"task {task}: {reason}", {"task": task}))

    def _damaged(
        self, region: str, row: str, evidence: dict[str, str | int | float | bool | None], repaired: bool
    ) -> None:
        reason = f"{region} damaged"
        if not repaired and region == WORKER_CODE:
            # A new worker has its code mapped afresh; no restart of the node is needed.
            self.service.find(Finding("memory.segments", f"{reason}: the worker is replaced", evidence))
            self._parts.worker.restart("memory.segments", reason)
            return
        failed = "" if repaired else f"{region} could not be mended"
        self.service.find(Finding(row, reason, evidence, failed=failed))

    def _sample(self) -> dict[str, Value]:
        """Return the items' values, and pass on what components have found since the last time."""
        view = self._parts.view
        view.load_w = self._parts.power.reading.power_w
        view.tick(time.monotonic())
        for found in view.take_findings():
            self._take_sensor(found)
        self._take_still(frozenset(self._parts.power.reading.still))
        for fault in self._parts.spool.take_faults():
            evidence = {"kind": fault.kind.value, "records": fault.records}
            self.service.find(Finding("spool.record", fault.text, {**evidence}))
        for name, count in self._parts.repairs.items():
            if (repairs := count()) > self._repairs[name]:
                reason = f"a copy of {name} in memory was struck, outvoted and written anew"
                self.service.find(Finding("memory.state", reason, {"value": name}))
                self._repairs[name] = repairs
        if self._database.damage is not None and not self._damage_told:
            self._damage_told = True
            self.service.find(Finding("node.restart", f"the database is damaged: {self._database.damage}"))
        values = sample(self._sources)
        self._lag_s = max(self._lag_s, float(values["node.loop_lag_s"] or 0.0))
        return values

    def _take_still(self, still: frozenset[str]) -> None:
        for name in sorted(still - self._still):
            reason = f"{name} stands still: its value is unknown"
            self.service.find(Finding("board.sensor", reason, {"sensor": name}))
        for name in sorted(self._still - still):
            text = f"{name} no longer stands still"
            self._recorder.event(Severity.INFO, "board.sensor_restored", text, {"sensor": name})
        self._still = still

    def _take_sensor(self, found: sensors.SensorAction) -> None:
        match found:
            case sensors.Rejected(channel, sensor_set, why, evidence):
                reason = f"{channel} of sensor set {sensor_set} is {why.value}"
                told = {"channel": channel, "set": sensor_set, "why": why.value, **evidence}
                self.service.find(Finding("sensor.reject", reason, told))
            case sensors.Restored(channel, sensor_set):
                text = f"{channel} of sensor set {sensor_set} is used again"
                self._recorder.event(Severity.INFO, "sensor.restored", text, {"channel": channel})
            case sensors.Lost(channel):
                text = f"no sensor of {channel} is usable: it is bridged"
                self._recorder.event(Severity.MEDIUM, "sensor.lost", text, {"channel": channel})
            case sensors.Regained(channel):
                text = f"{channel} is measured again"
                self._recorder.event(Severity.INFO, "sensor.regained", text, {"channel": channel})
