"""Shared memory that a dead bench left is cleared; that of the living, and of nodes on their own, is not."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from hil import shared_memory
from hil.shared_memory import MARK, clear_left, owned, remove_owned, scratch
from telemetry.errors import PenumbraError

BENCH = """
import sys
from pathlib import Path
from hil import shared_memory
shared_memory.SHARED_MEMORY = Path(sys.argv[1])
with shared_memory.owned(Path(sys.argv[1]) / "penumbra-n-1"), shared_memory.scratch("bench") as folder:
    (folder.parent / "penumbra-n-1").write_text("rows")
    (folder / "arena").write_text("rows")
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in the place of /dev/shm, which other tests use meanwhile."""
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    return tmp_path


def start(shared: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BENCH, str(shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_owned_is_gone_afterwards_also_after_an_error(shared: Path) -> None:
    path = shared / "penumbra-n-1"

    def use() -> None:
        with owned(path):
            path.write_text("rows")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        use()
    with scratch("bench") as folder:
        (folder / "arena").write_text("rows")
    assert list(shared.iterdir()) == []


def test_a_dead_bench_is_cleared_up_after_a_living_one_is_not(shared: Path) -> None:
    with start(shared) as process:
        assert clear_left() == []
        assert len(list(shared.iterdir())) == 4
        with pytest.raises(PenumbraError, match="in use by another flight"), owned(shared / "penumbra-n-1"):
            pass
        process.kill()
        process.wait()
        assert [path.name for path in clear_left()][-1] == "penumbra-n-1"
    assert list(shared.iterdir()) == []


def test_the_next_flight_clears_what_is_left(shared: Path) -> None:
    with start(shared) as process:
        process.kill()
    with owned(shared / "penumbra-n-2"):
        assert [path.name for path in shared.iterdir()] == ["penumbra-n-2" + MARK]


def test_what_a_worker_holds_and_what_bears_no_mark_is_left_alone(shared: Path) -> None:
    held, own = shared / "penumbra-n-1", shared / "penumbra-n-2"
    own.write_text("a node's own")
    held.write_text("rows")
    (shared / (held.name + MARK)).touch()
    (shared / ("something-else" + MARK)).touch()
    with held.open("rb") as worker:
        fcntl.flock(worker, fcntl.LOCK_EX)
        assert clear_left() == []
        assert held.exists()
    assert clear_left() == [held]
    assert sorted(path.name for path in shared.iterdir()) == ["penumbra-n-2", "something-else" + MARK]


def test_a_bench_about_to_end_removes_what_is_its_own(shared: Path) -> None:
    path = shared / "penumbra-n-1"
    with owned(path):
        path.write_text("rows")
        remove_owned()
        assert list(shared.iterdir()) == []
