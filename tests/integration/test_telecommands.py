"""Telecommands that outlive a node: the schedule, rates and keys over SIGKILL; and SIGKILL at every step."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from node_bench import NODE, Bench, open_bench

from node.jobs import JobQueue
from node.schedule import SKIP_AFTER_NS
from telemetry import bus, commands, topics
from telemetry.database import Database
from telemetry.envelope import encode_command, make_command
from telemetry.frame import decode_frame
from telemetry.keys import KeyRing, generate_key_file
from telemetry.packets import CommandSchedule, Stage, Verification
from telemetry.spool import Spool

S = 1_000_000_000
T0_NS = 1_767_225_600 * S


async def steer(bench: Bench) -> None:
    """Keep telling mission time, as the bus does."""
    while True:
        t_ns = time.time_ns() + bench.mission_offset_ns
        await bench.publish(topics.bus(NODE, "time"), bus.encode(bus.BusTime(t_ns=t_ns, rate=1.0)))
        await asyncio.sleep(0.2)


def about(bench: Bench, entry: int) -> list[tuple[Stage, bool, str]]:
    reports = [v for _, v in bench.archive.packets(NODE, Verification) if v.entry == entry]
    return [(v.stage, v.ok, v.code) for v in reports]


async def test_schedule_rates_and_sequence_outlive_a_kill_of_the_node(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench, asyncio.TaskGroup() as group:
        bench.mission_offset_ns = T0_NS - time.time_ns()
        steering = group.create_task(steer(bench), name="test.steer")
        await bench.start()
        await bench.until(lambda: bool(bench.events("clock.locked")), "mission time")
        now_ns = time.time_ns() + bench.mission_offset_ns
        infer = {"job": "later", "prompt": "hello", "max_tokens": 4}
        later = commands.ScheduleInsert(t_ns=now_ns + 3600 * S, command="infer", args=infer)
        assert (await bench.execute(later)).reason == "entry 1"
        missed = commands.ScheduleInsert(t_ns=now_ns + 1000 * S, command="report_ledger")
        assert (await bench.execute(missed)).reason == "entry 2"
        step = commands.make_step(commands.SetMode(mode="nominal"), 3700.0)
        assert (await bench.execute(commands.SequenceLoad(sequence="dusk", steps=(step,)))).ok
        assert (await bench.execute(commands.SequenceStart(sequence="dusk"))).reason == "1 steps"
        assert (await bench.execute(commands.SetRates(housekeeping_s=0.1))).ok

        await bench.kill()
        # The node comes back after the time of the first two, one of them long over.
        bench.mission_offset_ns += 3600 * S + 5 * S
        assert 3600 * S + 5 * S - 1000 * S > SKIP_AFTER_NS
        await bench.start()
        await bench.until(lambda: bench.finished("later") == "length", "the scheduled job")
        assert about(bench, 1) == [(Stage.STARTED, True, "ok"), (Stage.COMPLETED, True, "ok")]
        assert about(bench, 2) == [(Stage.STARTED, False, "skipped")]
        assert (await bench.execute(commands.ScheduleList())).ok
        await bench.until(lambda: bool(bench.archive.packets(NODE, CommandSchedule)), "the schedule")
        ((_, listed),) = bench.archive.packets(NODE, CommandSchedule)
        assert [(e.entry, e.name, e.sequence) for e in listed.entries] == [(3, "set_mode", "dusk")]
        assert listed.sequences == ["dusk"]
        # Ten a second, as commanded before the kill; the configuration says otherwise.
        count = len(bench.new_housekeeping())
        await bench.until(lambda: len(bench.new_housekeeping()) >= count + 20, "housekeeping", 8.0)
        steering.cancel()


async def test_worker_and_baseline_by_command(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start()
        await bench.until(lambda: bool(bench.events("worker.ready")), "a worker")
        before = bench.worker_pid()
        assert (await bench.execute(commands.RestartWorker())).ok
        await bench.until(lambda: bench.worker_pid() not in {None, before}, "another worker")
        await bench.until(lambda: len(bench.fdir("command")) == 2, "reports of the restart")
        assert (await bench.execute(commands.RecomputeBaseline(region="config"))).ok
        await bench.until(lambda: bool(bench.events("scrub.recomputed")), "the new baseline")
        refused = await bench.execute(commands.RecomputeBaseline(region="nothing"))
        assert refused.code == "unknown_region"


# Executes one command on a real database, and kills itself at the n-th SQL statement.
STEP = """
import asyncio, os, signal, sys
from pathlib import Path
from node.command_effects import Done
from node.commanding import Commanding
from node import state
from node.jobs import JobQueue
from node.long_commands import LongCommands
from node.recorder import Recorder
from node.schedule import Schedule
from telemetry.authenticator import Authenticator
from telemetry.database import Database
from telemetry.envelope import encode_command, make_command
from telemetry.keys import KeyRing
from telemetry.spool import Spool

path, keys, payload, at = Path(sys.argv[1]), Path(sys.argv[2]), bytes.fromhex(sys.argv[3]), int(sys.argv[4])

