"""Downlink: the spool's records to the ground, in priority order, until the archive acknowledges them.

The link is opportunistic: records flow whenever the space link is connected, and nothing is published
while it is not. `DownlinkWindow` decides how much may be under way and what has to be sent again; `Turns`
keeps the bulk moving beside what is urgent; `Downlink` carries it out. A backlog goes down in compressed
blocks (`telemetry.block`). Only an authenticated acknowledgement of the archive deletes a record: what a
broker confirms is no proof of anything (reference/fsw.md 4.3).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from node.pulse import Pulse
from telemetry import topics
from telemetry.ack import Ack
from telemetry.block import encode_block
from telemetry.database import Database, StoreFull
from telemetry.flow import Flow
from telemetry.link import Link, LinkDown
from telemetry.packets import PRIORITY, Stream
from telemetry.spool import Spool, SpoolRecord

_log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often new records are looked for, s (assumed: small beside a contact, cheap for SQLite)."""


BATCH = 256
"""Most records taken from the spool at once (assumed)."""
ACK_PART = 16
"""Records deleted in one transaction where the disk is too full for all that were acknowledged (assumed)."""
BATCH_BYTES = 64 * 1024
"""Most bytes of frames taken at once, by default: half a second at 1 Mbit/s, so that what is urgent waits no
longer than the `PIPELINE` of them (assumed)."""
PIPELINE = 4
"""Batches handed to the link at the same time: it is not to idle for a round trip after each (assumed)."""
BLOCK_FROM = 8
"""So many records in a batch are a backlog, and go as a block (assumed)."""
URGENT_PRIORITY = 1
"""Records up to this priority do not share a block with others, but go ahead of it."""

MAX_BACKOFF = 64
"""Most that the wait for an acknowledgement grows, in units of `retransmit_s` (assumed)."""


@dataclass(frozen=True)
class InFlight:
    """One record sent and not yet acknowledged."""

    stream: str
    boot: int
    seq: int
    sent_s: float
    wait_s: float
    """Time from `sent_s` after which it is sent again; doubles with each attempt."""


class DownlinkWindow:
    """Which records are under way: bounded in rate, and sent again when they wait too long.

    The wait doubles with each attempt, so that records the ground does not acknowledge step aside: with a
    dead uplink the newest housekeeping still comes down between the repetitions.

    Parameters
    ----------
    limit
        Records that may be sent within `retransmit_s` without being acknowledged.
    retransmit_s
        Age after which a record counts as lost on the way, s of the monotonic clock.

    Raises
    ------
    ValueError
        A limit under 1 or a time that is not positive.
    """

    def __init__(self, limit: int, retransmit_s: float) -> None:
        if limit < 1 or retransmit_s <= 0:
            raise ValueError(f"limit >= 1 and retransmit_s > 0 are required, got {limit}, {retransmit_s}")
        self.limit = limit
        self.retransmit_s = retransmit_s
        self._sent: dict[int, InFlight] = {}
        self._flow: tuple[Flow, float] | None = None
        self._swept_s = 0.0

    def room(self, now_s: float) -> int:
        """Return how many records may be sent now."""
        recent = sum(1 for r in self._sent.values() if now_s - r.sent_s < self.retransmit_s)
        return max(0, self.granted(now_s) - recent)

    def granted(self, now_s: float) -> int:
        """Return how many records may be under way: what the ground grants, while its word is fresh."""
        if self._flow is not None:
            flow, heard_s = self._flow
            if now_s - heard_s < flow.valid_s:
                return min(self.limit, flow.records)
        return self.limit

    def waiting(self, now_s: float) -> set[int]:
        """Return the row ids that are under way and not to be sent now."""
        return {row for row, r in self._sent.items() if now_s - r.sent_s < r.wait_s}

    def on_flow(self, flow: Flow, now_s: float) -> bool:
        """Take the ground's word on how much it can take; return whether it is newer than the last."""
        if self._flow is not None and flow.t_ns <= self._flow[0].t_ns:
            return False
        self._flow = (flow, now_s)
        return True

    def on_sent(self, record: SpoolRecord, now_s: float) -> None:
        """Note that a record was handed to the link."""
        before = self._sent.get(record.rowid)
        most_s = self.retransmit_s * MAX_BACKOFF
        wait_s = self.retransmit_s if before is None else min(2 * before.wait_s, most_s)
        self._sent[record.rowid] = InFlight(record.stream, record.boot, record.seq, now_s, wait_s)
        if now_s - self._swept_s >= self.retransmit_s:
            # What the spool dropped meanwhile is never sent again, and forgotten here.
            self._swept_s = now_s
            self._sent = {row: r for row, r in self._sent.items() if now_s - r.sent_s <= 2 * most_s}

    def on_confirmed(self, record: SpoolRecord, now_s: float) -> None:
        """Note that the link has taken a record: on a slow link its wait begins now."""
        sent = self._sent.get(record.rowid)
        if sent is not None:
            self._sent[record.rowid] = replace(sent, sent_s=now_s)

    def on_failed(self, record: SpoolRecord) -> None:
        """Note that the link did not take a record after all."""
        self._sent.pop(record.rowid, None)

    def on_ack(self, ack: Ack) -> int:
        """Forget acknowledged records; return how many."""
        done = [row for row, r in self._sent.items() if covers(ack, r.stream, r.boot, r.seq)]
        for row in done:
            del self._sent[row]
        return len(done)

    def on_disconnected(self) -> None:
        """Forget what was under way: it may have died with the connection."""
        self._sent.clear()


