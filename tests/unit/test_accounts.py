"""Texts proven by their certificates; the ledger recomputed from archive and spool."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from hil.accounts import assemble, ledger_fact, newer_packets, newest_packet, read_only, stored_frames
from hil.scenario import Job
from telemetry.archive import Archive
from telemetry.certificate import chain_next, chain_start
from telemetry.packets import Certificate, Event, Housekeeping, Result, Severity, Stream
from telemetry.sampling import Sampling
from telemetry.spool import Spool
from tests.flight_records import housekeeping

IMAGE = "0123456789abcdef"
NODE = "penumbra-1"


def blocks(job: str = "j", prompt: tuple[int, ...] = (2, 7)) -> list[Result]:
    chain = chain_start(IMAGE, job, prompt)
    made = []
    for epoch, (first, tokens) in enumerate([(0, [5, 6, 7]), (3, [8, 9])]):
        chain = chain_next(chain, epoch, first, tokens, b"kvdigest")
        made.append(
            Result(
                job=job,
                first=first,
                tokens=tokens,
                text=bytes(97 + t for t in tokens),
                certificate=Certificate(image_id=IMAGE, epoch=epoch, kv_digest=b"kvdigest", chain=chain),
                prompt_tokens=list(prompt) if epoch == 0 else None,
                finish="length" if epoch else None,
            )
        )
    return made


def test_texts_are_assembled_and_proven() -> None:
    sampling = Sampling(seed=3)
    asked = Job(id="j", prompt="prompt", max_tokens=5, sampling=sampling)
    (fact,) = assemble(IMAGE, [asked], {"j": blocks()})
    assert (fact.job, fact.prompt, fact.max_tokens) == ("j", "prompt", 5)
    assert fact.tokens == [5, 6, 7, 8, 9]
    assert fact.text == b"fghij"
    assert fact.proven == 5
    assert (fact.finish, fact.sampling, fact.findings) == ("length", sampling, [])


def test_tokens_without_proof_show_as_unproven() -> None:
    made = blocks()
    (other_image,) = assemble("f" * 16, [], {"j": made})
    assert (len(other_image.tokens), other_image.proven) == (5, 0)
    (no_middle,) = assemble(IMAGE, [], {"j": made[1:]})
    assert (len(no_middle.tokens), no_middle.proven) == (2, 0)
    assert no_middle.findings == ["token 3: the first 3 tokens are missing"]
    (twice,) = assemble(IMAGE, [], {"j": [made[0], made[0], made[1]]})
    assert (len(twice.tokens), twice.proven) == (8, 3)


def test_jobs_come_in_the_order_asked_then_the_unasked() -> None:
    asked = [Job(id=name, prompt="p", max_tokens=5) for name in "ba"]
    facts = assemble(IMAGE, asked, {"stranger": blocks("stranger"), "a": blocks("a")})
    assert [f.job for f in facts] == ["b", "a", "stranger"]
    assert facts[0].tokens == []
    assert facts[0].finish is None


class Store:
    """A node's database and a ground archive, filled by hand."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "node.db"
        self.connection = sqlite3.connect(self.path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.spool = Spool(NODE, 1, 1 << 20)
        self.spool.create(self.connection)
        self.archive = Archive.open(folder / "archive.db")

    def event(self, text: str = "e") -> None:
        self.spool.append(self.connection, Event(severity=Severity.INFO, name="n", text=text), 1)

    def downlink(self, count: int, *, acknowledge: bool = True) -> None:
        records = self.spool.batch(self.connection, count, set())
        self.archive.ingest(record.frame for record in records)
        if acknowledge:
            for ack in self.archive.acks(NODE):
                self.spool.acknowledge(self.connection, ack)

    def ledger(self):  # type: ignore[no-untyped-def]
        return ledger_fact(self.archive, NODE, self.path)


@pytest.fixture
def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Store(tmp_path)
    yield made
    made.connection.close()
    made.archive.close()


def test_ledger_balances_with_everything_somewhere(store: Store) -> None:
    for _ in range(5):
        store.event()
    store.downlink(3)
    fact = store.ledger()
    assert (fact.generated, fact.acked, fact.stored, fact.dropped, fact.lost) == (5, 3, 2, 0, 0)
    assert fact.consistent
    (row,) = fact.streams
    assert (row.stream, row.generated, row.archived, row.stored) == (Stream.EVENT, 5, 3, 2)


def test_archived_but_not_acknowledged_is_stored_and_not_lost(store: Store) -> None:
    store.event()
    store.downlink(1, acknowledge=False)
    fact = store.ledger()
    assert (fact.acked, fact.stored, fact.lost) == (0, 1, 0)
    assert fact.consistent


def test_a_record_that_vanished_is_lost(store: Store) -> None:
    for _ in range(3):
        store.event()
    store.connection.execute("DELETE FROM spool_record WHERE seq = 1")
    fact = store.ledger()
    assert fact.lost == 1
    assert not fact.consistent
    assert any("lost" in problem for problem in fact.problems)


def test_deleted_without_an_archive_is_found(store: Store) -> None:
    store.event()
    store.connection.execute("UPDATE spool_stream SET acked = 1")
    store.connection.execute("DELETE FROM spool_record")
    assert store.ledger().lost == 1


def test_drops_are_accounted_with_their_reason(store: Store) -> None:
    small = Spool(NODE, 1, 2000)
    for n in range(6):
        small.append(store.connection, housekeeping(float(n), n, 0).packet, n)
    fact = store.ledger()
    assert fact.dropped > 0
    assert fact.drop_reasons == {"full": fact.dropped}
    assert fact.lost == 0
    assert fact.consistent


def test_spool_is_read_without_being_changed(store: Store) -> None:
    store.event("first")
    for n in range(3):
        store.spool.append(store.connection, housekeeping(float(n), 10 + n, 0).packet, 100 + n)
    assert [f.stream for f in stored_frames(store.path)] == [Stream.EVENT] + [Stream.HOUSEKEEPING] * 3
    newest = newest_packet(store.path, Housekeeping)
    assert newest is not None
    assert (newest[0].t_ns, newest[1].tokens_released) == (102, 12)
    with (
        closing(read_only(store.path)) as other,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        other.execute("DELETE FROM spool_record")
    assert len(stored_frames(store.path)) == 4


def test_packets_newer_than_the_last_seen_are_read_in_order(store: Store) -> None:
    for job in ("a", "b"):
        for block in blocks(job):
            store.spool.append(store.connection, block, 1)
    found = newer_packets(store.path, Result, (0, -1))
    assert [(p.job, p.first) for _, p in found] == [("a", 0), ("a", 3), ("b", 0), ("b", 3)]
    frame, _ = found[1]
    assert [p.job for _, p in newer_packets(store.path, Result, (frame.boot, frame.seq))] == ["b", "b"]
    assert newer_packets(store.path, Result, (2, 0)) == []
    store.connection.execute("UPDATE spool_record SET frame = x'00' WHERE seq = 2")
    assert len(newer_packets(store.path, Result, (0, -1))) == 3
    assert newer_packets(store.path.with_name("none.db"), Result, (0, -1)) == []


def test_damaged_records_are_left_out_of_what_is_read(store: Store) -> None:
    store.event("first")
    store.spool.append(store.connection, housekeeping(0.0, 10, 0).packet, 100)
    store.connection.execute("UPDATE spool_record SET frame = x'00' WHERE stream = 'hk'")
    assert [f.stream for f in stored_frames(store.path)] == [Stream.EVENT]
    assert newest_packet(store.path, Housekeeping) is None
    assert store.ledger().lost == 0  # it is stored still: the node will drop it, and count it


def test_a_node_that_made_no_spool_accounts_for_nothing(tmp_path: Path, store: Store) -> None:
    empty = tmp_path / "empty.db"
    sqlite3.connect(empty).close()
    for path in (tmp_path / "none.db", empty):
        assert stored_frames(path) == []
        fact = ledger_fact(store.archive, NODE, path)
        assert (fact.generated, fact.lost, fact.consistent) == (0, 0, True)
    store.event()
    store.downlink(1)
    fact = ledger_fact(store.archive, NODE, empty)
    assert not fact.consistent
    assert "unknown to the node" in fact.problems[0]


def test_no_database_or_no_housekeeping_yet(tmp_path: Path, store: Store) -> None:
    assert newest_packet(tmp_path / "none.db", Housekeeping) is None
    assert newest_packet(store.path, Housekeeping) is None
