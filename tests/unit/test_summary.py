"""summary.json: the fields of the design, written whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from telemetry import summary as s
from telemetry.errors import PenumbraError


def make(**changes: object) -> s.Summary:
    flight = s.Summary(
        scenario="default",
        seed=1,
        speed=60.0,
        wall_s=93.0,
        orbit_s=5560.0,
        eclipse_s=2140.0,
        tokens=s.Tokens(released=900, discarded=32, unverified_released=0, reference_match=True),
        flips=s.Flips(
            injected=30, by_target={"weights": 20, "kv": 10}, detected=29, repaired=29, masked=1, missed=0
        ),
        recovery_ms=s.Recovery(p50=40.0, p99=90.0, max=None),
        power=s.Power(
            soc_min=0.5,
            soc_floor=0.3,
            floor_violation_s=0.0,
            watts_sun_mean=9.0,
            watts_eclipse_mean=None,
            joule_per_token=0.5,
        ),
        telemetry=s.Telemetry(generated=100, acked=90, stored=8, dropped=2, lost=0),
        protection_overhead_pct=None,
        verdict=[s.Check(name="lost", ok=True, measured=0, limit=0, text="records lost")],
    )
    return msgspec.structs.replace(flight, **changes)


def test_the_fields_of_the_design(tmp_path: Path) -> None:
    s.write_json(tmp_path / "summary.json", make())
    content = json.loads((tmp_path / "summary.json").read_text())
    assert list(content) == [
        "scenario",
        "seed",
        "speed",
        "wall_s",
        "orbit_s",
        "eclipse_s",
        "tokens",
        "flips",
        "recovery_ms",
        "power",
        "telemetry",
        "protection_overhead_pct",
        "verdict",
    ]
    parts = {
        "tokens": "released discarded unverified_released reference_match",
        "flips": "injected by_target detected repaired masked missed",
        "recovery_ms": "p50 p99 max",
        "power": "soc_min soc_floor floor_violation_s watts_sun_mean watts_eclipse_mean joule_per_token",
        "telemetry": "generated acked stored dropped lost",
    }
    for part, fields in parts.items():
        assert list(content[part]) == fields.split()
    assert list(content["verdict"][0]) == ["name", "ok", "measured", "limit", "text"]
    assert content["power"]["watts_eclipse_mean"] is None
    assert msgspec.json.decode((tmp_path / "summary.json").read_bytes(), type=s.Summary) == make()


def test_it_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for seed in (1, 2):
        s.write_json(path, make(seed=seed))
    assert json.loads(path.read_text())["seed"] == 2
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match="cannot be written"):
        s.write_json(tmp_path / "none" / "summary.json", make())
    (tmp_path / "dir").mkdir()
    with pytest.raises(PenumbraError, match="cannot be written"):
        s.write_json(tmp_path / "dir", make())
    assert [p.name for p in tmp_path.iterdir()] == ["dir"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_json_does_not_have_is_refused(tmp_path: Path, value: float) -> None:
    check = s.Check(name="x", ok=None, measured=value, limit=None, text="")
    for bad in (make(wall_s=value), make(verdict=[check])):
        with pytest.raises(ValueError, match=r"Summary\."):
            s.write_json(tmp_path / "summary.json", bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("oks", "passed"),
    [([True], True), ([True, None], None), ([None, False], False), ([], None), ([True, False], False)],
)
def test_the_verdict_of_all_checks(oks: list[bool | None], passed: bool | None) -> None:
    checks = [s.Check(name="x", ok=ok, measured=None, limit=None, text="") for ok in oks]
    assert make(verdict=checks).passed() is passed
