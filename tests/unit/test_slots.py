"""Which slot flies: switched only to a sound image, atomically, and back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hil.cli_model import model_app
from node.inference.manifest import WEIGHTS
from node.inference.slots import ACTIVE, active_image, active_slot, rollback, switch_slot
from telemetry.errors import PenumbraError


@pytest.fixture
def images(tiny_images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_images, tmp_path / "images"))


def damage(image: Path) -> None:
    with (image / WEIGHTS).open("r+b") as file:
        file.seek(4096)
        file.write(b"struck")


def test_without_a_file_slot_a_is_active(images):
    assert active_slot(images) == "a"
    assert active_image(images) == images / "a"


def test_a_switch_is_recorded_and_taken_back(images):
    assert switch_slot(images, "b") == "a"
    assert active_slot(images) == "b"
    assert rollback(images) == "a"
    assert active_slot(images) == "a"
    assert rollback(images) == "b"


def test_switching_to_the_active_slot_keeps_the_way_back(images):
    switch_slot(images, "b")
    assert switch_slot(images, "b") == "b"
    assert rollback(images) == "a"


def test_switching_to_the_slot_that_flies_by_default_leaves_no_way_back(images):
    assert switch_slot(images, "a") == "a"
    with pytest.raises(PenumbraError, match="no slot to go back to"):
        rollback(images)


def test_a_damaged_slot_is_refused_and_nothing_changes(images):
    damage(images / "b")
    with pytest.raises(PenumbraError, match=r"weights\.bin: page 1"):
        switch_slot(images, "b")
    assert active_slot(images) == "a"
    assert not (images / ACTIVE).exists()


def test_there_is_no_way_back_to_a_slot_damaged_since(images):
    switch_slot(images, "b")
    damage(images / "a")
    with pytest.raises(PenumbraError, match=r"weights\.bin: page 1"):
        rollback(images)
    assert active_slot(images) == "b"


def test_an_empty_slot_is_refused(images):
    shutil.rmtree(images / "b")
    with pytest.raises(PenumbraError, match=r"is not a model image(?s:.*)model build --slot b"):
        switch_slot(images, "b")


def test_a_kill_in_the_middle_leaves_the_old_slot(images, monkeypatch):
    switch_slot(images, "b")

    def killed(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        switch_slot(images, "a")
    assert active_slot(images) == "b"


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(images, monkeypatch):
    order: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), real_sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (order.append("rename"), real_replace(*paths))[1])
    switch_slot(images, "b")
    assert order == ["sync", "rename", "sync"]


@pytest.mark.parametrize("content", [b"", b"c\n", b"a\nb\na\n", b"\xff\n"])
def test_a_file_that_names_no_slot_is_refused(images, content):
    (images / ACTIVE).write_bytes(content)
    with pytest.raises(PenumbraError, match="active: damaged: it names no slot"):
        active_slot(images)


def test_from_the_command_line(images, tmp_path):
    report = tmp_path / "report.json"

    def run(*arguments: object) -> str:
        words = [str(word) for word in (*arguments, "--images", images, "--json", report)]
        result = CliRunner().invoke(model_app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "slot b is active, instead of a" in run("switch", "b")
    found = json.loads(report.read_bytes())
    assert (found["before"], found["active"]) == ("a", "b")
    assert "slot b is active, was active before" in run("switch", "b")
    assert f"{images / 'b'}: whole" in run("verify")
    run("info")
    assert json.loads(report.read_bytes())["images"][0]["directory"] == str(images / "b")
    assert "slot a is active, instead of b" in run("rollback")
    wrong = CliRunner().invoke(model_app, ["switch", "c"])
    assert wrong.exit_code == 2
