"""The store of telemetry under damage to its file: what is struck is told and counted, the rest survives."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from telemetry.ack import Ack
from telemetry.database import Database
from telemetry.frame import decode_frame
from telemetry.packets import Event, Severity, Stream
from telemetry.spool import Spool
from telemetry.spool_audit import FaultKind, pack_counter, vote_counter
from telemetry.spool_policy import DropReason

RECORDS = 150


def event(number: int) -> Event:
    return Event(severity=Severity.HIGH, name="a", text=f"{number} " * (number % 60))


def spool_of(boot: int = 1) -> Spool:
    return Spool("sat-1", boot, 1 << 24)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "node.db", isolation_level=None)) as made:
        yield made


@pytest.fixture
def spool(connection: sqlite3.Connection) -> Spool:
    """A spool with ten events stored."""
    made = spool_of()
    made.create(connection)
    for number in range(10):
        made.append(connection, event(number), number)
    assert made.take_faults() == []
    return made


def account(connection: sqlite3.Connection) -> tuple[int, int, int, dict[str, int]]:
    (entry,) = spool_of().ledger(connection)
    assert entry.generated == entry.acked + entry.stored + sum(entry.dropped.values())
    return entry.generated, entry.acked, entry.stored, entry.dropped


def restarted(connection: sqlite3.Connection) -> Spool:
    spool = spool_of(2)
    spool.create(connection)
    return spool


def kinds(spool: Spool) -> list[FaultKind]:
    return [fault.kind for fault in spool.take_faults()]


def test_a_sound_store_is_told_sound(connection: sqlite3.Connection, spool: Spool) -> None:
    spool.acknowledge(connection, Ack(node="sat-1", boot=1, stream=Stream.EVENT, upto=6, gaps=[(2, 3)]))
    before = list(connection.iterdump())
    assert kinds(restarted(connection)) == []
    assert sorted(connection.iterdump()) == sorted(before)


def test_a_record_found_corrupt_when_it_is_to_be_sent_is_told(
    connection: sqlite3.Connection, spool: Spool
) -> None:
    connection.execute("UPDATE spool_record SET frame = zeroblob(length(frame)) WHERE seq = 4")
    assert len(spool.batch(connection, 100, set())) == 9
    (fault,) = spool.take_faults()
    assert (fault.kind, fault.records) == (FaultKind.RECORD, 1)
    assert "event 1/4" in fault.text
    assert spool.take_faults() == []
    assert account(connection) == (10, 0, 9, {"corrupt": 1})


def test_a_record_found_corrupt_at_boot_is_told_and_counted_once(
    connection: sqlite3.Connection, spool: Spool
) -> None:
    connection.execute("UPDATE spool_record SET frame = zeroblob(length(frame)) WHERE seq = 4")
    later = restarted(connection)
    assert FaultKind.RECORD in kinds(later)
    assert account(connection) == (10, 0, 9, {"corrupt": 1})
    (dropped,) = later.dropped_ranges(connection)
    assert (dropped.first, dropped.last, dropped.reason) == (4, 4, DropReason.CORRUPT)
    assert kinds(restarted(connection)) == []


@pytest.mark.parametrize(
    "strike",
    [
        "seq = 4000",
        "boot = 17",
        "stream = 'evenu'",
        "stream = CAST(x'ff76656e74' AS TEXT)",
        "stream = CAST(stream AS BLOB)",
        "frame = CAST(frame AS TEXT)",
        "priority = 99",
        "size = -1",
    ],
)
def test_a_struck_key_is_mended_from_its_sound_frame(
    connection: sqlite3.Connection, spool: Spool, strike: str
) -> None:
    connection.execute(f"UPDATE spool_record SET {strike} WHERE seq = 4")  # noqa: S608
    later = restarted(connection)
    assert kinds(later) == [FaultKind.KEY]
    assert account(connection) == (10, 0, 10, {})
    records = later.batch(connection, 100, set())
    assert [(r.boot, r.stream, r.seq) for r in records] == [(1, Stream.EVENT, n) for n in range(10)]
    assert later.size(connection)[1] == sum(len(r.frame) for r in records)


def test_a_key_struck_to_that_of_another_stored_record_costs_no_record(
    connection: sqlite3.Connection, spool: Spool
) -> None:
    connection.execute("CREATE TABLE copy AS SELECT * FROM spool_record")
    connection.execute("DROP TABLE spool_record")
    connection.execute("ALTER TABLE copy RENAME TO spool_record")
    connection.execute("UPDATE spool_record SET seq = 5 WHERE seq = 4")
    later = restarted(connection)
    assert kinds(later) == [FaultKind.KEY]
    assert account(connection) == (10, 0, 10, {})


def test_records_that_vanished_are_counted(connection: sqlite3.Connection, spool: Spool) -> None:
    connection.execute("DELETE FROM spool_record WHERE seq IN (3, 4, 8)")
    later = restarted(connection)
    (fault,) = later.take_faults()
    assert (fault.kind, fault.records) == (FaultKind.ACCOUNT, 3)
    assert account(connection) == (10, 0, 7, {"corrupt": 3})
    assert [(d.first, d.last) for d in later.dropped_ranges(connection)] == [(3, 4), (8, 8)]


def test_when_acknowledged_and_vanished_cannot_be_told_apart_the_ground_decides(
    connection: sqlite3.Connection, spool: Spool
) -> None:
    spool.acknowledge(connection, Ack(node="sat-1", boot=1, stream=Stream.EVENT, upto=4))
    connection.execute("DELETE FROM spool_record WHERE seq = 7")
    later = restarted(connection)
    (fault,) = later.take_faults()
    assert fault.records == 1
    assert account(connection) == (10, 0, 5, {"corrupt": 5})
    # The next acknowledgement names all that is archived.
    later.acknowledge(connection, Ack(node="sat-1", boot=1, stream=Stream.EVENT, upto=5))
    assert account(connection) == (10, 5, 4, {"corrupt": 1})
    assert [(d.first, d.last) for d in later.dropped_ranges(connection)] == [(7, 7)]


@pytest.mark.parametrize("acked", [-3, 1, 9, "'x'"])
def test_a_struck_count_of_acknowledged_is_mended(
    connection: sqlite3.Connection, spool: Spool, acked: object
) -> None:
    connection.execute(f"UPDATE spool_stream SET acked = {acked}")  # noqa: S608
    assert FaultKind.ACCOUNT in kinds(restarted(connection))
    assert account(connection) == (10, 0, 10, {})


@pytest.mark.parametrize(
    "strike",
    ["first = 0", "last = 9", "last = -5", "reason = 'fuml'", "stream = 'evens'", "boot = 900", "first = 99"],
)
def test_a_struck_range_of_dropped_numbers_is_mended(
    connection: sqlite3.Connection, spool: Spool, strike: str
) -> None:
    connection.execute("UPDATE spool_record SET frame = x'00' WHERE seq IN (3, 4)")
    spool.batch(connection, 100, set())
    spool.take_faults()
    assert account(connection) == (10, 0, 8, {"corrupt": 2})
    connection.execute(f"UPDATE spool_drop SET {strike}")  # noqa: S608
    assert FaultKind.ACCOUNT in kinds(restarted(connection))
    entry = next(e for e in spool_of().ledger(connection) if e.boot == 1)
    assert (entry.generated, entry.acked, entry.stored, entry.dropped) == (10, 0, 8, {"corrupt": 2})


@pytest.mark.parametrize("strike", ["generated = 4", "generated = 9999", "generated = 'x'"])
def test_a_struck_sequence_counter_is_outvoted_at_the_next_append(
    connection: sqlite3.Connection, spool: Spool, strike: str
) -> None:
    connection.execute(f"UPDATE spool_stream SET {strike}")  # noqa: S608
    assert account(connection)[0] == 10
    assert spool.append(connection, event(0), 0) == 10
    assert kinds(spool) == [FaultKind.SEQUENCE]
    assert spool.append(connection, event(0), 0) == 11
    assert kinds(spool) == []
    assert account(connection)[0] == 12


@pytest.mark.parametrize("copy", [0, 1, 2])
def test_a_struck_copy_of_a_sequence_counter_is_outvoted_and_mended_at_boot(
    connection: sqlite3.Connection, spool: Spool, copy: int
) -> None:
    copies = bytearray(pack_counter(10))
    copies[copy * len(copies) // 3 + 8] ^= 4
    connection.execute("UPDATE spool_stream SET copies = ?", (bytes(copies),))
    assert kinds(restarted(connection)) == [FaultKind.SEQUENCE]
    assert connection.execute("SELECT generated, copies FROM spool_stream").fetchone() == (
        10,
        pack_counter(10),
    )


def test_a_sequence_counter_beyond_a_vote_goes_on_above_all_that_is_known(
    connection: sqlite3.Connection, spool: Spool
) -> None:
    connection.execute("UPDATE spool_stream SET generated = 2, copies = x'00'")
    assert spool.append(connection, event(0), 0) == 10
    assert kinds(spool) == [FaultKind.SEQUENCE]
    connection.execute("UPDATE spool_stream SET generated = 2, copies = x'00'")
    assert kinds(restarted(connection)) == [FaultKind.SEQUENCE]
    assert account(connection) == (11, 0, 11, {})


def test_a_database_of_an_earlier_version_gets_its_copies(
    connection: sqlite3.Connection, spool: Spool
) -> None:
    connection.execute("ALTER TABLE spool_stream DROP COLUMN copies")
    later = restarted(connection)
    assert kinds(later) == []
    assert connection.execute("SELECT copies FROM spool_stream").fetchone() == (pack_counter(10),)
    assert account(connection) == (10, 0, 10, {})


def test_counters_are_voted() -> None:
    copies = pack_counter(7)
    assert vote_counter(7, copies) == (7, False)
    assert vote_counter(8, copies) == (7, True)
    assert vote_counter(7, copies[:-1]) == (None, True)
    assert vote_counter(7, "text") == (None, True)
    assert vote_counter(7, None) == (7, True)
    assert vote_counter(-7, None) == (None, True)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a database that holds `RECORDS` events."""
    path = tmp_path_factory.mktemp("pristine") / "node.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        spool = spool_of()
        spool.create(connection)
        for number in range(RECORDS):
            spool.append(connection, event(number), number)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.read_bytes()


