"""A random walk of the job runner: a worker that obeys, dies and changes size, and a ground that cancels."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from pathlib import Path

import pytest
from scripted_worker import blocks, last_block
from waiting import handled

from node import job_runner as module
from node.inference import protocol
from node.job_runner import JobRunner
from node.jobs import JobQueue
from node.recorder import Recorder
from telemetry.certificate import verify_results
from telemetry.database import Database
from telemetry.frame import decode_frame
from telemetry.packets import Event, Result
from telemetry.spool import Spool

EPOCH_TOKENS = 4
MAX_BATCH = 4


class Worker:
    """Does at an epoch end what it was told; forgets everything when it dies."""

    def __init__(self) -> None:
        self.jobs: dict[str, deque[protocol.Block]] = {}
        self.starts: dict[str, protocol.Start] = {}
        self.parking: set[str] = set()
        self.ending: dict[str, str] = {}

    def take(self, message: protocol.Message) -> None:
        match message:
            case protocol.Start():
                assert message.job not in self.jobs, "never started twice"
                assert len(self.jobs) < MAX_BATCH, (
                    "a start may cross a shrinking of the batch, not exceed seats"
                )
                every = blocks(message.job, message.prompt, message.max_tokens, EPOCH_TOKENS)
                self.starts[message.job] = message
                self.jobs[message.job] = deque(b for b in every if b.first >= message.known_tokens)
            case protocol.Park(job=job) if job in self.jobs:
                # One that is not has just ended: its last block is on its way.
                self.parking.add(job)
            case protocol.Cancel(job=job, finish=finish) if job in self.jobs:
                self.ending[job] = finish

    def epoch(self) -> list[protocol.Block | protocol.Parked]:
        said: list[protocol.Block | protocol.Parked] = []
        for job, pending in list(self.jobs.items()):
            block = pending.popleft()
            if job in self.ending:
                start, finish = self.starts[job], self.ending.pop(job)
                said.append(last_block(start, block.first, EPOCH_TOKENS, finish))
                del self.jobs[job]
                self.parking.discard(job)
                continue
            said.append(block)
            if not pending:
                del self.jobs[job]
                self.parking.discard(job)
            elif job in self.parking:
                self.parking.discard(job)
                del self.jobs[job]
                said.append(protocol.Parked(job=job))
        return said


class Walk:
    """The runner with its store, and a worker at times."""

    def __init__(self, database: Database, seed: int) -> None:
        self.random = random.Random(seed)
        self.database = database
        self.spool = Spool("n", 1, 1 << 22)
        self.queue = JobQueue(self.spool)
        self.recorder = Recorder(database, self.spool, lambda: 0)
        self.batch = 2
        self.mission_ns = 0
        self.worker: Worker | None = None
        self.lengths: dict[str, int] = {}
        self.faults: list[str] = []
        self.runner = JobRunner(
            database,
            self.queue,
            self.recorder,
            batch=lambda: self.batch,
            mission_ns=lambda: self.mission_ns,
            send=self.send,
            on_fault=lambda monitor, reason: self.faults.append(f"{monitor}: {reason}"),
        )

    def send(self, message: protocol.Message) -> bool:
        if self.worker is None:
            return False
        self.worker.take(message)
        return True

    async def settle(self) -> None:
        await handled(self.runner._inbox)

    async def submit(self) -> None:
        name = f"j{len(self.lengths)}"
        self.lengths[name] = self.random.randint(1, 24)
        deadline_ns = self.mission_ns + self.random.randint(0, 40) if self.random.random() < 0.2 else None
        priority = self.random.choice([1, 5, 5, 9])

        await self.database.run(
            lambda c: self.queue.submit(
                c, name, "p", self.lengths[name], priority=priority, deadline_ns=deadline_ns
            )
        )
        self.runner.look()

    async def step(self) -> None:
        match self.random.choice(["submit", "submit", "epoch", "epoch", "epoch", "cancel", "size", "die"]):
            case "submit":
                await self.submit()
            case "epoch":
                self.epoch()
            case "cancel" if self.lengths:
                job = self.random.choice(list(self.lengths))
                await self.database.run(lambda c: self.queue.cancel(c, job))
                self.runner.look()
            case "size":
                self.batch = self.random.randint(1, MAX_BATCH)
                self.runner.look()
            case "die":
                self.die()
                if self.random.random() < 0.7:
                    self.come_up()
        if self.random.random() < 0.7:
            await self.settle()

    def epoch(self) -> None:
        self.mission_ns += 1
        if self.worker is not None:
            for message in self.worker.epoch():
                self.runner.offer(message)
        self.runner.look()

    def die(self) -> None:
        if self.worker is not None:
            self.worker = None
            self.runner.worker_gone()

    def come_up(self) -> None:
        if self.worker is None:
            self.worker = Worker()
            self.runner.worker_ready()


@pytest.mark.parametrize("seed", range(6))
async def test_every_job_ends_once_with_its_text_whatever_happens(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEADLINE_TICK_S", 0.005)
    database = await Database.open(tmp_path / "node.db")
    walk = Walk(database, seed)
    await database.run(walk.spool.create)
    await database.run(walk.queue.create)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(walk.runner.run(), name="test.runner"),
            group.create_task(walk.recorder.run(), name="test.recorder"),
        ]
        walk.come_up()
        for _ in range(80):
            await walk.step()
        walk.come_up()
        for _ in range(400):
            await walk.settle()
            active, queued = await database.run(walk.queue.tasks)
            if not active and not queued:
                break
            if walk.worker is not None and not walk.runner._leaving:
                assert len(walk.worker.jobs) <= walk.batch, "settled: never more than the batch"
            walk.epoch()
        await walk.recorder.flush()
        records = await database.run(lambda c: walk.spool.batch(c, 10_000, set()))
        for task in tasks:
            task.cancel()
    await database.close()

    packets = [decode_frame(record.frame).packet() for record in records]
    assert walk.faults == []
    names = {packet.name for packet in packets if isinstance(packet, Event)}
    assert names.isdisjoint({"job.gap", "job.divergence", "job.stray_block", "job.failed"})
    results = [packet for packet in packets if isinstance(packet, Result)]
    verdicts = {verdict.job: verdict for verdict in verify_results(results)}
    assert verdicts.keys() == walk.lengths.keys()
    for job, verdict in verdicts.items():
        assert verdict.sound, verdict.findings
        assert verdict.finish in {"length", "cancelled", "deadline"}
        assert sum(result.finish is not None for result in results if result.job == job) == 1
        if verdict.finish == "length":
            assert verdict.tokens == walk.lengths[job]
    assert walk.runner.running == set()
    if seed == 0:
        assert {"job.parked", "job.resumed", "job.finished"} <= names
