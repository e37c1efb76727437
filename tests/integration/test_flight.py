"""Whole flights: real processes, a real broker, a link that is really cut, flips in live memory.

The tiny model flies what does not depend on the text; the real one what the issue asks to be shown.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from own_run import own_processes
from rich.console import Console
from scenario_edits import changed

from hil.fly import FlyOptions, fly
from hil.record import FlightRecord
from hil.run_dir import scenario_text
from telemetry.summary import Summary

pytestmark = pytest.mark.flight


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short path: the node's socket lies some levels below."""
    with tempfile.TemporaryDirectory(prefix="pf-") as name:
        yield Path(name)


def tiny_scenario(folder: Path, **values: str) -> Path:
    """Half a revolution in about 9 s, with texts short enough for the tiny model."""
    settings = {"speed": "300.0", "max_tokens": "[96]", "min_flips_injected": "10", "positions": "256"}
    path = folder / "tiny.toml"
    path.write_text(changed(scenario_text("default-short"), **(settings | values)))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "hil.cli", "fly", "--no-live", *map(str, arguments)]


def children() -> set[int]:
    """Processes of this run of the tests that run flight software, by their command lines."""
    mine = set()
    for pid in own_processes():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"node.inference.worker" in line or (b"hil.cli" in line and b"node" in line):
            mine.add(pid)
    return mine


def only_run(folder: Path) -> Path:
    (run,) = [p for p in folder.iterdir() if p.is_dir()]
    return run


def outputs(run: Path) -> tuple[Summary, FlightRecord]:
    summary = msgspec.json.decode((run / "summary.json").read_bytes(), type=Summary)
    record = msgspec.json.decode((run / "flight.json").read_bytes(), type=FlightRecord)
    assert (run / "report.html").read_text().endswith("</html>\n")
    return summary, record


def verdicts(summary: Summary) -> dict[str, bool | None]:
    return {check.name: check.ok for check in summary.verdict}


def failed(summary: Summary) -> list[str]:
    return [f"{c.name}: {c.measured} ({c.limit}) {c.text}" for c in summary.verdict if c.ok is False]


def test_tiny_flight_from_start_to_report(folder: Path, tiny_images: Path) -> None:
    before = children()
    out, also = folder / "r", folder / "copy.json"
    done = subprocess.run(
        command(tiny_scenario(folder), "--images", tiny_images, "--out", out, "--json", also),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    summary, record = outputs(only_run(out))
    assert done.returncode in {0, 1}, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    ok = verdicts(summary)
    # The tiny model is done with its jobs in no time, and an idle board draws the same in sun and shadow.
    for name in set(ok) - {"eclipse_watts", "protection_overhead"}:
        assert ok[name] is True, failed(summary)
    # How many jobs get up in contacts of a second or two varies; what is released of them came down.
    assert summary.tokens.released == sum(len(job.tokens) for job in record.jobs)
    assert summary.tokens.released >= 100
    assert summary.tokens.reference_match is True
    assert json.loads(also.read_text()) == json.loads((only_run(out) / "summary.json").read_text())
    assert {f.strike.target.value for f in record.fates} >= {"weights"}
    assert any(h.name == "contact.begin" for h in record.happenings)
    assert children() <= before


def test_interrupted_flight_stops_cleanly_and_still_reports(folder: Path, tiny_images: Path) -> None:
    before = children()
    out = folder / "r"
    arguments = command(tiny_scenario(folder, speed="60.0"), "--images", tiny_images, "--out", out)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "flying" in line and not line.startswith("T+0:00:00"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130, rest
    assert "Traceback" not in rest
    summary, record = outputs(only_run(out))
    assert record.interrupted
    assert record.flown_s < record.planned_s
    ok = verdicts(summary)
    assert ok["flight_complete"] is None
    assert ok["ordered_stop"] is True
    assert ok["ledger_lost"] is True
    assert ok["ledger_balanced"] is True
    assert children() <= before


def test_interrupted_while_loading(folder: Path, tiny_images: Path) -> None:
    before, out = children(), folder / "r"
    arguments = command(tiny_scenario(folder), "--images", tiny_images, "--out", out)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "node started" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(40) == 130, rest
    assert "Traceback" not in rest
    outputs(only_run(out))
    assert children() <= before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-scenario"], "no packaged scenario of that name"),
        (["default-short", "--images", "{tmp}"], "penumbra model build"),
        (["default-short", "--speed", "0"], "--speed"),
        (["default-short", "--board", "jetson"], "so the draw is unknown"),
        (["default-short", "--images", "{images}", "--out", "{tmp}/file/x"], "cannot be made"),
        (["default-short", "--images", "{images}", "--out", "{tmp}/o", "--port", "{port}"], "is in use"),
        (["default-short", "--images", "{images}", "--json", "{tmp}/none/s.json"], "no such directory"),
    ],
)
def test_what_the_user_must_mend_is_said_in_one_message(
    arguments: list[str], words: str, folder: Path, tiny_images: Path
) -> None:
    (folder / "file").write_text("")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        filled = [a.format(tmp=folder, images=tiny_images, port=port) for a in arguments]
        done = subprocess.run(
            command(*filled), capture_output=True, text=True, check=False, timeout=60, cwd=folder
        )
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("penumbra: ")
    assert not (folder / "o").exists()  # nothing was begun


