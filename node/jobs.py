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

from telemetry.packets import Certificate, Packet, Result

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
        finish TEXT
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
MAX_TOKEN = 1 << 32
NO_CERTIFICATE = Certificate(image_id="", epoch=0, kv_digest=bytes(8), chain=bytes(32))
"""Certificate of a closing result without tokens: nothing is released, so nothing is proven."""


class JobState(StrEnum):
    """State of a job."""

    QUEUED = "queued"
    ACTIVE = "active"
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
    """None while open; else `length`, `eos`, `cancelled` or `failed: ...`."""


@dataclass(frozen=True)
class Submitted:
    """The job is in the queue; `new` is False when it was there already."""

    new: bool


class JobConflict(Exception):
    """Another job with the same id but a different prompt or length exists."""


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
    """Jobs in order of arrival; at most one is active.

    Parameters
    ----------
    spool
        Where results go, in the same transaction.
    """

    def __init__(self, spool: Appender) -> None:
        self._spool = spool

    def create(self, conn: sqlite3.Connection) -> None:
        """Create the tables where they are missing."""
        for statement in _SCHEMA:
            conn.execute(statement)

    def submit(self, conn: sqlite3.Connection, job: str, prompt: str, max_tokens: int) -> Submitted:
        """Queue a job. Asking again for the same job changes nothing.

        Raises
        ------
        JobConflict
            A job of this id with another prompt or length is known.
        """
        digest = hashlib.sha256(prompt.encode()).digest()
        row = conn.execute("SELECT prompt_sha256, max_tokens FROM jobs WHERE id = ?", (job,)).fetchone()
        if row is not None:
            if (bytes(row[0]), row[1]) != (digest, max_tokens):
                raise JobConflict(f"job {job!r} exists with another prompt or max_tokens")
            return Submitted(new=False)
        conn.execute(
            "INSERT INTO jobs (id, prompt, prompt_sha256, max_tokens, state) VALUES (?, ?, ?, ?, ?)",
            (job, prompt, digest, max_tokens, JobState.QUEUED),
        )
        return Submitted(new=True)

    def next(self, conn: sqlite3.Connection) -> Job | None:
        """Return the job to run: the active one, else the oldest queued one, now active. None: no work."""
        row = conn.execute(
            "SELECT id FROM jobs WHERE state != 'done' ORDER BY state = 'active' DESC, number LIMIT 1"
        ).fetchone()
        if row is None:
            return None
        conn.execute("UPDATE jobs SET state = ? WHERE id = ?", (JobState.ACTIVE, row[0]))
        return self.get(conn, row[0])

    def get(self, conn: sqlite3.Connection, job: str) -> Job | None:
        """Return one job, None when it is not known."""
        row = conn.execute(
            "SELECT id, prompt, max_tokens, state, tokens, cancel, finish FROM jobs WHERE id = ?", (job,)
        ).fetchone()
        if row is None:
            return None
        return Job(row[0], row[1], row[2], JobState(row[3]), row[4], bool(row[5]), row[6])

    def cancelled(self, conn: sqlite3.Connection) -> list[str]:
        """Return the open jobs that the ground asked to cancel, in order of arrival."""
        rows = conn.execute("SELECT id FROM jobs WHERE state != 'done' AND cancel = 1 ORDER BY number")
        return [row[0] for row in rows]

    def active(self, conn: sqlite3.Connection) -> Job | None:
        """Return the active job without starting another."""
        row = conn.execute("SELECT id FROM jobs WHERE state = 'active'").fetchone()
        return None if row is None else self.get(conn, row[0])

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
