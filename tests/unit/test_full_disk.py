"""A full disk: the bound counts all files, acknowledgements are booked, and the node's store comes up."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from small_disk import contents, fill, replace, small_disk, used_bytes

from node.downlink import ACK_PART
from telemetry.ack import Ack
from telemetry.database import Database, DiskState, StoreFull
from telemetry.disk_room import Reserve, Shares, free_bytes
from telemetry.durable_file import replace_file
from telemetry.packets import Event, Severity, Stream
from telemetry.spool import Spool

BOUND = 1 << 20
CAPACITY = BOUND // 4
PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 3_000_000) as directory:
        yield directory


def event(size: int = 300) -> Event:
    return Event(severity=Severity.LOW, name="a", text="x" * size)


async def open_store(
    directory: Path, boot: int = 1, capacity: int = CAPACITY, bound: int = BOUND
) -> tuple[Database, Spool]:
    database = await Database.open(directory / "node.db", max_bytes=bound)
    spool = Spool("sat-1", boot, capacity)
    await database.run(spool.create)
    return database, spool


async def append(database: Database, spool: Spool, size: int = 300) -> int:
    return await database.run(lambda c: spool.append(c, event(size), 0))


async def append_many_times(database: Database, spool: Spool, times: int) -> None:
    for _ in range(times):
        await append(database, spool)


def _append_until_full(connection: sqlite3.Connection, spool: Spool) -> None:
    while True:
        spool.append(connection, event(), 0)


async def acknowledge_all(database: Database, spool: Spool, boot: int = 1) -> int:
    generated = {(e.boot, e.stream): e.generated for e in await database.run(spool.ledger)}
    ack = Ack(node="sat-1", boot=boot, stream=Stream.EVENT, upto=generated[boot, Stream.EVENT], gaps=[])
    try:
        return await database.run(lambda c: spool.acknowledge(c, ack))
    except StoreFull:
        # As the downlink does: a few records at a time.
        deleted = 0
        while part := await database.run(lambda c: spool.acknowledge(c, ack, most=ACK_PART)):
            deleted += part
        return deleted


async def until_state(database: Database, state: DiskState) -> None:
    async with asyncio.timeout(20):
        while database.disk is not state:
            await database.run(lambda _: None)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("bound", [BOUND, 3 * BOUND + 4097, 64 << 20, 1 << 30])
def test_the_shares_of_all_files_are_within_the_bound(bound: int) -> None:
    shares = Shares.of(bound, PAGE)
    assert 0.95 * bound < shares.most_bytes(PAGE) <= bound
    # Pages that are in the log alone get into the database by the room of the reserve.
    assert shares.reserve_bytes >= (shares.log_pages + shares.growth_pages) * PAGE


async def test_the_log_does_not_eat_the_disk(disk: Path) -> None:
    """The ground is away: the store fills, policy acts, and neither log nor index outgrow the bound."""
    database, spool = await open_store(disk)
    for number in range(1500):
        await append(database, spool, 1 + number % 900)
        assert used_bytes(disk, "node.db") <= BOUND
    assert database.disk is DiskState.ROOM
    stored = (await database.run(spool.size))[0]
    assert stored > 300
    assert await acknowledge_all(database, spool) == stored
    assert used_bytes(disk, "node.db") <= BOUND
    await append(database, spool)
    await database.close()


async def test_one_large_transaction_is_within_the_bound(disk: Path) -> None:
    database, spool = await open_store(disk)
    packets = [(event(900), 0)] * 150
    for _ in range(8):
        await database.run(lambda c: spool.append_many(c, packets))
        assert used_bytes(disk, "node.db") <= BOUND
    await acknowledge_all(database, spool)
    assert used_bytes(disk, "node.db") <= BOUND
    await database.close()


async def test_a_disk_that_others_fill_costs_no_acknowledgement(disk: Path) -> None:
    database, spool = await open_store(disk)
    for _ in range(100):
        await append(database, spool)
    fill(disk / "other")
    # Telemetry goes on, in what the database has; policy gives way.
    for _ in range(1100):
        await append(database, spool)
    assert database.disk is DiskState.FULL
    assert not (disk / "node.db.reserve").exists()
    ledger = {e.stream: e for e in await database.run(spool.ledger)}[Stream.EVENT]
    assert ledger.generated == 1200
    assert ledger.dropped
    assert ledger.stored > 50
    assert await acknowledge_all(database, spool) == ledger.stored
    assert await append(database, spool) == 1200
    # All that was acknowledged is durable, and nothing of it comes again.
    await database.close()
    database, spool = await open_store(disk)
    assert database.recovered_from is None
    assert [r.seq for r in await database.run(lambda c: spool.batch(c, 99, set()))] == [1200]
    (disk / "other").unlink()
    await until_state(database, DiskState.ROOM)
    assert (disk / "node.db.reserve").exists()
    await database.close()


async def test_acknowledgements_alone_make_room_for_the_reserve(tmp_path: Path) -> None:
    """What others wrote stays; the ground only acknowledges, and the database gives its pages back."""
    with small_disk(tmp_path / "disk", 12_000_000) as disk:
        database, spool = await open_store(disk, capacity=64 << 20, bound=64 << 20)
        packets = [(event(900), 0)] * 50
        for _ in range(70):
            await database.run(lambda c: spool.append_many(c, packets))
        assert database.disk is DiskState.ROOM
        fill(disk / "other")
        await append_many_times(database, spool, 200)
        await until_state(database, DiskState.FULL)
        assert await acknowledge_all(database, spool) > 3000
        await until_state(database, DiskState.ROOM)
        assert (disk / "node.db.reserve").exists()
        await append_many_times(database, spool, 200)
        assert database.disk is DiskState.ROOM
        await database.close()


@pytest.mark.parametrize("clean", [True, False])
async def test_a_store_opens_on_a_full_disk(disk: Path, clean: bool) -> None:
    database, spool = await open_store(disk)
    for _ in range(200):
        await append(database, spool)
    if clean:
        await database.close()
        fill(disk / "other")
    else:
        fill(disk / "other")
        for _ in range(30):
            await append(database, spool)
        # What a kill leaves: log and index stay, the reserve is gone.
        left = contents(disk, "node.db*")
        await database.close()
        replace(disk, "node.db*", left)
        fill(disk / "more")
    database, spool = await open_store(disk, boot=2)
    assert database.disk is DiskState.FULL
    stored = (await database.run(spool.size))[0]
    assert stored > 100
    for _ in range(100):
        await append(database, spool)
    assert await acknowledge_all(database, spool) > 50
    await append(database, spool)
    await database.close()


async def test_a_new_store_on_a_full_disk_is_in_memory_until_there_is_room(disk: Path) -> None:
    (disk / "node.db.lock").touch()
    fill(disk / "other")
    database, spool = await open_store(disk)
    assert database.disk is DiskState.MEMORY
    for _ in range(20):
        await append(database, spool)
    assert await acknowledge_all(database, spool) == 20
    await append(database, spool)
    (disk / "other").unlink()
    await until_state(database, DiskState.ROOM)
    with closing(sqlite3.connect(disk / "node.db")) as other:
        assert other.execute("SELECT seq FROM spool_record").fetchall() == [(20,)]
    await database.close()
    assert (disk / "node.db.reserve").exists()


async def test_a_log_that_filled_the_disk_before_there_was_a_bound_is_read_into_memory(disk: Path) -> None:
    """The log has the whole disk, and the database file no page of it: nothing can be brought there."""
    spool = Spool("sat-1", 1, CAPACITY)
    with closing(sqlite3.connect(disk / "node.db", isolation_level=None)) as old:
        old.execute("PRAGMA journal_mode=WAL")
        spool.create(old)
        with pytest.raises(sqlite3.OperationalError, match="full"):
            _append_until_full(old, spool)
        stored = old.execute("SELECT COUNT(*) FROM spool_record").fetchone()[0]
        left = contents(disk, "node.db*")
    replace(disk, "node.db*", left)
    fill(disk / "rest")
    database = await Database.open(disk / "node.db", max_bytes=BOUND)
    spool = Spool("sat-1", 2, CAPACITY)
    await database.run(spool.create)
    assert abs((await database.run(spool.size))[0] - stored) <= 1
    for _ in range(30):
        await append(database, spool)
    assert database.disk is DiskState.MEMORY
    assert await acknowledge_all(database, spool) >= stored - 1
    await append(database, spool)
    await database.close()


async def test_a_reader_that_holds_the_log_back_is_within_the_bound(disk: Path) -> None:
    database, spool = await open_store(disk)
    await append(database, spool)
    with closing(sqlite3.connect(disk / "node.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM spool_record").fetchall()
        with pytest.raises(StoreFull, match="another process"):
            await append_many_times(database, spool, 500)
        assert used_bytes(disk, "node.db") <= BOUND
        reader.execute("ROLLBACK")
    for _ in range(500):
        await append(database, spool)
        assert used_bytes(disk, "node.db") <= BOUND
    assert used_bytes(disk, "node.db-wal") < BOUND // 4
    await database.close()


def test_a_file_that_does_not_fit_leaves_nothing_beside_it(disk: Path) -> None:
    replace_file(disk / "a", b"old")
    fill(disk / "other", 40_000)
    with pytest.raises(OSError, match="No space left"):
        replace_file(disk / "a", bytes(100_000))
    assert contents(disk, "*a*") == {"a": b"old"}
    assert free_bytes(disk) >= 32_768


def test_a_reserve_leaves_as_much_as_it_takes(disk: Path) -> None:
    reserve = Reserve(disk / "reserve", 100_000)
    fill(disk / "other", 150_000)
    assert not reserve.make()
    assert not reserve.path.exists()
    (disk / "other").unlink()
    assert reserve.make()
    assert reserve.held
    assert reserve.release()
    assert not reserve.held


async def test_a_bound_above_what_the_disk_has_does_not_fill_it(disk: Path) -> None:
    database, spool = await open_store(disk, capacity=64 << 20, bound=256 << 20)
    for _ in range(3000):
        await append(database, spool, 900)
    assert database.disk is DiskState.ROOM
    assert used_bytes(disk, "node.db") <= 3_000_000
    assert (disk / "node.db.reserve").exists()
    await acknowledge_all(database, spool)
    await database.close()