async def deliver(path: Path) -> tuple[dict[int, bytes], bool]:
    """Open the database, archive all that is sent; return that, and whether anything was told."""
    database = await Database.open(path)
    try:
        spool = spool_of(2)
        await database.run(spool.create)
        records = await database.run(lambda c: spool.batch(c, 10_000, set()))
        told = bool(spool.take_faults()) or database.recovered_from is not None
        sent = {r.seq: r.frame for r in records if r.boot == 1}
        gaps = [(n, n) for n in range(RECORDS) if n not in sent]
        ack = Ack(node="sat-1", boot=1, stream=Stream.EVENT, upto=RECORDS, gaps=gaps)
        await database.run(lambda c: spool.acknowledge(c, ack))
        await database.run(lambda c: spool.append(c, event(1), 0))
        entries = await database.run(spool.ledger)
        assert database.damage is None
    finally:
        await database.close()
    for entry in entries:
        assert entry.generated == entry.acked + entry.stored + sum(entry.dropped.values())
    first = [e for e in entries if e.boot == 1]
    if first:
        assert (first[0].generated, first[0].acked) == (RECORDS, len(sent))
        assert first[0].dropped == ({"corrupt": RECORDS - len(sent)} if len(sent) < RECORDS else {})
    return sent, told


async def test_a_bit_struck_anywhere_in_the_tables_costs_at_most_a_page_and_is_told(
    tmp_path: Path, pristine: bytes
) -> None:
    rng = random.Random(20)
    page_bytes = 4096
    for trial in range(60):
        struck = bytearray(pristine)
        # The first page holds the schema: struck there, the database may be beyond reading.
        at = rng.randrange(page_bytes, len(struck))
        struck[at] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{trial}.db"
        path.write_bytes(bytes(struck))
        sent, told = await deliver(path)
        lost = RECORDS - len(sent)
        for number, frame in sent.items():
            assert decode_frame(frame).packet() == event(number)
        assert lost <= page_bytes // 60, f"byte {at}: {lost} records lost"
        assert told or lost == 0, f"byte {at}: {lost} records lost and nothing told"


@pytest.mark.parametrize("pages", [(2, 5), (7, 8, 9), (11,)])
async def test_whole_pages_that_are_overwritten_cost_what_they_held_and_what_lies_between(
    tmp_path: Path, pristine: bytes, pages: tuple[int, ...]
) -> None:
    struck = bytearray(pristine)
    for page in pages:
        struck[page * 4096 : (page + 1) * 4096] = random.Random(page).randbytes(4096)
    (tmp_path / "node.db").write_bytes(bytes(struck))
    sent, told = await deliver(tmp_path / "node.db")
    assert told
    assert all(decode_frame(frame).packet() == event(number) for number, frame in sent.items())
