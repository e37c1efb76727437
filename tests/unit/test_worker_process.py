from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from node.inference import protocol
from node.worker_process import WorkerExit, WorkerProcess, describe_exit

WORKER = Path(__file__).parents[1] / "scripted_worker.py"


class Owner:
    """Starts one generation of the scripted worker and notes what it says."""

    def __init__(self, directory: Path, *arguments: str, argv: list[str] | None = None) -> None:
        self.messages: list[protocol.FromWorker] = []
        self.faults: list[tuple[str, str]] = []
        self.on_ready: Callable[[], None] = lambda: None
        path = directory / "worker.sock"
        own = [sys.executable, str(WORKER), "--socket", str(path), "--generation", "7", *arguments]
        self.process = WorkerProcess(
            own if argv is None else argv,
            socket_path=path,
            log_path=directory / "worker.log",
            generation=7,
            on_message=self.on_message,
            on_fault=self.on_fault,
        )

    def on_message(self, message: protocol.FromWorker) -> None:
        self.messages.append(message)
        if isinstance(message, protocol.Ready):
            self.on_ready()

    def on_fault(self, monitor: str, reason: str) -> None:
        self.faults.append((monitor, reason))
        self.process.kill()

    async def run(self) -> WorkerExit:
        return await asyncio.wait_for(self.process.run(), 20)


def test_every_kind_of_exit_becomes_a_sentence() -> None:
    assert describe_exit(0) == "exited with code 0"
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "killed by signal 9 (SIGKILL)"
    assert describe_exit(-250) == "killed by signal 250"


async def test_a_worker_says_ready_and_stops_in_order(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    owner.on_ready = lambda: owner.process.send(protocol.Shutdown()) and None
    assert await owner.run() == WorkerExit(0, "exited with code 0")
    assert isinstance(owner.messages[0], protocol.Ready)
    assert owner.faults == []
    assert owner.process.pid is None
    assert not owner.process.send(protocol.Ping(key=1))
    assert not (tmp_path / "worker.sock").exists()


async def test_the_socket_is_for_the_owner_only(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    modes: list[int] = []

    def look() -> None:
        modes.append((tmp_path / "worker.sock").stat().st_mode & 0o777)
        owner.process.kill()

    owner.on_ready = look
    await owner.run()
    assert modes == [0o600]


async def test_stop_kills_a_stopped_process_within_its_bound(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    stopped = asyncio.Event()

    def freeze() -> None:
        assert owner.process.pid is not None
        os.kill(owner.process.pid, signal.SIGSTOP)
        stopped.set()

    owner.on_ready = freeze
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.run(), name="test.run")
        await stopped.wait()
        async with asyncio.timeout(2.0):
            await owner.process.stop(0.3)
    assert run.result() == WorkerExit(-9, "killed by signal 9 (SIGKILL)")


@pytest.mark.parametrize(
    ("start", "reason"),
    [("wrong_generation", "generation 8, 7 was expected"), ("garbage", "unreadable message")],
)
async def test_what_breaks_the_protocol_is_a_fault(tmp_path: Path, start: str, reason: str) -> None:
    owner = Owner(tmp_path, "--start", start)
    assert (await owner.run()).returncode == -9
    assert owner.messages == []
    ((monitor, text),) = owner.faults
    assert monitor == "worker.protocol"
    assert reason in text


async def test_a_first_message_other_than_ready_is_a_fault(tmp_path: Path) -> None:
    code = (
        "import socket,sys,time\nfrom node.inference import protocol as p\n"
        f"s=socket.socket(socket.AF_UNIX);s.connect({str(tmp_path / 'worker.sock')!r})\n"
        "s.sendall(p.encode(p.Pong(key=1)));time.sleep(60)\n"
    )
    owner = Owner(tmp_path, argv=[sys.executable, "-c", code])
    await owner.run()
    assert owner.faults == [("worker.protocol", "first message was Pong, Ready was expected")]


async def test_a_closed_socket_of_a_running_process_is_a_fault(tmp_path: Path) -> None:
    code = (
        "import socket,time\n"
        f"s=socket.socket(socket.AF_UNIX);s.connect({str(tmp_path / 'worker.sock')!r})\n"
        "s.close();time.sleep(60)\n"
    )
    owner = Owner(tmp_path, argv=[sys.executable, "-c", code])
    await owner.run()
    assert owner.faults == [("worker.socket", "closed its socket but goes on running")]


async def test_last_words_are_delivered_and_an_exit_is_no_fault(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    start = protocol.Start(job="j", prompt="!fatal_at=0", max_tokens=4)
    owner.on_ready = lambda: owner.process.send(start) and None
    assert (await owner.run()).returncode == 1
    assert owner.messages[-1] == protocol.Fatal(reason="retries exhausted")
    assert owner.faults == []


async def test_a_command_that_cannot_be_started_is_an_exit_with_a_reason(tmp_path: Path) -> None:
    ended = await Owner(tmp_path, argv=[str(tmp_path / "no-such-program")]).run()
    assert ended.returncode is None
    assert "no-such-program" in ended.reason
    missing = Owner(tmp_path / "missing")
    ended = await missing.run()
    assert ended.returncode is None
    assert "worker.sock" in ended.reason


async def test_killed_before_it_was_started_it_dies_at_once(tmp_path: Path) -> None:
    owner = Owner(tmp_path, "--start", "hang")
    owner.process.kill()
    assert (await owner.run()).returncode == -9


async def test_cancelling_kills_and_reaps(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    ready = asyncio.Event()
    owner.on_ready = ready.set
    pid = None
    async with asyncio.TaskGroup() as group:
        run = group.create_task(owner.process.run(), name="test.run")
        await ready.wait()
        pid = owner.process.pid
        run.cancel()
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_second_connection_is_refused(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    ready = asyncio.Event()
    owner.on_ready = ready.set
    async with asyncio.TaskGroup() as group:
        group.create_task(owner.run(), name="test.run")
        await ready.wait()
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "worker.sock"))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        await writer.wait_closed()
        await owner.process.stop(5)
    assert owner.faults == []
