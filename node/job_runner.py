"""Hands jobs to the worker and its blocks to the store, one at a time and in order.

What the worker sends waits here until it is durable. While the spool refuses results the runner holds the
block back and tries again; nothing is lost, since a job has a bounded number of blocks and no further job
is started. After a restart of the worker its blocks still waiting are stored first, and only then is the
job started again, from the first token that is not stored.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from node.inference import protocol
from node.jobs import Duplicate, Gap, JobQueue, NotActive, Stored
from node.recorder import Recorder, Throttle
from telemetry.database import Database, StoreFull
from telemetry.packets import Result, Severity
from telemetry.spool import SpoolRefused

_log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_S = 0.25
"""Time between two attempts to store what the spool refused, s (assumed)."""
MAX_WAITING = 4096
"""Messages of a worker that may wait: more than any job has blocks (2048 tokens)."""


@dataclass(frozen=True)
class _Look:
    """Something changed: look for work."""


class JobRunner:
    """Feeds one worker from the durable queue.

    Parameters
    ----------
    database, queue
        The durable queue.
    recorder
        For events.
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
        send: Callable[[protocol.Message], bool],
        on_fault: Callable[[str, str], None],
    ) -> None:
        self.running: str | None = None
        """Job the worker decodes now."""
        self.blocked = False
        """True while the spool refuses results."""
        self.tokens_stored = 0
        """Tokens stored since boot."""
        self._database = database
        self._queue = queue
        self._recorder = recorder
        self._send = send
        self._on_fault = on_fault
        self._ready = False
        self._given_up: str | None = None
        self._inbox: asyncio.Queue[protocol.Block | protocol.JobError | _Look] = asyncio.Queue()
        self._throttle = Throttle(10.0)

    def worker_ready(self) -> None:
        """Tell that a worker is ready for a job."""
        self._ready = True
        self.look()

    def worker_gone(self) -> None:
        """Tell that the worker is gone; what it sent is still stored."""
        self._ready = False
        self.running = None

    def look(self) -> None:
        """Tell that the queue has changed."""
        self._inbox.put_nowait(_Look())

    def offer(self, message: protocol.Block | protocol.JobError) -> None:
        """Take a message of the worker."""
        if self._inbox.qsize() >= MAX_WAITING:
            self._on_fault("worker.protocol", f"more than {MAX_WAITING} messages wait to be stored")
            return
        self._inbox.put_nowait(message)

    async def run(self) -> None:
        """Store and start jobs until cancelled."""
        while True:
            message = await self._inbox.get()
            try:
                match message:
                    case protocol.Block():
                        await self._store(message)
                    case protocol.JobError():
                        await self._fail(message.job, message.reason)
                        self._ended(message.job)
                    case _Look():
                        await self._look_for_work()
            except ValueError as error:
                self._on_fault("worker.protocol", f"unusable {type(message).__name__}: {error}")

    async def _store(self, block: protocol.Block) -> None:
        if block.job == self._given_up:
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
        )
        t_ns = self._recorder.now_ns()
        outcome = await self._patiently(lambda c: self._queue.store_block(c, result, t_ns))
        evidence: dict[str, str | int | float | bool | None] = {"job": block.job, "first": block.first}
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
                if block.finish is None:
                    self._given_up = block.job
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

    def _ended(self, job: str) -> None:
        """Note that the worker is done with `job`, however it ended."""
        if self._given_up == job:
            self._given_up = None
        if self.running == job:
            self.running = None
        self.look()

    async def _look_for_work(self) -> None:
        for cancelled in await self._patiently(self._queue.cancelled):
            if cancelled == self.running:
                self._send(protocol.Cancel(job=cancelled))
            else:
                await self._finish(cancelled, "cancelled")
        if not self._ready or self.running is not None:
            return
        job = await self._patiently(self._queue.next)
        # The worker may have gone while the disk was asked.
        if job is None or not self._ready:
            return
        self.running = job.id
        self._given_up = None
        self._send(
            protocol.Start(job=job.id, prompt=job.prompt, max_tokens=job.max_tokens, known_tokens=job.tokens)
        )
        name, verb = ("job.resumed", "goes on at") if job.tokens else ("job.started", "starts at")
        self._recorder.event(
            Severity.INFO,
            name,
            f"job {job.id} {verb} token {job.tokens}",
            {"job": job.id, "tokens": job.tokens},
        )

    async def _patiently(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run a transaction, again and again while the store has no room."""
        while True:
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
