"""Downlink: the spool's records to the ground, in priority order, until the archive acknowledges them.

The link is opportunistic: records flow whenever the space link is connected, and nothing is published
while it is not. `DownlinkWindow` decides how much may be under way and what has to be sent again;
`Downlink` carries it out. Only an authenticated acknowledgement of the archive deletes a record:
what a broker confirms is no proof of anything (reference/fsw.md 4.3).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from dataclasses import dataclass
from functools import partial

from node.pulse import Pulse
from telemetry import topics
from telemetry.ack import Ack
from telemetry.database import Database, StoreFull
from telemetry.link import Link, LinkDown
from telemetry.spool import Spool, SpoolRecord

_log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often new records are looked for, s (assumed: small beside a contact, cheap for SQLite)."""


BATCH = 32
"""Records taken from the spool at once (assumed: two rounds of the link's publishes)."""


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

    def room(self, now_s: float) -> int:
        """Return how many records may be sent now."""
        recent = sum(1 for r in self._sent.values() if now_s - r.sent_s < self.retransmit_s)
        return max(0, self.limit - recent)

    def waiting(self, now_s: float) -> set[int]:
        """Return the row ids that are under way and not to be sent now."""
        return {row for row, r in self._sent.items() if now_s - r.sent_s < r.wait_s}

    def on_sent(self, record: SpoolRecord, now_s: float) -> None:
        """Note that a record was handed to the link."""
        before = self._sent.get(record.rowid)
        most_s = self.retransmit_s * MAX_BACKOFF
        wait_s = self.retransmit_s if before is None else min(2 * before.wait_s, most_s)
        self._sent[record.rowid] = InFlight(record.stream, record.boot, record.seq, now_s, wait_s)
        # What the spool dropped meanwhile is never sent again, and forgotten here.
        self._sent = {row: r for row, r in self._sent.items() if now_s - r.sent_s <= 2 * most_s}

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
    """

    def __init__(
        self, node: str, database: Database, spool: Spool, link: Link, window: DownlinkWindow
    ) -> None:
        self._node = node
        self._database = database
        self._spool = spool
        self._link = link
        self._window = window
        self._acks: asyncio.Queue[Ack] = asyncio.Queue()
        self.pulse = Pulse("downlink")
        """Health of the sending task, which turns by itself."""

    def on_ack(self, ack: Ack) -> None:
        """Take an authenticated acknowledgement: what it covers is deleted."""
        self._window.on_ack(ack)
        self._acks.put_nowait(ack)

    async def run(self) -> None:
        """Send and delete until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send(), name="node.downlink.send")
            group.create_task(self._delete(), name="node.downlink.delete")

    async def _send(self) -> None:
        while True:
            self.pulse.beat()
            if not self._link.connected.is_set():
                self._window.on_disconnected()
                await asyncio.sleep(POLL_S)
                continue
            limit = min(self._window.room(time.monotonic()), BATCH)
            records = await self._take(limit) if limit > 0 else []
            if records:
                await asyncio.gather(*(self._publish(record) for record in records))
            else:
                await asyncio.sleep(POLL_S)

    async def _take(self, limit: int) -> list[SpoolRecord]:
        exclude = self._window.waiting(time.monotonic())
        try:
            return await self._database.run(lambda c: self._spool.batch(c, limit, exclude))
        except (StoreFull, sqlite3.Error) as error:
            _log.error("the spool cannot be read: %s", error)
            return []

    async def _publish(self, record: SpoolRecord) -> None:
        # Before the broker confirms it: the ground's acknowledgement may be here first.
        self._window.on_sent(record, time.monotonic())
        try:
            await self._link.publish(topics.tm(self._node, record.stream), record.frame)
        except LinkDown:
            self._window.on_failed(record)

    async def _delete(self) -> None:
        while True:
            ack = await self._acks.get()
            try:
                await self._database.run(partial(self._spool.acknowledge, ack=ack))
            except (StoreFull, sqlite3.Error) as error:
                # The record is sent again, and the archive acknowledges it again.
                _log.error("acknowledged records were not deleted: %s", error)