async def main():
    left = at

    def count(statement):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    database = await Database.open(path)
    await database.run(state.create)
    boot = await database.run(state.begin_boot)
    spool = Spool("penumbra-1", boot.boot, 1 << 20)
    jobs, schedule = JobQueue(spool), Schedule()
    authenticator = Authenticator("penumbra-1", KeyRing.load(keys))
    for create in (spool.create, jobs.create, authenticator.load, schedule.create):
        await database.run(create)
    recorder = Recorder(database, spool, lambda: 1000)
    executed = asyncio.Event()

    async def work(arguments, progress):
        await progress("on its way")
        keep = lambda c: c.execute("INSERT INTO dumped VALUES (?)", (arguments.region,))
        return Done("dumped", effect=keep)

    def take(connection, arguments):
        return Done(later=True) if arguments.name == "dump_memory" else None

    await database.run(lambda c: c.execute("CREATE TABLE IF NOT EXISTS dumped (region TEXT)"))
    long = LongCommands(work, lambda: commanding, lambda a: executed.set())
    commanding = Commanding(database=database, spool=spool, jobs=jobs, authenticator=authenticator,
                            recorder=recorder, on_executed=lambda a: executed.set(), schedule=schedule,
                            mission_ns=lambda: None, on_begun=long.begin, take_other=take)
    tasks = [asyncio.create_task(service.run()) for service in (commanding, recorder, long)]
    await database.run(lambda c: c.set_trace_callback(count))
    commanding.offer(payload)
    while not executed.is_set() and not authenticator.report().redelivered:
        await asyncio.sleep(0.001)
    await recorder.flush()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await database.close()

asyncio.run(main())
"""


def give(path: Path, keys: Path, payload: bytes, at: int) -> int:
    arguments = [sys.executable, "-c", STEP, str(path), str(keys), payload.hex(), str(at)]
    return subprocess.run(arguments, check=False, timeout=60).returncode


async def reported(path: Path, seq: int) -> tuple[list[Verification], int]:
    """Return what was reported of a command, and how many dumps its region has."""
    database = await Database.open(path)
    spool = Spool("penumbra-1", 10_000, 1 << 20)
    records = await database.run(lambda c: spool.batch(c, 10_000, set()))
    (count,) = await database.run(
        lambda c: c.execute("SELECT COUNT(*) FROM dumped WHERE region = ?", (f"r{seq}",)).fetchone()
    )
    await database.close()
    packets = [decode_frame(record.frame).packet() for record in records]
    return [p for p in packets if isinstance(p, Verification) and p.command_seq == seq], count


@pytest.mark.timeout(300)
async def test_killed_at_any_statement_a_long_command_has_one_end_and_its_effect_goes_with_it(
    tmp_path: Path,
) -> None:
    keys, path = tmp_path / "keys.toml", tmp_path / "node.db"
    generate_key_file(keys)
    ring = KeyRing.load(keys)
    ends = set()
    for seq in itertools.count():
        command = make_command(
            commands.DumpMemory(region=f"r{seq}"), key_id="ground-1", seq=seq, t_issue_ns=0,
            t_expire_ns=2000, node="penumbra-1",
        )  # fmt: skip
        payload = encode_command(command, ring)
        first = await asyncio.to_thread(give, path, keys, payload, seq + 1)
        if first == 0:
            break
        assert first == -signal.SIGKILL
        assert await asyncio.to_thread(give, path, keys, payload, 0) == 0
        reports, dumps = await reported(path, seq)
        completions = {(r.code, r.reason) for r in reports if r.stage is Stage.COMPLETED}
        ((code, _),) = completions
        assert dumps == (code == "ok")
        ends.add(code)
    assert ends == {"ok", "interrupted"}
    assert seq > 40, f"{seq} statements only: the kills did not reach the completion"


async def stored(path: Path, seq: int) -> tuple[bool, list[Stage]]:
    """Return whether the job of a command is there, and the stages reported of the command."""
    database = await Database.open(path)
    spool = Spool("penumbra-1", 10_000, 1 << 20)
    job = await database.run(lambda c: JobQueue(spool).get(c, f"job-{seq}"))
    records = await database.run(lambda c: spool.batch(c, 10_000, set()))
    await database.close()
    packets = [decode_frame(record.frame).packet() for record in records]
    return job is not None, [p.stage for p in packets if isinstance(p, Verification) and p.command_seq == seq]


@pytest.mark.timeout(300)
async def test_killed_at_any_statement_a_command_is_executed_once(tmp_path: Path) -> None:
    """The ground repeats a command until it is answered; whatever dies in between, it takes effect once."""
    keys, path = tmp_path / "keys.toml", tmp_path / "node.db"
    generate_key_file(keys)
    ring = KeyRing.load(keys)
    answer = [Stage.ACCEPTED, Stage.STARTED, Stage.COMPLETED]
    for seq in itertools.count():
        infer = commands.Infer(job=f"job-{seq}", prompt="p", max_tokens=1)
        command = make_command(
            infer, key_id="ground-1", seq=seq, t_issue_ns=0, t_expire_ns=2000, node="penumbra-1"
        )
        payload = encode_command(command, ring)
        first = await asyncio.to_thread(give, path, keys, payload, seq + 1)
        if first == 0:
            break
        assert first == -signal.SIGKILL
        assert await asyncio.to_thread(give, path, keys, payload, 0) == 0
        there, stages = await stored(path, seq)
        assert there
        # Executed once; told once more if the kill came after the commit and before the answer was out.
        assert stages in (answer, answer * 2)
    assert seq > 30, f"{seq} statements only: the kills did not reach the command"
