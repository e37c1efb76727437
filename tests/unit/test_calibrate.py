"""`penumbra calibrate` leads a real worker of the tiny model from point to point."""

from __future__ import annotations

import json
import os

import pytest
from board_trees import TREES, write
from typer.testing import CliRunner

from hil import calibrate as c
from hil.cli import app
from node.boards import BoardSettings
from telemetry.errors import PenumbraError


def test_every_thread_count_meets_every_batch_and_one_point_rests_half_the_time():
    points = c.points(2, (1, 8))
    assert [(point.threads, point.batch) for point in points[:-1]] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    assert all(point.duty == 1 for point in points[:-1])
    assert points[-1] == c.Point(2, 1, 0.5)


def test_a_worker_is_led_through_all_points_with_one_load(tiny_image):
    seen: list[c.Point] = []
    result = c.calibrate(
        tiny_image, board=BoardSettings(), threads=1, seconds=0.5, batches=(1, 2), progress=seen.append
    )
    assert seen == c.points(1, (1, 2))
    assert [(point.batch, point.duty) for point in result.points] == [(1, 1), (2, 1), (1, 0.5)]
    assert all(point.tokens_s > 0 and point.seconds >= 0.5 for point in result.points)
    assert all(point.power_w is None for point in result.points)
    assert result.reloads == 0
    assert not result.board_measures
    assert result.duty_half_share == result.points[2].tokens_s / result.points[0].tokens_s
    # On a busy machine the others may get less of a core; half the duty never gets more than this.
    assert result.points[2].cpu_share < 0.7


def test_a_worker_that_cannot_start_is_an_error_with_its_last_words(tiny_image, tmp_path):
    broken = tmp_path / "a"
    broken.mkdir()
    (broken / "manifest.json").write_bytes((tiny_image / "manifest.json").read_bytes())
    with pytest.raises(
        PenumbraError, match="the worker failed while its operating points were measured: it ended"
    ):
        c.calibrate(broken, board=BoardSettings(), threads=1, seconds=0.5)


def test_a_board_without_a_meter_is_refused(tiny_image, tmp_path):
    with pytest.raises(PenumbraError, match="jetson"):
        c.calibrate(
            tiny_image, board=BoardSettings(kind="jetson", sysfs_root=str(tmp_path)), threads=1, seconds=0.5
        )


def test_the_command_writes_its_points(tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr(c, "BATCHES", (1,))
    path = tmp_path / "c.json"
    arguments = ["calibrate", "--images", str(tiny_images), "--threads", "1", "--seconds", "0.5"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "measures no watts" in done.stdout
    content = json.loads(path.read_text())
    assert content["board"] == "sim"
    assert content["points"][0]["power_w"] is None


NVPMODEL = """\
#!/bin/sh
modes='0:15W 1:25W 2:MAXN_SUPER 3:10W'
if [ "$1" = -m ]; then
  for m in $modes; do [ "${m%%:*}" = "$2" ] && echo "${m#*:}" > '{state}'; done
  echo "$2" >> '{state}.asked'
fi
echo "NV Power Mode: $(cat '{state}')"
"""


def test_a_board_with_a_meter_is_measured_in_each_power_mode_and_left_in_its_own(
    tiny_image, tmp_path, monkeypatch
):
    root, state = write(tmp_path / "root", TREES["orin-nano-jp6"]), tmp_path / "mode"
    (root / "sys/class/devfreq/17000000.gpu/max_freq").write_text("612000000")
    state.write_text("25W\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvpmodel").write_text(NVPMODEL.replace("{state}", str(state)))
    (tools / "nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    board = BoardSettings(kind="jetson", sysfs_root=str(root), other_w=1.0)
    result = c.calibrate(
        tiny_image, board=board, threads=1, seconds=0.6, batches=(1,), power_modes=("15W", "MAXN_SUPER")
    )
    assert [(p.power_mode, p.duty) for p in result.points] == [
        ("15W", 1.0), ("MAXN_SUPER", 1.0), ("MAXN_SUPER", 0.5),
    ]  # fmt: skip
    assert result.board_measures
    assert result.idle_w == pytest.approx(5.160 * 1.010 + 1.0)
    assert all(p.power_w == pytest.approx(result.idle_w) for p in result.points)
    assert all(p.board_c == pytest.approx(47.0) for p in result.points)
    assert "Orin Nano" in result.identity
    asked = (tmp_path / "mode.asked").read_text().split()
    assert (asked[-1], state.read_text().strip()) == ("1", "25W")
    with pytest.raises(PenumbraError, match="'30W': unknown"):
        c.calibrate(tiny_image, board=board, threads=1, seconds=0.6, batches=(1,), power_modes=("30W",))
