"""The worker's supervision put together: generations, health pings, the recovery ladder, its reports.

`fdir.recovery` and `fdir.health` decide; this service carries out, in this order: what must outlive the
node is persisted before it is acted on.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from fdir import health, recovery
from node import state
from node.boards import Board
from node.config import NodeConfig
from node.inference import protocol
from node.job_runner import JobMessage
from node.recorder import Evidence, Recorder
from node.worker_process import REAP_S, WorkerExit, WorkerProcess
from telemetry.database import Database, StoreFull
from telemetry.packets import FdirReport, Level, Outcome, Severity

_log = logging.getLogger(__name__)

TICK_S = 0.05
"""How often limits are looked at, s: fine against ping limits of half a second and more."""


@dataclass
class WorkerCounters:
    """Sums over all generations since boot, and the latest figures."""

    tokens_discarded: int = 0
    epochs_clean: int = 0
    epochs_dirty: int = 0
    strikes_detected: int = 0
    strikes_repaired: int = 0
    compute_trips: int = 0
    prefill_tokens: int = 0
    restarts: int = 0
    generation: int = 0
    scans_ms: list[float] = field(default_factory=list)
    """Times of the proofs since the last housekeeping."""

    def take_scan_ms(self) -> float:
        """Return the mean time of a proof since the last call, ms; 0 when there was none."""
        scans, self.scans_ms = self.scans_ms, []
        return sum(scans) / len(scans) if scans else 0.0


class WorkerService:
    """Keeps a healthy worker running while inference is allowed.

    Parameters
    ----------
    config
        Sections worker and node.
    command
        Worker command line without socket and generation, which are added here.
    restarts_s
        Times of past restarts as persisted.
    recorder, database, board
        Where reports go, where restarts are persisted, who follows the worker's process.
    on_safe
        Called with a reason when restarts are exhausted.
    """

    def __init__(
        self,
        config: NodeConfig,
        *,
        command: Sequence[str],
        restarts_s: Sequence[float],
        recorder: Recorder,
        database: Database,
        board: Board,
        on_safe: Callable[[str], None],
    ) -> None:
        self.counters = WorkerCounters()
        self.on_ready: Callable[[], None] = lambda: None
        self.on_gone: Callable[[], None] = lambda: None
        self.on_job_message: Callable[[JobMessage], None] = lambda _: None
        self._config = config
        self._command = list(command)
        self._recorder = recorder
        self._database = database
        self._board = board
        self._on_safe = on_safe
        self._recovery = recovery.WorkerRecovery(config.worker.restart_policy(), restarts_s, time.monotonic())
        self._pings = health.PingMonitor(config.worker.ping_limits())
        self._events: asyncio.Queue[recovery.RecoveryEvent] = asyncio.Queue()
        self._process: WorkerProcess | None = None
        self._status: protocol.Status | None = None
        self._redo_since_ns: int | None = None
        self._detected_ns: int | None = None
        self._reported: tuple[recovery.ReportFault, int] | None = None
        """Fault whose recovery is under way, and when it was detected, CLOCK_REALTIME, ns."""
        self._group: asyncio.TaskGroup | None = None

    @property
    def threads(self) -> int:
        """Processor cores the worker uses, as it told last; 0 while there is none."""
        return 0 if self._status is None else self._status.threads

    @property
    def state(self) -> recovery.WorkerState:
        """Where the worker is on the ladder."""
        return self._recovery.state

    def allow(self, *, rearm: bool) -> None:
        """Have a worker from now on; `rearm` forgets past restarts (on leaving safe mode)."""
        if rearm:
            self._events.put_nowait(recovery.Rearm())
        self._events.put_nowait(recovery.Want())

    def forbid(self) -> None:
        """Stop the worker and start none."""
        self._events.put_nowait(recovery.Unwant())

    def send(self, message: protocol.Message) -> bool:
        """Send to the worker; False when none is connected."""
        return self._process is not None and self._process.send(message)

    def report_fault(self, monitor: str, reason: str) -> None:
        """Report that the running worker is faulty; the ladder decides what follows."""
        if self._detected_ns is None:
            self._detected_ns = time.time_ns()
        self._events.put_nowait(recovery.Fault(monitor, reason))

    async def run(self) -> None:
        """Supervise until cancelled, which kills the worker."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._tick(), name="node.worker.tick")
            group.create_task(self._climb(), name="node.worker.ladder")

    async def stop(self) -> None:
        """Stop the worker in order, for good; at most ``stop_timeout_s + REAP_S`` seconds."""
        self.forbid()
        deadline_s = time.monotonic() + self._config.worker.stop_timeout_s + REAP_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(TICK_S)
            if self._process is None and self._events.empty():
                return
        _log.error("the worker did not end in time")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._watch(health.Tick())
            if self._events.empty():
                self._events.put_nowait(recovery.Tick())

    def _watch(self, event: health.PingEvent) -> None:
        for action in self._pings.handle(event, time.monotonic()):
            match action:
                case health.SendPing(key):
                    self.send(protocol.Ping(key=key))
                case health.PingLate(_, silent_s):
                    text = f"the worker has not answered for {silent_s:.2f} s"
                    self._recorder.event(Severity.LOW, "worker.ping_late", text, {"silent_s": silent_s})
                case health.PingRecovered(_, silent_s):
                    text = f"the worker answered after {silent_s:.2f} s"
                    self._recorder.event(Severity.INFO, "worker.ping_recovered", text, {"silent_s": silent_s})
                case health.PingFatal(reason, _):
                    self.report_fault("worker.ping", reason)

    async def _climb(self) -> None:
        while True:
            event = await self._events.get()
            for action in self._recovery.handle(event, time.monotonic()):
                await self._act(action)

    async def _act(self, action: recovery.RecoveryAction) -> None:
        match action:
            case recovery.PersistRestarts(times_s):
                await self._persist(times_s)
            case recovery.StartWorker():
                self._start()
            case recovery.StopWorker():
                self._watch(health.Disarm())
                self._spawn(self._stop_process(), "node.worker.stop")
            case recovery.KillWorker():
                if self._process is not None:
                    self._process.kill()
            case recovery.ReportFault():
                self._report_restart(action)
            case recovery.ReportRestarted():
                self._report_restarted()
            case recovery.EnterSafe(monitor, reason):
                self._report_safe(monitor, reason)
                self._on_safe(f"worker restarts exhausted: {reason}")

    async def _persist(self, times_s: tuple[float, ...]) -> None:
        def persist(connection: sqlite3.Connection) -> None:
            state.set_restarts(connection, times_s)

        try:
            await self._database.run(persist)
        except (StoreFull, sqlite3.Error) as error:
            # The worker is restarted all the same: the bound then holds within this boot only.
            _log.error("restart times not persisted: %s", error)

    def _start(self) -> None:
        self.counters.generation += 1
        generation = self.counters.generation
        socket_path = self._config.state_dir / "worker.sock"
        process = WorkerProcess(
            [*self._command, "--socket", str(socket_path), "--generation", str(generation)],
            socket_path=socket_path,
            log_path=self._config.state_dir / "worker.log",
            generation=generation,
            on_message=self._on_message,
            on_fault=self.report_fault,
        )
        self._process = process
        self._detected_ns = None
        self._spawn(self._live(process), f"node.worker.generation-{generation}")

    async def _live(self, process: WorkerProcess) -> None:
        ended = await process.run()
        self._gone(ended)

    async def _stop_process(self) -> None:
        if self._process is not None:
            await self._process.stop(self._config.worker.stop_timeout_s)

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        if self._group is None:
            raise RuntimeError("the service does not run")
        self._group.create_task(coroutine, name=name)

    def _gone(self, ended: WorkerExit) -> None:
        self._watch(health.Disarm())
        self._process = None
        self._status = None
        self._redo_since_ns = None
        self._board.set_worker(None)
        self.on_gone()
        if self._detected_ns is None:
            self._detected_ns = time.time_ns()
        self._events.put_nowait(recovery.Exited(ended.reason))

    def _on_message(self, message: protocol.FromWorker) -> None:
        match message:
            case protocol.Pong():
                self._watch(health.Pong(message.key))
            case protocol.Block() | protocol.JobError() | protocol.Parked():
                self.on_job_message(message)
            case protocol.Status():
                self._count(message)
            case protocol.Strike():
                self._report_strike(message)
            case protocol.Ready():
                self._ready(message)
            case protocol.Fatal():
                self.report_fault("worker.fatal", message.reason)

    def _ready(self, message: protocol.Ready) -> None:
        if self._process is not None:
            self._board.set_worker(self._process.pid)
        self._watch(health.Arm())
        self._events.put_nowait(recovery.Ready())
        held = ", ".join(resumed.job for resumed in message.resumed)
        self._recorder.event(
            Severity.INFO,
            "worker.ready",
            f"worker generation {message.generation} ready after {message.load_s:.2f} s"
            + (f", holds {held}" if held else ""),
            {
                "generation": message.generation,
                "pid": message.pid,
                "image_id": message.image_id,
                "onnxruntime": message.onnxruntime,
                "resumed_jobs": held,
                "resumed_tokens": sum(resumed.tokens for resumed in message.resumed),
                "load_s": message.load_s,
            },
        )
        self.on_ready()

    def _count(self, status: protocol.Status) -> None:
        before = self._status
        clean = status.epochs_clean - (before.epochs_clean if before else 0)
        dirty = status.epochs_dirty - (before.epochs_dirty if before else 0)
        self.counters.epochs_clean += clean
        self.counters.epochs_dirty += dirty
        self.counters.tokens_discarded += status.tokens_discarded - (before.tokens_discarded if before else 0)
        self.counters.prefill_tokens += status.prefill_tokens - (before.prefill_tokens if before else 0)
        if clean or dirty:
            self.counters.scans_ms.append(status.scan_ms)
        self._status = status
        now_ns = time.time_ns()
        if dirty and self._redo_since_ns is None:
            self._redo_since_ns = now_ns
        if clean and self._redo_since_ns is not None:
            self._recorder.post(
                FdirReport(
                    monitor="epoch.proof",
                    level=Level.EPOCH_REDO,
                    outcome=Outcome.REDONE,
                    action="redo",
                    detected_ns=self._redo_since_ns,
                    recovered_ns=now_ns,
                    evidence={"epochs_dirty": self.counters.epochs_dirty},
                )
            )
            self._redo_since_ns = None

    def _report_strike(self, strike: protocol.Strike) -> None:
        if strike.region == "compute":
            self._report_trip(strike)
            return
        repaired = strike.recovered_ns is not None
        recomputed = strike.method == "recompute"
        self.counters.strikes_detected += not (recomputed and repaired)
        self.counters.strikes_repaired += repaired
        if recomputed:
            level, outcome = Level.EPOCH_REDO, Outcome.REDONE if repaired else Outcome.STARTED
        else:
            level, outcome = Level.IN_WORKER_REPAIR, Outcome.REPAIRED if repaired else Outcome.ESCALATED
        self._recorder.post(
            FdirReport(
                monitor=f"{strike.region}.digest",
                level=level,
                outcome=outcome,
                action=strike.method,
                detected_ns=strike.detected_ns,
                recovered_ns=strike.recovered_ns,
                region=strike.region,
                page=strike.page,
                role=strike.role,
                evidence=strike.evidence,
            )
        )

    def _report_trip(self, strike: protocol.Strike) -> None:
        """Report a computation that failed a check: its epoch is thrown away and decoded again."""
        self.counters.compute_trips += 1
        if strike.method == "none":
            outcome = Outcome.ESCALATED
        else:
            outcome = Outcome.STARTED if strike.recovered_ns is None else Outcome.REDONE
        self._recorder.post(
            FdirReport(
                monitor="compute.check",
                level=Level.EPOCH_REDO,
                outcome=outcome,
                action=strike.method,
                detected_ns=strike.detected_ns,
                recovered_ns=strike.recovered_ns,
                region=strike.region,
                page=strike.page,
                role=strike.role,
                evidence=strike.evidence,
            )
        )

    def _report_restart(self, fault: recovery.ReportFault) -> None:
        self._reported = (fault, self._detected_ns or time.time_ns())
        self.counters.restarts += 1
        self._post_restart(Outcome.STARTED, None, {"restarts_in_window": fault.restarts})
        text = f"worker lost ({fault.monitor}: {fault.reason}); restart in {fault.delay_s:.2f} s"
        self._recorder.event(Severity.MEDIUM, "worker.lost", text, {"monitor": fault.monitor})

    def _report_restarted(self) -> None:
        self._post_restart(Outcome.RESTARTED, time.time_ns(), {"generation": self.counters.generation})
        self._reported = None

    def _post_restart(self, outcome: Outcome, recovered_ns: int | None, evidence: Evidence) -> None:
        if self._reported is None:
            return
        fault, detected_ns = self._reported
        self._recorder.post(
            FdirReport(
                monitor=fault.monitor,
                level=Level.WORKER_RESTART,
                outcome=outcome,
                action="restart_worker",
                detected_ns=detected_ns,
                recovered_ns=recovered_ns,
                evidence={"reason": fault.reason, **evidence},
            )
        )

    def _report_safe(self, monitor: str, reason: str) -> None:
        limit = self._config.worker.restart_limit
        self._recorder.post(
            FdirReport(
                monitor=monitor,
                level=Level.SAFE_MODE,
                outcome=Outcome.ESCALATED,
                action="safe_mode",
                detected_ns=self._detected_ns or time.time_ns(),
                recovered_ns=None,
                evidence={"reason": reason, "restart_limit": limit},
            )
        )
