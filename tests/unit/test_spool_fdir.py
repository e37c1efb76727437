"""Reports of the FDIR in a full store: merged before any is dropped, and what then still is dropped."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from telemetry.ack import Ack
from telemetry.archive import Archive
from telemetry.database import Database
from telemetry.fdir_merge import both_ends, counted
from telemetry.frame import decode_frame
from telemetry.packets import (
    Event,
    FdirReport,
    FdirStatus,
    FlightRecord,
    Level,
    Outcome,
    Packet,
    ProductChunk,
    Severity,
    Stream,
)
from telemetry.spool import Spool, SpoolRefused
from telemetry.spool_policy import REPORT_BYTES, DropReason

ROWS = 3
CAPACITY = 5 * REPORT_BYTES * ROWS
"""The least for which the policy promises that no report of so many rows and outcomes is dropped."""


def finding(number: int, row: int = 0, size: int = 500) -> FdirReport:
    return FdirReport(
        monitor=f"row.{row}",
        level=Level.IN_WORKER_REPAIR,
        outcome=Outcome.REPAIRED,
        action="page_copy",
        detected_ns=number,
        recovered_ns=None,
        evidence={"reason": "r" * size, "number": number},
    )


def status(number: int) -> FdirStatus:
    return FdirStatus(
        table_sha256="a" * 300,
        overall="enabled",
        external_control=False,
        resets=number,
        max_resets=3,
        rows=[],
    )


def flight(number: int) -> FlightRecord:
    return FlightRecord(reason="r", level=None, noted=number, entries=bytes(800))


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as made:
        yield made


def spool_of(connection: sqlite3.Connection, capacity: int = CAPACITY, boot: int = 1) -> Spool:
    spool = Spool("sat-1", boot, capacity)
    spool.create(connection)
    return spool


def fill(spool: Spool, connection: sqlite3.Connection) -> None:
    """Store products and results' worth of chunks, as many as are taken: nothing of it gives way."""
    for size in (900, 300, 100, 10, 1):
        while True:
            connection.execute("SAVEPOINT chunk")
            try:
                spool.append(connection, ProductChunk(product="p", index=0, data=bytes(size)), 0)
            except SpoolRefused:
                connection.execute("ROLLBACK TO chunk")
                break
            finally:
                connection.execute("RELEASE chunk")


def packets(spool: Spool, connection: sqlite3.Connection) -> list[Packet]:
    records = spool.batch(connection, 10_000, set())
    return [decode_frame(r.frame).packet() for r in records if r.stream is Stream.FDIR]


def reports(spool: Spool, connection: sqlite3.Connection) -> list[FdirReport]:
    return [packet for packet in packets(spool, connection) if isinstance(packet, FdirReport)]


def reasons(spool: Spool, connection: sqlite3.Connection) -> dict[str, int]:
    (entry,) = [e for e in spool.ledger(connection) if e.stream is Stream.FDIR]
    assert entry.generated == entry.acked + entry.stored + sum(entry.dropped.values())
    return entry.dropped


def test_no_report_is_dropped_for_want_of_room_where_the_policy_promises_it(
    connection: sqlite3.Connection,
) -> None:
    spool = spool_of(connection)
    fill(spool, connection)
    for number in range(300):
        spool.append(connection, finding(number, number % ROWS, 2 * REPORT_BYTES), number)
        assert spool.size(connection)[1] <= CAPACITY
    assert set(reasons(spool, connection)) == {"merged"}
    held = reports(spool, connection)
    assert counted(held) == 300
    for row in range(ROWS):
        ends = [end for report in held if report.monitor == f"row.{row}" for end in both_ends(report)]
        assert min(end.detected_ns for end in ends) == row
        assert max(end.detected_ns for end in ends) == 300 - ROWS + row


def test_with_room_for_less_than_one_of_each_the_new_one_is_dropped_and_counted(
    connection: sqlite3.Connection,
) -> None:
    spool = spool_of(connection, 3000)
    for row in range(40):
        spool.append(connection, finding(row, row, 200), 0)
    held = reports(spool, connection)
    assert 2 < len(held) < 12
    assert reasons(spool, connection) == {"full": 40 - len(held)}
    assert [report.monitor for report in held] == [f"row.{row}" for row in range(len(held))]
    # What is found again in a row that is there finds room: the evidence gives way.
    spool.append(connection, finding(40, 0, 400), 0)
    assert counted(reports(spool, connection)) == len(held) + 1
    assert reasons(spool, connection) == {"full": 40 - len(held), "merged": 1}


def test_evidence_of_both_ends_is_kept_where_there_is_room(connection: sqlite3.Connection) -> None:
    spool = spool_of(connection, 4000)
    for number in range(50):
        spool.append(connection, finding(number), number)
    whole = max(reports(spool, connection), key=lambda report: report.count)
    first, last = both_ends(whole)
    assert first == replace(finding(0), covers=whole.covers)
    assert last.evidence["number"] == whole.covers[-1][2] - 1
    assert len(last.evidence["reason"]) == 500  # type: ignore[arg-type]
    assert counted(reports(spool, connection)) == 50


