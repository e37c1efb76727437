"""What another run of the tests has on this machine is no leak of ours; what we leave is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import own_run
import pytest

HOLDS = """
import mmap, sys, time
kept = []
for path in sys.argv[1:]:
    file = open(path, "w+b")
    file.write(b"rows")
    file.flush()
    kept.append(mmap.mmap(file.fileno(), 4))  # also when the file is closed
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holders():
    """Start processes that make files and hold them; end them."""
    started: list[subprocess.Popen[str]] = []

    def start(*paths: Path, own: bool) -> subprocess.Popen[str]:
        name = own_run.RUN.partition("=")[0]
        environment = {key: value for key, value in os.environ.items() if own or key != name}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, *paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        return process

    yield start
    for process in started:
        process.communicate("")


def test_an_arena_of_another_run_is_no_leak(tmp_path: Path, holders) -> None:
    (tmp_path / "penumbra-old-1").write_text("there before")
    before = own_run.arenas(tmp_path)
    foreign = tmp_path / "penumbra-n-1"
    (tmp_path / "penumbra-bench-1-a").mkdir()
    holders(foreign, tmp_path / "penumbra-bench-1-a" / "arena", own=False)
    assert own_run.left_since(before, tmp_path, 0) == []


def test_an_arena_between_two_nodes_of_another_run_is_its_bench_s(tmp_path: Path, holders) -> None:
    (tmp_path / "penumbra-n-1").write_text("rows")
    holders(tmp_path / "penumbra-n-1.bench", own=False)
    assert own_run.left_since(set(), tmp_path, 0) == []


@pytest.mark.parametrize("alive", [True, False])
def test_an_arena_of_ours_is_a_leak(tmp_path: Path, holders, alive: bool) -> None:
    process = holders(tmp_path / "penumbra-n-1", own=True)
    assert process.pid in own_run.own_processes()
    if not alive:
        process.communicate("")
    assert own_run.left_since(set(), tmp_path, 0.1) == ["penumbra-n-1"]
    if not alive:
        assert process.pid not in own_run.own_processes()


def test_what_goes_within_a_while_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = tmp_path / "penumbra-n-1"
    arena.write_text("rows")
    monkeypatch.setattr(own_run.time, "sleep", lambda _: arena.unlink())
    assert own_run.left_since(set(), tmp_path) == []
