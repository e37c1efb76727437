from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import handled, until

from node import commanding as module
from node import state
from node.commanding import Commanding
from node.jobs import JobQueue
from node.recorder import Recorder, Throttle
from node.schedule import SKIP_AFTER_NS, Schedule
from telemetry import commands
from telemetry.authenticator import Authenticator
from telemetry.commands import Arguments
from telemetry.database import KEPT_PAGES, Database, StoreFull
from telemetry.envelope import COMMAND_VERSION, Command, encode_command, make_command
from telemetry.frame import decode_frame
from telemetry.keys import Key, KeyRing, KeyState
from telemetry.packets import (
    CommandSchedule,
    Event,
    Mode,
    Packet,
    SecurityReport,
    Severity,
    Stage,
    Verification,
)
from telemetry.sampling import Sampling
from telemetry.spool import Spool

RING = KeyRing([Key("g", b"k" * 32)])
NOW_NS = 1_000


class Ground:
    """Commands for one node, and what it stores in answer."""

    def __init__(self, database: Database, ring: KeyRing) -> None:
        self.ring = ring
        self.database = database
        self.spool = Spool("n", 1, 1 << 20)
        self.jobs = JobQueue(self.spool)
        self.authenticator = Authenticator("n", ring)
        self.recorder = Recorder(database, self.spool, lambda: NOW_NS)
        self.executed: list[Arguments] = []
        self.schedule = Schedule()
        self.mission_ns: int | None = NOW_NS
        self.holding = False
        self.commanding = Commanding(
            database=database,
            spool=self.spool,
            jobs=self.jobs,
            authenticator=self.authenticator,
            recorder=self.recorder,
            on_executed=self.executed.append,
            schedule=self.schedule,
            mission_ns=lambda: self.mission_ns,
            acting_ns=lambda: None if self.holding else self.mission_ns,
        )
        self.seq = itertools.count()

    def sign(self, arguments: Arguments, key_id: str = "g") -> bytes:
        return encode_command(
            make_command(
                arguments, key_id=key_id, seq=next(self.seq), t_issue_ns=0, t_expire_ns=2_000, node="n"
            ),
            self.ring,
        )

    async def retire(self, key: str, key_id: str = "g") -> list[Packet]:
        """Arm and fire the command that retires a key."""
        arm = commands.Arm(command="retire_key", args={"key": key})
        await self.send(self.sign(arm, key_id))
        return await self.send(self.sign(commands.RetireKey(key=key), key_id))

    async def send(self, *payloads: bytes) -> list[Packet]:
        """Offer messages; return every packet stored once they are handled."""
        for payload in payloads:
            self.commanding.offer(payload)
        await handled(self.commanding._inbox)
        await self.recorder.flush()
        records = await self.database.run(lambda c: self.spool.batch(c, 1000, set()))
        frames = [decode_frame(r.frame) for r in records]
        return [f.packet() for f in sorted(frames, key=lambda f: (f.stream, f.seq))]


@contextlib.asynccontextmanager
async def open_ground(
    tmp_path: Path, ring: KeyRing | None = None, max_bytes: int | None = None
) -> AsyncIterator[Ground]:
    database = await Database.open(tmp_path / "node.db", max_bytes=max_bytes)
    ground = Ground(database, KeyRing([Key("g", b"k" * 32)]) if ring is None else ring)
    await database.run(state.create)
    await database.run(ground.spool.create)
    await database.run(ground.jobs.create)
    await database.run(ground.authenticator.load)
    await database.run(ground.schedule.create)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(ground.commanding.run(), name="test.commanding"),
            group.create_task(ground.recorder.run(), name="test.recorder"),
        ]
        yield ground
        for task in tasks:
            task.cancel()
    await database.close()


def stages(packets: list[Packet]) -> list[tuple[Stage, bool, str]]:
    return [(p.stage, p.ok, p.code) for p in packets if isinstance(p, Verification)]


DONE = [(Stage.ACCEPTED, True, "ok"), (Stage.STARTED, True, "ok"), (Stage.COMPLETED, True, "ok")]


