"""Flights whose bench is ended, or whose output is: a short form of `penumbra campaign run ends`."""

from __future__ import annotations

from pathlib import Path

import pytest

from hil.campaign.ends_run import KINDS, EndRecord, run_ends
from hil.campaign.records import TRIALS, read_lines
from hil.campaign.report import make_report

pytestmark = pytest.mark.flight


@pytest.mark.timeout(600)
async def test_nothing_is_left_of_a_flight_however_it_ends(tiny_images: Path, tmp_path: Path) -> None:
    await run_ends(tiny_images, tmp_path, trials=1, seed=3)
    records = list(read_lines(tmp_path / TRIALS, EndRecord))
    assert sorted(record.kind for record in records) == sorted(KINDS)
    assert [record.problems for record in records if not record.is_right] == []
    # What the seed draws: ends while something runs, or this proves little.
    assert {record.phase for record in records if record.kind in {"hup", "term", "kill"}} - {"ended"}
    text = make_report([tmp_path])
    assert "| SIGKILL | 1 |" in text
    await run_ends(tiny_images, tmp_path, trials=1, seed=3)
    assert make_report([tmp_path]) == text
