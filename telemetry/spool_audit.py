"""Check every record of a spool against its own checksum, and its accounts against its records.

Run at each boot, and all that is needed after a salvage (`telemetry.salvage`), which does not judge rows. A
frame vouches for its identity: where the key columns of its row say something else, they were struck, and are
written anew. A frame that fails its CRC is dropped as corrupt. Sequence numbers that are nowhere any more are
counted as corrupt too, so that generated = acked + stored + dropped holds again.

Where it cannot be told which of them the ground had acknowledged, all are counted as dropped: the next
acknowledgement, which names everything archived so far, moves those back.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from telemetry.frame import FrameError, decode_frame
from telemetry.ledger import Ranges, merge, to_ranges
from telemetry.packets import PRIORITY, Stream
from telemetry.spool_policy import DropReason
from telemetry.voting import Unvoted, decode3, encode3

log = logging.getLogger("penumbra.spool")

_COUNTER_BYTES = 8
_REASONS = frozenset(DropReason)


class FaultKind(StrEnum):
    """What was found damaged."""

    RECORD = "record"
    """The frame of a record fails its CRC: dropped, and counted as corrupt."""
    KEY = "key"
    """The key of a record does not match its sound frame: mended."""
    SEQUENCE = "sequence"
    """A copy of a sequence counter was struck: outvoted and mended."""
    ACCOUNT = "account"
    """Records are gone, or a count was struck: what is nowhere any more is counted as corrupt."""


@dataclass(frozen=True)
class SpoolFault:
    """Damage found in the stored telemetry."""

    kind: FaultKind
    text: str
    """What was found, in words: names the record or the stream."""
    records: int = 0
    """Records lost by it."""


def pack_counter(value: int) -> bytes:
    """Return a sequence counter in three copies."""
    return encode3(value.to_bytes(_COUNTER_BYTES, "big"))


def vote_counter(plain: object, copies: object) -> tuple[int | None, bool]:
    """Return the voted counter and whether it must be written anew; None when it is beyond a vote.

    Parameters
    ----------
    plain
        The counter as it stands in its own column.
    copies
        What `pack_counter` made of it; None in a database of an earlier version.
    """
    sane = plain if isinstance(plain, int) and plain >= 0 else None
    if copies is None:
        return sane, True
    try:
        voted = decode3(copies if isinstance(copies, bytes) else b"")
    except Unvoted:
        return None, True
    value = int.from_bytes(voted.value, "big")
    return value, voted.repaired or value != plain


def audit(connection: sqlite3.Connection) -> list[SpoolFault]:
    """Check and mend the tables of the spool; return what was wrong."""
    faults = _check_records(connection)
    _recount_usage(connection)
    faults += _check_streams(connection)
    for fault in faults:
        log.warning("spool: %s", fault.text)
    return faults


def _check_records(connection: sqlite3.Connection) -> list[SpoolFault]:
    # NOT INDEXED and CAST: neither a struck index nor a struck type may hide a record.
    rows = connection.execute(
        "SELECT rowid, priority, boot, CAST(stream AS BLOB), seq, size, CAST(frame AS BLOB), "
        "typeof(stream) || typeof(frame) FROM spool_record NOT INDEXED"
    )
    unsound: list[tuple[int, str]] = []
    struck: list[tuple[int, tuple[Any, ...]]] = []
    for rowid, priority, boot, stream, seq, size, frame, types in rows:
        try:
            header = decode_frame(frame)
        except FrameError:
            unsound.append((rowid, f"{_text(stream)} {boot}/{seq}"))
            continue
        key = (PRIORITY[header.stream], header.boot, header.stream.value, header.seq, len(frame))
        if key != (priority, boot, _text(stream), seq, size) or types != "textblob":
            struck.append((rowid, (*key, frame)))
    rows.close()
    faults: list[SpoolFault] = []
    for rowid, name in unsound:
        connection.execute("DELETE FROM spool_record WHERE rowid = ?", (rowid,))
        # Counted by `_check_streams`: its key is not to be trusted more than its frame.
        faults.append(SpoolFault(FaultKind.RECORD, f"stored record {name} fails its CRC: dropped", 1))
    for rowid, _ in struck:
        connection.execute("DELETE FROM spool_record WHERE rowid = ?", (rowid,))
    for rowid, values in struck:
        connection.execute(
            "INSERT OR IGNORE INTO spool_record (rowid, priority, boot, stream, seq, size, frame) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (rowid, *values),
        )
        faults.append(
            SpoolFault(
                FaultKind.KEY, f"the key of stored record {values[2]} {values[1]}/{values[3]} was struck"
            )
        )
    return faults


def _recount_usage(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM spool_usage")
    connection.executemany("INSERT INTO spool_usage VALUES (?, 0, 0)", [(stream.value,) for stream in Stream])
    connection.execute(
        "INSERT OR REPLACE INTO spool_usage "
        "SELECT stream, COUNT(*), SUM(size) FROM spool_record GROUP BY stream"
    )


def _check_streams(connection: sqlite3.Connection) -> list[SpoolFault]:
    stored: dict[tuple[int, Stream], list[int]] = {}
    for boot, stream, seq in connection.execute("SELECT boot, stream, seq FROM spool_record"):
        stored.setdefault((boot, Stream(stream)), []).append(seq)
    dropped, spoiled = _read_drops(connection)
    counters = _read_counters(connection)
    faults: list[SpoolFault] = []
    for key in sorted(stored.keys() | dropped.keys() | counters.keys()):
        held = to_ranges(stored.get(key, ()))
        ranges = dropped.get(key, [])
        top = max([last + 1 for _, last in held] + [last + 1 for _, last, _ in ranges], default=0)
        voted, acked, anew, legacy = counters.get(key, (None, -1, True, False))
        generated = max(top, 0 if voted is None else voted)
        if anew or generated != voted:
            connection.execute(
                "INSERT INTO spool_stream (boot, stream, generated, acked, copies) VALUES (?, ?, ?, 0, ?) "
                "ON CONFLICT (boot, stream) DO UPDATE SET generated = excluded.generated, "
                "copies = excluded.copies",
                (key[0], key[1].value, generated, pack_counter(generated)),
            )
            if not legacy:
                text = f"the sequence counter of {key[1].value}, boot {key[0]}, was struck: {generated} it is"
                faults.append(SpoolFault(FaultKind.SEQUENCE, text))
        account = _Account(key, generated, acked, held, ranges, key in spoiled)
        faults += _balance(connection, account)
    return faults


@dataclass(frozen=True)
class _Account:
    """The numbers of one stream of one boot, as they stand."""

    key: tuple[int, Stream]
    generated: int
    acked: int
    held: Ranges
    dropped: list[tuple[int, int, str]]
    spoiled: bool
    """True when a dropped range of it made no sense."""


def _balance(connection: sqlite3.Connection, account: _Account) -> list[SpoolFault]:
    """Make generated = acked + stored + dropped hold for one stream, if it does not."""
    (boot, stream), acked = account.key, account.acked
    held, dropped = account.held, account.dropped
    gone = merge(held, [(first, last) for first, last, _ in dropped])
    overlap = _count(held) + sum(last - first + 1 for first, last, _ in dropped) - _count(gone)
    open_ranges = _cut((0, account.generated - 1), gone)
    missing = _count(open_ranges)
    if missing == acked and not overlap and not account.spoiled:
        return []
    if missing > acked or acked < 0:
        # Which of them were acknowledged cannot be told: the ground says so again.
        acked, lost = 0, missing - max(acked, 0)
    else:
        acked, open_ranges, lost = missing, [], 0
    connection.execute("DELETE FROM spool_drop WHERE boot = ? AND stream = ?", (boot, stream.value))
    kept: Ranges = held
    entries: list[tuple[int, int, str]] = []
    for first, last, reason in dropped:
        entries += [(a, b, reason) for a, b in _cut((first, last), kept)]
        kept = merge(kept, [(first, last)])
    entries += [(first, last, DropReason.CORRUPT.value) for first, last in open_ranges]
    connection.executemany(
        "INSERT INTO spool_drop VALUES (?, ?, ?, ?, ?)", [(boot, stream.value, *entry) for entry in entries]
    )
    connection.execute(
        "UPDATE spool_stream SET acked = ? WHERE boot = ? AND stream = ?", (acked, boot, stream.value)
    )
    text = f"the account of {stream.value}, boot {boot}, did not add up: {lost} records are lost"
    return [SpoolFault(FaultKind.ACCOUNT, text, lost)]


def _read_counters(
    connection: sqlite3.Connection,
) -> dict[tuple[int, Stream], tuple[int | None, int, bool, bool]]:
    """Return (voted, acked, must be written anew, of an earlier version) by stream; drop unknown streams."""
    counters: dict[tuple[int, Stream], tuple[int | None, int, bool, bool]] = {}
    for boot, name, generated, acked, copies in connection.execute(
        "SELECT boot, CAST(stream AS BLOB), generated, acked, copies FROM spool_stream"
    ).fetchall():
        stream = _stream(name)
        if stream is None or not isinstance(boot, int):
            connection.execute(
                "DELETE FROM spool_stream WHERE boot = ? AND CAST(stream AS BLOB) = ?", (boot, name)
            )
            continue
        voted, anew = vote_counter(generated, copies)
        counted = acked if isinstance(acked, int) else -1
        counters[boot, stream] = (voted, counted, anew, copies is None)
    return counters


def _read_drops(
    connection: sqlite3.Connection,
) -> tuple[dict[tuple[int, Stream], list[tuple[int, int, str]]], set[tuple[int, Stream]]]:
    """Return the dropped ranges that make sense, and the streams that have others."""
    dropped: dict[tuple[int, Stream], list[tuple[int, int, str]]] = {}
    spoiled: set[tuple[int, Stream]] = set()
    for boot, name, first, last, reason in connection.execute(
        "SELECT boot, CAST(stream AS BLOB), first, last, CAST(reason AS BLOB) FROM spool_drop"
    ).fetchall():
        stream = _stream(name)
        if stream is None or not all(isinstance(number, int) for number in (boot, first, last)):
            connection.execute(
                "DELETE FROM spool_drop WHERE boot = ? AND CAST(stream AS BLOB) = ? AND first = ?",
                (boot, name, first),
            )
            continue
        text = _text(reason)
        if not 0 <= first <= last or text not in _REASONS:
            spoiled.add((boot, stream))
            continue
        dropped.setdefault((boot, stream), []).append((first, last, text))
    return dropped, spoiled


def _text(data: object) -> str:
    return data.decode("utf-8", "replace") if isinstance(data, bytes) else str(data)


def _stream(name: object) -> Stream | None:
    with suppress(ValueError):
        return Stream(_text(name))
    return None


def _count(ranges: Ranges) -> int:
    return sum(last - first + 1 for first, last in ranges)


def _cut(whole: tuple[int, int], ranges: Ranges) -> Ranges:
    """Return what of `whole` is not in `ranges`, which are ascending and apart."""
    start, end = whole
    rest: Ranges = []
    for first, last in ranges:
        if first > end:
            break
        if first > start:
            rest.append((start, first - 1))
        start = max(start, last + 1)
    if start <= end:
        rest.append((start, end))
    return rest
