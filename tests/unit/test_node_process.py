"""The watchdog of the bus: restarts what dies, names why, and leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hil.node_process import NodeProcess, describe_exit
from hil.processes import all_processes, descendants, find_worker, parse_stat, read_process, same
from telemetry.errors import PenumbraError

# A stand-in for the node: starts a child whose command line names the worker module, and waits.
NODE = """
import signal, subprocess, sys, time
# Whoever sees the child may already stop us.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "node.inference.worker"],
                         start_new_session=True)
def leave(*_):
    child.kill(); child.wait(); sys.exit(0)
signal.signal(signal.SIGTERM, leave)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
print("up", flush=True)
while True: time.sleep(0.05)
"""
DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\n"
DEAF += "while True: time.sleep(1)"


async def until(done: Callable[[], object]) -> None:
    for _ in range(500):
        if done():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def make(tmp_path: Path, code: str, events: list[str] | None = None) -> NodeProcess:
    log = events if events is not None else []
    return NodeProcess(
        python(code),
        tmp_path / "node.log",
        on_event=lambda name, text: log.append(f"{name}: {text}"),
        restart_delay_s=0.05,
    )


async def test_restarts_a_killed_node_and_ends_its_orphan(tmp_path: Path) -> None:
    events: list[str] = []
    node = make(tmp_path, NODE, events)
    running = asyncio.create_task(node.run())
    await until(node.worker_pid)
    first, worker = node.pid, node.worker_pid()
    assert first is not None
    assert worker is not None
    assert node.kill_node()
    await until(lambda: node.pid not in {None, first} and node.worker_pid())
    assert read_process(worker) is None  # the orphan of the first life is gone before the second begins
    assert node.orphans_killed == 1
    assert node.restarts == 1
    assert node.lives[0].how == "killed by SIGKILL"
    assert any(e.startswith("node.died") for e in events)
    second = node.worker_pid()
    assert await node.stop() == "exit code 0"
    await running
    assert node.pid is None
    assert second is not None
    assert read_process(second) is None
    assert node.restarts == 1  # an ordered stop is no reason to restart


async def test_worker_faults_reach_the_worker_only(tmp_path: Path) -> None:
    node = make(tmp_path, NODE)
    assert not node.kill_worker()  # none yet
    assert not node.kill_node()
    running = asyncio.create_task(node.run())
    await until(node.worker_pid)
    worker = node.worker_pid()
    assert worker is not None
    assert node.stop_worker()
    await until(lambda: (p := read_process(worker)) is not None and p.state == "T")
    assert node.kill_worker()  # SIGKILL ends a stopped process too
    await until(lambda: read_process(worker) is None)
    assert node.pid is not None
    await node.stop()
    await running


async def test_stop_kills_a_deaf_node_after_the_bound(tmp_path: Path) -> None:
    events: list[str] = []
    node = make(tmp_path, DEAF, events)
    running = asyncio.create_task(node.run())
    await until(
        lambda: "up" in (tmp_path / "node.log").read_text() if (tmp_path / "node.log").exists() else 0
    )
    assert await node.stop(bound_s=0.2) == "killed by SIGKILL"
    await running
    assert any(e.startswith("node.overrun") for e in events)


async def test_cancelled_run_leaves_nothing(tmp_path: Path) -> None:
    node = make(tmp_path, NODE)
    running = asyncio.create_task(node.run())
    await until(node.worker_pid)
    pid, worker = node.pid, node.worker_pid()
    assert pid is not None
    assert worker is not None
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert read_process(pid) is None
    assert read_process(worker) is None


async def test_configuration_error_is_not_restarted_and_shows_the_log(tmp_path: Path) -> None:
    node = make(tmp_path, "import sys; print('node.toml: [link] url: missing'); sys.exit(2)")
    with pytest.raises(PenumbraError, match=r"\[link\] url: missing"):
        await node.run()
    assert len(node.lives) == 1


async def test_node_that_never_comes_up_ends_the_flight(tmp_path: Path) -> None:
    node = make(tmp_path, "import sys; sys.exit(7)")
    with pytest.raises(PenumbraError, match="does not come up"):
        await node.run()
    assert len(node.lives) == 4


async def test_stop_without_start(tmp_path: Path) -> None:
    assert await make(tmp_path, NODE).stop() == "never started"


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "killed by SIGKILL"), (-250, "killed by signal 250")],
)
def test_exits_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words


def test_stat_line_with_spaces_and_brackets_in_the_name() -> None:
    tail = "S 7 12 13 0 -1 4194560 1 0 0 0 30 4 0 0 20 0 1 0 987654 1 1"
    process = parse_stat(f"12 (a) b (c)) {tail}")
    assert (process.pid, process.parent, process.session, process.state) == (12, 7, 13, "S")
    assert (process.cpu_ticks, process.start_ticks) == (34, 987654)


@pytest.mark.parametrize("line", ["", "12 (name", "12 (name) S 1 2"])
def test_broken_stat_line(line: str) -> None:
    with pytest.raises(ValueError, match="not a line"):
        parse_stat(line)


def test_descendants_and_self() -> None:
    me = read_process(os.getpid())
    assert me is not None
    assert same(me)
    assert os.getpid() in {p.pid for p in descendants(os.getppid(), all_processes())}
    assert find_worker(os.getpid()) is None
    assert read_process(2**22 + 1) is None
