"""What the ground can say after a flight: the texts, proven by their certificates, and the ledger.

The ledger is recomputed from the archive and from the spool the node left on its disk, which is opened
read-only once the node has ended.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from hil.record import JobFact, LedgerFact, StreamAccount
from hil.scenario import Job
from telemetry.archive import Archive
from telemetry.certificate import JobVerdict, verify_results
from telemetry.frame import Frame, FrameError, decode_frame
from telemetry.ledger import Key, Ranges, merge, reconcile, to_ranges
from telemetry.packets import Packet, Result, StreamLedger
from telemetry.spool import DroppedRange, Spool

P = TypeVar("P", bound=Packet)
NEWER_MAX = 64
"""Packets read at a time from a node's spool: far more than a batch commits between two looks."""


def read_only(path: Path) -> sqlite3.Connection:
    """Open a node's database without being able to change it.

    Raises
    ------
    sqlite3.Error
        There is none, or it cannot be read.
    """
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)


@contextmanager
def _spool_of(database: Path) -> Iterator[sqlite3.Connection | None]:
    """Open the spool of a node that has ended; None if it never made one."""
    if not database.exists():
        yield None
        return
    with closing(read_only(database)) as connection:
        made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'spool_record'").fetchone()
        yield connection if made else None


def stored_frames(database: Path) -> list[Frame]:
    """Return the frames waiting in a node's spool, in order of (stream, boot, seq).

    A damaged one is left out: the node drops it, counted, when it comes to send it. A node that ended before
    it made its spool has none.
    """
    rows: list[tuple[bytes]] = []
    with _spool_of(database) as connection:
        if connection is not None:
            rows = connection.execute("SELECT frame FROM spool_record ORDER BY stream, boot, seq").fetchall()
    frames = []
    for (data,) in rows:
        with suppress(FrameError):
            frames.append(decode_frame(data))
    return frames


def newest_packet(database: Path, kind: type[P]) -> tuple[Frame, P] | None:
    """Return the newest packet of a type in a node's spool with its frame; None if there is none now.

    The bench's view into the node between contacts: it reads the node's disk, and the node does not notice.
    """
    try:
        with closing(read_only(database)) as connection:
            row = connection.execute(
                "SELECT frame FROM spool_record WHERE stream = ? ORDER BY boot DESC, seq DESC LIMIT 1",
                (kind.stream.value,),
            ).fetchone()
        if row is None:
            return None
        frame = decode_frame(row[0])
        packet = frame.packet()
    except (sqlite3.Error, FrameError):
        return None  # not made yet, busy, or damaged: there is a next time
    return (frame, packet) if isinstance(packet, kind) else None


def newer_packets(database: Path, kind: type[P], after: tuple[int, int]) -> list[tuple[Frame, P]]:
    """Return the packets of a type in a node's spool that came after (boot, sequence number), oldest first.

    At most the newest `NEWER_MAX` of them. Like `newest_packet`, the bench's view into the node.
    """
    try:
        with closing(read_only(database)) as connection:
            rows = connection.execute(
                "SELECT frame FROM spool_record WHERE stream = ? AND (boot, seq) > (?, ?)"
                " ORDER BY boot DESC, seq DESC LIMIT ?",
                (kind.stream.value, *after, NEWER_MAX),
            ).fetchall()
    except sqlite3.Error:
        return []  # not made yet, or busy: there is a next time
    found = []
    for (data,) in reversed(rows):
        with suppress(FrameError):
            frame = decode_frame(data)
            packet = frame.packet()
            if isinstance(packet, kind):
                found.append((frame, packet))
    return found


def ledger_fact(archive: Archive, node: str, database: Path) -> LedgerFact:
    """Recompute the ledger of a node that has ended.

    Every sequence number ever generated is looked up: archived, stored, dropped by policy, or lost.

    Parameters
    ----------
    archive
        The ground's archive.
    node
        Node name.
    database
        The node's `node.db`. A node that ended before it made its spool accounts for nothing; whatever the
        archive holds of it is then a problem.
    """
    spool = Spool(node, boot=0, capacity_bytes=1)
    entries: list[StreamLedger] = []
    stored: dict[Key, Ranges] = {}
    ranges: list[DroppedRange] = []
    with _spool_of(database) as connection:
        if connection is not None:
            entries = spool.ledger(connection)
            stored = {key: to_ranges(seqs) for key, seqs in spool.stored_sequences(connection).items()}
            ranges = spool.dropped_ranges(connection)
    dropped: dict[Key, Ranges] = {}
    for each in ranges:
        key = (each.boot, each.stream)
        dropped[key] = merge(dropped.get(key, []), [(each.first, each.last)])
    check = reconcile(
        entries,
        archive.sequences(node),
        stored=stored,
        dropped=dropped,
        duplicated=archive.conflicts(node),
        final=True,
    )
    counts = archive.counts(node)
    reasons: Counter[str] = Counter()
    for entry in entries:
        reasons.update(entry.dropped)
    return LedgerFact(
        generated=check.generated,
        acked=check.acked,
        stored=check.stored,
        dropped=check.dropped,
        lost=check.lost,
        duplicated=check.duplicated,
        consistent=check.consistent,
        problems=check.problems,
        streams=[
            StreamAccount(
                boot=entry.boot,
                stream=entry.stream,
                generated=entry.generated,
                acked=entry.acked,
                stored=entry.stored,
                dropped=sum(entry.dropped.values()),
                archived=counts.get((entry.boot, entry.stream), 0),
            )
            for entry in entries
        ],
        drop_reasons=dict(reasons),
    )


def assemble(image_id: str, jobs: Sequence[Job], results: Mapping[str, Sequence[Result]]) -> list[JobFact]:
    """Put the texts of all jobs together, and check their certificates.

    Parameters
    ----------
    image_id
        The image the ground expects.
    jobs
        What the ground asked for, in that order.
    results
        Blocks of each job in order of their first token, see `Archive.results`.

    Returns
    -------
    list of JobFact
        Every job asked for, in the order asked, then any the ground never asked for.
    """
    every = [block for blocks in results.values() for block in blocks]
    verdicts = {verdict.job: verdict for verdict in verify_results(every, image_ids=[image_id])}
    asked = {job.id: job for job in jobs}
    unasked = [Job(id=name, prompt="", max_tokens=0) for name in results if name not in asked]
    facts = []
    for job in [*jobs, *unasked]:
        blocks = results.get(job.id, [])
        verdict = verdicts.get(job.id, JobVerdict(job.id))
        facts.append(
            JobFact(
                job=job.id,
                prompt=job.prompt,
                max_tokens=job.max_tokens,
                tokens=[token for block in blocks for token in block.tokens],
                text=b"".join(block.text for block in blocks),
                proven=verdict.proven,
                finish=verdict.finish,
                sampling=job.sampling,
                findings=[f"token {found.first}: {found.text}" for found in verdict.findings],
            )
        )
    return facts
