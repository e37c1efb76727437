"""The ICD: complete, and never stale."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from telemetry import icd
from telemetry.authenticator import RejectCode
from telemetry.bus import CHANNELS
from telemetry.commands import COMMANDS, ArgumentCode
from telemetry.dictionary.codes import FailureCode
from telemetry.packets import BY_TYPE, Level, Mode, Outcome, Severity, Stage, Stream
from telemetry.spool_policy import DropReason
from telemetry.summary import Summary


def test_the_committed_document_is_up_to_date() -> None:
    assert icd.main(["--check"]) == 0


def test_a_stale_or_missing_document_fails_the_check_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "icd.md"
    assert icd.main(["--check", "--path", str(path)]) == 1
    assert "is missing" in capsys.readouterr().err
    assert not path.exists()
    assert icd.main(["--path", str(path)]) == 0
    assert icd.main(["--check", "--path", str(path)]) == 0
    path.write_text(path.read_text().replace("battery_soc", "battery_sock"))
    capsys.readouterr()
    assert icd.main(["--check", "--path", str(path)]) == 1
    error = capsys.readouterr().err
    assert "does not match the code" in error
    assert "python -m telemetry.icd" in error
    assert "battery_sock" in path.read_text()


def test_the_command_line_exits_1_when_stale(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "telemetry.icd", "--check", "--path", str(tmp_path / "icd.md")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_everything_on_the_wire_is_in_it() -> None:
    text = icd.generate()
    for name, kind in {**BY_TYPE, **CHANNELS, **COMMANDS, "summary": Summary}.items():
        assert re.search(rf"#+ .*{name.replace('_', '[-_]')}", text), name
        for field in kind.__struct_fields__:
            assert f"`{field}`" in text
    for enum in (
        Stream,
        Mode,
        Severity,
        Stage,
        Level,
        Outcome,
        RejectCode,
        ArgumentCode,
        FailureCode,
        DropReason,
    ):
        section = text.split(f"### {enum.__name__}\n")[1].split("\n#")[0]
        for member in enum:
            assert f"`{member.value}` | {member.name} |" in section
    for stream in Stream:
        assert f"`penumbra/{{node}}/tm/{stream.value}`" in text


def test_every_number_with_a_unit_in_its_name_shows_it() -> None:
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \| ([^|]*) \|", icd.generate(), re.MULTILINE)
    bare = [
        name
        for name, _, unit in rows
        if re.search(r"_(ns|ms|s|w|v|a|c|wh|pct|soc)$", name) and not unit.strip()
    ]
    assert len(rows) > 100
    assert bare == []


def test_every_link_inside_the_document_has_its_heading() -> None:
    text = icd.generate()
    headings = {
        re.sub(r"[^a-z0-9 _-]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings
