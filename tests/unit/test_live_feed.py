"""What the live view is fed with, and what it must not believe."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import msgspec
import pytest

from hil import live_feed as module
from hil.faults import Target
from hil.live import LiveState
from hil.live_feed import LiveFeed, plan_text
from hil.spacecraft import FlightClock
from telemetry.frame import Frame, decode_frame, encode_frame
from telemetry.packets import (
    Certificate,
    Event,
    FdirReport,
    Housekeeping,
    Level,
    Mode,
    Outcome,
    Packet,
    Result,
    Severity,
)
from telemetry.spool import Spool
from tests.flight_records import START_NS, housekeeping, plans, strike

T0 = 1_700_000_000_000_000_000


class Feed:
    def __init__(self, folder: Path) -> None:
        self.state = LiveState()
        self.clock = FlightClock(T0, 60.0)
        self.feed = LiveFeed(self.state, self.clock, folder / "node.db")

    def take(self, packet: Packet, t_s: float = 0.0, boot: int = 1) -> None:
        data = encode_frame(node="n", boot=boot, seq=0, t_ns=T0 + int(t_s * 1e9), packet=packet)
        frame: Frame = decode_frame(data)
        self.feed.on_packet(frame, packet)


@pytest.fixture
def feed(tmp_path: Path) -> Feed:
    return Feed(tmp_path)


def hk(**changes: object) -> Housekeeping:
    return msgspec.structs.replace(housekeeping(0.0, 10, 5).packet, **changes)


def result(first: int, text: bytes, job: str = "j", finish: str | None = None) -> Result:
    proof = Certificate(image_id="i", epoch=0, kv_digest=b"", chain=b"")
    return Result(job=job, first=first, tokens=[1], text=text, certificate=proof, finish=finish)


def test_housekeeping_fills_the_view(feed: Feed) -> None:
    feed.take(hk(strikes_detected=3, strikes_repaired=2, jobs_active=2))
    s = feed.state
    assert (s.mode, s.ceiling_w, s.duty, s.tokens_released) == ("nominal", 9.5, 0.9, 10)
    assert (s.jobs_done, s.jobs_queued, s.backlog, s.worker) == (2, 3, 5, "running")
    assert s.jobs_active == 2
    assert (s.flips_detected, s.flips_repaired) == (3, 2)
    assert feed.feed.computing == (1, 1)


def test_old_or_unlocked_housekeeping_is_not_believed(feed: Feed) -> None:
    feed.take(hk(), t_s=100.0)
    feed.take(hk(tokens_released=5), t_s=50.0)
    feed.take(hk(tokens_released=6, clock_locked=False), t_s=900.0)
    assert feed.state.tokens_released == 10
    feed.take(hk(tokens_released=11), t_s=101.0)
    assert feed.state.tokens_released == 11


def test_strikes_are_counted_over_boots(feed: Feed) -> None:
    feed.take(hk(strikes_detected=3, strikes_repaired=3), t_s=1.0)
    feed.take(hk(strikes_detected=1, strikes_repaired=0), t_s=2.0, boot=2)
    feed.take(hk(strikes_detected=2, strikes_repaired=2), t_s=3.0, boot=2)
    assert (feed.state.flips_detected, feed.state.flips_repaired) == (5, 5)


def test_who_computes_is_known_only_while_it_runs(feed: Feed) -> None:
    feed.take(hk(worker_state="starting"), t_s=1.0)
    assert feed.feed.computing is None
    feed.take(hk(worker_generation=4), t_s=2.0, boot=3)
    assert feed.feed.computing == (3, 4)


def test_text_is_joined_in_order_even_inside_a_character(feed: Feed) -> None:
    whole = "na\u00efve".encode()
    feed.take(result(0, whole[:3]))
    feed.take(result(2, b"!"))
    feed.take(result(1, whole[3:]))
    assert feed.state.text == "na\u00efve!"


def test_one_of_several_jobs_is_shown_until_it_ends_or_falls_silent(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    for first in range(3):
        for job in ("a", "b"):
            feed.take(result(first, f"{job}{first} ".encode(), job))
    assert (feed.state.job, feed.state.text) == ("a", "a0 a1 a2 ")
    feed.take(result(3, b"end", "a", "length"))
    assert (feed.state.job, feed.state.text) == ("a", "a0 a1 a2 end")
    feed.take(result(3, b"b3", "b"))
    assert (feed.state.job, feed.state.text) == ("b", "b0 b1 b2 b3")
    feed.take(result(0, b"c", "c"))
    assert feed.state.job == "b"
    now_s[0] += module.HOLD_S
    feed.take(result(1, b"C", "c"))
    assert (feed.state.job, feed.state.text) == ("c", "cC")
    feed.take(result(4, b"after a gap", "c"))
    assert feed.state.text == "after a gap"


def test_events_of_weight_and_mode_changes_are_told(feed: Feed) -> None:
    feed.take(Event(severity=Severity.INFO, name="a", text="trivial"))
    feed.take(Event(severity=Severity.HIGH, name="b", text="grave"))
    feed.take(hk(), t_s=1.0)
    feed.take(hk(mode=Mode.ECLIPSE), t_s=2.0)
    told = [text for _, _, text in feed.state.events]
    assert told == ["node: grave", "mode nominal to eclipse"]


def test_last_strike_and_its_answer(feed: Feed) -> None:
    struck = strike(1)
    feed.feed.on_strike(struck)
    assert feed.state.flips_injected == 1
    assert f"page {struck.page}" in feed.state.last_strike
    report = FdirReport(
        monitor="weights.digest", level=Level.IN_WORKER_REPAIR, outcome=Outcome.REPAIRED, action="parity",
        detected_ns=struck.t_ns, recovered_ns=struck.t_ns + 212_000_000, region="weights", page=struck.page,
        role="ffn_up",
    )  # fmt: skip
    feed.take(report)
    assert feed.state.last_strike == f"ffn_up page {struck.page}: 212 ms"


async def test_between_contacts_it_reads_the_node_s_disk(feed: Feed, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "node.db", isolation_level=None)
    spool = Spool("n", 2, 1 << 20)
    spool.create(connection)
    spool.append(connection, hk(tokens_released=77), T0)
    for first, text in enumerate((b"from ", b"the ", b"disk")):
        spool.append(connection, result(first, text), T0)
        spool.append(connection, result(first, b"other", "k"), T0)
    feed.clock.start()
    running = asyncio.create_task(feed.feed.run(lambda: 42))
    for _ in range(100):
        if feed.state.text and len(feed.state.rates) > 0:
            break
        await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.wait([running])
    connection.close()
    s = feed.state
    assert (s.tokens_released, s.archived, s.text) == (77, 42, "from the disk")
    assert feed.feed.computing == (2, 1)
    assert s.token_rate_hz == 0.0


def test_the_answer_to_a_strike_is_that_of_the_same_job(feed: Feed) -> None:
    struck = strike(1, target=Target.KV)
    feed.feed.on_strike(struck)
    report = FdirReport(
        monitor="kv.digest", level=Level.IN_WORKER_REPAIR, outcome=Outcome.REPAIRED, action="parity",
        detected_ns=struck.t_ns, recovered_ns=struck.t_ns + 50_000_000, region="kv", page=struck.page,
        role="global", evidence={"job": "another"},
    )  # fmt: skip
    feed.take(report)
    assert "last in" in feed.state.last_strike
    feed.take(msgspec.structs.replace(report, evidence={"job": struck.job}))
    assert feed.state.last_strike == f"global page {struck.page}: 50 ms"


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (0, "planner: the battery's floor at 1:10:00"),
        (1, "rules: the commanded cap"),
        (2, "rules: the array"),
    ],
)
def test_the_plan_is_told_in_words(sample: int, text: str) -> None:
    assert plan_text(plans()[sample].packet, START_NS) == text


def test_backlog_and_shedding_are_told_with_the_plan() -> None:
    packet = msgspec.structs.replace(
        plans()[0].packet, least_priority=7,
        backlog_tokens=900, backlog_clear_ns=START_NS + 600 * 1_000_000_000,
    )  # fmt: skip
    told = plan_text(packet, START_NS)
    assert "backlog 900 tokens, done 0:10:00" in told
    assert "shed below priority 7" in told
    assert "beyond the horizon" in plan_text(msgspec.structs.replace(packet, backlog_clear_ns=None), START_NS)
