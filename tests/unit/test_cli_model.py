"""`penumbra model` from its command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hil.cli_model import model_app
from telemetry.errors import PenumbraError


def run(*arguments: object) -> str:
    result = CliRunner().invoke(model_app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_build_verify_and_info_of_both_slots(tiny_gguf, tmp_path):
    images, report = tmp_path / "images", tmp_path / "report.json"
    output = run("build", "--slot", "both", "--gguf", tiny_gguf, "--images", images, "--json", report)
    assert output.count("Tiny Gemma") == 2
    built = json.loads(report.read_bytes())
    assert {image["directory"] for image in built["images"]} == {str(images / "a"), str(images / "b")}
    assert {"quantise", "pack", "calibrate", "screen", "lay out", "probe", "parity"} <= set(built["stage_s"])

    assert run("verify", "--slot", "both", "--images", images, "--json", report).count("whole") == 2
    assert len(json.loads(report.read_bytes())["images"]) == 2

    assert "ffn_down" in run("info", "--images", images, "--slot", "b", "--json", report)
    (info,) = json.loads(report.read_bytes())["images"]
    assert info["image_id"] == built["images"][0]["image_id"]


def test_a_damaged_image_has_no_report(tiny_gguf, tmp_path):
    run("build", "--gguf", tiny_gguf, "--images", tmp_path, "--slot", "a")
    with (tmp_path / "a" / "weights.bin").open("r+b") as file:
        file.write(b"struck")
    with pytest.raises(PenumbraError, match=r"weights\.bin: page 0"):
        run("verify", "--images", tmp_path, "--slot", "a", "--json", tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


def test_force_mends_a_damaged_second_slot(tiny_gguf, tmp_path):
    run("build", "--slot", "both", "--gguf", tiny_gguf, "--images", tmp_path)
    with (tmp_path / "b" / "weights.bin").open("r+b") as file:
        file.write(b"struck")
    run("build", "--slot", "both", "--gguf", tiny_gguf, "--images", tmp_path, "--force")
    run("verify", "--slot", "both", "--images", tmp_path)


def test_a_context_beyond_the_model_is_refused(tiny_gguf, tmp_path):
    with pytest.raises(PenumbraError, match=r"a context of 257 was asked for, the model was trained for 256"):
        run("build", "--gguf", tiny_gguf, "--images", tmp_path, "--context", 257)
    with pytest.raises(PenumbraError, match="a context of 10 was asked for"):
        run("build", "--gguf", tiny_gguf, "--images", tmp_path, "--context", 10)
    run("build", "--gguf", tiny_gguf, "--images", tmp_path, "--context", 64)
