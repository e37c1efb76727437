"""Which outcome a flip in memory has, and which pages are drawn."""

from __future__ import annotations

import os
import random

import pytest

from hil.campaign.memory_run import SHARED, MemoryOutcome, ResidentPage, _is_of, _outcome, _region, draw_page
from hil.memory import NotThere
from telemetry.packets import FdirReport, Level, Outcome


def report(monitor="weights.digest", outcome=Outcome.REPAIRED, action="parity"):
    return FdirReport(
        monitor=monitor, level=Level.IN_WORKER_REPAIR, outcome=outcome, action=action, detected_ns=1,
        recovered_ns=2, evidence={},
    )  # fmt: skip


RESTART = report("worker.exit", Outcome.STARTED, "restart_worker")


@pytest.mark.parametrize(
    ("reports", "flags", "outcome"),
    [
        ([], {}, MemoryOutcome.MASKED),
        ([report()], {}, MemoryOutcome.REPAIRED),
        ([report("kv.digest", Outcome.REDONE, "recompute")], {}, MemoryOutcome.REDONE),
        ([report(), RESTART], {}, MemoryOutcome.WORKER_RESTARTED),
        ([RESTART], {"node_restarted": True}, MemoryOutcome.NODE_RESTARTED),
        ([RESTART], {"served": False}, MemoryOutcome.NO_SERVICE),
        ([report()], {"wrong": True, "served": False}, MemoryOutcome.WRONG_OUTPUT),
    ],
)
def test_the_gravest_outcome_counts(reports, flags, outcome):
    settings = {"served": True, "wrong": False, "node_restarted": False} | flags
    assert _outcome(reports, **settings) is outcome


@pytest.mark.parametrize(
    ("region", "monitor", "of"),
    [
        ("weights", "weights.digest", True),
        ("weights", "kv.digest", False),
        ("arena", "kv.digest", True),
        ("code", "memory.segments", True),
        ("heap", "memory.tables", True),
        ("heap", "weights.digest", False),
    ],
)
def test_a_repair_of_another_region_is_not_of_this_flip(region, monitor, of):
    assert _is_of(report(monitor), ResidentPage(0, region)) is of


@pytest.mark.parametrize(
    ("path", "permissions", "region"),
    [
        ("/x/a/weights.bin", "r--p", "weights"),
        (f"{SHARED}/penumbra-n-1", "rw-s", "arena"),
        ("[heap]", "rw-p", "heap"),
        ("[stack]", "rw-p", "stack"),
        ("", "rw-p", "anonymous"),
        ("/lib/libc.so.6", "r--p", "code"),
        ("/usr/bin/python3", "r-xp", "code"),
        ("/usr/share/locale", "r--p", "file"),
    ],
)
def test_regions_are_named_by_what_they_hold(path, permissions, region):
    assert _region(path, permissions) == region


def test_pages_of_this_process_are_drawn_over_all_its_regions():
    rng = random.Random(4)
    pages = [draw_page(os.getpid(), rng) for _ in range(60)]
    assert len({page.region for page in pages}) >= 3
    assert all(page.address % 4096 == 0 for page in pages)


def test_a_process_that_is_gone_has_none():
    with pytest.raises(NotThere, match="gone"):
        draw_page(2**22 - 3, random.Random(1))
