"""A short campaign of strikes on a real worker with the tiny model."""

from __future__ import annotations

from pathlib import Path

from hil.campaign.records import TRIALS, read_lines, read_notes
from hil.campaign.report import last_notes, make_report
from hil.campaign.strata import Stratum
from hil.campaign.strike_run import Plan, run_strikes
from hil.campaign.strike_worker import WorkerSettings
from hil.campaign.strikes import COUNTED, FOUND, UNDETECTED, StrikeRecord

PLAN = Plan(
    trials=3,
    settings=WorkerSettings(threads=1, batch=2, seats=3, positions=256, epoch_s=0.1),
    texts=4,
    bytes_a_token=1,
)


async def test_strikes_of_all_strata_are_found_and_a_finished_campaign_is_left_alone(
    tiny_image: Path, tmp_path: Path
) -> None:
    await run_strikes(tiny_image, tmp_path, PLAN)
    records = [r for r in read_lines(tmp_path / TRIALS, StrikeRecord) if r.fate in COUNTED]
    assert {r.stratum: sum(o.stratum is r.stratum for o in records) for r in records} == dict.fromkeys(
        Stratum, 3
    )
    assert not [r for r in records if r.fate in UNDETECTED]
    assert [r for r in records if r.fate in FOUND and r.repair_ms is not None]
    notes = last_notes(read_notes(tmp_path))
    assert sum(int(note["released"] or 0) for note in notes) > 0
    assert {note["wrong"] for note in notes} == {0}
    text = make_report([tmp_path])
    await run_strikes(tiny_image, tmp_path, PLAN)
    assert make_report([tmp_path]) == text
