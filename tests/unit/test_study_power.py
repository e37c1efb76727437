"""The power study: its bound bounds, its sweep runs, its governors are what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from hil.cli import app
from hil.study import report
from hil.study.cell import BOTH, GOOD, NONE, SOC_FLOOR, Cell, least_w, measured_curve
from hil.study.governors import GOVERNORS, Flight, Simple
from hil.study.power import study_power, sweep
from hil.study.simulate import run, world
from hil.study.world import sky

CURVE = measured_curve()
CELL = Cell(beta_deg=0.0, ratio=1.0, battery_wh=36.0, errors=GOOD)


def test_the_sky_has_the_beta_that_was_asked_for_and_its_eclipses() -> None:
    low, high = sky(0.0, 3), sky(73.0, 3)
    assert abs(low.beta_deg) < 4
    assert high.beta_deg > 68
    dark = [p.duration_s for p in low.passes]
    assert min(dark) > 2_000
    assert high.passes == ()
    lit = low.irradiance > 0
    assert lit.mean() == pytest.approx(1 - np.mean(dark) / low.period_s, abs=0.02)
    with pytest.raises(ValueError, match="beta 89"):
        sky(89.0, 3)


@pytest.mark.parametrize("name", GOVERNORS)
@pytest.mark.parametrize(("ratio", "wh"), [(0.75, 24.0), (1.1, 60.0)])
def test_no_governor_that_keeps_the_floor_beats_the_bound(name: str, ratio: float, wh: float) -> None:
    found = run(world(msgspec.structs.replace(CELL, ratio=ratio, battery_wh=wh), 4, CURVE), GOVERNORS[name])
    assert found.floor_violation_s > 0 or 0 < found.percent <= 100.0 + 1e-6
    assert (found.floor_violation_s > 0) == (found.soc_min < SOC_FLOOR)
    assert sum(float(v) * t for v, t in found.tokens_by_value.items()) == pytest.approx(found.value)


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize("errors", [NONE, BOTH])
def test_the_planner_keeps_the_floor_and_comes_near_the_optimum(loss: float, errors: object) -> None:
    cell = msgspec.structs.replace(CELL, errors=errors, array_loss=loss)
    found = run(world(cell, 5, CURVE), GOVERNORS["planner"])
    assert found.floor_violation_s == 0
    assert found.percent > 85.0
    assert found.fallbacks == 0


def test_rules_are_worse_than_the_planner_and_bare_service_is_worse_than_all() -> None:
    place = world(msgspec.structs.replace(CELL, battery_wh=60.0), 5, CURVE)
    planned, ruled, least = (
        run(place, make) for make in (
            GOVERNORS["planner"], GOVERNORS["rules"], lambda craft: Simple(craft, lambda view: -1.0)
        )
    )  # fmt: skip
    assert planned.value > ruled.value > least.value
    assert least.payload_mean_w == pytest.approx(least_w(CURVE))


def test_a_run_is_the_same_again_and_another_with_another_seed() -> None:
    first, again, other = (
        run(world(msgspec.structs.replace(CELL, seed=seed), 3, CURVE), lambda c: Flight(c, planned=True))
        for seed in (1, 1, 2)
    )
    assert (first.value, first.soc_min, first.plans) == (again.value, again.soc_min, again.plans)
    assert other.value != first.value


def test_the_sweep_has_every_axis_and_a_quick_one_less() -> None:
    whole, quick = sweep((1,), quick=False), sweep((1,), quick=True)
    assert len(whole) == len(set(map(repr, whole))) == 3 * 5 * 3 * 4
    assert set(map(repr, quick)) <= set(map(repr, whole))
    assert len(sweep((1, 2), quick=True)) == 2 * len(quick)


def test_the_command_writes_figures_page_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hil.study.power.sweep", lambda seeds, quick: [CELL])
    page, figures = tmp_path / "power.md", tmp_path / "power.json"
    arguments = ["study", "power", "--orbits", "2", "--workers", "1", "--governor", "greedy"]
    done = CliRunner().invoke(
        app, [*arguments, "--markdown", str(page), "--json", str(figures)], catch_exceptions=False
    )
    assert done.exit_code == 0
    found = json.loads(figures.read_text())
    assert [row["governor"] for row in found["by_governor"]] == ["planner", "greedy"]
    assert len(found["cells"]) == 3
    assert found["floor_violations"] == 0
    text = page.read_text()
    assert "![percent of the optimum" in text
    assert (tmp_path / "power.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(app, ["study", "power", "--governor", "clairvoyant"])
    assert "unknown, allowed are planner, rules" in str(refused.exception)


def test_a_broken_floor_is_counted_apart_and_its_value_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = msgspec.structs.replace(CELL, ratio=0.75, battery_wh=24.0)
    monkeypatch.setattr("hil.study.power.sweep", lambda seeds, quick: [cell])
    found = study_power(orbits=4, governors=("greedy",))
    row = next(row for row in found.by_governor if row.governor == "greedy")
    assert (row.floor_violations, row.percent_of_lp.median, row.percent_of_lp.worst) == (1, None, None)
    assert row.floor_violation_s > 0
    assert "- | -" in report.markdown(found, "penumbra study power", None)
