"""The KV arena: commits survive a kill at any instant, and one process holds it at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from node.inference.arena import ARENA_VERSION, PAGE, ArenaShape, ArenaState, KvArena, arena_path
from telemetry.errors import PenumbraError

SHAPE = ArenaShape(
    version=ARENA_VERSION, image_id="0123456789abcdef", layers=2, kv_heads=1, positions=64, head_dim=32
)


def test_views_lie_where_the_layout_says_and_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    first = KvArena(path, SHAPE)
    first.kv[3, 63, 31] = 1.5
    first.tokens[:3] = [7, 8, 9]
    first.commit(ArenaState(job="j", prompt_tokens=3))
    size = first.size_bytes
    first.close()
    second = KvArena(path, SHAPE)
    assert path.stat().st_size == size
    assert second.kv.shape == (4, 64, 32)
    assert second.kv.ctypes.data % PAGE == 0
    assert second.kv[3, 63, 31] == 1.5
    assert second.tokens[:3].tolist() == [7, 8, 9]
    assert second.state == ArenaState(serial=1, job="j", prompt_tokens=3)
    second.close()


@pytest.mark.parametrize("field", ["image_id", "positions", "layers", "head_dim"])
def test_another_shape_starts_empty(tmp_path: Path, field: str) -> None:
    path = tmp_path / "arena"
    first = KvArena(path, SHAPE)
    first.commit(ArenaState(job="old"))
    first.close()
    value = "fedcba9876543210" if field == "image_id" else getattr(SHAPE, field) * 2
    other = KvArena(path, msgspec.structs.replace(SHAPE, **{field: value}))
    assert other.state.job == ""
    other.close()


def test_a_torn_state_record_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    arena = KvArena(path, SHAPE)
    for count in (1, 2, 3):
        arena.commit(ArenaState(job="j", generated=count))
    newest = 1 + arena.state.serial % 2
    arena.close()
    with path.open("r+b") as file:
        file.seek(newest * PAGE + 12)
        byte = file.read(1)[0]
        file.seek(newest * PAGE + 12)
        file.write(bytes([byte ^ 4]))
    again = KvArena(path, SHAPE)
    assert again.state.generated == 2
    again.close()


def test_both_state_records_gone_means_no_job(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    arena = KvArena(path, SHAPE)
    arena.commit(ArenaState(job="j"))
    arena.close()
    with path.open("r+b") as file:
        for page in (1, 2):
            file.seek(page * PAGE)
            file.write(b"\xff" * 16)
    again = KvArena(path, SHAPE)
    assert again.state == ArenaState()
    again.close()


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    program = (
        "import sys,pathlib,msgspec; from node.inference.arena import *\n"
        "s = msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=ArenaShape)\n"
        "a = KvArena(pathlib.Path(sys.argv[1]), s); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path), msgspec.msgpack.encode(SHAPE).hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(PenumbraError, match="held by another process"):
            KvArena(path, SHAPE, lock_timeout_s=0.1)
        os.kill(holder.pid, signal.SIGKILL)
        KvArena(path, SHAPE, lock_timeout_s=5.0).close()
    finally:
        holder.kill()
        holder.communicate()


def test_a_directory_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match="shared memory"):
        KvArena(tmp_path / "no" / "arena", SHAPE)


def test_the_name_is_a_function_of_node_and_state_directory(tmp_path: Path) -> None:
    assert arena_path("sim-1", tmp_path) == arena_path("sim-1", tmp_path / "x" / "..")
    assert arena_path("sim-1", tmp_path) != arena_path("sim-1", tmp_path / "x")
    assert arena_path("sim-1", tmp_path).name.startswith("penumbra-sim-1-")
