"""The database: durable when `run` returns, one failure alone, damage moved aside, full means full."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_disk import contents, used_bytes

from telemetry.database import GROUP_MAX, Database, StoreFull
from telemetry.errors import PenumbraError


def create(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS t (x)")


def insert(value: object):
    return lambda connection: connection.execute("INSERT INTO t VALUES (?)", (value,)).rowcount


def values(connection: sqlite3.Connection) -> list[object]:
    return [x for (x,) in connection.execute("SELECT x FROM t ORDER BY rowid")]


async def test_what_run_returned_is_in_the_file(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    await database.run(create)
    assert await database.run(insert(1)) == 1
    other = sqlite3.connect(tmp_path / "a.db")
    assert values(other) == [1]
    other.close()
    assert await database.run(lambda c: c.execute("PRAGMA synchronous").fetchone()) == (2,)
    assert await database.run(lambda c: c.execute("PRAGMA journal_mode").fetchone()) == ("wal",)
    await database.close()
    assert database.recovered_from is None


async def test_requests_that_queue_up_share_one_transaction(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    await database.run(create)
    gate = threading.Event()
    first = asyncio.create_task(database.run(lambda _: gate.wait(5)))
    await asyncio.sleep(0.05)
    counted = [asyncio.create_task(database.run(lambda c: c.total_changes)) for _ in range(2)]
    many = [asyncio.create_task(database.run(insert(i))) for i in range(2 * GROUP_MAX)]
    await asyncio.sleep(0)
    begun: list[str] = []
    tracing = asyncio.create_task(database.run(lambda c: c.set_trace_callback(begun.append)))
    await asyncio.sleep(0)
    more = [asyncio.create_task(database.run(insert(i))) for i in range(50)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, tracing, *counted, *many, *more)
    assert await database.run(lambda c: len(values(c))) == 2 * GROUP_MAX + 50
    assert sum(statement.startswith("COMMIT") for statement in begun) <= 3
    await database.close()


async def test_one_failure_does_not_undo_its_neighbours(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    await database.run(create)
    gate = threading.Event()
    blocked = asyncio.create_task(database.run(lambda _: gate.wait(5)))
    await asyncio.sleep(0.05)

    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES ('undone')")
        raise KeyError("mine")

    tasks = [asyncio.create_task(database.run(f)) for f in (insert("a"), fail, insert("b"))]
    await asyncio.sleep(0)
    gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await blocked
    assert isinstance(outcomes[1], KeyError)
    assert await database.run(values) == ["a", "b"]
    await database.close()


async def test_a_lost_transaction_is_run_again_one_by_one(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    await database.run(create)
    gate = threading.Event()
    blocked = asyncio.create_task(database.run(lambda _: gate.wait(5)))
    await asyncio.sleep(0.05)

    def lose(connection: sqlite3.Connection) -> None:
        connection.execute("ROLLBACK")  # What SQLite does by itself on some errors.
        raise sqlite3.OperationalError("disk I/O error")

    tasks = [asyncio.create_task(database.run(f)) for f in (insert("a"), lose, insert("b"))]
    await asyncio.sleep(0)
    gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await blocked
    assert isinstance(outcomes[1], sqlite3.OperationalError)
    assert await database.run(values) == ["a", "b"]
    await database.close()


async def test_full_is_store_full_and_leaves_room_for_what_gives_way(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", max_bytes=1 << 20)
    await database.run(create)

    async def fill() -> None:
        for _ in range(1000):
            await database.run(insert(b"x" * 1000))

    with pytest.raises(StoreFull):
        await fill()
    stored = len(await database.run(values))
    assert 200 < stored < 400
    with pytest.raises(StoreFull):
        await database.run(insert(b"x" * 10_000))
    assert await database.run(lambda c: len(values(c))) == stored
    await database.run(lambda c: c.execute("DELETE FROM t WHERE rowid <= 20"))
    await database.run(insert(b"x" * 1000))
    assert used_bytes(tmp_path, "a.db") <= 1 << 20
    await database.close()


@pytest.mark.parametrize("damage", ["header", "page", "garbage"])
async def test_a_corrupt_file_is_moved_aside_and_reported(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.db"
    database = await Database.open(path)
    await database.run(create)
    for i in range(300):
        await database.run(insert(f"{i}" * 50))
    await database.close()
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[0] ^= 1
    elif damage == "page":
        content[4096 * 2 : 4096 * 2 + 200] = b"\xff" * 200
    else:
        content = bytearray(b"no database at all" * 500)
    path.write_bytes(content)
    for number in (1, 2):
        database = await Database.open(path)
        assert database.recovered_from == tmp_path / f"a.db.corrupt-{number}"
        assert (tmp_path / f"a.db.corrupt-{number}").read_bytes() == content
        assert list(contents(tmp_path, "*.corrupt-*")) == [f"a.db.corrupt-{number}"]
        await database.run(create)
        found = await database.run(values)
        if damage == "page":
            # Of the table's pages the first is gone; all that lies behind it is saved, in order.
            assert found == [f"{i}" * 50 for i in range(300 - len(found), 300)]
            assert 200 < len(found) < 300
            assert database.salvaged is not None
            assert database.salvaged.rows == {"t": len(found)}
            assert database.salvaged.incomplete == ["t"]
        else:
            assert found == []
            assert database.salvaged is None
        await database.close()
        path.write_bytes(content)


async def test_a_struck_index_costs_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = await Database.open(path)
    await database.run(create)
    await database.run(lambda c: c.execute("CREATE INDEX i ON t (x)"))
    for i in range(20):
        await database.run(insert(f"row {i:04d}"))
    await database.close()
    content = path.read_bytes()
    # The row's text stands in the table and in the index.
    first, second = content.find(b"row 0007"), content.rfind(b"row 0007")
    assert first != second
    struck = content[: second + 7] + b"9" + content[second + 8 :]
    path.write_bytes(struck)
    database = await Database.open(path)
    assert database.recovered_from is not None
    assert len(await database.run(values)) == 20
    assert await database.run(lambda c: c.execute("PRAGMA integrity_check").fetchall()) == [("ok",)]
    await database.close()


async def test_a_struck_schema_that_is_no_text_any_more_does_not_stop_the_node(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = await Database.open(path)
    await database.run(create)
    await database.close()
    content = path.read_bytes()
    assert content.count(b"CREATE TABLE t") == 1
    path.write_bytes(content.replace(b"CREATE TABLE t", b"CREATE TABLE \xf4"))
    database = await Database.open(path)
    assert database.recovered_from is not None
    assert database.salvaged is None
    await database.close()


async def test_damage_met_while_open_is_told(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    await database.run(create)
    with pytest.raises(sqlite3.Error):
        await database.run(lambda c: c.execute("SELECT nothing FROM t"))
    assert database.damage is None
    await database.run(lambda c: c.execute("INSERT INTO t VALUES (CAST(x'ff' AS TEXT))"))
    with pytest.raises(sqlite3.OperationalError, match="decode to UTF-8"):
        await database.run(values)
    assert database.damage is not None
    assert "UTF-8" in database.damage
    await database.close()


async def test_user_errors_name_the_file_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match="cannot write in its directory") as caught:
        await Database.open(tmp_path / "missing" / "a.db")
    assert "exists and is writable" in caught.value.mend
    (tmp_path / "dir.db").mkdir()
    with pytest.raises(PenumbraError, match=r"dir\.db"):
        await Database.open(tmp_path / "dir.db")


async def test_a_second_owner_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = await Database.open(tmp_path / "a.db")
    with pytest.raises(PenumbraError, match="another process"):
        await Database.open(tmp_path / "a.db")
    await first.close()
    second = await Database.open(tmp_path / "a.db")
    await second.close()


async def test_close_finishes_what_is_queued_and_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    database = await Database.open(tmp_path / "a.db")
    await database.run(create)
    tasks = [asyncio.create_task(database.run(insert(i))) for i in range(20)]
    await asyncio.sleep(0)
    await database.close()
    assert sum(await asyncio.gather(*tasks)) == 20
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("database")]
    with pytest.raises(RuntimeError, match="closed"):
        await database.run(values)


async def test_close_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = await Database.open(tmp_path / "a.db")
    gate = threading.Event()
    hanging = asyncio.create_task(database.run(lambda _: gate.wait(10)))
    await asyncio.sleep(0.05)
    started = time.monotonic()
    await database.close(timeout_s=0.2)
    assert time.monotonic() - started < 1.0
    assert "still busy" in caplog.text
    gate.set()
    assert await hanging


async def test_the_loop_stays_free_while_the_disk_is_slow(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    slow = asyncio.create_task(database.run(lambda _: time.sleep(0.3)))
    longest, last = 0.0, time.monotonic()
    while not slow.done():
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert longest < 0.2
    await database.close()


async def test_a_cancelled_wait_does_not_disturb_the_others(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    await database.run(create)
    gate = threading.Event()
    blocked = asyncio.create_task(database.run(lambda _: gate.wait(5)))
    await asyncio.sleep(0.05)
    given_up = asyncio.create_task(database.run(insert("given up")))
    await asyncio.sleep(0)
    given_up.cancel()
    gate.set()
    await blocked
    await database.run(insert("kept"))
    assert (await database.run(values))[-1] == "kept"
    assert given_up.cancelled()
    await database.close()


def test_a_request_may_outlive_its_loop(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys, time\nfrom pathlib import Path\nfrom telemetry.database import Database\n"
        "async def main():\n"
        "    d = await Database.open(Path(sys.argv[1]))\n"
        "    asyncio.ensure_future(d.run(lambda c: time.sleep(0.3)))\n"
        "    await asyncio.sleep(0.05)\n"
        "asyncio.run(main()); time.sleep(0.5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "a.db")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