def test_statuses_then_merging_then_flight_records(connection: sqlite3.Connection) -> None:
    spool = spool_of(connection, 6000)
    for number in range(2):
        spool.append(connection, flight(number), 0)
        spool.append(connection, status(number), 0)
        spool.append(connection, finding(number), 0)
    while not spool.dropped_ranges(connection):
        spool.append(connection, finding(2, row=1), 0)
    assert reasons(spool, connection)["full"] == 1
    kept = [p.resets for p in packets(spool, connection) if isinstance(p, FdirStatus)]
    assert kept == [1]
    row = 2
    while reasons(spool, connection)["full"] == 1:
        spool.append(connection, finding(3, row), 0)
        row += 1
    assert reasons(spool, connection)["merged"] >= 2
    kinds = [(report.monitor, report.outcome) for report in reports(spool, connection)]
    assert len(set(kinds)) == len(kinds)
    assert [p.noted for p in packets(spool, connection) if isinstance(p, FlightRecord)] == [1]
    while reasons(spool, connection)["full"] < 3:
        spool.append(connection, finding(3, row), 0)
        row += 1
    assert not any(isinstance(p, FlightRecord) for p in packets(spool, connection))
    assert len(reports(spool, connection)) == row


def test_a_new_flight_record_drops_no_report(connection: sqlite3.Connection) -> None:
    spool = spool_of(connection, 3000)
    for row in range(20):
        spool.append(connection, finding(row, row % 4, 300), 0)
    for number in range(5):
        spool.append(connection, flight(number), 0)
    assert counted(reports(spool, connection)) == 20


def test_the_ground_counts_once_what_came_down_before_and_after_merging(
    connection: sqlite3.Connection, tmp_path: Path
) -> None:
    with closing(Archive.open(tmp_path / "archive.db")) as archive:
        for boot in (1, 2, 3):
            spool = spool_of(connection, 3000, boot)
            for number in range(30):
                spool.append(connection, finding(number), 0)
                records = spool.batch(connection, 100, set())
                if number % 3 == 0:
                    archive.ingest([record.frame for record in records[:2]])
                if number % 7 == 0:
                    for ack in archive.acks("sat-1"):
                        spool.acknowledge(connection, ack)
        archived = [report for _, report in archive.packets("sat-1", FdirReport)]
        assert archive.conflicts("sat-1") == 0
        assert counted([*archived, *reports(spool, connection)]) == 90
        assert len(archived) > 10


def test_a_merged_report_that_came_down_after_all_counts_as_acknowledged(
    connection: sqlite3.Connection,
) -> None:
    spool = spool_of(connection, 3000)
    for number in range(10):
        spool.append(connection, finding(number), 0)
    merged = reasons(spool, connection)["merged"]
    spool.acknowledge(connection, Ack(node="sat-1", boot=1, stream=Stream.FDIR, upto=1))
    assert reasons(spool, connection)["merged"] == merged - 1


def test_a_damaged_report_is_not_merged(connection: sqlite3.Connection) -> None:
    spool = spool_of(connection, 3000)
    for number in range(3):
        spool.append(connection, finding(number), 0)
    connection.execute("UPDATE spool_record SET frame = zeroblob(size) WHERE seq = 1")
    for number in range(3, 10):
        spool.append(connection, finding(number), 0)
    assert reasons(spool, connection)["corrupt"] == 1
    assert set(reasons(spool, connection)) == {"corrupt", "merged"}
    (fault,) = spool.take_faults()
    assert fault.records == 1


def test_a_report_of_an_earlier_version_stays_as_it_is(connection: sqlite3.Connection) -> None:
    spool = spool_of(connection, 3000)
    for number in range(2):
        spool.append(connection, finding(number), 0)
    for rowid, frame in connection.execute("SELECT rowid, frame FROM spool_record").fetchall():
        header = decode_frame(frame)
        report = header.packet()
        assert isinstance(report, FdirReport)
        old = replace(report, covers=[])
        data = spool._room.encode_report(header.seq, header.t_ns, old)
        connection.execute(
            "UPDATE spool_record SET frame = ?, size = ? WHERE rowid = ?", (data, len(data), rowid)
        )
    spool = spool_of(connection, 3000, 2)
    for number in range(10):
        spool.append(connection, finding(number), 0)
    held = reports(spool, connection)
    assert [report.covers for report in held[:2]] == [[], []]
    assert counted(held) == 12


@pytest.mark.parametrize("struck", ["number = 7", "copies = x'00'", "number = 7, copies = x'00'"])
def test_a_struck_running_number_never_counts_too_much(connection: sqlite3.Connection, struck: str) -> None:
    spool = spool_of(connection)
    spool.append(connection, finding(0), 0)
    connection.execute(f"UPDATE spool_finding SET {struck}")  # noqa: S608
    for number in range(1, 4):
        spool.append(connection, finding(number), 0)
    assert counted(reports(spool, connection)) == 4


async def test_a_full_disk_merges_too(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", max_bytes=300_000)
    spool = Spool("sat-1", 1, 10**9)
    await database.run(spool.create)
    event = Event(severity=Severity.HIGH, name="a", text="e" * 400)
    for number in range(300):
        await database.run(lambda c, number=number: spool.append(c, finding(number, number % 5, 1500), 0))
        await database.run(lambda c: spool.append(c, event, 0))
    assert set(await database.run(lambda c: reasons(spool, c))) == {"merged"}
    assert counted(await database.run(lambda c: reports(spool, c))) == 300
    await database.close()


def test_drop_reasons_are_known_at_the_next_boot(connection: sqlite3.Connection) -> None:
    spool = spool_of(connection, 3000)
    for number in range(10):
        spool.append(connection, finding(number), 0)
    before = spool.dropped_ranges(connection)
    assert {dropped.reason for dropped in before} == {DropReason.MERGED}
    again = spool_of(connection, 3000, 2)
    assert again.take_faults() == []
    assert again.dropped_ranges(connection) == before
