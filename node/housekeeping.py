"""Periodic telemetry: housekeeping, ledger and security report."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from node.bus_view import BusView
from node.clock import MissionClock
from node.commanding import Commanding
from node.config import TelemetrySection
from node.fdir_wiring import Fdir
from node.intake import Intake
from node.job_runner import JobRunner
from node.jobs import JobQueue
from node.modes import ModeMachine
from node.power_service import PowerService
from node.pulse import Pulse
from node.recorder import Recorder
from node.state import BootState, Rates
from node.worker_service import WorkerService
from telemetry.authenticator import Authenticator
from telemetry.database import Database, DiskState, StoreFull
from telemetry.dictionary.codes import DropCode
from telemetry.frame import FrameError
from telemetry.link import Link
from telemetry.packets import Housekeeping, Ledger, Severity
from telemetry.spool import Spool

_log = logging.getLogger(__name__)

BEAT_S = 0.5
"""Longest time between two answers to health pings, s (assumed: a fraction of their limits)."""
_DISK_EVENTS = {
    DiskState.ROOM: (Severity.INFO, "the disk has room again: the database may grow, and has its reserve"),
    DiskState.FULL: (Severity.HIGH, "the disk is full: the database does not grow, and telemetry gives way"),
    DiskState.MEMORY: (
        Severity.HIGH,
        "the disk takes nothing: the database is in memory, and nothing new survives a restart",
    ),
}


@dataclass(frozen=True)
class Sources:
    """What housekeeping is sampled from."""

    clock: MissionClock
    modes: ModeMachine
    view: BusView
    power: PowerService
    worker: WorkerService
    runner: JobRunner
    intake: Intake
    authenticator: Authenticator
    commanding: Commanding
    link: Link
    fdir: Fdir
    boot: BootState


class HousekeepingService:
    """Samples the node and accounts for its telemetry.

    Parameters
    ----------
    settings
        Periods.
    database, spool, jobs
        The store.
    recorder
        For the packets.
    sources
        Returns what is sampled.
    rates
        Commanded periods.
    """

    def __init__(
        self,
        settings: TelemetrySection,
        *,
        database: Database,
        spool: Spool,
        jobs: JobQueue,
        recorder: Recorder,
        sources: Callable[[], Sources],
        rates: Rates,
    ) -> None:
        self.pulse = Pulse("housekeeping")
        """Health of the task that samples, which turns by itself."""
        self.store: tuple[int, float] | None = None
        """Jobs queued, and the filled share of the spool; None before the first sample."""
        self._settings = settings
        self._rates = rates
        self._database = database
        self._spool = spool
        self._jobs = jobs
        self._recorder = recorder
        self._get_sources = sources
        self._disk = DiskState.ROOM
        """What the disk had room for when it was looked at last."""
        self._ledger_wanted = asyncio.Event()
        self._started_s = time.monotonic()
        self._rate_since = (self._started_s, 0)

    async def run(self) -> None:
        """Sample and account until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sample_each_period(), name="node.housekeeping.sample")
            group.create_task(self._ledger_each_period(), name="node.housekeeping.ledger")

    def set_rates(self, rates: Rates) -> None:
        """Use other periods, from now on."""
        self._rates = rates
        self._ledger_wanted.set()

    def _housekeeping_s(self) -> float:
        commanded = self._rates.housekeeping_s
        return self._settings.housekeeping_period_s if commanded is None else commanded

    def _ledger_s(self) -> float:
        commanded = self._rates.ledger_s
        return self._settings.ledger_period_s if commanded is None else commanded

    def report_ledger(self) -> None:
        """Send ledger and security report now, out of turn."""
        self._ledger_wanted.set()

    async def account(self) -> None:
        """Append a security report, then a ledger that accounts for all but itself."""
        security = self._sources.authenticator.report()
        t_ns = self._recorder.now_ns()

        def append(connection: sqlite3.Connection) -> None:
            self._spool.append(connection, security, t_ns)
            self._spool.append(connection, Ledger(streams=self._spool.ledger(connection)), t_ns)

        await self._guard(lambda: self._database.run(append))

    async def sample(self) -> None:
        """Append one housekeeping packet."""

        async def take() -> None:
            self._look_at_disk()
            counts, size = await self._database.run(
                lambda c: (self._jobs.counts(c), self._spool.size(c)),
            )
            self.store = (counts[0], min(1.0, size[1] / self._settings.spool_max_bytes))
            packet, t_ns = self._packet(counts, size), self._recorder.now_ns()
            await self._database.run(lambda c: self._spool.append(c, packet, t_ns))

        await self._guard(take)

    def _look_at_disk(self) -> None:
        """Report what the disk has room for, where that has changed."""
        before, self._disk = self._disk, self._database.disk
        if self._disk is not before:
            severity, text = _DISK_EVENTS[self._disk]
            self._recorder.event(severity, f"disk.{self._disk}", text, {"before": before.value})

    async def _guard(self, write: Callable[[], Awaitable[None]]) -> None:
        try:
            await write()
        except (StoreFull, FrameError, sqlite3.Error) as error:
            self._recorder.refused += 1
            _log.error("periodic telemetry not stored: %s", error)

    async def _sample_each_period(self) -> None:
        next_s = time.monotonic()
        while True:
            await self.sample()
            # The period is looked at anew each time: another one may be commanded during a long one.
            since_s = next_s
            while (left_s := since_s + self._housekeeping_s() - time.monotonic()) > 0:
                self.pulse.beat()
                await asyncio.sleep(min(left_s, BEAT_S))
            # A slow disk makes it skip turns, not run behind for ever.
            next_s = max(since_s + self._housekeeping_s(), time.monotonic())
            self.pulse.beat()
            await asyncio.sleep(0)

    async def _ledger_each_period(self) -> None:
        while True:
            self._ledger_wanted.clear()
            await self.account()
            try:
                async with asyncio.timeout(self._ledger_s()):
                    await self._ledger_wanted.wait()
            except TimeoutError:
                continue

    def _packet(self, counts: tuple[int, int, int], size: tuple[int, int]) -> Housekeeping:
        now_s = time.monotonic()
        s = self._sources
        counters, power, eps = s.worker.counters, s.power, s.view.fresh_eps(now_s)
        umbra, setpoint = power.umbra, power.setpoint
        security = s.authenticator.report()
        dropped = {**s.intake.dropped, DropCode.QUEUE_FULL: s.commanding.dropped}
        return Housekeeping(
            mode=s.modes.mode,
            uptime_s=now_s - self._started_s,
            clock_locked=s.clock.locked,
            # The packet knows no "unknown" here; without a forecast the eclipse times are None too.
            sunlit=power.sunlit,
            eclipse_entry_ns=None if umbra is None else umbra.entry_ns,
            eclipse_exit_ns=None if umbra is None else umbra.exit_ns,
            battery_soc=None if eps is None else eps.battery_soc,
            array_w=None if eps is None else eps.array_w,
            load_w=power.reading.power_w,
            ceiling_w=0.0 if setpoint is None else setpoint.ceiling_w,
            duty=0.0 if setpoint is None else setpoint.duty,
            board_c=power.board_c(now_s),
            ecc_corrected=power.reading.ecc_corrected,
            ecc_uncorrected=power.reading.ecc_uncorrected,
            worker_state=s.worker.state,
            worker_generation=counters.generation,
            worker_restarts=counters.restarts,
            tokens_released=counts[2],
            tokens_discarded=counters.tokens_discarded,
            token_rate_hz=self._token_rate_hz(now_s),
            epochs_clean=counters.epochs_clean,
            epochs_dirty=counters.epochs_dirty,
            strikes_detected=counters.strikes_detected,
            strikes_repaired=counters.strikes_repaired,
            scan_ms=counters.take_scan_ms(),
            jobs_queued=counts[0],
            jobs_done=counts[1],
            spool_records=size[0],
            spool_bytes=size[1],
            link_up=s.link.connected.is_set(),
            commands_accepted=security.accepted,
            commands_rejected=sum(security.rejected.values()),
            bus_messages=s.intake.bus_messages,
            garbage_messages=sum(dropped.values()),
            dropped={code.value: count for code, count in dropped.items() if count},
            jobs_active=len(s.runner.running),
            batch=power.point.batch,
            threads=s.worker.threads,
            prefill_tokens=counters.prefill_tokens,
            compute_trips=counters.compute_trips,
            **self._fdir_fields(),
        )

    def _fdir_fields(self) -> dict[str, Any]:
        s = self._sources
        service, scrub = s.fdir.service, s.fdir.scrubber.status()
        enabled, passive, disabled = service.counts()
        return {
            "fdir_enabled": enabled,
            "fdir_passive": passive,
            "fdir_disabled": disabled,
            "fdir_external": service.external_control,
            "fdir_detections": service.detections,
            "fdir_actions": service.actions,
            "fdir_level": service.level,
            "resets": service.resets,
            "scrub_pass_s": scrub.pass_s,
            "scrub_age_s": scrub.pass_age_s,
            "scrub_miscompares": sum(region.miscompares for region in scrub.regions),
            "worker_scrub_pass_s": s.worker.scrub_pass_s,
            "loop_lag_ms": s.fdir.take_lag_ms(),
            "watchdog": s.fdir.health.watchdog,
            "watchdog_fed": s.fdir.health.feeds,
            "sensor_rejections": s.view.rejections,
            "eps_source": s.view.eps_source.value,
            "state_repairs": len(s.boot.repaired),
        }

    @property
    def _sources(self) -> Sources:
        return self._get_sources()

    def _token_rate_hz(self, now_s: float) -> float:
        before_s, before = self._rate_since
        stored = self._sources.runner.tokens_stored
        self._rate_since = (now_s, stored)
        return (stored - before) / max(now_s - before_s, 1e-3)
