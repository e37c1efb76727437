"""Hands jobs to the worker and its blocks to the store, in order.

`node.scheduler` decides which jobs share the batch; this class carries it out. What the worker sends waits
here until it is durable. While the spool refuses results the runner holds every block back and tries again;
nothing is lost, since a batch has a bounded number of blocks and no further job is started. After a restart
of the worker its blocks still waiting are stored first, and only then are the jobs that had places started
again, each from its first token that is not stored.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from node import scheduler
from node.inference import protocol
from node.jobs import Duplicate, Gap, Job, JobQueue, NotActive, Stored
from node.pulse import Pulse
from node.recorder import Evidence, Recorder, Throttle
from node.scheduler import End, Park, Start, Task
from telemetry.database import Database, StoreFull
from telemetry.packets import Result, Severity
from telemetry.spool import SpoolRefused

_log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_S = 0.25
"""Time between two attempts to store what the spool refused, s (assumed)."""
DEADLINE_TICK_S = 0.25
"""How often the deadlines of the open jobs are looked at, s (assumed: a fraction of an epoch)."""
MAX_WAITING = 1 << 15
"""Messages of a worker that may wait: more than a batch of 8 has blocks, were each of a single token."""
JobMessage = protocol.Block | protocol.JobError | protocol.Parked


@dataclass(frozen=True)
class _Look:
    """Something changed: look for work."""


@dataclass(frozen=True)
class _Beat:
    """A health ping waits."""


@dataclass(frozen=True)
class _Ready:
    """A worker is ready; comes after all that the one before it sent."""

    generation: int


class JobRunner:
    """Feeds one worker from the durable queue.

    Parameters
    ----------
    database, queue
        The durable queue.
    recorder
        For events.
    batch
        Returns the most jobs that may be active now, at least 1; tell a change by `look`.
    least_priority
        Returns the priority below which jobs get no place now; tell a change by `look`.
    mission_ns
        Returns mission time, UTC ns, for deadlines; None while it is not known.
    send
        Sends a message to the worker; False when there is none.
    on_fault
        Called with (monitor, reason) when the worker sends what no sound worker sends.
    """

    def __init__(
        self,
        database: Database,
        queue: JobQueue,
        recorder: Recorder,
        *,
        batch: Callable[[], int],
        least_priority: Callable[[], int] = lambda: 0,
        mission_ns: Callable[[], int | None],
        send: Callable[[protocol.Message], bool],
        on_fault: Callable[[str, str], None],
    ) -> None:
        self.running: set[str] = set()
        """Jobs active at the worker: each was started, and has neither ended nor parked since."""
        self.blocked = False
        """True while the spool refuses results."""
        self.tokens_stored = 0
        """Tokens stored since boot."""
        self.tasks: tuple[Task, ...] = ()
        """Open jobs, as of the last look at the queue."""
        self._database = database
        self._queue = queue
        self._recorder = recorder
        self._batch = batch
        self._least_priority = least_priority
        self._mission_ns = mission_ns
        self._send = send
        self._on_fault = on_fault
        self._ready = False
        self._generation = 0
        self._leaving: set[str] = set()
        """Running jobs that were told to park or to end."""
        self._given_up: set[str] = set()
        """Running jobs that have failed here: what the worker still sends of them is dropped."""
        self._next_deadline_ns: int | None = None
        self._inbox: asyncio.Queue[JobMessage | _Look | _Ready | _Beat] = asyncio.Queue()
        self._throttle = Throttle(10.0)
        self.pulse = Pulse("jobs", lambda: self._inbox.put_nowait(_Beat()))
        """Health of the task that stores and starts."""

    def worker_ready(self) -> None:
        """Tell that a worker is ready for jobs."""
        self._inbox.put_nowait(_Ready(self._generation))

    def worker_gone(self) -> None:
        """Tell that the worker is gone; what it sent is still stored, and its jobs keep their places."""
        self._ready = False
        self._generation += 1
        self.running.clear()
        self._leaving.clear()

    def look(self) -> None:
        """Tell that the queue or the batch has changed."""
        self._inbox.put_nowait(_Look())

    async def fail_begun(self, reason: str) -> None:
        """End the jobs that have tokens already; there is no worker now, and the next could not go on."""

        def begun(connection: sqlite3.Connection) -> list[str]:
            active, queued = self._queue.tasks(connection)
            jobs = [self._queue.get(connection, task.job) for task in (*active, *queued)]
            return [job.id for job in jobs if job is not None and job.tokens]

        for job in await self._patiently(begun):
            await self._fail(job, reason)
        self.look()

    def offer(self, message: JobMessage) -> None:
        """Take a message of the worker."""
        if self._inbox.qsize() >= MAX_WAITING:
            self._on_fault("worker.protocol", f"more than {MAX_WAITING} messages wait to be stored")
            return
        self._inbox.put_nowait(message)

    async def run(self) -> None:
        """Store and start jobs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve(), name="node.jobs.serve")
            group.create_task(self._watch_deadlines(), name="node.jobs.deadlines")

    async def _serve(self) -> None:
        while True:
            message = await self._inbox.get()
            self.pulse.beat()
            try:
                match message:
                    case protocol.Block():
                        await self._store(message)
                    case protocol.JobError():
                        await self._fail(message.job, message.reason)
                        self._ended(message.job)
                    case protocol.Parked():
                        await self._park(message.job)
                        self._ended(message.job)
                    case _Ready(generation):
                        self._ready = generation == self._generation
                        # What the worker before has sent of them is through.
                        self._given_up.clear()
                        await self._look_for_work()
                    case _Look():
                        await self._look_for_work()
                    case _Beat():
                        pass
            except ValueError as error:
                self._on_fault("worker.protocol", f"unusable {type(message).__name__}: {error}")

    async def _watch_deadlines(self) -> None:
        while True:
            await asyncio.sleep(DEADLINE_TICK_S)
            now_ns, next_ns = self._mission_ns(), self._next_deadline_ns
            if now_ns is not None and next_ns is not None and now_ns >= next_ns:
                # `_look_for_work` finds the next one.
                self._next_deadline_ns = None
                self.look()

    async def _store(self, block: protocol.Block) -> None:
        if block.job in self._given_up:
            if block.finish is not None:
                self._ended(block.job)
            return
        result = Result(
            job=block.job,
            first=block.first,
            tokens=block.tokens,
            text=block.text,
            certificate=block.certificate,
            prompt_tokens=block.prompt_tokens,
            finish=block.finish,
            logprobs=block.logprobs,
        )
        t_ns = self._recorder.now_ns()
        outcome = await self._patiently(lambda c: self._queue.store_block(c, result, t_ns))
        evidence: Evidence = {"job": block.job, "first": block.first}
        match outcome:
            case Stored(tokens, finish):
                self.tokens_stored += len(block.tokens)
                if finish is not None:
                    self._recorder.event(
                        Severity.INFO,
                        "job.finished",
                        f"job {block.job} finished ({finish}) after {tokens} tokens",
                        {"job": block.job, "tokens": tokens, "finish": finish},
                    )
            case Duplicate(same):
                if not same:
                    text = f"job {block.job}: block {block.first} came again with other tokens, dropped"
                    self._recorder.event(Severity.HIGH, "job.divergence", text, evidence)
            case Gap(expected, got):
                text = f"job {block.job}: block begins at token {got}, {expected} was expected"
                self._recorder.event(Severity.HIGH, "job.gap", text, {**evidence, "expected": expected})
                await self._fail(block.job, f"block at {got} does not continue token {expected}")
                if block.finish is None and block.job in self.running:
                    self._given_up.add(block.job)
                    self._send(protocol.Cancel(job=block.job))
            case NotActive():
                text = f"block of job {block.job}, which is not being run: dropped"
                self._recorder.event(Severity.MEDIUM, "job.stray_block", text, evidence)
        if block.finish is not None:
            self._ended(block.job)

    async def _fail(self, job: str, reason: str) -> None:
        if await self._finish(job, f"failed: {reason}"):
            self._recorder.event(
                Severity.MEDIUM, "job.failed", f"job {job} failed: {reason}", {"job": job, "reason": reason}
            )

    async def _finish(self, job: str, finish: str) -> bool:
        t_ns = self._recorder.now_ns()
        return await self._patiently(lambda c: self._queue.finish(c, job, finish, t_ns))

    async def _park(self, job: str) -> None:
        tokens = await self._patiently(lambda c: self._queue.park(c, job))
        if tokens is not None:
            self._report_parked(job, tokens)

    def _report_parked(self, job: str, tokens: int) -> None:
        text = f"job {job} gave up its place at token {tokens}"
        self._recorder.event(Severity.INFO, "job.parked", text, {"job": job, "tokens": tokens})

    def _ended(self, job: str) -> None:
        """Note that the worker is done with `job`, however it ended."""
        self.running.discard(job)
        self._leaving.discard(job)
        self._given_up.discard(job)
        self.look()

    async def _look_for_work(self) -> None:
        """Ask the scheduler, and carry out what it says."""
        situation = _Situation(
            running=frozenset(self.running),
            leaving=frozenset(self._leaving),
            batch=self._batch(),
            least_priority=self._least_priority(),
            now_ns=self._mission_ns(),
            ready=self._ready,
        )
        generation = self._generation
        decision = await self._patiently(lambda c: _decide(self._queue, c, situation))
        self._next_deadline_ns = decision.next_deadline_ns
        self.tasks = decision.tasks
        for job, tokens in decision.parked:
            self._report_parked(job, tokens)
        for end in decision.ends:
            if end.job not in situation.running:
                await self._end(end)
        # The worker may have gone while the disk was asked. Places given in vain are filled when it is ready.
        if generation == self._generation:
            self._instruct(decision, situation.running)

    def _instruct(self, decision: _Decision, running: frozenset[str]) -> None:
        for end in decision.ends:
            if end.job in running:
                self._leaving.add(end.job)
                self._send(protocol.Cancel(job=end.job, finish=end.finish))
        for park in decision.parks:
            self._leaving.add(park)
            self._send(protocol.Park(job=park))
        for job in decision.starts:
            self._start(job)

    def _start(self, job: Job) -> None:
        self.running.add(job.id)
        self._send(
            protocol.Start(
                job=job.id,
                prompt=job.prompt,
                max_tokens=job.max_tokens,
                known_tokens=job.tokens,
                sampling=job.sampling,
            )
        )
        name, verb = ("job.resumed", "goes on at") if job.tokens else ("job.started", "starts at")
        self._recorder.event(
            Severity.INFO,
            name,
            f"job {job.id} {verb} token {job.tokens}",
            {"job": job.id, "tokens": job.tokens, "priority": job.priority},
        )

    async def _end(self, end: End) -> None:
        """End a job that is not active at the worker, which may keep its rows for later."""
        if self._ready:
            self._send(protocol.Cancel(job=end.job, finish=end.finish))
        if await self._finish(end.job, end.finish):
            text = f"job {end.job} finished ({end.finish}) without a worker"
            self._recorder.event(Severity.INFO, "job.finished", text, {"job": end.job, "finish": end.finish})
            self.look()

    async def _patiently(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run a transaction, again and again while the store has no room."""
        while True:
            # Waiting for room is no illness.
            self.pulse.beat()
            try:
                result = await self._database.run(function)
            except (SpoolRefused, StoreFull, sqlite3.OperationalError) as error:
                self.blocked = True
                if self._throttle.admit(time.monotonic()) is not None:
                    self._recorder.event(
                        Severity.MEDIUM, "spool.refused", f"results wait: {error}", {"reason": str(error)}
                    )
                await asyncio.sleep(RETRY_S)
            else:
                self.blocked = False
                return result


@dataclass(frozen=True)
class _Situation:
    """What a decision is made on, besides the queue."""

    running: frozenset[str]
    leaving: frozenset[str]
    batch: int
    least_priority: int
    now_ns: int | None
    ready: bool


@dataclass(frozen=True)
class _Decision:
    """What is to be done now that the durable part of it is."""

    starts: list[Job]
    parks: list[str]
    parked: list[tuple[str, int]]
    """Jobs that gave up their place while no worker had them, with their tokens so far."""
    ends: list[End]
    next_deadline_ns: int | None
    tasks: tuple[Task, ...]
    """All open jobs."""


def _decide(queue: JobQueue, connection: sqlite3.Connection, situation: _Situation) -> _Decision:
    """Schedule the open jobs, and store who has a place."""
    running = situation.running
    active, queued = queue.tasks(connection)
    active = [replace(task, leaving=task.job in situation.leaving) for task in active]
    closing = len(running - {task.job for task in active})
    actions = scheduler.plan(
        active,
        queued,
        situation.batch,
        situation.now_ns,
        closing=closing,
        least_priority=situation.least_priority,
    )
    tasks = (*active, *queued)
    ends = [action for action in actions if isinstance(action, End)]
    next_deadline_ns = _next_deadline_ns([*active, *queued], situation.now_ns)
    if not situation.ready:
        return _Decision([], [], [], ends, next_deadline_ns, tasks)
    parks: list[str] = []
    parked: list[tuple[str, int]] = []
    ended = {end.job for end in ends}
    # Those that have a place and no worker yet: it was restarted, or the node was.
    held = [task.job for task in active if task.job not in running and task.job not in ended]
    given: list[str] = []
    for action in actions:
        match action:
            case Park(job) if job in running:
                parks.append(job)
            case Park(job):
                held.remove(job)
                parked.append((job, queue.park(connection, job) or 0))
            case Start(job):
                given.append(job)
                queue.activate(connection, job)
            case End():
                pass
    jobs = [queue.get(connection, job) for job in (*held, *given)]
    starts = [job for job in jobs if job is not None]
    return _Decision(starts, parks, parked, ends, next_deadline_ns, tasks)


def _next_deadline_ns(tasks: Sequence[Task], now_ns: int | None) -> int | None:
    deadlines = (task.deadline_ns for task in tasks if task.deadline_ns is not None)
    return min((at for at in deadlines if now_ns is None or at > now_ns), default=None)
