from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from memory_link import MemoryLink
from waiting import until

from node.downlink import (
    BLOCK_FROM,
    MAX_BACKOFF,
    Downlink,
    DownlinkWindow,
    Turns,
    messages,
)
from telemetry import topics
from telemetry.ack import Ack
from telemetry.block import decode_block
from telemetry.database import Database
from telemetry.frame import decode_frame, encode_frame
from telemetry.packets import PRIORITY, Event, ProductChunk, Severity, Stream
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


def stored(stream: Stream, seq: int, text: str = "as before") -> SpoolRecord:
    packet = Event(severity=Severity.INFO, name="n", text=text)
    frame = encode_frame(node="n", boot=1, seq=seq, t_ns=seq, packet=packet)
    return SpoolRecord(seq, stream, 1, seq, frame)


def test_a_backlog_goes_as_a_block_and_what_is_urgent_alone_before_it() -> None:
    low = [stored(Stream.HOUSEKEEPING, seq) for seq in range(BLOCK_FROM)]
    urgent = [stored(Stream.FDIR, 90), stored(Stream.EVENT, 91)]
    first, second, block = messages("n", [*urgent, *low])
    assert (first.topic, first.records) == (topics.tm("n", "fdir"), (urgent[0],))
    assert (second.topic, second.records) == (topics.tm("n", "event"), (urgent[1],))
    assert (block.topic, block.records) == (topics.tm_block("n"), tuple(low))
    assert decode_block(block.payload) == [record.frame for record in low]


def test_few_records_and_what_does_not_compress_go_alone() -> None:
    few = [stored(Stream.HOUSEKEEPING, seq) for seq in range(BLOCK_FROM - 1)]
    assert [m.records for m in messages("n", few)] == [(record,) for record in few]
    noise = [
        replace(stored(Stream.RESULT, seq), frame=np.random.default_rng(seq).bytes(500))
        for seq in range(BLOCK_FROM)
    ]
    assert [m.records for m in messages("n", noise)] == [(record,) for record in noise]


def test_each_bulk_stream_has_its_turn() -> None:
    turns = Turns()
    assert {turns.next() for _ in Turns.BULK} == set(Turns.BULK)
    assert set(Turns.BULK) == {s for s in Stream if PRIORITY[s] > PRIORITY[Stream.LEDGER]}


async def test_products_move_while_urgent_records_wait(tmp_path: Path) -> None:
    link = MemoryLink()
    async with open_downlink(tmp_path, link, DownlinkWindow(2, 60.0), 0) as (downlink, database, spool):
        chunk = ProductChunk(product="dump-1", index=0, data=bytes(10))
        event = Event(severity=Severity.HIGH, name="e", text="")
        await database.run(lambda c: spool.append_many(c, [(event, 0)] * 200 + [(chunk, 0)]))
        heard: set[Stream] = set()
        for _ in range(400):
            if Stream.PRODUCT in heard:
                break
            await asyncio.sleep(0.01)
            frames = [decode_frame(payload) for _, payload in link.published]
            heard = {frame.stream for frame in frames}
            seqs = [frame.seq for frame in frames if frame.stream is Stream.EVENT]
            if seqs:
                downlink.on_ack(Ack(node="n", boot=1, stream=Stream.EVENT, upto=max(seqs) + 1))
        assert Stream.PRODUCT in heard
        assert len(seqs) < 100


async def test_a_confirmed_record_waits_for_its_acknowledgement_from_then_on(tmp_path: Path) -> None:
    window = DownlinkWindow(2, 1.0)
    window.on_sent(record(1), 0.0)
    window.on_confirmed(record(1), 5.0)
    assert window.waiting(5.9) == {1}
    assert window.waiting(6.0) == set()


async def test_what_is_not_acknowledged_is_sent_again(tmp_path: Path) -> None:
    link = MemoryLink()
    async with open_downlink(tmp_path, link, DownlinkWindow(10, 0.1), 1):
        await until(lambda: len(link.published) >= 3)
    assert set(sequences(link)) == {0}
