from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import until

from node import commanding as module
from node import state
from node.commanding import Commanding
from node.jobs import JobQueue
from node.recorder import Recorder, Throttle
from telemetry import commands
from telemetry.authenticator import Authenticator
from telemetry.commands import Arguments
from telemetry.database import Database, StoreFull
from telemetry.envelope import COMMAND_VERSION, Command, encode_command, make_command
from telemetry.frame import decode_frame
from telemetry.keys import Key, KeyRing, KeyState
from telemetry.packets import Mode, Packet, SecurityReport, Stage, Verification
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
        self.commanding = Commanding(
            database=database,
            spool=self.spool,
            jobs=self.jobs,
            authenticator=self.authenticator,
            recorder=self.recorder,
            on_executed=self.executed.append,
        )
        self.seq = itertools.count()

    def sign(self, arguments: Arguments, key_id: str = "g") -> bytes:
        return encode_command(
            make_command(
                arguments, key_id=key_id, seq=next(self.seq), t_issue_ns=0, t_expire_ns=2_000, node="n"
            ),
            self.ring,
        )

    async def send(self, *payloads: bytes) -> list[Packet]:
        """Offer messages; return every packet stored once they are handled."""
        for payload in payloads:
            self.commanding.offer(payload)
        await until(self.commanding._inbox.empty)
        # The last one is out of the inbox, but perhaps not through the disk.
        await self.database.run(lambda c: None)
        await asyncio.sleep(0.02)
        await self.recorder.flush()
        records = await self.database.run(lambda c: self.spool.batch(c, 1000, set()))
        frames = [decode_frame(r.frame) for r in records]
        return [f.packet() for f in sorted(frames, key=lambda f: (f.stream, f.seq))]


@contextlib.asynccontextmanager
async def open_ground(tmp_path: Path, ring: KeyRing | None = None) -> AsyncIterator[Ground]:
    database = await Database.open(tmp_path / "node.db")
    ground = Ground(database, KeyRing([Key("g", b"k" * 32)]) if ring is None else ring)
    await database.run(state.create)
    await database.run(ground.spool.create)
    await database.run(ground.jobs.create)
    await database.run(ground.authenticator.load)
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
        assert stages(await ground.send(ground.sign(commands.RetireKey(key="spare"))))[-3:] == DONE
        assert stages(await ground.send(ground.sign(commands.RetireKey(key="g"))))[-1][2] == "key_unchanged"
        assert stages(await ground.send(ground.sign(commands.ActivateKey(key="next"))))[-3:] == DONE
        await ground.send(ground.sign(commands.RetireKey(key="g"), key_id="next"))
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
