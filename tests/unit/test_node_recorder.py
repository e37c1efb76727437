from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from node import recorder as module
from node.recorder import Recorder, Throttle
from telemetry.database import Database
from telemetry.frame import decode_frame
from telemetry.packets import Event, FdirReport, Level, Outcome, Severity
from telemetry.spool import Spool


def test_throttle_lets_a_burst_through_then_one_a_period_and_counts_the_rest() -> None:
    throttle = Throttle(10.0, burst=2)
    assert [throttle.admit(t) for t in (0.0, 0.0, 0.0, 5.0, 9.9)] == [1, 1, None, None, None]
    assert throttle.admit(10.0) == 4
    assert throttle.admit(15.0) is None
    assert [throttle.admit(1000.0) for _ in range(3)] == [2, 1, None]


def test_a_clock_that_goes_back_earns_nothing() -> None:
    throttle = Throttle(1.0)
    assert throttle.admit(100.0) == 1
    assert throttle.admit(0.0) is None


async def test_packets_are_stored_in_order_with_the_time_of_posting(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "node.db")
    spool = Spool("n", 1, 1 << 20)
    await database.run(spool.create)
    times = iter(range(100))
    recorder = Recorder(database, spool, lambda: next(times))
    async with asyncio.TaskGroup() as group:
        writer = group.create_task(recorder.run(), name="test.recorder")
        for number in range(5):
            recorder.event(Severity.INFO, f"e{number}", "text", {"n": number})
        await recorder.flush()
        writer.cancel()
    records = await database.run(lambda c: spool.batch(c, 10, set()))
    frames = [decode_frame(r.frame) for r in records]
    assert [(f.seq, f.t_ns) for f in frames] == [(n, n) for n in range(5)]
    events = [f.packet() for f in frames]
    assert [e.name for e in events if isinstance(e, Event)] == [f"e{n}" for n in range(5)]
    await database.close()


async def test_what_cannot_be_stored_is_counted_and_the_next_packet_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = await Database.open(tmp_path / "node.db")
    spool = Spool("n", 1, 1 << 20)
    await database.run(spool.create)
    recorder = Recorder(database, spool, lambda: 0)
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    async with asyncio.TaskGroup() as group:
        writer = group.create_task(recorder.run(), name="test.recorder")
        # The ground would refuse this one: a page is not below 0.
        recorder.post(
            FdirReport(
                monitor="kv.digest",
                level=Level.IN_WORKER_REPAIR,
                outcome=Outcome.REPAIRED,
                action="parity",
                detected_ns=0,
                recovered_ns=0,
                page=-1,
            )
        )
        for number in range(4):
            recorder.event(Severity.INFO, f"e{number}", "text")
        await recorder.flush()
        writer.cancel()
    assert recorder.refused == 3
    stored = await database.run(lambda c: count(c, "event"))
    assert stored == 2
    await database.close()


def count(connection: sqlite3.Connection, stream: str) -> int:
    row = connection.execute("SELECT COUNT(*) FROM spool_record WHERE stream = ?", (stream,)).fetchone()
    return int(row[0])
