"""A tiny flight for emulated boards: every process of it runs as the code of the CPU that runs this test.

`make test-aarch64` runs it as aarch64 code, `make test` as code of the host, faster.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from scenario_edits import changed

from hil.fly import FlyOptions, fly
from hil.record import FlightRecord, Happening
from hil.run_dir import scenario_text
from node.inference.manifest import load_manifest
from telemetry.summary import Summary

pytestmark = pytest.mark.flight

EMULATED = "PENUMBRA_PYTHON" in os.environ
"""Set by the emulated Python that `tests/aarch64.py` makes."""
SPEED = 4.0 if EMULATED else 40.0
"""Mission seconds a second: a flight of 7 s, or of 70 s of emulated code."""
NOT_JUDGED = {"eclipse_watts", "eclipse_forecast", "protection_overhead"}
"""The flight ends before the umbra begins, and measures no cost."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short path: the node's socket lies some levels below."""
    with tempfile.TemporaryDirectory(prefix="pf-") as name:
        yield Path(name)


def scenario(folder: Path) -> Path:
    """One contact in sunlight, in which jobs come up and their text goes down, under many flips."""
    text = changed(
        scenario_text("default-short"),
        duration_orbits="0.05",
        count="12",
        first_contact="12",
        max_tokens="[96]",
        positions="256",
        upsets_per_orbit="800",
        min_flips_injected="5",
        min_contacts="1",
        housekeeping_s="0.5\npatience = 25.0",
    )
    path = folder / "emulated.toml"
    path.write_text(text)
    return path


def most_at_once(happenings: Iterable[Happening]) -> int:
    """Return how many jobs were under way together, at most."""
    now = most = 0
    for happening in happenings:
        now += {"job.started": 1, "job.finished": -1}.get(happening.name, 0)
        most = max(most, now)
    return most


def test_a_batch_decodes_under_flips_what_each_job_decodes_alone(folder: Path, tiny_images: Path) -> None:
    options = FlyOptions(
        scenario=str(scenario(folder)),
        speed=SPEED,
        live=False,
        out_dir=folder / "r",
        images_dir=tiny_images,
        overhead=False,
    )
    with (folder / "shown.txt").open("w") as shown:
        code = fly(options, Console(file=shown, width=200))
    told = (folder / "shown.txt").read_text()
    (run,) = (folder / "r").iterdir()
    summary = msgspec.json.decode((run / "summary.json").read_bytes(), type=Summary)
    record = msgspec.json.decode((run / "flight.json").read_bytes(), type=FlightRecord)
    assert {check.name: check.ok for check in summary.verdict if check.name not in NOT_JUDGED} == {
        check.name: True for check in summary.verdict if check.name not in NOT_JUDGED
    }, told
    assert code == 0
    assert (run / "report.html").read_text().endswith("</html>\n")
    # Tokens: decoded together, and each job's are those of the same job alone, without a flip.
    assert summary.tokens.released == sum(len(job.tokens) for job in record.jobs) >= 96
    assert summary.tokens.reference_match is True
    assert summary.tokens.unverified_released == 0
    assert [job.job for job in record.jobs if job.tokens != (job.reference or [])] == []
    assert most_at_once(record.happenings) >= 2, told
    # Flips: in live weights, found and repaired where they were, without a restart.
    flips = summary.flips
    assert flips.by_target["weights"] >= 5
    assert flips.missed == 0
    assert flips.detected == flips.repaired == flips.injected - flips.masked > 0
    assert (record.worker_restarts, record.node_restarts) == (0, 0), told
    # Kernels of this CPU, not of the one that emulates it.
    assert load_manifest(tiny_images / "a").cpu.startswith(f"{platform.machine()}:")
