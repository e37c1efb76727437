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
from telemetry.dictionary.codes import DropCode


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


PATCHED = """
import os, sys
from pathlib import Path
from node.bus_view import BusView
from node.clock import MissionClock
from node.intake import Intake
from node.runtime import main
from telemetry.bus import BusOrbit, BusThermal, BusTime
from telemetry.errors import PenumbraError
%s
sys.exit(main(Path(sys.argv[1])))
"""
ENDS = """
def handle(self, message, now_s, sound=BusView.handle):
    if isinstance(message, BusThermal) and message.board_c == 0.5:
        os._exit(70)
    sound(self, message, now_s)
BusView.handle = handle
"""
DROPS_FORECAST = """
def handle(self, message, now_s, sound=BusView.handle):
    try:
        sound(self, message, now_s)
    except PenumbraError:
        self.forecast = self._elements = None
        raise
BusView.handle = handle
"""
KEEPS_TEMPERATURE = """
def handle(self, message, now_s, sound=BusView.handle):
    sound(self, message, now_s)
    if isinstance(message, BusThermal) and message.board_c == 0.5:
        raise ValueError("0.5 degC")
BusView.handle = handle
"""
STEPS_AT_ONCE = """
def handle(self, event, mono_ns, sound=MissionClock.handle):
    if isinstance(event, BusTime) and event.rate == 7.0:
        self._base_t_ns += 60 * 10**9
        raise ValueError("rate 7")
    return sound(self, event, mono_ns)
MissionClock.handle = handle
"""
COUNTS_NOTHING = """
def on_message(self, topic, payload, *, retained=False, sound=Intake.on_message):
    if payload != b"lost":
        sound(self, topic, payload, retained=retained)
Intake.on_message = on_message
"""
POWER_LOOP_FAILS = """
def next_umbra(self, t_ns, sound=BusView.next_umbra):
    if self._thermal is not None and self._thermal[0].board_c == 0.5:
        raise ZeroDivisionError("0.5 degC")
    return sound(self, t_ns)
BusView.next_umbra = next_umbra
"""
THERMAL = bus.encode(bus.BusThermal(t_ns=T0_NS, board_c=0.5, radiator_c=5.0))
ORBIT = bus.encode(bus.BusOrbit(line1="1" * 69, line2="2" * 69))
TIME = bus.encode(bus.BusTime(t_ns=T0_NS, rate=7.0))
CHANGES = {
    "eclipse_entry_s": (DROPS_FORECAST, "orbit, TLE", ORBIT),
    "board_c": (KEEPS_TEMPERATURE, "thermal", THERMAL),
    "clock_right": (STEPS_AT_ONCE, "time", TIME),
}


async def flown(folder: Path, monkeypatch: pytest.MonkeyPatch, weakness: str, chosen: Chosen) -> FieldsResult:
    """Send chosen messages to a node with a weakness."""
    monkeypatch.setattr(field_node, "NODE_COMMAND", [sys.executable, "-c", PATCHED % weakness])
    monkeypatch.setattr(field_node, "STILL_S", 3.0)
    result = FieldsResult()
    await run_live(folder / "node", chosen, result, lambda _, __: None)
    return result


async def test_a_node_that_ends_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = await flown(tmp_path, monkeypatch, ENDS, Chosen(taken={"thermal": [THERMAL]}))
    assert result.node_restarts == 1
    assert result.live[0].unaccounted == 1
    assert not result.is_right
    assert (tmp_path / "node" / "node.log").exists()


@pytest.mark.parametrize("changes", CHANGES)
async def test_a_refused_message_that_changes_something_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: str
) -> None:
    weakness, name, payload = CHANGES[changes]
    chosen = Chosen(refused={name: [(payload, DropCode.REFUSED)]})
    result = await flown(tmp_path, monkeypatch, weakness, chosen)
    assert result.live[0].changed == 1
    assert result.live[0].unaccounted == result.live[0].unexpected == 0
    assert any(changes in finding for finding in result.findings), result.findings
    assert not result.is_right
    assert result.recovered


async def test_a_message_that_is_not_counted_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Chosen(refused={"eps": [(b"lost", DropCode.MALFORMED)]})
    result = await flown(tmp_path, monkeypatch, COUNTS_NOTHING, chosen)
    assert result.live[0].unaccounted == 1
    assert not result.is_right


async def test_a_message_counted_for_another_reason_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Chosen(refused={"orbit, TLE": [(ORBIT, DropCode.MALFORMED)]})
    result = await flown(tmp_path, monkeypatch, "", chosen)
    assert result.live[0].answers == {"refused": 1}
    assert result.live[0].unexpected == 1
    assert not result.is_right


async def test_a_power_loop_that_fails_on_what_was_taken_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = await flown(tmp_path, monkeypatch, POWER_LOOP_FAILS, Chosen(taken={"thermal": [THERMAL]}))
    assert result.live[0].answers == {"accepted": 1}
    assert result.power_failures > 0
    assert not result.is_right
    assert result.recovered, result.findings
