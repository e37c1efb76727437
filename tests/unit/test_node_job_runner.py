from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from scripted_worker import blocks
from waiting import handled, until

from node import job_runner as module
from node.inference import protocol
from node.job_runner import JobRunner
from node.jobs import Job, JobQueue
from node.recorder import Recorder
from telemetry.database import Database
from telemetry.frame import decode_frame
from telemetry.packets import Event, Result
from telemetry.sampling import Sampling
from telemetry.spool import Spool


class Desk:
    """A runner with its store, and what it sends to a worker that is not there."""

    def __init__(self, database: Database, capacity: int) -> None:
        self.batch = 1
        self.mission_ns: int | None = 0
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
            batch=lambda: self.batch,
            mission_ns=lambda: self.mission_ns,
            send=self.send,
            on_fault=lambda monitor, reason: self.faults.append(f"{monitor}: {reason}"),
        )

    def send(self, message: protocol.Message) -> bool:
        self.sent.append(message)
        return True

    async def submit(self, job: str, tokens: int = 8, **settings: Any) -> None:
        await self.database.run(lambda c: self.queue.submit(c, job, "p", tokens, **settings))
        self.runner.look()

    def take_sent(self) -> list[protocol.Message]:
        """Return what was sent since the last call."""
        sent, self.sent = self.sent, []
        return sent

    async def settle(self) -> None:
        await handled(self.runner._inbox)
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


async def test_a_ready_worker_gets_as_many_jobs_as_the_batch_has_places(tmp_path: Path) -> None:
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


def start(job: str, known: int = 0, tokens: int = 8, **fields: Any) -> protocol.Start:
    return protocol.Start(job=job, prompt="p", max_tokens=tokens, known_tokens=known, **fields)


async def test_blocks_of_several_jobs_come_interleaved_and_each_job_keeps_its_own_count(
    tmp_path: Path,
) -> None:
    async with open_desk(tmp_path) as desk:
        desk.batch = 3
        sampling = Sampling(seed=4, logprobs=True)
        await desk.submit("a", 12)
        await desk.submit("b", 8, sampling=sampling, priority=7)
        for job in "cd":
            await desk.submit(job)
        desk.runner.worker_ready()
        await desk.settle()
        assert desk.take_sent() == [start("b", sampling=sampling), start("a", tokens=12), start("c")]
        assert desk.runner.running == {"a", "b", "c"}
        of = {job: blocks(job, "p", 12 if job == "a" else 8, 4, logprobs=job == "b") for job in "abc"}
        for index in range(2):
            for job in "cab":
                desk.runner.offer(of[job][index])
        await desk.settle()
        assert [(await desk.job(job)).finish for job in "abcd"] == [None, "length", "length", None]
        assert desk.take_sent() == [start("d")]
        stored = [p for p in await desk.packets() if isinstance(p, Result)]
        assert [(p.job, p.first) for p in stored] == [(job, at) for at in (0, 4) for job in "cab"]
        logprobs = [p.logprobs for p in stored if p.job == "b"]
        assert logprobs == [block.logprobs for block in of["b"]]
        assert None not in logprobs
        assert desk.runner.tokens_stored == 24


