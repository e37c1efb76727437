"""Commands that take longer than their transaction: begun, reported, completed once, or interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import until

from node import commanding as module
from node import state
from node.command_effects import CommandFailed, Done
from node.commanding import Commanding
from node.jobs import JobQueue
from node.long_commands import LongCommands, Progress
from node.recorder import Recorder
from node.schedule import Schedule
from telemetry import commands
from telemetry.authenticator import Authenticator
from telemetry.commands import Arguments
from telemetry.database import Database, StoreFull
from telemetry.envelope import encode_command, make_command
from telemetry.frame import decode_frame
from telemetry.keys import Key, KeyRing
from telemetry.packets import Stage, Verification
from telemetry.spool import Spool

NOW_NS = 1_000
DUMP = commands.DumpMemory(region="config")


class Board:
    """Commanding with works that wait until they are let go."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.spool = Spool("n", 1, 1 << 20)
        self.ring = KeyRing([Key("g", b"k" * 32)])
        self.jobs = JobQueue(self.spool)
        self.authenticator = Authenticator("n", self.ring)
        self.recorder = Recorder(database, self.spool, lambda: NOW_NS)
        self.schedule = Schedule()
        self.mission_ns = NOW_NS
        self.go_on = asyncio.Event()
        self.result: Done | Exception = Done("product dump-1-1")
        self.begun: list[Arguments] = []
        self.done: list[Arguments] = []
        self.long = LongCommands(self.work, lambda: self.commanding, self.done.append)
        self.commanding = Commanding(
            database=database,
            spool=self.spool,
            jobs=self.jobs,
            authenticator=self.authenticator,
            recorder=self.recorder,
            on_executed=lambda _: None,
            on_begun=self.long.begin,
            schedule=self.schedule,
            mission_ns=lambda: self.mission_ns,
            take_other=lambda _, arguments: Done(later=True) if arguments == DUMP else None,
        )

    async def work(self, arguments: Arguments, progress: Progress) -> Done:
        self.begun.append(arguments)
        await progress("half of it")
        await self.go_on.wait()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def sign(self, arguments: Arguments, seq: int) -> bytes:
        command = make_command(arguments, key_id="g", seq=seq, t_issue_ns=0, t_expire_ns=2_000, node="n")
        return encode_command(command, self.ring)

    async def reports(self) -> list[Verification]:
        await self.recorder.flush()
        batch = await self.database.run(lambda c: self.spool.batch(c, 1000, set()))
        packets = [decode_frame(record.frame).packet() for record in batch]
        return [packet for packet in packets if isinstance(packet, Verification)]

    async def stages(self) -> list[tuple[Stage, str, str]]:
        return [(report.stage, report.code, report.reason) for report in await self.reports()]

    async def until_stages(self, count: int) -> list[tuple[Stage, str, str]]:
        async def enough() -> bool:
            return len(await self.stages()) >= count

        await until(enough)
        return await self.stages()


@contextlib.asynccontextmanager
async def board(directory: Path) -> AsyncIterator[Board]:
    database = await Database.open(directory / "node.db")
    made = Board(database)
    for create in (
        state.create, made.spool.create, made.jobs.create, made.authenticator.load, made.schedule.create,
    ):  # fmt: skip
        await database.run(create)
    tasks = [
        asyncio.create_task(service.run(), name=f"test.{type(service).__name__}")
        for service in (made.commanding, made.recorder, made.long)
    ]
    try:
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await database.close()


BEGUN = [(Stage.ACCEPTED, "ok", ""), (Stage.STARTED, "ok", ""), (Stage.PROGRESS, "ok", "half of it")]


