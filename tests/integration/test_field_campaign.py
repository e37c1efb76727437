"""Single-field mutations to a running node, as a user runs the campaign."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hil.bench.link_load import T0_NS
from hil.campaign import field_node
from hil.campaign.field_run import Chosen, FieldsResult, run_live
from hil.campaign.fuzz_run import NODE_FILES, FuzzResult
from hil.campaign.records import SUMMARY
from telemetry import bus


def test_a_node_lives_on_under_mutated_fields_and_counts_each(tmp_path: Path) -> None:
    code = "from hil.cli import main\nif __name__ == '__main__':\n    main()\n"
    (tmp_path / "penumbra_cli.py").write_text(code)
    out = tmp_path / "out"
    arguments = ["campaign", "run", "fuzz", "--out", str(out), "--seed", "11"]
    sizes = ["--inputs", "100", "--commands", "10", "--fields", "3000"]
    done = subprocess.run(
        [sys.executable, tmp_path / "penumbra_cli.py", *arguments, *sizes],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = msgspec.json.decode((out / SUMMARY).read_bytes(), type=FuzzResult).fields
    assert result is not None
    assert result.is_right, result.findings
    assert result.node_end == "exit code 0"
    assert sum(each.sent for each in result.live) >= 3000
    for each in result.live:
        assert sum(each.answers.values()) == each.sent
    for asked, counted in zip(result.bus, result.live, strict=True):
        assert asked.answers.get("accepted", 0) == counted.answers.get("accepted", 0)
    assert "### Single fields" in done.stdout
    assert "Restarts of the node: **0**" in done.stdout
    assert not (out / NODE_FILES).exists()


FRAGILE = """
import os, sys
from pathlib import Path
from node.bus_view import BusView
from node.runtime import main
sound = BusView.handle

def handle(self, message, now_s):
    if getattr(message, "board_c", None) == 0.5:
        os._exit(70)
    sound(self, message, now_s)

BusView.handle = handle
sys.exit(main(Path(sys.argv[1])))
"""


async def test_a_node_that_ends_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_node, "NODE_COMMAND", [sys.executable, "-c", FRAGILE])
    monkeypatch.setattr(field_node, "STILL_S", 3.0)
    payload = bus.encode(bus.BusThermal(t_ns=T0_NS, board_c=0.5, radiator_c=5.0))
    result = FieldsResult()
    chosen = Chosen(taken={"thermal": [payload]})
    await run_live(tmp_path / "node", chosen, result, lambda _, __: None)
    assert result.node_restarts == 1
    assert result.live[0].unaccounted == 1
    assert not result.is_right
    assert (tmp_path / "node" / "node.log").exists()