def test_node_that_cannot_come_up_ends_the_flight_with_its_log(folder: Path, tiny_images: Path) -> None:
    images = folder / "images"
    (images / "a").mkdir(parents=True)
    for file in (tiny_images / "a").iterdir():
        (images / "a" / file.name).write_bytes(file.read_bytes())
    (images / "a" / "trunk.onnx").write_bytes(b"no graph")
    started = time.monotonic()
    done = subprocess.run(
        command(tiny_scenario(folder), "--images", images, "--out", folder / "r"),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "trunk.onnx" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60  # not the bound on loading, but the node's own verdict


@pytest.mark.gemma
@pytest.mark.timeout(240)
def test_default_short_shows_what_it_must(folder: Path, gemma_image: Path) -> None:
    out = folder / "r"
    done = subprocess.run(
        command("default-short", "--images", gemma_image.parent, "--out", out, "--json", folder / "s.json"),
        capture_output=True,
        text=True,
        check=False,
        timeout=220,
    )
    raw: dict[str, Any] = json.loads((folder / "s.json").read_text())
    summary, record = outputs(only_run(out))
    assert failed(summary) == []
    assert done.returncode == 0, done.stdout + done.stderr
    # Released text is byte for byte that of a fault-free run; nothing left without proof.
    assert raw["tokens"]["reference_match"] is True
    assert raw["tokens"]["unverified_released"] == 0
    assert raw["tokens"]["released"] >= 300
    # Every flip detected before release, repaired in place, without a restart.
    flips = raw["flips"]
    assert flips["injected"] >= 15
    assert flips["missed"] == 0
    assert flips["detected"] == flips["repaired"] == flips["injected"] - flips["masked"]
    assert flips["masked"] <= 2
    assert set(flips["by_target"]) == {"weights", "kv"}
    assert record.worker_restarts == record.node_restarts == 0
    assert raw["recovery_ms"]["p99"] > 0
    # Fewer watts in eclipse, floor kept, forecast right.
    assert raw["power"]["watts_eclipse_mean"] < raw["power"]["watts_sun_mean"]
    assert raw["power"]["soc_min"] >= raw["power"]["soc_floor"]
    assert raw["power"]["floor_violation_s"] == 0
    assert max(abs(e.error_s) for e in record.forecast) <= 5.0
    # Nothing lost.
    ledger = raw["telemetry"]
    assert ledger["lost"] == 0
    assert ledger["generated"] == ledger["acked"] + ledger["stored"] + ledger["dropped"]
    assert raw["protection_overhead_pct"] is not None


@pytest.mark.gemma
@pytest.mark.timeout(180)
def test_text_and_ledger_survive_process_faults(folder: Path, gemma_image: Path) -> None:
    before = children()
    text = changed(
        scenario_text("default-short"), duration_orbits="0.32", min_flips_injected="5", min_contacts="1"
    )
    scenario = folder / "s.toml"
    faults = {"kill_worker": 400.0, "stop_worker": 750.0, "kill_node": 1100.0}
    tables = [f'[[faults]]\nat_s = {at_s}\nkind = "{kind}"\n' for kind, at_s in faults.items()]
    scenario.write_text("\n".join([text, *tables]))
    options = FlyOptions(
        scenario=str(scenario),
        live=False,
        out_dir=folder / "r",
        images_dir=gemma_image.parent,
        overhead=False,
    )
    with open(os.devnull, "w") as nowhere:
        code = fly(options, Console(file=nowhere))
    summary, record = outputs(only_run(folder / "r"))
    # A third of a revolution, part of it without a worker: watts in sun and shadow are not compared here.
    others = [line for line in failed(summary) if not line.startswith("eclipse_watts")]
    assert others == []
    assert code in {0, 1}
    assert [h.name for h in record.process_faults] == list(faults)
    for kind in faults:
        assert verdicts(summary)[f"recovered_{kind}"] is True
    assert summary.tokens.reference_match is True
    assert summary.tokens.unverified_released == 0
    assert summary.flips.missed == 0
    assert summary.telemetry.lost == 0
    ledger = summary.telemetry
    assert ledger.generated == ledger.acked + ledger.stored + ledger.dropped
    assert (record.node_restarts, record.worker_restarts) == (1, 2)
    assert {s.boot for s in record.ledger.streams} == {1, 2}
    assert children() <= before
