"""The sim board's draw, from a made-up procfs and from a real process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from node.boards import BoardSettings, open_board
from node.boards.sim import SimBoard

SETTINGS = BoardSettings(idle_w=4.0, core_w=4.0, cores=2)


class Proc:
    """A procfs with one process, and a clock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_s = 100.0

    def stat(self, pid: int, ticks: int, *, state: str = "R", start: int = 7, name: str = "a b) (c") -> None:
        (self.root / str(pid)).mkdir(exist_ok=True)
        utime, stime = ticks - ticks // 4, ticks // 4
        fields = [state, *["0"] * 10, str(utime), str(stime), *["0"] * 6, str(start), *["0"] * 30]
        (self.root / str(pid) / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")

    def board(self) -> SimBoard:
        return SimBoard(SETTINGS, clock=lambda: self.now_s, proc=self.root)


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_draw_follows_cpu_time(proc: Proc) -> None:
    board = proc.board()
    assert board.name == "sim"
    assert board.range_w() == (4.0, 12.0)
    assert board.read().power_w == 4.0
    proc.stat(5, 1000)
    board.set_worker(5)
    proc.now_s += 1
    assert board.read().power_w == 4.0  # nothing to compare with yet
    proc.now_s += 2
    proc.stat(5, 1300)  # 3 CPU seconds in 2
    reading = board.read()
    assert reading.power_w == pytest.approx(4.0 + 4.0 * 1.5)
    assert reading.board_c is None
    proc.now_s += 1
    assert board.read().power_w == 4.0


def test_readings_close_together_repeat(proc: Proc) -> None:
    board = proc.board()
    board.set_worker(5)
    proc.stat(5, 0)
    board.read()
    proc.now_s += 1
    proc.stat(5, 100)
    assert board.read().power_w == pytest.approx(8.0)
    proc.now_s += 0.05
    proc.stat(5, 110)
    assert board.read().power_w == pytest.approx(8.0)


def test_draw_stays_within_the_board(proc: Proc) -> None:
    board = proc.board()
    board.set_worker(5)
    proc.stat(5, 0)
    board.read()
    proc.now_s += 1
    proc.stat(5, 100_000)
    assert board.read().power_w == 12.0


@pytest.mark.parametrize("end", ["gone", "zombie", "other", "none"])
def test_a_worker_that_is_gone_draws_nothing(proc: Proc, end: str) -> None:
    board = proc.board()
    board.set_worker(5)
    proc.stat(5, 0)
    board.read()
    proc.now_s += 1
    if end == "gone":
        (proc.root / "5" / "stat").unlink()
    elif end == "zombie":
        proc.stat(5, 100, state="Z")
    elif end == "other":
        proc.stat(5, 100, start=8)  # the number went to another process
    else:
        board.set_worker(None)
    assert board.read().power_w == 4.0


def test_a_new_worker_starts_from_its_own_count(proc: Proc) -> None:
    board = proc.board()
    proc.stat(5, 1000)
    proc.stat(6, 5000)
    board.set_worker(5)
    board.read()
    proc.now_s += 1
    board.set_worker(6)
    assert board.read().power_w == 4.0
    proc.now_s += 1
    proc.stat(6, 5050)
    assert board.read().power_w == pytest.approx(6.0)


def test_a_real_process_that_computes_draws_more_than_one_that_sleeps() -> None:
    board = SimBoard(SETTINGS)
    for code, low, high in (("while True: pass", 4.4, 9.0), ("import time; time.sleep(60)", 4.0, 4.3)):
        with subprocess.Popen([sys.executable, "-S", "-c", code]) as worker:
            try:
                time.sleep(0.5)  # past the interpreter's start
                board.set_worker(worker.pid)
                board.read()
                time.sleep(1.0)
                assert low <= board.read().power_w <= high
            finally:
                worker.kill()
        time.sleep(0.15)
        assert board.read().power_w == 4.0


def test_open_board() -> None:
    board = open_board(SETTINGS)
    assert board.range_w() == (4.0, 12.0)
    assert not board.measures
    assert [offer.state for offer in board.probe()] == ["ok"]


@pytest.mark.parametrize(
    "table", [{"idle_w": 0}, {"core_w": -1.0}, {"cores": 0}, {"idel_w": 4.0}, {"kind": "abacus"}]
)
def test_settings_out_of_range_are_refused(table: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(table, BoardSettings)