async def test_its_completion_follows_with_its_effect(tmp_path: Path) -> None:
    def effect(connection: sqlite3.Connection) -> None:
        state.set_cap(connection, 3.5)

    async with board(tmp_path) as on:
        on.result = Done("product dump-1-1", effect=effect)
        on.commanding.offer(on.sign(DUMP, 1))
        assert await on.until_stages(3) == BEGUN
        # It holds nothing up.
        on.commanding.offer(on.sign(commands.Ping(), 2))
        assert len(await on.until_stages(7)) == 7
        on.go_on.set()
        stages = await on.until_stages(8)
        assert stages[-1] == (Stage.COMPLETED, "ok", "product dump-1-1")
        await until(lambda: on.done == [DUMP])
        assert (await on.database.run(state.begin_boot)).cap_w == 3.5


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (CommandFailed("not_readable", "no worker"), "not_readable", "no worker"),
        (StoreFull("full"), "not_stored", "the node's database: full"),
        (sqlite3.OperationalError("locked"), "not_stored", "the node's database: locked"),
        (OSError(28, "No space left on device", "x.part"), "io_error", "x.part: No space left on device"),
    ],
)
async def test_what_fails_is_completed_as_failed(
    tmp_path: Path, error: Exception, code: str, reason: str
) -> None:
    async with board(tmp_path) as on:
        on.result = error
        on.go_on.set()
        on.commanding.offer(on.sign(DUMP, 1))
        assert (await on.until_stages(4))[-1] == (Stage.COMPLETED, code, reason)


async def test_one_that_fails_may_change_something_all_the_same(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        on.result = CommandFailed("damaged", "sent anew", lambda c: state.set_cap(c, 2.5))
        on.go_on.set()
        on.commanding.offer(on.sign(DUMP, 1))
        assert (await on.until_stages(4))[-1][1] == "damaged"
        assert (await on.database.run(state.begin_boot)).cap_w == 2.5


async def test_a_boot_reports_what_the_one_before_did_not_end(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        on.commanding.offer(on.sign(DUMP, 1))
        await on.until_stages(3)
    async with board(tmp_path) as on:
        stages = await on.until_stages(4)
        assert stages == [*BEGUN, (Stage.COMPLETED, "interrupted", "the node ended while it was carried out")]
        # Asked again, it is answered with all of that, and not begun anew.
        on.commanding.offer(on.sign(DUMP, 1))
        assert await on.until_stages(8) == 2 * stages
        assert on.begun == []
    async with board(tmp_path) as on:
        await asyncio.sleep(0.1)
        assert len(await on.stages()) == 8


async def test_a_repetition_while_it_runs_is_answered_with_what_is_known(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        payload = on.sign(DUMP, 1)
        on.commanding.offer(payload)
        await on.until_stages(3)
        on.commanding.offer(payload)
        assert await on.until_stages(6) == 2 * BEGUN
        on.go_on.set()
        assert len(await on.until_stages(7)) == 7
        assert on.begun == [DUMP]


async def test_one_that_is_scheduled_is_reported_under_its_entry(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        later = commands.ScheduleInsert(t_ns=NOW_NS + 500, command="dump_memory", args={"region": "config"})
        on.commanding.offer(on.sign(later, 1))
        await on.until_stages(3)
        on.go_on.set()
        on.mission_ns += 600
        await on.until_stages(6)
        entries = [report for report in await on.reports() if report.entry == 1]
        assert [report.stage for report in entries] == [Stage.STARTED, Stage.PROGRESS, Stage.COMPLETED]
        assert {report.name for report in entries} == {"dump_memory"}


async def test_a_full_disk_delays_its_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCHEDULE_REST_S", 0.01)
    async with board(tmp_path) as on:
        on.commanding.offer(on.sign(DUMP, 1))
        await on.until_stages(3)
        append, calls = on.spool.append, itertools.count()

        def full(*arguments: object) -> int:
            if next(calls) < 3:
                raise StoreFull("full")
            return append(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(on.spool, "append", full)
        on.go_on.set()
        assert (await on.until_stages(4))[-1][0] is Stage.COMPLETED
        assert next(calls) > 3
