from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.jobs import (
    Duplicate,
    Gap,
    JobConflict,
    JobQueue,
    JobState,
    NotActive,
    Stored,
    Submitted,
)
from node.scheduler import Task
from telemetry.certificate import NO_CERTIFICATE
from telemetry.packets import Result
from telemetry.sampling import Sampling
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
    queue.activate(connection, "j")
    queue.store_block(connection, block(0, [1], finish="eos"), 0)
    # The prompt is gone, its digest is not.
    assert queue.get(connection, "j").prompt == ""  # type: ignore[union-attr]
    assert queue.submit(connection, "j", "hello", 8) == Submitted(new=False)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": Sampling(seed=2)},
        {"sampling": Sampling()},
        {"priority": 6},
        {"deadline_ns": 8},
        {"deadline_ns": None},
    ],
)
def test_a_job_of_other_settings_is_another_job(
    connection: sqlite3.Connection, change: dict[str, object]
) -> None:
    queue, _ = opened(connection)
    settings: dict[str, Any] = {"sampling": Sampling(seed=1), "priority": 7, "deadline_ns": 9}
    queue.submit(connection, "j", "hello", 8, **settings)
    assert queue.submit(connection, "j", "hello", 8, **settings) == Submitted(new=False)
    with pytest.raises(JobConflict):
        queue.submit(connection, "j", "hello", 8, **{**settings, **change})
    job = queue.get(connection, "j")
    assert job is not None
    assert (job.sampling, job.priority, job.deadline_ns) == (Sampling(seed=1), 7, 9)


def test_several_jobs_are_active_and_one_can_be_parked(connection: sqlite3.Connection) -> None:
    queue, _ = opened(connection)
    for number, name in enumerate("cab"):
        queue.submit(connection, name, name, 4, priority=number, deadline_ns=number or None)
    assert queue.tasks(connection) == (
        [],
        [
            Task("c", 1, 0, tokens_left=4),
            Task("a", 2, 1, 1, tokens_left=4),
            Task("b", 3, 2, 2, tokens_left=4),
        ],
    )
    for name in "bc":
        queue.activate(connection, name)
    assert queue.active(connection) == ["c", "b"]
    for name in "bc":
        assert queue.store_block(connection, block(0, [1], name), 0) == Stored(1, None)
    assert queue.park(connection, "c") == 1
    assert queue.park(connection, "c") is None
    assert queue.park(connection, "a") is None
    assert queue.active(connection) == ["b"]
    assert queue.store_block(connection, block(1, [1], "c"), 0) == NotActive()
    queue.activate(connection, "c")
    assert queue.store_block(connection, block(1, [1], "c", "length"), 0) == Stored(2, "length")
    queue.activate(connection, "c")
    active, queued = queue.tasks(connection)
    assert ([t.job for t in active], [t.job for t in queued]) == (["b"], ["a"])
    assert queue.counts(connection) == (2, 1, 3)


LAST_SCHEMA = """CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        prompt TEXT NOT NULL,
        prompt_sha256 BLOB NOT NULL,
        max_tokens INTEGER NOT NULL,
        state TEXT NOT NULL,
        tokens INTEGER NOT NULL DEFAULT 0,
        cancel INTEGER NOT NULL DEFAULT 0,
        finish TEXT
    )"""
"""The table as the version before this one made it."""


def test_a_database_of_the_version_before_opens_and_its_jobs_go_on(connection: sqlite3.Connection) -> None:
    connection.execute(LAST_SCHEMA)
    digest = hashlib.sha256(b"p").digest()
    rows = [("old", "active", 2, None), ("waits", "queued", 0, None), ("gone", "done", 5, "eos")]
    for name, state, tokens, finish in rows:
        connection.execute(
            "INSERT INTO jobs (id, prompt, prompt_sha256, max_tokens, state, tokens, finish)"
            " VALUES (?, 'p', ?, 8, ?, ?, ?)",
            (name, digest, state, tokens, finish),
        )
    for _ in range(2):  # the second time there is nothing left to add
        queue, _ = opened(connection)
    assert queue.tasks(connection) == ([Task("old", 1, tokens_left=6)], [Task("waits", 2, tokens_left=8)])
    old = queue.get(connection, "old")
    assert old is not None
    assert (old.tokens, old.sampling, old.priority, old.deadline_ns) == (2, Sampling(), 5, None)
    assert queue.submit(connection, "old", "p", 8) == Submitted(new=False)
    assert queue.submit(connection, "gone", "p", 8) == Submitted(new=False)
    assert queue.store_block(connection, block(2, [3], "old", "length"), 0) == Stored(3, "length")
    queue.submit(connection, "new", "p", 8, sampling=Sampling(top_k=3), priority=0, deadline_ns=-1)
    assert queue.tasks(connection)[1] == [
        Task("waits", 2, tokens_left=8),
        Task("new", 4, 0, -1, tokens_left=8),
    ]
    assert queue.counts(connection) == (2, 2, 8)


def test_a_block_is_stored_spooled_and_counted_once(connection: sqlite3.Connection) -> None:
    queue, _ = opened(connection)
    queue.submit(connection, "j", "p", 8)
    queue.activate(connection, "j")
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
    queue.activate(connection, "j")
    with pytest.raises(ValueError, match="token"):
        queue.store_block(connection, block(0, [token]), 0)


def test_what_the_spool_refuses_changes_nothing(connection: sqlite3.Connection) -> None:
    queue, spool = opened(connection, capacity=1500)
    queue.submit(connection, "j", "p", 10_000)
    queue.activate(connection, "j")
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
    assert [task.cancel for task in queue.tasks(connection)[1]] == [True]
    assert queue.finish(connection, "j", "cancelled", 0)
    assert not queue.finish(connection, "j", "cancelled", 0)
    assert not queue.finish(connection, "unknown", "cancelled", 0)
    assert queue.tasks(connection) == ([], [])
    assert queue.cancel(connection, "j").state is JobState.DONE  # type: ignore[union-attr]
    assert results(connection) == 1


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
    queue.activate(connection, "j")
    text = list(range(1000, 1000 + total))
    stored: list[int] = []
    for number, restart in walk:
        if restart:
            parked = queue.park(connection, "j")
            assert parked == (None if len(stored) == total else len(stored))
            queue.activate(connection, "j")
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
