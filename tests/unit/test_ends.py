"""The judge of flights that are ended: what it must call wrong."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hil.campaign.ends_run import KINDS, EndRecord, is_whole, problems

RIGHT = EndRecord(
    index=0, kind="term", variant=False, moment_s=1.0, phase="flying", code=130, end_s=1.0, processes_left=0,
    shared_left=0, cleared=0, begun=True, report=True,
)  # fmt: skip


def judge(said: str = "", **changes: Any) -> list[str]:
    return list(problems(msgspec.structs.replace(RIGHT, **changes), said))


def test_what_is_right() -> None:
    assert judge() == []
    assert judge(kind="kill", code=-signal.SIGKILL, report=False) == []
    assert judge(kind="twice", report=False) == []
    assert judge(kind="hup", begun=False, report=False, code=-signal.SIGHUP) == []
    assert all(judge(kind=kind, code=1, phase="ended") == [] for kind in KINDS)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("the bench hung", {"code": None}),
        ("1 processes left", {"processes_left": 1}),
        ("2 pieces of shared memory left", {"shared_left": 2}),
        ("no whole report", {"report": False}),
        ("no whole report", {"kind": "full", "code": 0, "report": False}),
        ("no run directory", {"kind": "pipe", "code": 0, "report": False, "begun": False}),
        ("return code -1", {"kind": "hup", "code": -1}),
        ("return code 130", {"kind": "pipe"}),
        ("return code 2", {"code": 2}),
        ("return code 0", {"kind": "hup", "code": 0}),  # the signal was ignored: it flew on to its end
    ],
)
def test_what_is_wrong(words: str, changes: dict[str, Any]) -> None:
    assert judge(**changes) == [words]


def test_a_traceback_is_wrong() -> None:
    assert judge("Traceback (most recent call last):") == ["a traceback"]


def test_half_a_report_is_none(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert not is_whole(path)
    path.write_text("<html>")
    assert not is_whole(path)
    path.write_text("<html></html>\n")
    assert is_whole(path)
