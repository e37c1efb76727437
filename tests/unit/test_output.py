"""Output that goes away, fills up, stands still or lacks letters costs what is shown, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hil.output import QUEUE_BYTES, Forgiving

GREEK = "\u03b1\u2581"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        with suppress(OSError):  # some tests close one
            os.close(descriptor)


def test_a_closed_pipe_takes_everything(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    out = Forgiving(writing)
    assert out.write(b"seen") == 4
    assert os.read(reading, 9) == b"seen"
    os.close(reading)
    assert out.write(b"unseen") == 6
    assert isinstance(out.failure, BrokenPipeError)


def test_a_full_disk_takes_everything() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        out = Forgiving(descriptor)
        assert out.write(b"unseen") == 6
        assert out.failure is not None
        assert out.failure.strerror == "No space left on device"
    finally:
        os.close(descriptor)


def test_a_pipe_that_another_process_made_nonblocking_gets_all(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    got = bytearray()
    size = 1 << 18  # more than a pipe holds

    def read() -> None:
        while len(got) < size:
            got.extend(os.read(reading, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    assert Forgiving(writing).write(b"x" * size) == size
    reader.join(30)
    assert len(got) == size


def test_a_reader_that_does_not_read_holds_up_no_view(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hil.output.DRAIN_S", 0.05)
    reading, writing = pipe
    out = Forgiving(writing)
    with out.a_view():
        for _ in range(2 * QUEUE_BYTES // 65536):
            assert out.write(b"x" * 65536) == 65536
    assert out.failure is not None
    os.close(reading)  # and the thread ends: its writes fail
    for thread in threading.enumerate():
        if thread.name == "hil.output.pump":
            thread.join(30)  # the next file may get the number of this descriptor


def test_a_view_comes_whole_and_in_order(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    out = Forgiving(writing)
    with out.a_view():
        for number in range(1000):
            out.write(b"%04d" % number)
    out.write(b"end")
    assert os.read(reading, 8192) == b"".join(b"%04d" % number for number in range(1000)) + b"end"
    assert out.failure is None


def run(*arguments: str, to: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`penumbra` under a shell that does something with its output."""
    line = f'"$0" -m hil.cli "$@" {to}'
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", line, sys.executable, *arguments],
        capture_output=True, text=True, check=False, timeout=60, env=os.environ | environment,
    )  # fmt: skip


# A plain line, a long text, and a table with boxes.
COMMANDS = (["--version"], ["campaign", "report", "{out}"], ["node", "--probe", "{out}/node.toml"])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign's directory, and a node's configuration."""
    from hil.campaign.records import Header, write_header

    path = tmp_path_factory.mktemp("out")
    write_header(path, Header(plan="kills", seed=1))
    (path / "node.toml").write_text((Path(__file__).parents[2] / "docs/node-example.toml").read_text())
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_every_command_prints_in_ascii(command: list[str], out: Path) -> None:
    done = run(*(a.format(out=out) for a in command), PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_reader_that_has_read_enough_is_no_error(command: list[str], out: Path) -> None:
    done = run(*(a.format(out=out) for a in command), to="| true")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_a_result_that_could_not_be_printed_is_an_error_in_one_message(command: list[str], out: Path) -> None:
    done = run(*(a.format(out=out) for a in command), to="> /dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("penumbra: standard output: No space left on device: not all was printed")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("to", ["2> /dev/full", "2>&-", ">&- 2>&-", "2>&1 | true", "<&- >&- 2>&-"])
def test_an_error_that_cannot_be_said_keeps_its_code(to: str, out: Path) -> None:
    done = run("campaign", "report", str(out / "none"), to=to)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_closed_output_becomes_no_other_file(out: Path) -> None:
    """With descriptor 1 closed the next file that is opened would be it, and get what is printed."""
    report = out / "report.md"
    done = run("campaign", "report", str(out), "--markdown", str(report), to=">&-")
    assert done.returncode == 0
    assert report.read_text().startswith("# Fault campaigns")


def test_letters_that_the_encoding_lacks_are_replaced() -> None:
    code = f"from hil.output import Outputs; Outputs.install(); print({GREEK!r} + 'x\\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == b"??x?\n"
