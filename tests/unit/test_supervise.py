"""The parent of the node: what it decides, and what it does with real children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from node import watchdog
from node.supervise import PARENT_FD_ENV
from node.supervision import (
    AskStop,
    End,
    Exited,
    Fed,
    Kill,
    Limits,
    Start,
    StopAsked,
    Supervision,
    Tick,
    Wait,
)

LIMITS = Limits(feed_s=5.0, start_s=20.0, stop_s=8.0, quick_s=10.0, wait_s=1.0, longest_wait_s=4.0)


def begun() -> Supervision:
    supervision = Supervision(LIMITS)
    assert supervision.begin(0.0) == [Start()]
    return supervision


def test_a_node_that_feeds_is_left_alone():
    supervision = begun()
    for now_s in range(1, 100, 4):
        assert supervision.handle(Fed(), now_s) == []
        assert supervision.handle(Tick(), now_s + 3.9) == []


def test_a_node_that_stops_feeding_is_killed_once_and_started_again():
    supervision = begun()
    supervision.handle(Fed(), 15.0)
    assert supervision.handle(Tick(), 19.9) == []
    assert supervision.handle(Tick(), 20.0) == [Kill("it has not fed for 5 s")]
    assert supervision.handle(Tick(), 30.0) == []
    assert supervision.handle(Exited(-9), 30.1) == [Wait(1.0, "signal 9")]
    assert supervision.handle(Tick(), 31.0) == []
    assert supervision.handle(Tick(), 31.1) == [Start()]
    assert supervision.restarts == 1


def test_a_node_that_never_feeds_is_killed_after_the_time_for_its_start():
    supervision = begun()
    assert supervision.handle(Tick(), 19.0) == []
    assert supervision.handle(Tick(), 20.0) == [Kill("it did not feed within 20 s of its start")]


@pytest.mark.parametrize("code", [75, 70, -6, 1])
def test_crashes_and_restarts_asked_for_start_it_again_and_short_lives_wait_longer(code):
    supervision, now_s, waits = begun(), 0.0, []
    for _ in range(4):
        now_s += 2.0
        (wait,) = supervision.handle(Exited(code), now_s)
        assert isinstance(wait, Wait)
        waits.append(wait.for_s)
        now_s += wait.for_s
        assert supervision.handle(Tick(), now_s) == [Start()]
    assert waits == [1.0, 2.0, 4.0, 4.0]
    (wait,) = supervision.handle(Exited(code), now_s + 10.0)
    assert wait == Wait(1.0, wait.why)


@pytest.mark.parametrize("code", [0, 2])
def test_an_ordered_end_and_what_the_user_must_mend_end_it(code):
    assert begun().handle(Exited(code), 1.0) == [End(code)]


def test_a_stop_is_passed_on_and_bounded():
    supervision = begun()
    supervision.handle(Fed(), 1.0)
    assert supervision.handle(StopAsked(), 2.0) == [AskStop()]
    assert supervision.handle(StopAsked(), 2.5) == []
    assert supervision.handle(Tick(), 9.9) == []
    assert supervision.handle(Tick(), 10.0) == [Kill("it did not stop within 8 s")]
    assert supervision.handle(Exited(-9), 10.1) == [End(137)]


def test_a_stop_between_two_lives_ends_at_once():
    supervision = begun()
    supervision.handle(Exited(70), 1.0)
    assert supervision.handle(StopAsked(), 1.5) == [End(0)]


def test_times_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="above 0"):
        Limits(feed_s=0.0)


def test_both_ends_call_the_pipe_the_same():
    assert PARENT_FD_ENV == watchdog.PARENT_FD_ENV


CHILD = """
import os, sys, time
fd = int(os.environ["PENUMBRA_WATCHDOG_FD"])
marks, feeds, code = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(marks, "a") as file:
    file.write(f"{os.getpid()}\\n")
lives = len(open(marks).readlines())
for _ in range(feeds if lives == 1 else 3):
    os.write(fd, b"\\1")
    time.sleep(0.05)
if lives == 1 and code == 99:
    time.sleep(600)
sys.exit(code if lives == 1 else 0)
"""
PARENT = """
import sys
from node.supervise import Limits, main
limits = Limits(feed_s=0.6, start_s=20.0, stop_s=5.0, quick_s=5.0, wait_s=0.05)
command = [sys.executable, "-c", *sys.argv[1:]]
sys.exit(main(command, limits, lambda text: print(text, flush=True)))
"""


def parent(tmp_path: Path, feeds: int, code: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PARENT, CHILD, str(tmp_path / "marks"), str(feeds), str(code)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "words"),
    [(99, "killed: it has not fed for 0.6 s"), (75, "ended (exit code 75)"), (70, "ended (exit code 70)")],
)
def test_a_real_child_that_hangs_or_dies_is_started_again(tmp_path, code, words):
    with parent(tmp_path, 3, code) as process:
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert words in out
    assert len((tmp_path / "marks").read_text().splitlines()) == 2


def test_a_real_child_is_stopped_with_its_parent(tmp_path):
    with parent(tmp_path, 10_000, 0) as process:
        deadline = time.monotonic() + 20
        while not (tmp_path / "marks").exists() or not (tmp_path / "marks").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    (pid,) = (tmp_path / "marks").read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_child_hears_of_the_death_of_its_parent(tmp_path):
    with parent(tmp_path, 10_000, 0) as process:
        deadline = time.monotonic() + 20
        while not (tmp_path / "marks").exists() or not (tmp_path / "marks").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.communicate(timeout=20)
    (pid,) = (tmp_path / "marks").read_text().split()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)
