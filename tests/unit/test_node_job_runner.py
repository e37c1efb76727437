from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scripted_worker import blocks
from waiting import until

from node import job_runner as module
from node.inference import protocol
from node.job_runner import JobRunner
from node.jobs import Job, JobQueue
from node.recorder import Recorder
from telemetry.database import Database
from telemetry.frame import decode_frame
from telemetry.packets import Event, Result
from telemetry.spool import Spool


class Desk:
    """A runner with its store, and what it sends to a worker that is not there."""

    def __init__(self, database: Database, capacity: int) -> None:
        self.database = database
        self.spool = Spool("n", 1, capacity)
        self.queue = JobQueue(self.spool)
        self.recorder = Recorder(database, self.spool, lambda: 0)
        self.sent: list[protocol.Message] = []
        self.faults: list[str] = []
        self.runner = JobRunner(
            database,
            self.queue,
            self.recorder,
            send=self.send,
            on_fault=lambda monitor, reason: self.faults.append(f"{monitor}: {reason}"),
        )

    def send(self, message: protocol.Message) -> bool:
        self.sent.append(message)
        return True

    async def submit(self, job: str, tokens: int = 8) -> None:
        await self.database.run(lambda c: self.queue.submit(c, job, "p", tokens))
        self.runner.look()

    async def settle(self) -> None:
        await until(self.runner._inbox.empty)
        for _ in range(3):
            await self.database.run(lambda c: None)
            await asyncio.sleep(0.01)
        await self.recorder.flush()

    async def job(self, job: str) -> Job:
        found = await self.database.run(lambda c: self.queue.get(c, job))
        assert found is not None
        return found

    async def packets(self) -> list[Result | Event]:
        records = await self.database.run(lambda c: self.spool.batch(c, 1000, set()))
        packets = [decode_frame(r.frame).packet() for r in records]
        return [p for p in packets if isinstance(p, Result | Event)]

    async def events(self) -> list[str]:
        return [p.name for p in await self.packets() if isinstance(p, Event)]


@contextlib.asynccontextmanager
async def open_desk(tmp_path: Path, capacity: int = 1 << 20) -> AsyncIterator[Desk]:
    database = await Database.open(tmp_path / "node.db")
    desk = Desk(database, capacity)
    await database.run(desk.spool.create)
    await database.run(desk.queue.create)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(desk.runner.run(), name="test.runner"),
            group.create_task(desk.recorder.run(), name="test.recorder"),
        ]
        yield desk
        for task in tasks:
            task.cancel()
    await database.close()