class Turns:
    """Whose record goes first in a batch: mostly the most urgent, and in turn one of each bulk stream.

    So each bulk stream gets at least one record of every `len(BULK)` batches, however much that is urgent
    waits, and what is urgent loses one record a batch.
    """

    BULK = (Stream.PRODUCT, Stream.HOUSEKEEPING, Stream.PLAN, Stream.RESULT)

    def __init__(self) -> None:
        self._turn = 0

    def next(self) -> Stream:
        """Return the bulk stream whose turn it is."""
        stream = self.BULK[self._turn]
        self._turn = (self._turn + 1) % len(self.BULK)
        return stream


@dataclass(frozen=True)
class Message:
    """What is published at once, and the records it carries."""

    topic: str
    payload: bytes
    records: tuple[SpoolRecord, ...]


def messages(node: str, records: Sequence[SpoolRecord]) -> list[Message]:
    """Return what to publish for some records, the urgent first: a backlog as a block, few one by one."""
    urgent = [record for record in records if PRIORITY[record.stream] <= URGENT_PRIORITY]
    bulk = [record for record in records if PRIORITY[record.stream] > URGENT_PRIORITY]
    made: list[Message] = []
    for part in (urgent, bulk):
        block = encode_block([record.frame for record in part]) if len(part) >= BLOCK_FROM else None
        if block is None:
            made += [Message(topics.tm(node, r.stream), r.frame, (r,)) for r in part]
        else:
            made.append(Message(topics.tm_block(node), block, tuple(part)))
    return made


def covers(ack: Ack, stream: str, boot: int, seq: int) -> bool:
    """Tell whether an acknowledgement says that this record is archived."""
    if (ack.stream, ack.boot) != (stream, boot) or seq >= ack.upto:
        return False
    return not any(first <= seq <= last for first, last in ack.gaps)


class Downlink:
    """Carries the window out.

    Parameters
    ----------
    node
        Node name, for the topics.
    database, spool
        The store.
    link
        The space link.
    window
        What may be under way.
    batch_bytes
        Most bytes of frames taken at once.
    """

    def __init__(
        self,
        node: str,
        database: Database,
        spool: Spool,
        link: Link,
        window: DownlinkWindow,
        *,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self._node = node
        self._database = database
        self._spool = spool
        self._link = link
        self._window = window
        self._batch_bytes = batch_bytes
        self.batches = 0
        """Batches handed to the link, since boot."""
        self._turns = Turns()
        self._pipeline = asyncio.Semaphore(PIPELINE)
        self._acks: asyncio.Queue[Ack] = asyncio.Queue()
        self.pulse = Pulse("downlink")
        """Health of the sending task, which turns by itself."""

    def on_ack(self, ack: Ack) -> None:
        """Take an authenticated acknowledgement: what it covers is deleted."""
        self._window.on_ack(ack)
        self._acks.put_nowait(ack)

    def on_flow(self, flow: Flow) -> None:
        """Take an authenticated word of the ground on how much it can take."""
        self._window.on_flow(flow, time.monotonic())

    async def run(self) -> None:
        """Send and delete until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send(group), name="node.downlink.send")
            group.create_task(self._delete(), name="node.downlink.delete")

    async def _send(self, group: asyncio.TaskGroup) -> None:
        while True:
            self.pulse.beat()
            if not self._link.connected.is_set():
                self._window.on_disconnected()
                await asyncio.sleep(POLL_S)
                continue
            limit = min(self._window.room(time.monotonic()), BATCH)
            records = await self._take(limit) if limit > 0 else []
            if not records:
                await asyncio.sleep(POLL_S)
                continue
            now_s = time.monotonic()
            for record in records:
                # Before the broker confirms it: the ground's acknowledgement may be here first.
                self._window.on_sent(record, now_s)
            await self._pipeline.acquire()
            self.batches += 1
            batch = messages(self._node, records)
            group.create_task(self._publish(batch), name="node.downlink.publish")

    async def _take(self, limit: int) -> list[SpoolRecord]:
        exclude = self._window.waiting(time.monotonic())
        first = self._turns.next()
        try:
            return await self._database.run(
                lambda c: self._spool.batch(c, limit, exclude, max_bytes=self._batch_bytes, first=first)
            )
        except (StoreFull, sqlite3.Error) as error:
            _log.error("the spool cannot be read: %s", error)
            return []

    async def _publish(self, batch: Sequence[Message]) -> None:
        try:
            await asyncio.gather(*(self._publish_one(message) for message in batch))
        finally:
            self._pipeline.release()

    async def _publish_one(self, message: Message) -> None:
        try:
            await self._link.publish(message.topic, message.payload)
        except LinkDown:
            for record in message.records:
                self._window.on_failed(record)
            return
        now_s = time.monotonic()
        for record in message.records:
            self._window.on_confirmed(record, now_s)

    async def _delete(self) -> None:
        while True:
            acks = [await self._acks.get()]
            while not self._acks.empty():
                acks.append(self._acks.get_nowait())
            # The newest of each stream says all that the older ones say.
            newest = {(ack.node, ack.boot, ack.stream): ack for ack in acks}
            try:
                try:
                    await self._database.run(partial(self._acknowledge, acks=newest.values()))
                except StoreFull:
                    for ack in newest.values():
                        await self._acknowledge_in_parts(ack)
            except (StoreFull, sqlite3.Error) as error:
                # The record is sent again, and the archive acknowledges it again.
                _log.error("acknowledged records were not deleted: %s", error)

    async def _acknowledge_in_parts(self, ack: Ack) -> None:
        """Delete a few records at a time: each transaction needs room for the pages it changes."""
        while await self._database.run(partial(self._spool.acknowledge, ack=ack, most=ACK_PART)):
            pass

    def _acknowledge(self, connection: sqlite3.Connection, acks: Iterable[Ack]) -> None:
        for ack in acks:
            self._spool.acknowledge(connection, ack)
