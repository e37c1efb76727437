"""The operator's line: what cannot be read or executed is one message, counted, and the next line goes on."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hil.cli_ground import _line
from hil.operator import MAX_LINE_BYTES, Operator
from hil.uplink import Ticket
from node.uploads import MAX_TABLE_BYTES
from telemetry.archive import Archive
from telemetry.commands import MAX_UPLOAD_BYTES, Arguments, Arm, Ping, SwitchImage
from telemetry.packets import Stage, Verification


class Station:
    """Answers each command by one that it is carried out."""

    def __init__(self) -> None:
        self.given: list[Arguments] = []
        self.uplink = self

    def queue(self, commands: Sequence[Arguments]) -> list[Ticket]:
        self.given += commands
        return [Ticket(each, reports=[answer(each.name)]) for each in commands]


def answer(name: str, **values: Any) -> Verification:
    return Verification(
        **{"key_id": "k", "command_seq": 1, "name": name, "stage": Stage.COMPLETED, "ok": True, "code": "ok"}
        | values
    )


class Line(SimpleNamespace):
    """An operator, its station, and what it said."""

    operator: Operator
    station: Station
    said: list[str]

    async def refused(self, line: bytes) -> str:
        """Execute a line that must be refused, and one that must be executed; return what was said."""
        self.said.clear()
        before = self.operator.failures
        await self.operator.execute(line)
        (said,) = self.said
        assert self.operator.failures == before + 1
        assert self.station.given == []
        await self.operator.execute(b"ping\n")
        assert self.station.given == [Ping()]
        self.station.given.clear()
        assert len(said) < 1000  # The longest names all commands.
        return said


@pytest.fixture
def line() -> Line:
    station, said = Station(), list[str]()
    operator = Operator(cast("Any", station), cast("Archive", None), "n", said.append)
    return Line(operator=operator, station=station, said=said)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"ping \xff\xfe\n", r"ping \xff\xfe: not UTF-8: invalid start byte at byte 5"),
        (b"infer {\"job\": \"a\", \"prompt\": \"\xe4\"}\n", "not UTF-8"),
        (b"p\0i\0n\0g\0\n", "no command"),
        (b"ping " + b"[" * 100_000 + b"]" * 100_000, "ping: its arguments are no"),
        (b'ping {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 32 levels"),
        (b'ping {"a": ' + b"[" * 100_000, "nested deeper than 32 levels"),
        (b'arm {"command": "ping", "args": ' + b'{"a": ' * 40 + b"1" + b"}" * 41, "nested deeper"),
        (b'arm {"command": "ping", "args": {"a": 99999999999999999999}}', "more than 64 bits"),
        (b'ping {"a": ' + b"1" * 6000 + b"}", "out of range"),
        (b'infer {"job": "a", "prompt": "\\ud800", "max_tokens": 1}', "no JSON object"),
        (b"ping " + b"x" * MAX_LINE_BYTES, "a line of more than 1048576 bytes"),
        (b"fire", "no command ''"),
        (b"upload fdir_table 'half", "No closing quotation"),
        (b"upload fdir_table a\0b", "no NUL character"),
        (b"upload image " + b"a" * 5000, "File name too long"),
        (b"products a\0b", "no NUL character"),
    ],
    ids=range(16),
)  # fmt: skip
async def test_a_line_that_cannot_be_read_is_refused_and_the_next_goes_on(
    line: Line, text: bytes, says: str
) -> None:
    assert says in await line.refused(text)


@pytest.mark.parametrize(
    "text", [b"\xef\xbb\xbfping\n", b"\xef\xbb\xbf# a comment\nping", b"ping\r\n", b"ping\t{}"]
)
async def test_a_byte_order_mark_and_other_blanks_are_no_part_of_a_command(line: Line, text: bytes) -> None:
    for each in text.splitlines(keepends=True):
        await line.operator.execute(each)
    assert line.station.given == [Ping()]
    assert line.operator.failures == 0


async def test_fire_is_for_hazardous_commands_and_nothing_else_is_sent(line: Line) -> None:
    said = await line.refused(b"fire ping")
    assert "fire ping: not sent: ping needs no arming, its hazard is none" in said
    assert said.endswith("give it without fire: ping")
    said = await line.refused(b'fire set_mode {"mode": "safe"}')
    assert "its hazard is service" in said
    assert said.endswith('without fire: set_mode {"mode": "safe"}')
    await line.operator.execute(b'fire switch_image {"slot": "b"}')
    assert line.station.given == [Arm(command="switch_image", args={"slot": "b"}), SwitchImage(slot="b")]


def test_what_failed_does_not_read_as_if_it_were_completed(line: Line) -> None:
    line.operator.tell(answer("arm", ok=False, code="not_hazardous", reason="ping needs no arming"))
    line.operator.tell(answer("ping"))
    assert line.said == [
        "arm 1 failed at completed: not_hazardous: ping needs no arming",
        "ping 1 completed ok",
    ]


def sparse(size_bytes: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size_bytes)

    return make


@pytest.mark.parametrize(
    ("kind", "make", "says"),
    [
        ("fdir_table", lambda path: path.symlink_to("/dev/null"), "not a regular file"),
        ("image", lambda path: path.symlink_to("/dev/null"), "not a regular file"),
        ("fdir_table", os.mkfifo, "not a regular file"),
        ("fdir_table", Path.mkdir, "not a regular file"),
        ("fdir_table", Path.touch, "it is empty"),
        ("image", Path.touch, "it is empty"),
        (
            "fdir_table",
            sparse(MAX_TABLE_BYTES + 1),
            "262145 bytes; an upload of kind fdir_table has at most 262144",
        ),
        ("image", sparse(MAX_UPLOAD_BYTES + 1), "an upload of kind image has at most 17179869184"),
        ("fdir_table", lambda _: None, "No such file"),
    ],
    ids=range(9),
)
async def test_what_cannot_be_uploaded_is_named_before_anything_is_sent(
    line: Line, tmp_path: Path, kind: str, make: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "it"
    make(path)
    said = await line.refused(f"upload {kind} '{path}'".encode())
    assert str(path) in said
    assert says in said


def test_a_line_longer_than_allowed_is_left_out_to_its_end() -> None:
    file = io.BytesIO(b"ping\n" + b"x" * 1000 + b"\n" + b"y" * 9 + b"\n" + b"z" * 11)
    lines = [_line(file, 10) for _ in range(5)]
    assert lines == [b"ping\n", b"x" * 11, b"y" * 9 + b"\n", b"z" * 11, b""]