async def test_a_ready_worker_gets_one_job_at_a_time(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a")
        await desk.submit("b")
        await desk.settle()
        assert desk.sent == []
        desk.runner.worker_ready()
        await desk.settle()
        assert desk.sent == [protocol.Start(job="a", prompt="p", max_tokens=8)]
        for block in blocks("a", "p", 8, 4):
            desk.runner.offer(block)
        await desk.settle()
        assert desk.sent[1:] == [protocol.Start(job="b", prompt="p", max_tokens=8)]
        assert desk.runner.tokens_stored == 8
        assert await desk.events() == ["job.started", "job.finished", "job.started"]


async def test_after_a_restart_waiting_blocks_are_stored_before_the_job_goes_on(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a", 12)
        desk.runner.worker_ready()
        await desk.settle()
        first, second, third = blocks("a", "p", 12, 4)
        desk.runner.offer(first)
        desk.runner.offer(second)
        desk.runner.worker_gone()
        desk.runner.worker_ready()
        await desk.settle()
        assert desk.sent[-1] == protocol.Start(job="a", prompt="p", max_tokens=12, known_tokens=8)
        desk.runner.offer(second)
        desk.runner.offer(third)
        await desk.settle()
        assert (await desk.job("a")).finish == "length"
        assert desk.runner.tokens_stored == 12


async def test_a_refusing_spool_holds_blocks_back_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.02)
    async with open_desk(tmp_path, capacity=2_500) as desk:
        await desk.submit("a", 80)
        desk.runner.worker_ready()
        await desk.settle()
        for block in blocks("a", "p", 80, 4):
            desk.runner.offer(block)
        await until(lambda: desk.runner.blocked)
        before = (await desk.job("a")).tokens
        assert 0 < before < 80
        assert "spool.refused" in await desk.events()
        desk.spool.capacity_bytes = 1 << 20
        await desk.settle()
        await until(lambda: not desk.runner.blocked)
        await desk.settle()
        assert (await desk.job("a")).finish == "length"


async def test_cancelling_an_active_job_asks_the_worker_and_a_queued_one_ends_here(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a")
        await desk.submit("b")
        desk.runner.worker_ready()
        await desk.settle()
        for job in ("a", "b"):
            await desk.database.run(lambda c, j=job: desk.queue.cancel(c, j))
        desk.runner.look()
        await desk.settle()
        assert desk.sent[1:] == [protocol.Cancel(job="a")]
        assert (await desk.job("b")).finish == "cancelled"
        # The worker dies before it could end the job: it is not started again.
        desk.runner.worker_gone()
        desk.runner.worker_ready()
        await desk.settle()
        assert (await desk.job("a")).finish == "cancelled"
        assert len(desk.sent) == 2


async def test_a_gap_fails_the_job_and_frees_the_worker_when_it_says_so(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a", 12)
        await desk.submit("b")
        desk.runner.worker_ready()
        await desk.settle()
        first, second, third = blocks("a", "p", 12, 4)
        desk.runner.offer(second)
        await desk.settle()
        assert (await desk.job("a")).finish == "failed: block at 4 does not continue token 0"
        assert desk.sent[1:] == [protocol.Cancel(job="a")]
        desk.runner.offer(first)
        desk.runner.offer(third)
        await desk.settle()
        assert desk.sent[2:] == [protocol.Start(job="b", prompt="p", max_tokens=8)]
        assert [n for n in await desk.events() if n in ("job.gap", "job.failed")] == ["job.gap", "job.failed"]


async def test_other_tokens_for_a_stored_block_are_reported_and_dropped(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a", 12)
        desk.runner.worker_ready()
        await desk.settle()
        desk.runner.offer(blocks("a", "p", 12, 4)[0])
        desk.runner.offer(protocol.Block(**{**fields(blocks("a", "p", 12, 4)[0]), "tokens": [1, 2, 3, 4]}))
        desk.runner.offer(blocks("x", "p", 12, 4)[0])
        await desk.settle()
        names = await desk.events()
        assert "job.divergence" in names
        assert "job.stray_block" in names
        assert (await desk.job("a")).tokens == 4


async def test_a_job_error_fails_the_job_and_the_next_is_started(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a")
        await desk.submit("b")
        desk.runner.worker_ready()
        await desk.settle()
        desk.runner.offer(protocol.JobError(job="a", reason="too long"))
        await desk.settle()
        assert (await desk.job("a")).finish == "failed: too long"
        assert desk.sent[-1] == protocol.Start(job="b", prompt="p", max_tokens=8)


@pytest.mark.parametrize("change", [{"tokens": [-1]}, {"tokens": [2**40]}])
async def test_a_block_no_ground_could_read_is_a_fault_of_the_worker(
    tmp_path: Path, change: dict[str, object]
) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a")
        desk.runner.worker_ready()
        await desk.settle()
        desk.runner.offer(protocol.Block(**{**fields(blocks("a", "p", 8, 4)[0]), **change}))
        await desk.settle()
        assert len(desk.faults) == 1
        assert desk.faults[0].startswith("worker.protocol: unusable Block")
        assert (await desk.job("a")).tokens == 0


async def test_a_flood_of_messages_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    async with open_desk(tmp_path) as desk:
        for _ in range(5):
            desk.runner.offer(protocol.JobError(job="x", reason="r"))
        assert desk.faults == ["worker.protocol: more than 3 messages wait to be stored"] * 2


def fields(block: protocol.Block) -> dict[str, object]:
    return {name: getattr(block, name) for name in block.__struct_fields__}
