"""The first signal asks, its echo changes nothing, a later one ends at once; what is tied dies too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hil import ending
from hil.ending import Ending, interrupt
from hil.processes import all_processes, descendants, same

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_once_and_its_echo_changes_nothing(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    asked: list[str] = []
    end = Ending()
    with end.watching(), end.asking(lambda: asked.append("stop")):
        for _ in range(3):
            signal.raise_signal(number)
    assert asked == ["stop"]
    assert end.asked
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_before_there_is_anything_to_ask_interrupts() -> None:
    end = Ending()
    with pytest.raises(KeyboardInterrupt), end.watching():
        signal.raise_signal(signal.SIGHUP)


def test_what_begins_after_the_signal_is_asked_at_once() -> None:
    end = Ending()
    with end.watching(), end.asking(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), end.asking(interrupt):
            pytest.fail("the reference run was begun")


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        end = Ending()
        with end.watching():
            signal.raise_signal(signal.SIGHUP)
        ending.end_as_by_ctrl_c()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert not end.asked
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


TWICE = """
import time
from hil.ending import ECHO_S, Ending
end = Ending()
end.at_once = lambda: print("at once", flush=True)
with end.watching(), end.asking(lambda: print("asked", flush=True)):
    print("up", flush=True)
    time.sleep(60)
"""


def test_a_later_signal_ends_at_once_whatever_is_under_way() -> None:
    with python(TWICE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        time.sleep(ending.ECHO_S + 0.1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "at once\n"
        assert process.wait(30) == 130


IN_ORDER = """
import asyncio
from hil.ending import end_as_by_ctrl_c
end_as_by_ctrl_c()
async def main():
    try:
        print("up", flush=True)
        await asyncio.sleep(60)
    finally:
        print("cleared", flush=True)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    raise SystemExit(130)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_other_commands_end_in_order_by_any_of_the_three(number: signal.Signals) -> None:
    with python(IN_ORDER) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.read() == "cleared\n"
        assert process.wait(30) == 130


BENCH = """
import subprocess, sys, time
from hil.tether import tied
subprocess.Popen(tied([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]))
time.sleep(60)
"""


def test_what_is_tied_dies_with_a_killed_bench() -> None:
    with python(BENCH) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        (child,) = descendants(process.pid, all_processes())
        process.kill()
    deadline_s = time.monotonic() + 30
    while same(child) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not same(child)


def test_a_program_whose_parent_is_gone_is_not_begun(tmp_path: Path) -> None:
    from hil import tether

    made = tmp_path / "made"
    command = [sys.executable, "-I", tether.__file__, str(os.getppid()), "/usr/bin/touch", str(made)]
    assert subprocess.run(command, check=False).returncode == tether.EXIT_ORPHAN
    assert not made.exists()


def test_a_tied_program_that_does_not_exist_says_so(tmp_path: Path) -> None:
    from hil.tether import tied

    done = subprocess.run(tied([str(tmp_path / "none")]), capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert done.stderr == f"{tmp_path / 'none'}: No such file or directory\n"


LOADING = """
import builtins, time
from hil import start
load = builtins.__import__
def slow(name, *arguments):
    if name == "hil.cli":
        print("loading", flush=True)
        time.sleep(60)
    return load(name, *arguments)
builtins.__import__ = slow
start.main()
"""


def test_ctrl_c_while_the_command_is_loaded_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOADING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == -signal.SIGINT


CONVERTED = """
from hil import cli
def app():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error
cli.app = app
cli.main()
"""


def test_ctrl_c_that_an_extension_made_an_import_error_of_is_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", CONVERTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
