"""The worker's supervision put together: generations, health pings, its life-cycle, its reports.

`fdir.recovery` and `fdir.health` decide; this service carries out, in this order: what must outlive the
node is persisted before it is acted on. What is found wrong goes to the FDIR (`node.fdir_service`).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from fdir import health, recovery
from node import state
from node.boards import Board
from node.config import NodeConfig
from node.findings import Find, Finding, of_strike
from node.inference import protocol
from node.job_runner import JobMessage
from node.pulse import Pulse
from node.recorder import Evidence, Recorder
from node.worker_counters import WorkerCounters
from node.worker_process import REAP_S, WorkerExit, WorkerProcess
from telemetry.database import Database, StoreFull
from telemetry.packets import FdirReport, Level, Outcome, Severity

_log = logging.getLogger(__name__)

TICK_S = 0.05
"""How often limits are looked at, s: fine against ping limits of half a second and more."""
REPEAT_S = 1.0
"""Time after which the FDIR is told again what it has done nothing about, s (assumed)."""
EXIT_UNUSABLE = 2
"""Exit code of a worker that cannot use its image, or its configuration."""
ROWS = {"worker.socket": "worker.protocol"}
"""Rows of the FDIR table that monitors with a name of their own belong to."""
_UNDECIDED = (recovery.WorkerState.STARTING, recovery.WorkerState.RUNNING, recovery.WorkerState.GIVEN_UP)
"""States in which a fault waits for the FDIR's decision."""