async def test_a_higher_job_takes_a_place_when_the_lower_one_has_left_it(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        desk.batch = 2
        for job in "ab":
            await desk.submit(job, 12)
        desk.runner.worker_ready()
        await desk.settle()
        desk.take_sent()
        await desk.submit("urgent", priority=9)
        await desk.settle()
        assert desk.take_sent() == [protocol.Park(job="b")]
        desk.runner.look()
        desk.runner.offer(blocks("b", "p", 12, 4)[0])
        await desk.settle()
        assert desk.take_sent() == [], "the place is not free yet, and it is not asked for twice"
        desk.runner.offer(protocol.Parked(job="b"))
        await desk.settle()
        assert desk.take_sent() == [start("urgent")]
        assert (await desk.job("b")).state == "queued"
        for block in blocks("urgent", "p", 8, 4):
            desk.runner.offer(block)
        await desk.settle()
        assert desk.take_sent() == [start("b", 4, 12)]
        assert (await desk.events())[-4:] == ["job.parked", "job.started", "job.finished", "job.resumed"]


async def test_a_job_that_ends_while_it_is_to_be_parked_is_done(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a")
        desk.runner.worker_ready()
        await desk.settle()
        await desk.submit("urgent", priority=9)
        await desk.settle()
        for block in blocks("a", "p", 8, 4):
            desk.runner.offer(block)
        desk.runner.offer(protocol.Parked(job="a"))
        await desk.settle()
        assert (await desk.job("a")).finish == "length"
        assert desk.sent == [start("a"), protocol.Park(job="a"), start("urgent")]


async def test_a_smaller_batch_parks_the_lowest_and_a_larger_one_takes_it_back(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        desk.batch = 3
        await desk.submit("low", priority=1)
        for job in "ab":
            await desk.submit(job)
        desk.runner.worker_ready()
        await desk.settle()
        desk.take_sent()
        desk.batch = 1
        desk.runner.look()
        await desk.settle()
        assert desk.take_sent() == [protocol.Park(job="b"), protocol.Park(job="low")]
        for job in ("b", "low"):
            desk.runner.offer(protocol.Parked(job=job))
        await desk.settle()
        assert desk.runner.running == {"a"}
        desk.batch = 2
        desk.runner.look()
        await desk.settle()
        assert desk.take_sent() == [start("b")]


async def test_a_restarted_worker_gets_the_jobs_that_had_places_from_where_each_was(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        desk.batch = 2
        for job in "ab":
            await desk.submit(job, 12)
        desk.runner.worker_ready()
        await desk.settle()
        desk.take_sent()
        # Of the same priority and with a deadline: it would go first, were the places free.
        await desk.submit("c", deadline_ns=10**6)
        desk.runner.offer(blocks("b", "p", 12, 4)[0])
        desk.runner.worker_gone()
        desk.runner.offer(blocks("b", "p", 12, 4)[1])
        desk.runner.worker_ready()
        await desk.settle()
        assert desk.take_sent() == [start("a", 0, 12), start("b", 8, 12)]
        # Meanwhile the batch shrinks: the job that has no place at the worker yet is parked here.
        desk.runner.worker_gone()
        desk.batch = 1
        desk.runner.worker_ready()
        await desk.settle()
        assert desk.take_sent() == [start("a", 0, 12)]
        assert (await desk.job("b")).state == "queued"


async def test_deadlines_end_active_jobs_at_the_worker_and_others_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEADLINE_TICK_S", 0.01)
    async with open_desk(tmp_path) as desk:
        desk.mission_ns = None
        await desk.submit("a", deadline_ns=100)
        await desk.submit("b", deadline_ns=200)
        desk.runner.worker_ready()
        await desk.settle()
        assert desk.take_sent() == [start("a")]
        desk.mission_ns = 99
        desk.runner.look()
        await asyncio.sleep(0.05)
        assert desk.take_sent() == []
        desk.mission_ns = 100
        await until(lambda: desk.sent != [])
        assert desk.take_sent() == [protocol.Cancel(job="a", finish="deadline")]
        block = blocks("a", "p", 8, 4)[0]
        desk.runner.offer(protocol.Block(**{**fields(block), "finish": "deadline"}))
        await desk.settle()
        assert (await desk.job("a")).finish == "deadline"
        assert desk.take_sent() == [start("b")]
        # The worker dies before it could end b: it is ended here, and not started again.
        desk.mission_ns = 250
        desk.runner.worker_gone()
        desk.runner.look()
        await desk.settle()
        assert (await desk.job("b")).finish == "deadline"
        closing = [p for p in await desk.packets() if isinstance(p, Result)][-1]
        assert (closing.job, closing.first, closing.tokens, closing.finish) == ("b", 0, [], "deadline")
        desk.runner.worker_ready()
        await desk.settle()
        assert desk.take_sent() == []


async def test_a_worker_lost_while_the_disk_is_asked_gets_nothing_and_the_next_gets_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_desk(tmp_path) as desk:
        await desk.submit("a")
        await desk.settle()
        run = desk.database.run

        async def lose_the_worker(function: Any) -> Any:
            result = await run(function)
            desk.runner.worker_gone()
            return result

        monkeypatch.setattr(desk.database, "run", lose_the_worker)
        desk.runner.worker_ready()
        await handled(desk.runner._inbox)
        monkeypatch.setattr(desk.database, "run", run)
        assert desk.take_sent() == []
        assert (await desk.job("a")).state == "active"
        desk.runner.worker_ready()
        await desk.settle()
        assert desk.take_sent() == [start("a")]


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
        # The worker may keep the rows of a parked job: it is told to forget b, and need not answer.
        assert desk.take_sent()[1:] == [protocol.Cancel(job="b"), protocol.Cancel(job="a")]
        assert (await desk.job("b")).finish == "cancelled"
        # The worker dies before it could end the job: it is not started again.
        desk.runner.worker_gone()
        desk.runner.worker_ready()
        await desk.settle()
        assert (await desk.job("a")).finish == "cancelled"
        assert desk.sent == [protocol.Cancel(job="a")]


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
        # Its place is free only when the worker is done with it.
        desk.runner.look()
        await desk.settle()
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