@pytest.mark.parametrize(
    "arguments",
    [
        commands.Infer(job="j", prompt="p", max_tokens=4),
        commands.SetMode(mode=Mode.SAFE),
        commands.SetMode(mode=Mode.NOMINAL),
        commands.SetPowerCap(power_w=5.0),
        commands.SetPowerCap(power_w=None),
        commands.ReportLedger(),
    ],
)
async def test_each_command_is_executed_after_it_is_durable(tmp_path: Path, arguments: Arguments) -> None:
    async with open_ground(tmp_path) as ground:
        assert stages(await ground.send(ground.sign(arguments))) == DONE
        assert ground.executed == [arguments]
        found = await ground.database.run(state.begin_boot)
        job = await ground.database.run(lambda c: ground.jobs.get(c, "j"))
    assert found.safe == (arguments == commands.SetMode(mode=Mode.SAFE))
    assert found.cap_w == (5.0 if arguments == commands.SetPowerCap(power_w=5.0) else None)
    assert (job is not None) == isinstance(arguments, commands.Infer)


async def test_a_job_is_queued_with_all_that_was_asked(tmp_path: Path) -> None:
    sampling = Sampling(temperature=0.5, seed=9, stop=("x",), logprobs=True)
    asked = commands.Infer(
        job="j", prompt="p", max_tokens=4, sampling=sampling, priority=8, deadline_ns=5_000
    )
    async with open_ground(tmp_path) as ground:
        assert stages(await ground.send(ground.sign(asked))) == DONE
        job = await ground.database.run(lambda c: ground.jobs.get(c, "j"))
        assert job is not None
        assert (job.sampling, job.priority, job.deadline_ns) == (sampling, 8, 5_000)
        other = commands.Infer(job="j", prompt="p", max_tokens=4, priority=8, deadline_ns=5_000)
        assert (Stage.COMPLETED, False, "job_exists") in stages(await ground.send(ground.sign(other)))


