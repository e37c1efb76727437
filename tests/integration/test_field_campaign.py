"""Single-field mutations to a running node, as a user runs the campaign."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from hil.campaign.fuzz_run import NODE_FILES, FuzzResult
from hil.campaign.records import SUMMARY


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
