"""The spool, case by case: who gives way to whom, what damage does, what a full disk does."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from telemetry.ack import Ack
from telemetry.database import Database, StoreFull
from telemetry.errors import PenumbraError
from telemetry.frame import FrameError, decode_frame
from telemetry.packets import (
    BootReport,
    Certificate,
    Event,
    FdirReport,
    Housekeeping,
    Ledger,
    Level,
    Mode,
    Outcome,
    Packet,
    PowerPlan,
    ProductChunk,
    Result,
    SecurityReport,
    Severity,
    Stage,
    Stream,
    StreamLedger,
    Verification,
)
from telemetry.spool import Spool, SpoolRefused
from telemetry.spool_policy import GIVES_WAY, PROTECTED, REFUSED_ABOVE, DropReason

SIZE = 1500
"""Rough size of the frames below, bytes."""


def packet(stream: Stream, size: int = SIZE) -> Packet:
    text = "x" * size
    certificate = Certificate(image_id="i", epoch=0, kv_digest=b"8" * 8, chain=b"c" * 32)
    counts = {f: 0 for f in Housekeeping.__struct_fields__ if f.endswith(("s", "d", "restarts"))}
    hk: dict[str, object] = {
        **counts,
        "dropped": {},
        "mode": Mode.NOMINAL,
        "uptime_s": 1.0,
        "clock_locked": True,
        "sunlit": 1.0,
        "eclipse_entry_ns": None,
        "eclipse_exit_ns": None,
        "battery_soc": None,
        "array_w": None,
        "load_w": 1.0,
        "ceiling_w": 1.0,
        "duty": 1.0,
        "board_c": None,
        "worker_state": text,
        "worker_generation": 0,
        "tokens_released": 0,
        "tokens_discarded": 0,
        "token_rate_hz": 0.0,
        "epochs_clean": 0,
        "epochs_dirty": 0,
        "jobs_queued": 0,
        "jobs_done": 0,
        "spool_bytes": 0,
        "link_up": True,
    }
    made: dict[Stream, Packet] = {
        Stream.HOUSEKEEPING: Housekeeping(**hk),  # type: ignore[arg-type]
        Stream.PLAN: PowerPlan(
            ceiling_w=1.0,
            duty=1.0,
            reason=text,
            battery_soc=None,
            soc_floor=0.2,
            eclipse_entry_ns=None,
            eclipse_exit_ns=None,
        ),
        Stream.RESULT: Result(job="j", first=0, tokens=[], text=text.encode(), certificate=certificate),
        Stream.EVENT: Event(severity=Severity.HIGH, name="a", text=text),
        Stream.FDIR: FdirReport(
            monitor=text,
            level=Level.EPOCH_REDO,
            outcome=Outcome.REDONE,
            action="",
            detected_ns=0,
            recovered_ns=None,
        ),
        Stream.VERIFICATION: Verification(
            key_id="a", command_seq=0, name="ping", stage=Stage.ACCEPTED, ok=True, code="ok", reason=text
        ),
        Stream.SECURITY: SecurityReport(
            accepted=0, redelivered=0, rejected={text: 1}, last_key_id=None, last_seq=None, last_reason=None
        ),
        Stream.PRODUCT: ProductChunk(product="dump-1", index=0, data=text.encode()),
        Stream.BOOT: BootReport(
            software=text,
            boot=1,
            clean_shutdown=True,
            config_sha256="",
            image_id=None,
            board="sim",
            python="3",
            onnxruntime=None,
            resumed_job=None,
        ),
        Stream.LEDGER: Ledger(
            streams=[
                StreamLedger(boot=1, stream=Stream.EVENT, generated=0, acked=0, stored=0, dropped={text: 0})
            ]
        ),
    }
    return made[stream]


@pytest.fixture
def connection():
    connection = sqlite3.connect(":memory:", isolation_level=None)
    yield connection
    connection.close()


def make(connection: sqlite3.Connection, frames: float, boot: int = 1) -> Spool:
    spool = Spool("sat-1", boot, int(frames * (SIZE + 700)))
    spool.create(connection)
    return spool


def fill(spool: Spool, connection: sqlite3.Connection, stream: Stream) -> int:
    """Append until the next one no longer finds room by itself; return how many are stored."""
    stored = 0
    while True:
        connection.execute("SAVEPOINT try")
        try:
            spool.append(connection, packet(stream), 0)
        except SpoolRefused:
            connection.execute("ROLLBACK TO try")
            connection.execute("RELEASE try")
            return stored
        if spool.dropped_ranges(connection):
            connection.execute("ROLLBACK TO try")
            connection.execute("RELEASE try")
            return stored
        connection.execute("RELEASE try")
        stored += 1


def drops(spool: Spool, connection: sqlite3.Connection) -> list[tuple[Stream, int, int, DropReason]]:
    return [(r.stream, r.first, r.last, r.reason) for r in spool.dropped_ranges(connection)]


def test_the_streams_are_all_spoken_for() -> None:
    assert {*GIVES_WAY, *PROTECTED, *REFUSED_ABOVE} == set(Stream)
    assert set(PROTECTED) == {
        Stream.EVENT,
        Stream.FDIR,
        Stream.VERIFICATION,
        Stream.SECURITY,
        Stream.BOOT,
        Stream.LEDGER,
    }
    assert PROTECTED[0] is Stream.LEDGER


@pytest.mark.parametrize("stream", Stream)
def test_numbers_start_at_zero_for_every_stream_and_boot(
    connection: sqlite3.Connection, stream: Stream
) -> None:
    for boot in (1, 2):
        spool = make(connection, 20, boot)
        assert [spool.append(connection, packet(stream), 0) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("stream", GIVES_WAY)
def test_the_oldest_gives_way(connection: sqlite3.Connection, stream: Stream) -> None:
    spool = make(connection, 5)
    stored = fill(spool, connection, stream)
    assert [spool.append(connection, packet(stream), 0) for _ in range(2)] == [stored, stored + 1]
    assert drops(spool, connection) == [(stream, 0, 1, DropReason.FULL)]
    assert spool.stored_sequences(connection) == {(1, stream): list(range(2, stored + 2))}


@pytest.mark.parametrize("wanting", [*PROTECTED, Stream.RESULT])
def test_housekeeping_then_plans_give_way_to_the_rest(
    connection: sqlite3.Connection, wanting: Stream
) -> None:
    spool = make(connection, 8)
    spool.append(connection, packet(Stream.PLAN), 0)
    spool.append(connection, packet(Stream.HOUSEKEEPING), 0)
    for _ in range(20):
        connection.execute("SAVEPOINT try")
        try:
            spool.append(connection, packet(wanting), 0)
        except SpoolRefused:
            break
        dropped = [stream for stream, *_ in drops(spool, connection)]
        if dropped == [Stream.HOUSEKEEPING]:
            assert (1, Stream.PLAN) in spool.stored_sequences(connection)
        if Stream.PLAN in dropped:
            assert Stream.HOUSEKEEPING in dropped
    assert {Stream.HOUSEKEEPING, Stream.PLAN} <= {stream for stream, *_ in drops(spool, connection)}


def test_housekeeping_does_not_drive_out_anything_but_housekeeping(connection: sqlite3.Connection) -> None:
    spool = make(connection, 5)
    stored = fill(spool, connection, Stream.PLAN)
    assert spool.append(connection, packet(Stream.HOUSEKEEPING), 0) == 0
    assert drops(spool, connection) == [(Stream.HOUSEKEEPING, 0, 0, DropReason.FULL)]
    assert spool.append(connection, packet(Stream.HOUSEKEEPING), 0) == 1
    assert spool.size(connection)[0] == stored
    assert drops(spool, connection) == [(Stream.HOUSEKEEPING, 0, 1, DropReason.FULL)]


def test_results_are_refused_and_a_reserve_stays_for_faults(connection: sqlite3.Connection) -> None:
    spool = make(connection, 12)
    stored = fill(spool, connection, Stream.RESULT)
    with pytest.raises(SpoolRefused, match="no room"):
        spool.append(connection, packet(Stream.RESULT), 0)
    before = spool.stored_sequences(connection)[1, Stream.RESULT]
    assert spool.append(connection, packet(Stream.FDIR), 0) == 0
    assert spool.append(connection, packet(Stream.EVENT), 0) == 0
    assert spool.stored_sequences(connection)[1, Stream.RESULT] == before == list(range(stored))
    assert drops(spool, connection) == []


async def test_a_refused_result_leaves_no_trace(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    spool = Spool("sat-1", 1, 6 * SIZE)
    await database.run(spool.create)
    await database.run(lambda c: spool.append(c, packet(Stream.HOUSEKEEPING), 0))
    accepted = 0
    while True:
        before = await database.run(lambda c: (spool.ledger(c), spool.size(c)))
        try:
            await database.run(lambda c: spool.append(c, packet(Stream.RESULT), 0))
        except SpoolRefused:
            break
        accepted += 1
    assert await database.run(lambda c: (spool.ledger(c), spool.size(c))) == before
    held = await database.run(spool.stored_sequences)
    upto = len(held[1, Stream.RESULT])
    assert upto == accepted
    ack = Ack(node="sat-1", boot=1, stream=Stream.RESULT, upto=upto)
    assert await database.run(lambda c: spool.acknowledge(c, ack)) == upto
    assert await database.run(lambda c: spool.append(c, packet(Stream.RESULT), 0)) == upto
    await database.close()


@pytest.mark.parametrize("wanting", PROTECTED)
def test_a_store_full_of_faults_gives_up_the_lowest_priority_first(
    connection: sqlite3.Connection, wanting: Stream
) -> None:
    spool = make(connection, 8)
    spool.append(connection, packet(Stream.LEDGER), 0)
    fill(spool, connection, wanting)
    spool.append(connection, packet(wanting), 0)
    assert [stream for stream, *_ in drops(spool, connection)] == [Stream.LEDGER]


def test_a_record_never_drives_out_one_of_higher_priority(connection: sqlite3.Connection) -> None:
    spool = make(connection, 5)
    fill(spool, connection, Stream.SECURITY)
    before = spool.stored_sequences(connection)
    assert spool.append(connection, packet(Stream.EVENT), 0) == 0
    assert spool.stored_sequences(connection) == before
    assert drops(spool, connection) == [(Stream.EVENT, 0, 0, DropReason.FULL)]


@pytest.mark.parametrize("stream", Stream)
def test_a_record_larger_than_its_share_is_counted_and_drives_nothing_out(
    connection: sqlite3.Connection, stream: Stream
) -> None:
    spool = make(connection, 3)
    spool.append(connection, packet(Stream.HOUSEKEEPING), 0)
    before = spool.size(connection)
    seq = spool.append(connection, packet(stream, 20_000), 0)
    assert spool.size(connection) == before
    assert drops(spool, connection) == [(stream, seq, seq, DropReason.TOO_LARGE)]


@pytest.mark.parametrize("bit", [0, 7, 800, -1])
def test_a_flipped_bit_costs_one_record(connection: sqlite3.Connection, bit: int) -> None:
    spool = make(connection, 20)
    for _ in range(5):
        spool.append(connection, packet(Stream.EVENT), 0)
    (frame,) = connection.execute("SELECT frame FROM spool_record WHERE seq = 2").fetchone()
    flipped = bytearray(frame)
    flipped[bit // 8] ^= 1 << bit % 8
    connection.execute("UPDATE spool_record SET frame = ? WHERE seq = 2", (bytes(flipped),))
    assert [record.seq for record in spool.batch(connection, 10, set())] == [0, 1, 3, 4]
    assert drops(spool, connection) == [(Stream.EVENT, 2, 2, DropReason.CORRUPT)]
    (entry,) = spool.ledger(connection)
    assert (entry.generated, entry.stored, entry.dropped) == (5, 4, {"corrupt": 1})
    assert [record.seq for record in spool.batch(connection, 10, set())] == [0, 1, 3, 4]


def test_a_sound_frame_under_a_wrong_number_is_not_sent(connection: sqlite3.Connection) -> None:
    spool = make(connection, 20)
    for _ in range(2):
        spool.append(connection, packet(Stream.EVENT), 0)
    (frame,) = connection.execute("SELECT frame FROM spool_record WHERE seq = 0").fetchone()
    connection.execute("UPDATE spool_record SET frame = ? WHERE seq = 1", (frame,))
    assert [record.seq for record in spool.batch(connection, 10, set())] == [0]
    assert drops(spool, connection) == [(Stream.EVENT, 1, 1, DropReason.CORRUPT)]


def test_an_event_of_an_outage_is_first_out(connection: sqlite3.Connection) -> None:
    spool = make(connection, 60)
    for stream in (Stream.HOUSEKEEPING, Stream.RESULT, Stream.PLAN, Stream.EVENT, Stream.FDIR):
        for _ in range(3):
            spool.append(connection, packet(stream), 0)
    later = make(connection, 60, boot=2)
    later.append(connection, packet(Stream.FDIR), 0)
    order = [(r.stream, r.boot, r.seq) for r in later.batch(connection, 5, set())]
    assert order == [(Stream.FDIR, 1, 0), (Stream.FDIR, 1, 1), (Stream.FDIR, 1, 2), (Stream.FDIR, 2, 0), (
        Stream.EVENT, 1, 0)]  # fmt: skip
    first = {r.rowid for r in later.batch(connection, 5, set())}
    rest = later.batch(connection, 100, first)
    assert len(rest) == 11
    assert not first & {r.rowid for r in rest}


def test_a_row_number_is_never_used_again(connection: sqlite3.Connection) -> None:
    spool = make(connection, 20)
    spool.append(connection, packet(Stream.EVENT), 0)
    (record,) = spool.batch(connection, 1, set())
    spool.acknowledge(connection, Ack(node="sat-1", boot=1, stream=Stream.EVENT, upto=1))
    spool.append(connection, packet(Stream.EVENT), 0)
    (other,) = spool.batch(connection, 1, set())
    assert other.rowid > record.rowid


def test_a_record_archived_after_it_gave_way_counts_as_acked(connection: sqlite3.Connection) -> None:
    spool = make(connection, 5)
    stored = fill(spool, connection, Stream.HOUSEKEEPING)
    for _ in range(3):
        spool.append(connection, packet(Stream.HOUSEKEEPING), 0)
    assert drops(spool, connection) == [(Stream.HOUSEKEEPING, 0, 2, DropReason.FULL)]
    ack = Ack(node="sat-1", boot=1, stream=Stream.HOUSEKEEPING, upto=2, gaps=[(0, 0)])
    assert spool.acknowledge(connection, ack) == 0
    (entry,) = spool.ledger(connection)
    assert (entry.generated, entry.acked, entry.stored, entry.dropped) == (stored + 3, 1, stored, {"full": 2})
    assert [r[1:3] for r in drops(spool, connection)] == [(0, 0), (2, 2)]


def test_acknowledgements_delete_only_what_they_name(connection: sqlite3.Connection) -> None:
    for boot in (1, 2):
        spool = make(connection, 60, boot)
        for stream in (Stream.EVENT, Stream.PLAN):
            for _ in range(6):
                spool.append(connection, packet(stream), 0)
    ack = Ack(node="sat-1", boot=1, stream=Stream.EVENT, upto=5, gaps=[(1, 2)])
    assert spool.acknowledge(connection, ack) == 3
    assert spool.acknowledge(connection, ack) == 0
    held = spool.stored_sequences(connection)
    assert held[1, Stream.EVENT] == [1, 2, 5]
    assert all(held[key] == [0, 1, 2, 3, 4, 5] for key in held if key != (1, Stream.EVENT))


@pytest.mark.parametrize("wrong", [{"node": "sat-2"}, {"boot": 9}, {"stream": Stream.FDIR}, {"upto": 4}])
def test_an_acknowledgement_of_what_was_never_generated_deletes_nothing(
    connection: sqlite3.Connection, wrong: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    spool = make(connection, 20)
    for _ in range(3):
        spool.append(connection, packet(Stream.EVENT), 0)
    fields: dict[str, object] = {"node": "sat-1", "boot": 1, "stream": Stream.EVENT, "upto": 3, **wrong}
    assert spool.acknowledge(connection, Ack(**fields)) == 0  # type: ignore[arg-type]
    assert spool.size(connection)[0] == 3
    assert "not generated" in caplog.text


def test_another_node_is_refused_on_the_same_database(connection: sqlite3.Connection) -> None:
    make(connection, 20)
    with pytest.raises(PenumbraError, match="sat-1") as caught:
        Spool("sat-2", 1, 1000).create(connection)
    assert "state directory" in caught.value.mend


def test_a_packet_the_ground_could_not_read_is_not_generated(connection: sqlite3.Connection) -> None:
    spool = make(connection, 20)
    with pytest.raises(FrameError):
        spool.append(connection, Event(severity="bad", name="a", text=""), 0)  # type: ignore[arg-type]
    assert spool.ledger(connection) == []


async def test_a_full_disk_drops_housekeeping_and_keeps_faults(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", max_bytes=300_000)
    spool = Spool("sat-1", 1, 10**9)
    await database.run(spool.create)
    for _ in range(300):
        await database.run(lambda c: spool.append(c, packet(Stream.HOUSEKEEPING), 0))
    dropped = sum(r.last - r.first + 1 for r in await database.run(spool.dropped_ranges))
    assert dropped > 50
    assert (await database.run(spool.size))[0] == 300 - dropped
    for _ in range(20):
        await database.run(lambda c: spool.append(c, packet(Stream.EVENT), 0))
    assert len((await database.run(spool.stored_sequences))[1, Stream.EVENT]) == 20

    async def fill_up() -> None:
        while True:
            await database.run(lambda c: spool.append(c, packet(Stream.RESULT), 0))

    with pytest.raises(SpoolRefused):
        await fill_up()
    for entry in await database.run(spool.ledger):
        assert entry.generated == entry.acked + entry.stored + sum(entry.dropped.values())
    records = await database.run(lambda c: spool.batch(c, 10**6, set()))
    assert [decode_frame(r.frame).stream for r in records[:20]] == [Stream.EVENT] * 20
    await database.close()


async def test_a_disk_filled_by_others_is_store_full_and_nothing_is_generated(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", max_bytes=1 << 20)
    spool = Spool("sat-1", 1, 10**9)
    await database.run(spool.create)
    await database.run(lambda c: c.execute("CREATE TABLE other (x)"))

    async def fill_up() -> None:
        while True:
            await database.run(lambda c: c.execute("INSERT INTO other VALUES (?)", (b"x" * 3000,)))

    with pytest.raises(StoreFull):
        await fill_up()
    with pytest.raises(StoreFull):
        await database.run(lambda c: spool.append(c, packet(Stream.EVENT, 6000), 0))
    assert await database.run(spool.ledger) == []
    await database.run(lambda c: c.execute("DELETE FROM other"))
    assert await database.run(lambda c: spool.append(c, packet(Stream.EVENT, 6000), 0)) == 0
    await database.close()