async def test_ping_reports_every_stage(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        assert [s[0] for s in stages(await ground.send(ground.sign(commands.Ping())))] == list(Stage)


async def test_a_redelivered_command_is_answered_and_not_executed_again(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        payload = ground.sign(commands.Ping())
        await ground.send(payload)
        assert len(stages(await ground.send(payload))) == 8
        assert len(ground.executed) == 1


async def test_a_flood_of_repetitions_is_not_answered_without_bound(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        payload = ground.sign(commands.Ping())
        packets = await ground.send(*[payload] * 50)
        assert len(stages(packets)) <= 4 * (1 + 16 + 1)


async def test_commands_outside_the_dictionary_fail_their_acceptance(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        unknown = Command(COMMAND_VERSION, "g", next(ground.seq), 0, 2_000, "n", "reboot", {})
        bad = Command(COMMAND_VERSION, "g", next(ground.seq), 0, 2_000, "n", "infer", {"job": "j"})
        packets = await ground.send(encode_command(unknown, RING), encode_command(bad, RING))
        assert stages(packets) == [
            (Stage.ACCEPTED, False, "unknown_command"),
            (Stage.ACCEPTED, False, "bad_argument"),
        ]
        assert ground.executed == []


async def test_rejections_are_counted_reported_and_throttled(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        forged = bytearray(ground.sign(commands.Ping()))
        forged[-1] ^= 1
        packets = await ground.send(*[bytes(forged)] * 30, b"", b"garbage")
        reports = [p for p in packets if isinstance(p, SecurityReport)]
        assert 1 <= len(reports) <= 6
        assert stages(packets) == []
        assert ground.authenticator.report().rejected == {"bad_mac": 30, "malformed": 2}
        # Someone with the key is answered all the same.
        late = make_command(commands.Ping(), key_id="g", seq=1, t_issue_ns=0, t_expire_ns=5, node="n")
        assert stages(await ground.send(encode_command(late, RING))) == [(Stage.ACCEPTED, False, "expired")]


async def test_what_cannot_be_made_durable_is_not_executed_and_may_be_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_ground(tmp_path) as ground:
        payload = ground.sign(commands.Infer(job="j", prompt="p", max_tokens=4))

        def full(*_: object, **__: object) -> None:
            raise StoreFull("no room")

        with monkeypatch.context() as patch:
            patch.setattr(ground.jobs, "submit", full)
            assert stages(await ground.send(payload)) == []
            assert ground.executed == []
        assert stages(await ground.send(payload)) == DONE
        assert len(ground.executed) == 1


async def test_commands_beyond_what_may_wait_are_counted(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        for _ in range(module.MAX_WAITING + 5):
            ground.commanding.offer(ground.sign(commands.Ping()))
        assert ground.commanding.dropped == 5


async def test_a_flood_without_a_key_takes_nobodys_place(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        forged = bytearray(ground.sign(commands.Ping()))
        forged[-1] ^= 1
        for _ in range(10 * module.MAX_WAITING):
            ground.commanding.offer(bytes(forged))
        assert ground.commanding.dropped == 0
        assert stages(await ground.send(ground.sign(commands.ReportLedger()))) == DONE
        assert ground.authenticator.report().rejected == {"bad_mac": 10 * module.MAX_WAITING}


async def test_more_commands_than_the_node_takes_are_held_back_and_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_ground(tmp_path) as ground:
        monkeypatch.setattr(ground.commanding, "_rate", Throttle(1000.0, burst=2))
        payloads = [ground.sign(commands.ReportLedger()) for _ in range(3)]
        found = stages(await ground.send(*payloads))
        assert found == [*DONE, *DONE, (Stage.ACCEPTED, False, "rate_limited")]
        assert ground.authenticator.report().rejected == {"rate_limited": 1}
        monkeypatch.setattr(ground.commanding, "_rate", Throttle(1.0, burst=2))
        assert stages(await ground.send(payloads[2]))[-3:] == DONE


async def test_keys_are_changed_without_a_gap_and_stay_so(tmp_path: Path) -> None:
    ring = KeyRing([Key("g", b"k" * 32), Key("next", b"n" * 32, KeyState.STANDBY), Key("spare", b"s" * 32)])
    async with open_ground(tmp_path, ring) as ground:
        # Two are active: a third one has to wait.
        assert stages(await ground.send(ground.sign(commands.ActivateKey(key="next"))))[-1] == (
            Stage.COMPLETED, False, "key_unchanged",
        )  # fmt: skip
        assert stages(await ground.retire("spare"))[-3:] == DONE
        assert stages(await ground.retire("g"))[-1][2] == "key_unchanged"
        assert stages(await ground.send(ground.sign(commands.ActivateKey(key="next"))))[-3:] == DONE
        await ground.retire("g", "next")
        assert {key: report.state for key, report in ground.authenticator.report().keys.items()} == {
            "g": "retired", "next": "active", "spare": "retired",
        }  # fmt: skip
        old = encode_command(
            make_command(commands.Ping(), key_id="g", seq=50, t_issue_ns=0, t_expire_ns=2_000, node="n"), RING
        )
        await ground.send(old)
        assert ground.authenticator.report().rejected == {"key_retired": 1}
    again = KeyRing([Key("g", b"k" * 32), Key("next", b"n" * 32, KeyState.STANDBY), Key("spare", b"s" * 32)])
    async with open_ground(tmp_path, again):
        assert [key.id for key in again.active()] == ["next"]


def last(packets: list[Packet]) -> Verification:
    return [p for p in packets if isinstance(p, Verification)][-1]


async def test_a_hazardous_command_is_armed_then_given_exactly_so_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing([Key("g", b"k" * 32), Key("b", b"b" * 32), Key("c", b"c" * 32)])
    retire, other = commands.RetireKey(key="b"), commands.RetireKey(key="c")
    arm = commands.Arm(command="retire_key", args={"key": "b"})
    async with open_ground(tmp_path, ring) as ground:

        async def give(arguments: Arguments) -> str:
            return last(await ground.send(ground.sign(arguments))).code

        assert await give(retire) == "not_armed"
        assert await give(arm) == "ok"
        assert await give(other) == "not_armed"
        assert await give(retire) == "not_armed"  # The wrong one has disarmed it.
        assert await give(arm) == "ok"
        with monkeypatch.context() as patch:
            patch.setattr("node.command_effects.ARMED_S", -1.0)
            assert await give(arm) == "ok"
            assert await give(retire) == "not_armed"  # Too late.
        assert await give(arm) == "ok"
        assert await give(retire) == "ok"
        assert await give(retire) == "not_armed"  # Once.
        assert await give(arm) == "ok"
        await ground.database.run(state.begin_boot)
        assert await give(retire) == "not_armed"  # A restart disarms.
        assert await give(commands.Arm(command="ping")) == "not_hazardous"
        assert await give(commands.Arm(command="retire_key")) == "bad_argument"
        assert [key.id for key in ring.active()] == ["g", "c"]


async def test_a_scheduled_command_is_executed_at_its_time_under_its_origin(tmp_path: Path) -> None:
    cap = commands.SetPowerCap(power_w=5.0)
    insert = commands.ScheduleInsert(t_ns=NOW_NS + 500, command="set_power_cap", args={"power_w": 5.0})
    async with open_ground(tmp_path) as ground:
        answer = last(await ground.send(ground.sign(insert)))
        assert (answer.code, answer.reason) == ("ok", "entry 1")
        await ground.send(ground.sign(commands.ScheduleList()))
        ground.mission_ns = None  # Without a clock it waits.
        await asyncio.sleep(3 * module.SCHEDULE_TICK_S)
        assert cap not in ground.executed
        ground.mission_ns = NOW_NS + 500
        await until(lambda: cap in ground.executed)
        packets = await ground.send()
        about = [p for p in packets if isinstance(p, Verification) and p.entry == 1]
        assert [(p.stage, p.name, p.key_id, p.command_seq) for p in about] == [
            (Stage.STARTED, "set_power_cap", "g", 0),
            (Stage.COMPLETED, "set_power_cap", "g", 0),
        ]
        (listed,) = [p for p in packets if isinstance(p, CommandSchedule)]
        assert [(e.entry, e.name, e.execute_ns) for e in listed.entries] == [
            (1, "set_power_cap", NOW_NS + 500)
        ]
        assert (await ground.database.run(state.begin_boot)).cap_w == 5.0
        # The insertion is answered again with its own reports, not with those of the entry.
        assert all(v.entry is None for v in ground.authenticator._seen["g", 0].verifications)


async def test_a_command_whose_time_is_long_over_is_skipped_and_reported(tmp_path: Path) -> None:
    insert = commands.ScheduleInsert(t_ns=NOW_NS + 500, command="report_ledger")
    async with open_ground(tmp_path) as ground:
        await ground.send(ground.sign(insert))
        ground.mission_ns = NOW_NS + 501 + SKIP_AFTER_NS
        await until(lambda: ground.schedule.next_ns is None)
        answer = last(await ground.send())
        assert (answer.entry, answer.ok, answer.code) == (1, False, "skipped")
        assert commands.ReportLedger() not in ground.executed


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (commands.ScheduleInsert(t_ns=NOW_NS, command="ping"), "in_the_past"),
        (commands.ScheduleInsert(t_ns=NOW_NS + 1, command="nothing"), "unknown_command"),
        (commands.ScheduleInsert(t_ns=NOW_NS + 1, command="cancel"), "bad_argument"),
        (commands.ScheduleInsert(t_ns=NOW_NS + 1, command="retire_key", args={"key": "b"}), "not_for_later"),
        (commands.ScheduleInsert(t_ns=NOW_NS + 1, command="arm", args={"command": "ping"}), "not_for_later"),
        (commands.ScheduleDelete(entry=7), "unknown_entry"),
        (commands.ScheduleShift(by_s=1.0, entry=7), "unknown_entry"),
        (commands.SequenceStart(sequence="none"), "unknown_sequence"),
        (commands.SequenceStop(sequence="none"), "not_running"),
        (
            commands.SequenceLoad(
                sequence="s", steps=(commands.SequenceStep(delay_s=0, command="ping", crc32c=1),)
            ),
            "damaged",
        ),
    ],
)
async def test_what_cannot_be_scheduled(tmp_path: Path, arguments: Arguments, code: str) -> None:
    async with open_ground(tmp_path) as ground:
        assert last(await ground.send(ground.sign(arguments))).code == code
        assert ground.schedule.next_ns is None


async def test_nothing_is_scheduled_without_mission_time(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        ground.mission_ns = None
        insert = commands.ScheduleInsert(t_ns=NOW_NS + 1, command="ping")
        assert last(await ground.send(ground.sign(insert))).code == "no_clock"


async def test_a_sequence_runs_step_by_step_and_can_be_stopped(tmp_path: Path) -> None:
    steps = tuple(
        commands.make_step(commands.SetPowerCap(power_w=float(watts)), delay_s=1.0) for watts in (5, 6, 7)
    )
    load = commands.SequenceLoad(sequence="dawn", steps=steps)
    async with open_ground(tmp_path) as ground:
        assert last(await ground.send(ground.sign(load))).code == "ok"
        start = last(await ground.send(ground.sign(commands.SequenceStart(sequence="dawn"))))
        assert start.reason == "3 steps"
        assert last(await ground.send(ground.sign(load))).code == "sequence_running"
        ground.mission_ns = NOW_NS + 2_000_000_000
        await until(lambda: commands.SetPowerCap(power_w=6.0) in ground.executed)
        assert [a for a in ground.executed if isinstance(a, commands.SetPowerCap)] == [
            commands.SetPowerCap(power_w=5.0),
            commands.SetPowerCap(power_w=6.0),
        ]
        stop = last(await ground.send(ground.sign(commands.SequenceStop(sequence="dawn"))))
        assert (stop.code, stop.reason) == ("ok", "1 steps were left")
        assert ground.schedule.next_ns is None


S = 1_000_000_000
LIFTED_LATER = (
    commands.make_step(commands.SetPowerCap(power_w=5.0), delay_s=1.0),
    commands.make_step(commands.ReportLedger(), delay_s=60.0),
    commands.make_step(commands.SetPowerCap(power_w=None), delay_s=60.0),
)


async def begin_sequence(ground: Ground, steps: tuple[commands.SequenceStep, ...]) -> None:
    """Load a sequence that caps the power, start it, and let its first step run."""
    await ground.send(ground.sign(commands.SequenceLoad(sequence="dawn", steps=steps)))
    assert last(await ground.send(ground.sign(commands.SequenceStart(sequence="dawn")))).code == "ok"
    ground.mission_ns = NOW_NS + S
    await until(lambda: commands.SetPowerCap(power_w=5.0) in ground.executed)


async def test_nothing_scheduled_is_done_or_skipped_while_a_step_of_the_clock_is_held(tmp_path: Path) -> None:
    insert = commands.ScheduleInsert(t_ns=NOW_NS + 500, command="report_ledger")
    async with open_ground(tmp_path) as ground:
        await ground.send(ground.sign(insert))
        ground.holding = True
        ground.mission_ns = NOW_NS + 500
        await asyncio.sleep(3 * module.SCHEDULE_TICK_S)
        assert commands.ReportLedger() not in ground.executed
        # What is given now is taken by the time in force.
        more = commands.ScheduleInsert(t_ns=NOW_NS + 900, command="ping")
        assert last(await ground.send(ground.sign(more))).code == "ok"
        ground.holding = False
        await until(lambda: commands.ReportLedger() in ground.executed)


@pytest.mark.parametrize("step_s", [3600, -3600, 1024 * 7 * 86400])
async def test_a_sequence_under_way_keeps_its_delays_across_a_step_of_mission_time(
    tmp_path: Path, step_s: int
) -> None:
    async with open_ground(tmp_path) as ground:
        await begin_sequence(ground, LIFTED_LATER)
        at_ns = ground.schedule.next_ns
        assert at_ns == NOW_NS + 61 * S
        alone = NOW_NS + 10**6 * S
        await ground.send(ground.sign(commands.ScheduleInsert(t_ns=alone, command="ping")))
        ground.commanding.follow_step(step_s * S)
        ground.mission_ns = NOW_NS + (1 + step_s) * S
        await until(lambda: not ground.commanding._step_ns)
        report = await ground.database.run(ground.schedule.report)
        assert {e.execute_ns for e in report.entries if e.sequence} == {
            at_ns + step_s * S,
            at_ns + (step_s + 60) * S,
        }
        assert {e.execute_ns for e in report.entries if not e.sequence} <= {alone}
        ground.mission_ns += 121 * S
        await until(lambda: commands.SetPowerCap(power_w=None) in ground.executed)
        assert commands.ReportLedger() not in ground.executed  # 60 s late, with the last one: skipped
        events = [p for p in await ground.send() if isinstance(p, Event)]
        assert [e.name for e in events] == ["sequence.partial"]


async def test_of_a_sequence_run_by_half_the_ground_learns_and_its_cap_is_lifted(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        await begin_sequence(ground, LIFTED_LATER)
        ground.mission_ns = NOW_NS + 3600 * S
        await until(lambda: ground.schedule.next_ns is None)
        packets = await ground.send()
        assert (await ground.database.run(state.begin_boot)).cap_w is None
    assert ground.executed[-1] == commands.SetPowerCap(power_w=None)
    assert commands.ReportLedger() not in ground.executed
    (event,) = [p for p in packets if isinstance(p, Event)]
    assert (event.name, event.evidence) == ("sequence.partial", {"sequence": "dawn", "ran": 2, "missed": 1})


async def test_a_sequence_that_ran_as_a_whole_is_no_event(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        await begin_sequence(ground, LIFTED_LATER)
        for second in (61, 121):
            ground.mission_ns = NOW_NS + second * S
            await asyncio.sleep(0)
            await until(lambda: (ground.schedule.next_ns or 2**63) > (ground.mission_ns or 0))
        packets = await ground.send()
    assert not [p for p in packets if isinstance(p, Event)]


@pytest.mark.parametrize(
    ("late", "executed"),
    [
        (commands.SetPowerCap(power_w=None), True),
        (commands.SetPowerCap(power_w=9.0), True),
        (commands.SetPowerCap(power_w=7.0), False),
        (commands.SetFdirRow(row="*", state="enabled"), True),
        (commands.SetFdirRow(row="*", state="disabled"), False),
        (commands.ExternalControl(on=False), True),
        (commands.ExternalControl(on=True), False),
        (commands.SetMode(mode="nominal"), False),
    ],
)
async def test_of_what_is_late_only_the_end_of_a_restriction_is_carried_out(
    tmp_path: Path, late: Arguments, executed: bool
) -> None:
    args = commands.make_step(late, delay_s=0.0).args
    async with open_ground(tmp_path) as ground:
        await ground.send(ground.sign(commands.SetPowerCap(power_w=8.0)))
        insert = commands.ScheduleInsert(t_ns=NOW_NS + 500, command=late.name, args=args)
        await ground.send(ground.sign(insert))
        ground.mission_ns = NOW_NS + 501 + SKIP_AFTER_NS
        await until(lambda: ground.schedule.next_ns is None)
        await ground.send()
    assert (late in ground.executed) == executed


@pytest.mark.parametrize("copies", [1, 2, 3])
async def test_a_struck_entry_is_outvoted_or_not_executed(tmp_path: Path, copies: int) -> None:
    insert = commands.ScheduleInsert(t_ns=NOW_NS + 500, command="set_power_cap", args={"power_w": 5.0})
    async with open_ground(tmp_path) as ground:
        await ground.send(ground.sign(insert))

        def strike(connection: sqlite3.Connection) -> None:
            record = bytearray(connection.execute("SELECT record FROM schedule").fetchone()[0])
            for copy in range(copies):
                record[copy * len(record) // 3 + 10] ^= 1
            connection.execute("UPDATE schedule SET record = ?", (bytes(record),))

        await ground.database.run(strike)
        ground.mission_ns = NOW_NS + 500
        await until(lambda: ground.schedule.next_ns is None)
        answer = last(await ground.send())
        executed = any(isinstance(a, commands.SetPowerCap) for a in ground.executed)
        assert (answer.entry, answer.code, executed) == (
            (1, "ok", True) if copies < 3 else (1, "damaged", False)
        )


async def test_an_entry_found_at_another_time_than_it_says_is_not_executed(tmp_path: Path) -> None:
    insert = commands.ScheduleInsert(t_ns=NOW_NS + 10**9, command="set_power_cap", args={"power_w": 5.0})
    async with open_ground(tmp_path) as ground:
        await ground.send(ground.sign(insert))
        await ground.database.run(lambda c: c.execute("UPDATE schedule SET t_ns = ?", (NOW_NS - 1,)))
        await ground.database.run(ground.schedule.look)
        await until(lambda: ground.schedule.next_ns is None)
        assert last(await ground.send()).code == "damaged"
        assert not any(isinstance(a, commands.SetPowerCap) for a in ground.executed)


async def fill_with_jobs(ground: Ground) -> int:
    """Command jobs until one is refused; return how many are there."""
    for number in range(99):
        job = commands.Infer(job=f"j{number}", prompt="x" * 16_000, max_tokens=4)
        await ground.send(ground.sign(job))
        if job not in ground.executed:
            return number
    raise AssertionError("no job was refused")


def unused_pages(connection: sqlite3.Connection) -> int:
    most, held, unused = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("max_page_count", "page_count", "freelist_count")
    )
    return int(most - held + unused)


async def test_jobs_leave_the_pages_that_commands_need(tmp_path: Path) -> None:
    async with open_ground(tmp_path, max_bytes=1 << 20) as ground:
        assert await fill_with_jobs(ground) > 3
        assert await ground.database.run(unused_pages) >= KEPT_PAGES
        await ground.send(ground.sign(commands.Cancel(job="j0")))
        assert ground.executed[-1] == commands.Cancel(job="j0")


async def test_telemetry_gives_way_to_a_command_but_not_to_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = commands.Cancel(job="j")
    async with open_ground(tmp_path) as ground:
        await ground.send(ground.sign(commands.Infer(job="j", prompt="p", max_tokens=4)))
        for _ in range(5):
            ground.recorder.event(Severity.INFO, "a", "t")
        await ground.recorder.flush()
        _, held = await ground.database.run(ground.spool.size)
        record = ground.authenticator.record

        def full(connection: sqlite3.Connection, verification: Verification) -> None:
            if ground.spool.size(connection)[1] >= held:
                raise StoreFull("no page is left")
            record(connection, verification)

        monkeypatch.setattr(ground.authenticator, "record", full)
        job = commands.Infer(job="late", prompt="p", max_tokens=4)
        await ground.send(ground.sign(job))
        assert job not in ground.executed
        assert (await ground.database.run(ground.spool.size))[1] == held
        payload = ground.sign(cancel)
        await ground.send(payload)
        assert ground.executed[-1] == cancel
        assert (await ground.database.run(ground.spool.dropped_ranges)) != []
        await ground.send(payload)
        assert ground.executed.count(cancel) == 1, "once, though it was tried twice"


async def test_a_full_disk_leaves_the_scheduled_command_where_it_is_and_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SCHEDULE_REST_S", 0.2)
    insert = commands.ScheduleInsert(t_ns=NOW_NS + 500, command="set_power_cap", args={"power_w": 5.0})
    async with open_ground(tmp_path) as ground:
        await ground.send(ground.sign(insert))
        append = ground.spool.append

        def full(*_: object) -> int:
            raise StoreFull("no room")

        wakes: list[tuple[float, bool]] = []
        wake = ground.commanding._wake

        def counted() -> None:
            wakes.append((time.monotonic(), ground.commanding._stored))
            wake()

        monkeypatch.setattr(ground.commanding, "_wake", counted)
        monkeypatch.setattr(ground.spool, "append", full)
        ground.mission_ns = NOW_NS + 500

        def tries() -> int:
            return sum("not executed" in record.message for record in caplog.records)

        await until(lambda: tries() >= 4)
        assert tries() <= len(wakes)
        rests = [after - before for (before, stored), (after, _) in itertools.pairwise(wakes) if not stored]
        assert min(rests) >= 0.19
        assert ground.executed == [insert]
        # While it is tried it is taken out, and put back.
        await until(lambda: ground.schedule.next_ns == NOW_NS + 500)
        monkeypatch.setattr(ground.spool, "append", append)
        await until(lambda: commands.SetPowerCap(power_w=5.0) in ground.executed)


async def test_rates_are_remembered(tmp_path: Path) -> None:
    async with open_ground(tmp_path) as ground:
        await ground.send(ground.sign(commands.SetRates(housekeeping_s=10.0)))
        assert (await ground.database.run(state.begin_boot)).rates == state.Rates(10.0, None)
