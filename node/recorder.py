"""The way of every packet into the spool, and how often a thing may be reported.

Code in the middle of a decision must not wait for the disk: it posts, and a writer stores in order.
A packet that the store cannot take is counted and logged; telemetry goes on.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from node.pulse import Pulse
from telemetry.database import Database, StoreFull
from telemetry.frame import FrameError
from telemetry.packets import Event, Packet, Severity
from telemetry.spool import Spool, SpoolRefused

_log = logging.getLogger(__name__)

MAX_WAITING = 1000
"""Packets that may wait for the disk (assumed: many seconds of a storm of events)."""
Evidence: TypeAlias = dict[str, str | int | float | bool | None]
_LOG_LEVEL = {
    Severity.INFO: logging.INFO,
    Severity.LOW: logging.INFO,
    Severity.MEDIUM: logging.WARNING,
    Severity.HIGH: logging.ERROR,
}


class Throttle:
    """Let so many reports through in a time, and count what it held back.

    Parameters
    ----------
    period_s
        Time in which one more report is allowed, s.
    burst
        Reports allowed at once after a quiet time.
    """

    def __init__(self, period_s: float, burst: int = 1) -> None:
        self.period_s = period_s
        self.burst = burst
        self._credit = float(burst)
        self._last_s: float | None = None
        self._held = 0

    def admit(self, now_s: float) -> int | None:
        """Return how often it happened since the last report, this time included; None to hold back."""
        if self._last_s is not None:
            earned = max(0.0, now_s - self._last_s) / self.period_s
            self._credit = min(self.burst, self._credit + earned)
        self._last_s = now_s
        self._held += 1
        if self._credit < 1:
            return None
        self._credit -= 1
        count, self._held = self._held, 0
        return count


class Recorder:
    """Writes packets to the spool.

    Parameters
    ----------
    database, spool
        Where packets go.
    now_ns
        Mission clock, for the stamps.
    """

    def __init__(self, database: Database, spool: Spool, now_ns: Callable[[], int]) -> None:
        self.now_ns = now_ns
        self.refused = 0
        """Packets the store could not take, since boot."""
        self._database = database
        self._spool = spool
        self._waiting: deque[tuple[Packet, int]] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.pulse = Pulse("recorder", self._wake.set)
        """Health of the writer."""

    def post(self, packet: Packet) -> None:
        """Queue a packet, stamped now. Never blocks, never raises."""
        if len(self._waiting) >= MAX_WAITING:
            self._refuse(packet, "too many packets wait for the disk")
            return
        self._waiting.append((packet, self.now_ns()))
        self._idle.clear()
        self._wake.set()

    def event(self, severity: Severity, name: str, text: str, evidence: Evidence | None = None) -> None:
        """Queue an event packet, and log it."""
        _log.log(_LOG_LEVEL[severity], "%s: %s", name, text)
        self.post(Event(severity=severity, name=name, text=text, evidence=evidence or {}))

    async def run(self) -> None:
        """Store what is posted, in order, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self.pulse.beat()
            while self._waiting:
                packets = [self._waiting.popleft() for _ in range(len(self._waiting))]
                await self._store_all(packets)
            self._idle.set()

    async def flush(self) -> None:
        """Return when everything posted so far is stored or refused. Needs `run` to be running."""
        await self._idle.wait()

    async def _store_all(self, packets: Sequence[tuple[Packet, int]]) -> None:
        try:
            await self._database.run(lambda c: self._spool.append_many(c, packets))
        except (StoreFull, SpoolRefused, FrameError, sqlite3.Error):
            # One of them does not fit: the others are not to pay for it.
            for packet, t_ns in packets:
                await self._store(packet, t_ns)

    async def _store(self, packet: Packet, t_ns: int) -> None:
        def append(connection: sqlite3.Connection) -> int:
            return self._spool.append(connection, packet, t_ns)

        try:
            await self._database.run(append)
        except (StoreFull, SpoolRefused, FrameError, sqlite3.Error) as error:
            self._refuse(packet, str(error))

    def _refuse(self, packet: Packet, why: str) -> None:
        self.refused += 1
        _log.error("%s packet not stored: %s", packet.type_name, why)
