"""Durable queue of inference jobs, in the same database as the spool.

Storing a committed block, spooling it as a `Result` and advancing its job is one transaction, so a kill
at any moment neither loses a token nor sends one twice. All methods take the connection and are meant
for `telemetry.database.Database.run`.
"""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import msgspec

from node.scheduler import Task
from telemetry.certificate import NO_CERTIFICATE
from telemetry.commands import DEFAULT_PRIORITY
from telemetry.packets import Packet, Result
from telemetry.sampling import GREEDY, Sampling

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        prompt TEXT NOT NULL,
        prompt_sha256 BLOB NOT NULL,
        max_tokens INTEGER NOT NULL,
        state TEXT NOT NULL,
        tokens INTEGER NOT NULL DEFAULT 0,
        cancel INTEGER NOT NULL DEFAULT 0,
        finish TEXT,
        priority INTEGER NOT NULL DEFAULT 5,
        deadline_ns INTEGER,
        sampling BLOB
    )""",
    "CREATE INDEX IF NOT EXISTS jobs_open ON jobs(number) WHERE state != 'done'",
    """CREATE TABLE IF NOT EXISTS job_blocks (
        job TEXT NOT NULL,
        first INTEGER NOT NULL,
        count INTEGER NOT NULL,
        digest BLOB NOT NULL,
        PRIMARY KEY (job, first)
    ) WITHOUT ROWID""",
)
_ADDED_COLUMNS = {
    "priority": "INTEGER NOT NULL DEFAULT 5",
    "deadline_ns": "INTEGER",
    "sampling": "BLOB",
}
"""Columns a database of a version before this one lacks, with what its jobs have in them."""
MAX_TOKEN = 1 << 32


class JobState(StrEnum):
    """State of a job."""

    QUEUED = "queued"
    """Waits for a place in the batch: new, or parked."""
    ACTIVE = "active"
    """Has a place in the batch, also while there is no worker."""
    DONE = "done"


@dataclass(frozen=True)
class Job:
    """One inference job as stored."""

    id: str
    prompt: str
    """Empty once the job is done: only its digest is kept."""
    max_tokens: int
    state: JobState
    tokens: int
    """Tokens stored so far."""
    cancel: bool
    """True when the ground asked to cancel it."""
    finish: str | None
    """None while open; else as `telemetry.packets.Result.finish`."""
    sampling: Sampling = GREEDY
    priority: int = DEFAULT_PRIORITY
    """9 goes first."""
    deadline_ns: int | None = None
    """Mission time at which it ends as it is; None: never."""


@dataclass(frozen=True)
class Submitted:
    """The job is in the queue; `new` is False when it was there already."""

    new: bool


class JobConflict(Exception):
    """Another job with the same id exists, with another prompt or other settings."""


@dataclass(frozen=True)
class Stored:
    """The block is stored and spooled."""

    tokens: int
    finish: str | None


@dataclass(frozen=True)
class Duplicate:
    """The block was stored before; dropped. `same` tells whether it is equal to the stored one."""

    same: bool


@dataclass(frozen=True)
class Gap:
    """The block does not continue the job; dropped. Blocks between are missing, or it overlaps."""

    expected: int
    got: int


@dataclass(frozen=True)
class NotActive:
    """The block is of a job that is not being run; dropped."""


StoreOutcome = Stored | Duplicate | Gap | NotActive


class Appender(Protocol):
    """The part of `telemetry.spool.Spool` the queue needs."""

    def append(self, conn: sqlite3.Connection, packet: Packet, t_ns: int) -> int:
        """Store a packet in this transaction; return its sequence number."""
        ...


def _digest(result: Result) -> bytes:
    return hashlib.sha256(b"".join(t.to_bytes(4, "big") for t in result.tokens)).digest()


class JobQueue:
    """Jobs in order of arrival; which of them are active is decided by `node.scheduler`.

    Parameters
    ----------
    spool
        Where results go, in the same transaction.
    """

    def __init__(self, spool: Appender) -> None:
        self._spool = spool

    def create(self, conn: sqlite3.Connection) -> None:
        """Create the tables where they are missing, and add the columns an older database lacks."""
        for statement in _SCHEMA:
            conn.execute(statement)
        present = {row[1] for row in conn.execute("PRAGMA table_info(jobs)")}
        for column, definition in _ADDED_COLUMNS.items():
            if column not in present:
                conn.execute(f"ALTER TABLE jobs ADD COLUMN {column} {definition}")

    def submit(
        self,
        conn: sqlite3.Connection,
        job: str,
        prompt: str,
        max_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        priority: int = DEFAULT_PRIORITY,
        deadline_ns: int | None = None,
    ) -> Submitted:
        """Queue a job. Asking again for the same job changes nothing.

        Raises
        ------
        JobConflict
            A job of this id with another prompt or other settings is known.
        """
        digest = hashlib.sha256(prompt.encode()).digest()
        known = self.get(conn, job)
        if known is not None:
            (known_digest,) = conn.execute("SELECT prompt_sha256 FROM jobs WHERE id = ?", (job,)).fetchone()
            asked = (digest, max_tokens, sampling, priority, deadline_ns)
            before = (known.max_tokens, known.sampling, known.priority, known.deadline_ns)
            if asked != (bytes(known_digest), *before):
                raise JobConflict(f"job {job!r} exists with another prompt or other settings")
            return Submitted(new=False)
        conn.execute(
            "INSERT INTO jobs (id, prompt, prompt_sha256, max_tokens, state, priority, deadline_ns, sampling)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(job, prompt, digest, max_tokens, JobState.QUEUED, priority, deadline_ns),
                None if sampling == GREEDY else msgspec.msgpack.encode(sampling),
            ),
        )
        return Submitted(new=True)

    def tasks(self, conn: sqlite3.Connection) -> tuple[list[Task], list[Task]]:
        """Return the (active, queued) jobs in order of arrival, as the scheduler sees them."""
        active: list[Task] = []
        queued: list[Task] = []
        rows = conn.execute(
            "SELECT id, number, priority, deadline_ns, cancel, max_tokens - tokens, state FROM jobs"
            " WHERE state != 'done' ORDER BY number"
        )
        for job, number, priority, deadline_ns, cancel, left, state in rows:
            task = Task(job, number, priority, deadline_ns, bool(cancel), max(0, left))
            (active if state == JobState.ACTIVE else queued).append(task)
        return active, queued

    def activate(self, conn: sqlite3.Connection, job: str) -> None:
        """Note that an open job has a place in the batch."""
        conn.execute("UPDATE jobs SET state = 'active' WHERE id = ? AND state = 'queued'", (job,))

    def park(self, conn: sqlite3.Connection, job: str) -> int | None:
        """Note that an active job gave up its place; return its tokens so far, None if it is not active."""
        row = conn.execute(
            "UPDATE jobs SET state = 'queued' WHERE id = ? AND state = 'active' RETURNING tokens", (job,)
        ).fetchone()
        return None if row is None else int(row[0])

    def get(self, conn: sqlite3.Connection, job: str) -> Job | None:
        """Return one job, None when it is not known."""
        row = conn.execute(
            "SELECT id, prompt, max_tokens, state, tokens, cancel, finish, sampling, priority, deadline_ns"
            " FROM jobs WHERE id = ?",
            (job,),
        ).fetchone()
        if row is None:
            return None
        return Job(
            id=row[0],
            prompt=row[1],
            max_tokens=row[2],
            state=JobState(row[3]),
            tokens=row[4],
            cancel=bool(row[5]),
            finish=row[6],
            sampling=GREEDY if row[7] is None else msgspec.msgpack.decode(row[7], type=Sampling),
            priority=row[8],
            deadline_ns=row[9],
        )

    def active(self, conn: sqlite3.Connection) -> list[str]:
        """Return the active jobs in order of arrival."""
        return [row[0] for row in conn.execute("SELECT id FROM jobs WHERE state = 'active' ORDER BY number")]

    def store_block(self, conn: sqlite3.Connection, result: Result, t_ns: int) -> StoreOutcome:
        """Store a committed block: spool it and advance its job, or say why it is dropped.

        Raises
        ------
        telemetry.spool.SpoolRefused
            The spool has no room for results now; nothing is changed, try again later.
        ValueError
            The block does not fit the schema of a result: it can only come from a poisoned worker.
        """
        if not all(0 <= token < MAX_TOKEN for token in result.tokens):
            raise ValueError("block holds a token outside 0 to 2**32 - 1")
        job = self.get(conn, result.job)
        if job is None or job.state is JobState.QUEUED:
            return NotActive()
        if job.state is JobState.DONE and result.first == job.tokens and not result.tokens:
            return Duplicate(result.finish == job.finish)
        if job.state is JobState.DONE or result.first < job.tokens:
            return self._compare(conn, job, result)
        if result.first > job.tokens:
            return Gap(job.tokens, result.first)
        self._spool.append(conn, result, t_ns)
        tokens = job.tokens + len(result.tokens)
        if result.tokens:
            conn.execute(
                "INSERT INTO job_blocks (job, first, count, digest) VALUES (?, ?, ?, ?)",
                (job.id, result.first, len(result.tokens), _digest(result)),
            )
        conn.execute("UPDATE jobs SET tokens = ? WHERE id = ?", (tokens, job.id))
        if result.finish is not None:
            self._close(conn, job.id, result.finish)
        return Stored(tokens, result.finish)

    def finish(self, conn: sqlite3.Connection, job: str, finish: str, t_ns: int) -> bool:
        """End an open job from the supervisor's side, with a closing result without tokens.

        Returns
        -------
        bool
            False when the job is not known or done already; nothing is changed then.

        Raises
        ------
        telemetry.spool.SpoolRefused
            As `store_block`.
        """
        known = self.get(conn, job)
        if known is None or known.state is JobState.DONE:
            return False
        closing = Result(
            job=job, first=known.tokens, tokens=[], text=b"", certificate=NO_CERTIFICATE, finish=finish
        )
        self._spool.append(conn, closing, t_ns)
        self._close(conn, job, finish)
        return True

    def cancel(self, conn: sqlite3.Connection, job: str) -> Job | None:
        """Mark a job to be cancelled; return it as it was, None when it is not known.

        The mark outlives a restart. Who runs the job ends it: the worker at the end of its epoch when it
        is active, else `finish`.
        """
        known = self.get(conn, job)
        if known is not None and known.state is not JobState.DONE:
            conn.execute("UPDATE jobs SET cancel = 1 WHERE id = ?", (job,))
        return known

    def counts(self, conn: sqlite3.Connection) -> tuple[int, int, int]:
        """Return (open jobs, jobs done, tokens released), all since the node was first started."""
        row = conn.execute(
            "SELECT COUNT(*) FILTER (WHERE state != 'done'), COUNT(*) FILTER (WHERE state = 'done'),"
            " COALESCE(SUM(tokens), 0) FROM jobs"
        ).fetchone()
        return int(row[0]), int(row[1]), int(row[2])

    def _compare(self, conn: sqlite3.Connection, job: Job, result: Result) -> Duplicate | Gap:
        row = conn.execute(
            "SELECT count, digest FROM job_blocks WHERE job = ? AND first = ?", (job.id, result.first)
        ).fetchone()
        if row is None:
            # It begins inside one of the stored blocks, or after the end of the job.
            return Gap(job.tokens, result.first)
        return Duplicate((row[0], bytes(row[1])) == (len(result.tokens), _digest(result)))

    def _close(self, conn: sqlite3.Connection, job: str, finish: str) -> None:
        conn.execute(
            "UPDATE jobs SET state = ?, finish = ?, prompt = '' WHERE id = ?", (JobState.DONE, finish, job)
        )
