from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.jobs import (
    NO_CERTIFICATE,
    Duplicate,
    Gap,
    JobConflict,
    JobQueue,
    JobState,
    NotActive,
    Stored,
    Submitted,
)
from telemetry.packets import Result
from telemetry.spool import Spool, SpoolRefused


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    yield connection
    connection.close()


def opened(connection: sqlite3.Connection, capacity: int = 1 << 20) -> tuple[JobQueue, Spool]:
    spool = Spool("n", 1, capacity)
    spool.create(connection)
    queue = JobQueue(spool)
    queue.create(connection)
    return queue, spool


def block(first: int, tokens: list[int], job: str = "j", finish: str | None = None) -> Result:
    return Result(
        job=job,
        first=first,
        tokens=tokens,
        text=bytes(len(tokens)),
        certificate=NO_CERTIFICATE,
        finish=finish,
    )


def results(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT COUNT(*) FROM spool_record WHERE stream = 'result'").fetchone()[0])


def test_submit_is_idempotent_and_another_job_of_the_same_id_is_refused(
    connection: sqlite3.Connection,
) -> None:
    queue, _ = opened(connection)
    assert queue.submit(connection, "j", "hello", 8) == Submitted(new=True)
    assert queue.submit(connection, "j", "hello", 8) == Submitted(new=False)
    for prompt, tokens in (("other", 8), ("hello", 9)):
        with pytest.raises(JobConflict):
            queue.submit(connection, "j", prompt, tokens)
    queue.next(connection)
    queue.store_block(connection, block(0, [1], finish="eos"), 0)
    # The prompt is gone, its digest is not.
    assert queue.get(connection, "j").prompt == ""  # type: ignore[union-attr]
    assert queue.submit(connection, "j", "hello", 8) == Submitted(new=False)


def test_jobs_run_one_at_a_time_in_order_of_arrival(connection: sqlite3.Connection) -> None:
    queue, _ = opened(connection)
    assert queue.next(connection) is None
    for name in ("b", "a"):
        queue.submit(connection, name, name, 4)
    assert queue.active(connection) is None
    assert queue.next(connection).id == "b"  # type: ignore[union-attr]
    assert queue.next(connection).id == "b"  # type: ignore[union-attr]
    assert queue.active(connection).id == "b"  # type: ignore[union-attr]
    queue.store_block(connection, block(0, [1], "b", "length"), 0)
    assert queue.next(connection).id == "a"  # type: ignore[union-attr]
    assert queue.counts(connection) == (1, 1, 1)


def test_a_block_is_stored_spooled_and_counted_once(connection: sqlite3.Connection) -> None:
    queue, _ = opened(connection)
    queue.submit(connection, "j", "p", 8)
    queue.next(connection)
    assert queue.store_block(connection, block(0, [1, 2]), 0) == Stored(2, None)
    assert queue.store_block(connection, block(0, [1, 2]), 0) == Duplicate(same=True)
    assert queue.store_block(connection, block(0, [1, 3]), 0) == Duplicate(same=False)
    assert queue.store_block(connection, block(1, [2, 3]), 0) == Gap(2, 1)
    assert queue.store_block(connection, block(3, [4]), 0) == Gap(2, 3)
    assert queue.store_block(connection, block(2, [4], finish="length"), 0) == Stored(3, "length")
    assert queue.store_block(connection, block(2, [4], finish="length"), 0) == Duplicate(same=True)
    assert queue.store_block(connection, block(3, [], finish="length"), 0) == Duplicate(same=True)
    assert queue.store_block(connection, block(3, [5]), 0) == Gap(3, 3)
    assert results(connection) == 2
    job = queue.get(connection, "j")
    assert job is not None
    assert (job.state, job.tokens, job.finish) == (JobState.DONE, 3, "length")


def test_blocks_of_unknown_or_waiting_jobs_are_dropped(connection: sqlite3.Connection) -> None:
    queue, _ = opened(connection)
    queue.submit(connection, "j", "p", 8)
    assert queue.store_block(connection, block(0, [1]), 0) == NotActive()
    assert queue.store_block(connection, block(0, [1], "x"), 0) == NotActive()
    assert results(connection) == 0


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_none_is_refused(connection: sqlite3.Connection, token: int) -> None:
    queue, _ = opened(connection)
    queue.submit(connection, "j", "p", 8)
    queue.next(connection)
    with pytest.raises(ValueError, match="token"):
        queue.store_block(connection, block(0, [token]), 0)


def test_what_the_spool_refuses_changes_nothing(connection: sqlite3.Connection) -> None:
    queue, spool = opened(connection, capacity=1500)
    queue.submit(connection, "j", "p", 10_000)
    queue.next(connection)
    tokens = 0
    with pytest.raises(SpoolRefused):  # noqa: PT012 - the loop ends by it
        while True:
            connection.execute("SAVEPOINT s")
            try:
                queue.store_block(connection, block(tokens, [7] * 20), 0)
            except SpoolRefused:
                connection.execute("ROLLBACK TO s")
                raise
            connection.execute("RELEASE s")
            tokens += 20
    assert tokens > 0
    assert queue.get(connection, "j").tokens == tokens  # type: ignore[union-attr]
    assert results(connection) == tokens // 20
    spool.capacity_bytes *= 2
    assert queue.store_block(connection, block(tokens, [7] * 20), 0) == Stored(tokens + 20, None)


def test_cancel_is_remembered_and_finish_closes_with_an_empty_result(connection: sqlite3.Connection) -> None:
    queue, _ = opened(connection)
    assert queue.cancel(connection, "j") is None
    queue.submit(connection, "j", "p", 8)
    assert queue.cancel(connection, "j").state is JobState.QUEUED  # type: ignore[union-attr]
    assert queue.cancelled(connection) == ["j"]
    assert queue.finish(connection, "j", "cancelled", 0)
    assert not queue.finish(connection, "j", "cancelled", 0)
    assert not queue.finish(connection, "unknown", "cancelled", 0)
    assert queue.cancelled(connection) == []
    assert queue.cancel(connection, "j").state is JobState.DONE  # type: ignore[union-attr]
    assert results(connection) == 1
    assert queue.next(connection) is None


@given(
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60),
    st.integers(1, 5),
)
def test_any_order_of_blocks_gives_a_prefix_of_the_text_each_token_once(
    total: int, walk: list[tuple[int, bool]], size: int
) -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    queue, _ = opened(connection)
    queue.submit(connection, "j", "p", total)
    queue.next(connection)
    text = list(range(1000, 1000 + total))
    stored: list[int] = []
    for number, restart in walk:
        if restart:
            assert queue.next(connection) is not None or len(stored) == total
        first = min(number * size, total)
        part = text[first : first + size]
        if not part:
            continue
        last = first + len(part) == total
        outcome = queue.store_block(connection, block(first, part, finish="length" if last else None), 0)
        if first == len(stored):
            assert isinstance(outcome, Stored)
            stored += part
        elif first < len(stored):
            assert outcome == Duplicate(same=True)
        else:
            assert outcome == Gap(len(stored), first)
        assert stored == text[: len(stored)]
        assert queue.counts(connection)[2] == len(stored)
    connection.close()
