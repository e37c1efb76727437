"""How the bench judges a cap: on made-up draws, and once on a real worker of the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hil.bench import ceiling
from hil.bench.ceiling import STEP_S, _judge
from hil.cli import app
from node.boards import BoardSettings

BOARD = BoardSettings()
CAPS = [(100.0, 10.0), (100.0 + STEP_S, 6.0)]


def read(draw_w: Callable[[float], float]) -> list[tuple[float, float]]:
    times = np.arange(99.0, 100.0 + 2 * STEP_S, 0.01)
    cores = np.array([(draw_w(t) - BOARD.idle_w) / BOARD.core_w for t in times])
    used = np.concatenate([[0.0], np.cumsum(cores[:-1] * 0.01)])
    return list(zip(times[::10].tolist(), used[::10].tolist(), strict=True))


def follows(t: float, lag_s: float, share: float = 0.99) -> float:
    return share * (10.0 if t < 100.0 + STEP_S + lag_s else 6.0)


def test_a_cap_that_is_held_is_held_and_the_time_to_it_is_the_lag_and_the_mean() -> None:
    found = _judge(CAPS, read(lambda t: follows(t, 0.5)), BOARD)
    assert (found.over, found.samples > 100) == (0, True)
    assert found.settled_s == [pytest.approx(1.5, abs=0.11)]
    assert np.median(found.unused) == pytest.approx(0.01, abs=0.001)


def test_control_a_draw_over_the_cap_is_counted() -> None:
    found = _judge(CAPS, read(lambda t: follows(t, 0.5, share=1.05)), BOARD)
    assert found.over == found.samples
    assert max(found.excess_w) == pytest.approx(0.5, abs=0.01)
    late = _judge(CAPS, read(lambda t: follows(t, 2.5)), BOARD)
    assert 0 < late.over < 0.3 * late.samples
    assert late.settled_s == [pytest.approx(3.4, abs=0.2)]


def test_the_command_holds_caps_on_a_real_worker(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceiling, "STEP_S", 3.0)
    path = tmp_path / "c.json"
    arguments = ["bench", "ceiling", "--images", str(tiny_images), "--threads", "1", "--steps", "2"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(path.read_text())
    assert (found["steps"], found["samples"] > 5) == (2, True)
    assert 0.0 <= found["over_share"] <= 1.0
    assert "means above the cap" in done.stdout
