"""Short campaigns with the tiny model: strikes on a real worker, faults of a real node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hil.campaign.kill_run import KINDS, KillRecord, run_kills
from hil.campaign.live_node import LiveSettings
from hil.campaign.memory_run import MemoryOutcome, MemoryRecord, run_memory
from hil.campaign.records import TRIALS, Records, read_header, read_lines, read_notes
from hil.campaign.report import last_notes, make_report
from hil.campaign.strata import Stratum
from hil.campaign.strike_run import Plan, run_strikes
from hil.campaign.strike_worker import WorkerSettings
from hil.campaign.strikes import COUNTED, FOUND, UNDETECTED, StrikeRecord
from hil.processes import all_processes, descendants, same
from hil.shared_memory import clear_left
from node.config import NodeConfig

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


LIVE = LiveSettings(threads=1, batch=2, seats=3, positions=256, jobs=3)


async def test_a_node_killed_and_stopped_loses_no_token_and_no_record(
    tiny_images: Path, tmp_path: Path
) -> None:
    await run_kills(tiny_images, tmp_path, trials=1, seed=2, settings=LIVE, bytes_a_token=1)
    records = list(read_lines(tmp_path / TRIALS, KillRecord))
    assert {(r.target, r.kind) for r in records} == set(KINDS)
    assert all(r.back and r.back_ms is not None for r in records)
    (note,) = last_notes(read_notes(tmp_path))
    assert (note["wrong"], note["wrong_ends"], note["lost"], note["duplicated"]) == (0, 0, 0, 0)
    assert (note["all_ended"], note["consistent"], note["exit_code"], note["unproven"]) == (True, True, 0, 0)
    assert "SIGSTOP of the node | 1 | 1 |" in make_report([tmp_path])


async def test_flips_anywhere_are_classified(tiny_images: Path, tmp_path: Path) -> None:
    await run_memory(
        tiny_images, tmp_path, worker_trials=3, node_trials=2, seed=2, settings=LIVE, bytes_a_token=1
    )
    records = list(read_lines(tmp_path / TRIALS, MemoryRecord))
    assert [r.target for r in records] == ["worker"] * 3 + ["node"] * 2
    assert {r.outcome for r in records} <= set(MemoryOutcome) - {MemoryOutcome.WRONG_OUTPUT}
    (note,) = last_notes(read_notes(tmp_path))
    assert (note["wrong"], note["lost"]) == (0, 0)
    text = make_report([tmp_path])
    assert "| **worker** | 3 |" in text
    assert "| **node** | 2 |" in text


CAMPAIGN = """
import asyncio, sys
from pathlib import Path
from hil.campaign.kill_run import run_kills
from hil.campaign.live_node import LiveSettings
from node.config import NodeConfig
settings = LiveSettings(threads=1, batch=2, seats=3, positions=256, jobs=3)
images, out = map(Path, sys.argv[1:])
asyncio.run(run_kills(images, out, trials=500, seed=1, settings=settings, bytes_a_token=1))
"""


def test_a_campaign_that_is_killed_leaves_no_process_and_goes_on(tiny_images: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CAMPAIGN, str(tiny_images), str(tmp_path)]) as process:
        deadline_s = time.monotonic() + 60
        trials = tmp_path / TRIALS
        while not trials.exists() or not trials.read_bytes():
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        family = descendants(process.pid, all_processes())
        assert len(family) >= 2
        process.kill()
    deadline_s = time.monotonic() + 30
    while any(same(member) for member in family) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    left = [member for member in family if same(member)]
    for member in left:
        os.kill(member.pid, signal.SIGKILL)
    assert left == [], "the node outlives its campaign"
    clear_left()  # as the next campaign or flight does
    (config,) = tmp_path.rglob("node.toml")
    assert not NodeConfig.load(config).arena_path.exists()
    header = read_header(tmp_path)
    with Records(tmp_path, header, KillRecord) as records:
        assert records.done
