from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from memory_link import MemoryLink
from waiting import until

from node.downlink import MAX_BACKOFF, Downlink, DownlinkWindow
from telemetry import topics
from telemetry.ack import Ack
from telemetry.database import Database
from telemetry.frame import decode_frame
from telemetry.packets import Event, Severity, Stream
from telemetry.spool import Spool, SpoolRecord


def record(number: int, stream: Stream = Stream.EVENT, boot: int = 1) -> SpoolRecord:
    return SpoolRecord(number, stream, boot, number, b"")


def test_records_under_way_are_bounded_and_not_sent_twice() -> None:
    window = DownlinkWindow(2, 1.0)
    window.on_sent(record(1), 0.0)
    window.on_sent(record(2), 0.0)
    assert window.room(0.5) == 0
    assert window.waiting(0.5) == {1, 2}
    assert window.on_ack(Ack(node="n", boot=1, stream=Stream.EVENT, upto=2)) == 1
    assert window.room(0.5) == 1
    assert window.waiting(0.5) == {2}


def test_repetitions_wait_twice_as_long_each_time_up_to_a_bound() -> None:
    window = DownlinkWindow(2, 1.0)
    now_s, waits = 0.0, []
    for _ in range(9):
        window.on_sent(record(1), now_s)
        wait_s = next(w for w in range(1, 200) if window.waiting(now_s + w) == set())
        waits.append(wait_s)
        now_s += wait_s
    assert waits == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert waits[-1] == MAX_BACKOFF


def test_a_record_that_was_dropped_meanwhile_is_forgotten() -> None:
    window = DownlinkWindow(2, 1.0)
    window.on_sent(record(1), 0.0)
    window.on_sent(record(2), 2 * MAX_BACKOFF + 1.0)
    window.on_sent(record(1), 2 * MAX_BACKOFF + 1.0)
    # Had it been remembered, its wait would have doubled.
    assert window.waiting(2 * MAX_BACKOFF + 2.5) == set()


def test_acknowledgements_of_other_boots_and_streams_free_nothing() -> None:
    window = DownlinkWindow(2, 1.0)
    window.on_sent(record(1), 0.0)
    for boot, stream in ((2, Stream.EVENT), (1, Stream.FDIR)):
        assert window.on_ack(Ack(node="n", boot=boot, stream=stream, upto=9)) == 0
    assert window.on_ack(Ack(node="n", boot=1, stream=Stream.EVENT, upto=9, gaps=[(1, 1)])) == 0
    assert window.waiting(0.0) == {1}


@pytest.mark.parametrize(("limit", "retransmit_s"), [(0, 1.0), (1, 0.0), (1, -1.0)])
def test_a_window_without_room_or_time_is_refused(limit: int, retransmit_s: float) -> None:
    with pytest.raises(ValueError, match="required"):
        DownlinkWindow(limit, retransmit_s)


@contextlib.asynccontextmanager
async def open_downlink(
    tmp_path: Path, link: MemoryLink, window: DownlinkWindow, events: int
) -> AsyncIterator[tuple[Downlink, Database, Spool]]:
    database = await Database.open(tmp_path / "node.db")
    spool = Spool("n", 1, 1 << 20)
    await database.run(spool.create)
    for number in range(events):
        event = Event(severity=Severity.INFO, name=f"e{number}", text="")
        await database.run(lambda c, e=event: spool.append(c, e, 0))
    downlink = Downlink("n", database, spool, link, window)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(downlink.run(), name="test.downlink")
        yield downlink, database, spool
        task.cancel()
    await database.close()


def sequences(link: MemoryLink) -> list[int]:
    return [decode_frame(payload).seq for _, payload in link.published]


async def test_records_go_down_in_order_and_stay_until_the_archive_has_them(tmp_path: Path) -> None:
    link = MemoryLink()
    async with open_downlink(tmp_path, link, DownlinkWindow(10, 60.0), 4) as (downlink, database, spool):
        await until(lambda: len(link.published) >= 4)
        assert sequences(link) == [0, 1, 2, 3]
        assert {topic for topic, _ in link.published} == {topics.tm("n", "event")}
        assert (await database.run(spool.size))[0] == 4
        downlink.on_ack(Ack(node="n", boot=1, stream=Stream.EVENT, upto=3, gaps=[(1, 1)]))

        async def two_left() -> bool:
            return (await database.run(spool.size))[0] == 2

        await until(two_left)
        left = await database.run(lambda c: spool.batch(c, 10, set()))
        assert [r.seq for r in left] == [1, 3]


async def test_nothing_is_published_while_the_link_is_down_and_all_after(tmp_path: Path) -> None:
    link = MemoryLink(up=False)
    async with open_downlink(tmp_path, link, DownlinkWindow(10, 60.0), 3):
        await asyncio.sleep(0.2)
        assert link.published == []
        link.connected.set()
        await until(lambda: len(link.published) >= 3)


async def test_what_the_link_did_not_take_is_sent_again(tmp_path: Path) -> None:
    link = MemoryLink()
    link.failing = True
    async with open_downlink(tmp_path, link, DownlinkWindow(2, 60.0), 3):
        await asyncio.sleep(0.2)
        link.failing = False
        await until(lambda: len(link.published) >= 2)
        assert sequences(link)[:2] == [0, 1]


async def test_what_is_not_acknowledged_is_sent_again(tmp_path: Path) -> None:
    link = MemoryLink()
    async with open_downlink(tmp_path, link, DownlinkWindow(10, 0.1), 1):
        await until(lambda: len(link.published) >= 3)
    assert set(sequences(link)) == {0}