class WorkerService:
    """Keeps a healthy worker running while inference is allowed.

    What it finds goes to the FDIR; a faulty worker is restarted only when that says so. A finding that
    nothing is done about (its row is switched off, the ground has taken control) is told again every
    `REPEAT_S`, so that it is not forgotten when that changes.

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
    ) -> None:
        self.counters = WorkerCounters()
        self.on_started: Callable[[], None] = lambda: None
        """Called when a new generation is started."""
        self.on_ready: Callable[[], None] = lambda: None
        self.on_gone: Callable[[], None] = lambda: None
        self.on_job_message: Callable[[JobMessage], None] = lambda _: None
        self.on_finding: Find = lambda _: None
        self.on_recovered: Callable[[str], None] = lambda _row: None
        """Called with the row whose fault is over."""
        self.on_machine: Callable[[object, Sequence[object]], None] = lambda _event, _actions: None
        """Called with each event of the life-cycle and the actions it led to, before they are carried out."""
        self.image_id: str | None = None
        """Image of the worker that was ready last; None before the first."""
        self.may_mend = protocol.Repair(weights=True, kv=True, compute=True)
        self.pulse = Pulse("worker")
        """Health of the task that carries out, which turns by itself."""
        self._config = config
        self._command = list(command)
        self._recorder = recorder
        self._database = database
        self._board = board
        self._recovery = recovery.WorkerRecovery(config.worker.restart_policy(), restarts_s, time.monotonic())
        self._pings = health.PingMonitor(config.worker.ping_limits())
        self._events: asyncio.Queue[recovery.RecoveryEvent] = asyncio.Queue()
        self._process: WorkerProcess | None = None
        self._status: protocol.Status | None = None
        self._redo_since_ns: int | None = None
        self._detected_ns: int | None = None
        self._reported: tuple[recovery.ReportFault, int] | None = None
        """Fault whose recovery is under way, and when it was detected, CLOCK_REALTIME, ns."""
        self._open: dict[str, Finding] = {}
        """Findings about the worker that nothing has been done about yet, by row."""
        self._told_s = 0.0
        self._lost: WorkerExit | None = None
        """How the process ended, while that has not been decided on yet."""
        self._allowed = False
        self._held = False
        self._group: asyncio.TaskGroup | None = None

    @property
    def threads(self) -> int:
        """Processor cores the worker uses, as it told last; 0 while there is none."""
        return 0 if self._status is None else self._status.threads

    @property
    def scrub_pass_s(self) -> float | None:
        """Time of the worker's last pass over all pages of the image, s; None before the first is done."""
        return None if self._status is None else self._status.scrub_pass_s

    @property
    def state(self) -> recovery.WorkerState:
        """Where the worker is in its life."""
        state = self._recovery.state
        gone = self._lost is not None and state in {
            recovery.WorkerState.STARTING,
            recovery.WorkerState.RUNNING,
        }
        return recovery.WorkerState.LOST if gone else state

    @property
    def wanted(self) -> bool:
        """Whether a worker is to run: it is allowed, and its image is not being worked on."""
        return self._allowed and not self._held

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def ping_silent_s(self) -> float:
        """How long the ping under way has waited for its answer, s."""
        return self._pings.silent_s

    def allow(self, *, rearm: bool) -> None:
        """Have a worker from now on; `rearm` forgets past restarts (on leaving safe mode)."""
        self._allowed = True
        if rearm:
            self._events.put_nowait(recovery.Rearm())
        if not self._held:
            self._events.put_nowait(recovery.Want())

    def forbid(self) -> None:
        """Stop the worker and start none."""
        self._allowed = False
        self._events.put_nowait(recovery.Unwant())

    async def hold(self) -> bool:
        """Stop the worker, and start none before `release`; return whether it is gone.

        Takes at most ``stop_timeout_s + REAP_S`` seconds.
        """
        self._held = True
        self._events.put_nowait(recovery.Unwant())
        return await self._ended()

    def release(self, image: Path | None = None) -> None:
        """Let a worker run again, with past restarts forgotten if it has got another or mended `image`."""
        self._held = False
        if image is not None:
            if "--image" in self._command:
                self._command[self._command.index("--image") + 1] = str(image)
            self._events.put_nowait(recovery.Rearm())
        if self._allowed:
            self._events.put_nowait(recovery.Want())

    def restart(self, row: str, reason: str) -> None:
        """Replace the worker that runs, or that was lost: what the recovery ladder does on level 2."""
        if self._detected_ns is None:
            self._detected_ns = time.time_ns()
        self._events.put_nowait(recovery.Fault(row, reason))

    def mend(self, may_mend: protocol.Repair) -> None:
        """Say what the worker may mend by itself, this one and those after it."""
        self.may_mend = may_mend
        self.send(may_mend)

    def send(self, message: protocol.Message) -> bool:
        """Send to the worker; False when none is connected."""
        return self._process is not None and self._process.send(message)

    def report_fault(self, monitor: str, reason: str) -> None:
        """Tell the FDIR that the running worker is faulty; it decides what follows."""
        row = ROWS.get(monitor, monitor)
        if self._detected_ns is None:
            self._detected_ns = time.time_ns()
        finding = Finding(row, reason, {"generation": self.counters.generation}, self._detected_ns)
        self._open[row] = finding
        self._told_s = time.monotonic()
        self.on_finding(finding)

    async def run(self) -> None:
        """Supervise until cancelled, which kills the worker."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._tick(), name="node.worker.tick")
            group.create_task(self._live_on(), name="node.worker.life")

    async def stop(self) -> None:
        """Stop the worker in order, for good; at most ``stop_timeout_s + REAP_S`` seconds."""
        self.forbid()
        if not await self._ended():
            _log.error("the worker did not end in time")

    async def _ended(self) -> bool:
        deadline_s = time.monotonic() + self._config.worker.stop_timeout_s + REAP_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(TICK_S)
            if self._process is None and self._recovery.is_at_rest:
                return True
        return False

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._watch(health.Tick())
            if self._open and time.monotonic() - self._told_s >= REPEAT_S:
                self._tell_again()
            if self._events.empty():
                self._events.put_nowait(recovery.Tick())

    def _tell_again(self) -> None:
        """Tell the FDIR once more what it has done nothing about, and what became of the worker since."""
        if self._recovery.state not in _UNDECIDED:
            self._open.clear()
            return
        if self._lost is not None and "worker.exit" not in self._open:
            self.report_fault("worker.exit", self._lost.reason)
        self._told_s = time.monotonic()
        for finding in list(self._open.values()):
            self.on_finding(finding)

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

    async def _live_on(self) -> None:
        while True:
            event = await self._events.get()
            self.pulse.beat()
            actions = self._recovery.handle(event, time.monotonic())
            if actions or not isinstance(event, recovery.Tick):
                self.on_machine(event, actions)
            for action in actions:
                await self._act(action)

    async def _act(self, action: recovery.RecoveryAction) -> None:
        match action:
            case recovery.PersistRestarts(times_s):
                await self._persist(times_s)
            case recovery.StartWorker():
                self._start()
            case recovery.StopWorker():
                self._watch(health.Disarm())
                self._open.clear()
                self._spawn(self._stop_process(), "node.worker.stop")
            case recovery.KillWorker():
                self._open.clear()
                if self._process is not None:
                    self._process.kill()
                elif self._lost is not None:
                    self._events.put_nowait(recovery.Exited(self._lost.reason))
            case recovery.ReportFault():
                self._report_restart(action)
            case recovery.ReportRestarted():
                self._report_restarted()
            case recovery.StartLate(reason):
                self.report_fault("worker.start", reason)
            case recovery.Exhausted(monitor, reason):
                self.report_fault("worker.restarts", f"restarts exhausted ({monitor}: {reason})")

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
        self._lost = None
        self._open.clear()
        self._spawn(self._live(process), f"node.worker.generation-{generation}")
        self.on_started()

    async def _live(self, process: WorkerProcess) -> None:
        ended = await process.run()
        self._gone(ended)

    async def _stop_process(self) -> None:
        if self._process is not None:
            await self._process.stop(self._config.worker.stop_timeout_s)
        elif self._lost is not None:
            self._events.put_nowait(recovery.Exited(self._lost.reason))

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        if self._group is None:
            raise RuntimeError("the service does not run")
        self._group.create_task(coroutine, name=name)

    def _gone(self, ended: WorkerExit) -> None:
        starting = self._recovery.state is recovery.WorkerState.STARTING
        self._watch(health.Disarm())
        self._process = None
        self._status = None
        self._redo_since_ns = None
        self._board.set_worker(None)
        self.on_gone()
        if self._detected_ns is None:
            self._detected_ns = time.time_ns()
        if self._recovery.state not in _UNDECIDED:
            self._events.put_nowait(recovery.Exited(ended.reason))
            return
        self._lost = ended
        if self._open:
            # Its end follows from what was found before: that decides, and is told again if it did not.
            return
        unusable = starting and ended.returncode == EXIT_UNUSABLE
        self.report_fault("image.damaged" if unusable else "worker.exit", ended.reason)

    def _on_message(self, message: protocol.FromWorker) -> None:
        match message:
            case protocol.Pong():
                self._pong(message)
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

    def _pong(self, pong: protocol.Pong) -> None:
        if self._open.pop("worker.ping", None) is None:
            self._watch(health.Pong(pong.key))
        else:
            # Nobody did anything about its silence, and it is over.
            self._watch(health.Arm())
            self.on_recovered("worker.ping")

    def _ready(self, message: protocol.Ready) -> None:
        if self._open.pop("worker.start", None) is not None:
            # Nobody did anything about its being late, and it is ready now.
            self.on_recovered("worker.start")
        if self._process is not None:
            self._board.set_worker(self._process.pid)
        self.image_id = message.image_id
        self.send(self.may_mend)
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
        clean, dirty = self.counters.add(self._status, status)
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
        whole = strike.recovered_ns is not None
        if strike.region == "compute":
            self.counters.compute_trips += 1
        else:
            # Rows to be computed anew are told twice: they count as found once, and as repaired when whole.
            self.counters.strikes_detected += not (strike.method == "recompute" and whole)
            self.counters.strikes_repaired += whole
        self.on_finding(of_strike(strike))

    def _report_restart(self, fault: recovery.ReportFault) -> None:
        self._reported = (fault, self._detected_ns or time.time_ns())
        self.counters.restarts += 1
        self._post_restart(Outcome.STARTED, None, {"restarts_in_window": fault.restarts})
        text = f"worker lost ({fault.monitor}: {fault.reason}); restart in {fault.delay_s:.2f} s"
        self._recorder.event(Severity.MEDIUM, "worker.lost", text, {"monitor": fault.monitor})

    def _report_restarted(self) -> None:
        self._post_restart(Outcome.RESTARTED, time.time_ns(), {"generation": self.counters.generation})
        if self._reported is not None:
            self.on_recovered(self._reported[0].monitor)
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
