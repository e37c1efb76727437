"""An upload from the ground's side: open it, send what is missing until nothing is, commit it.

What is sent may be lost anywhere on its way: the node says what it lacks, and that is sent again. So an
upload that was broken off, by a contact's end or a restart of either side, goes on when it is begun again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from hil.ground import GroundStation
from hil.uplink import Ticket
from node.uploads import MAX_TABLE_BYTES
from telemetry.commands import MAX_UPLOAD_BYTES, Arguments, Arm, UploadBegin, UploadCommit, UploadStatus
from telemetry.dictionary.codes import FailureCode
from telemetry.errors import PenumbraError
from telemetry.packets import UploadReport, Verification

CHUNK_BYTES: Final = 16 * 1024
"""Size of a chunk (assumed: an eighth of a second at 1 Mbit/s)."""
ROUND_S: Final = 1.0
"""Time in which what is sent at once is to arrive, s (assumed: below the keep-alive of the node's link, whose
answers wait behind it)."""
FIRST_ROUND: Final = 4
MAX_ROUND: Final = 128
"""Chunks sent before the node is asked what it lacks, at first and at most (assumed: half of what it lets
wait)."""
AT_ONCE: Final = 16
"""Chunks handed to the link at the same time."""
GO_ON: Final = (
    FailureCode.DAMAGED, FailureCode.INCOMPLETE, FailureCode.INTERRUPTED, FailureCode.NOT_ARMED,
)  # fmt: skip
"""Codes of a commit that is tried again: chunks were struck on board, or the node restarted meanwhile."""
MOST_BYTES: Final = {"image": MAX_UPLOAD_BYTES, "fdir_table": MAX_TABLE_BYTES}
"""Largest file the node takes, by kind."""
POLL_S: Final = 0.05
REPORT_S: Final = 10.0
"""Time after which a report that did not come is asked for again, s."""


class Rounds:
    """How many chunks to send before the node is asked: what arrives in about `ROUND_S` on this link.

    The chunks wait in the broker, and so does all else that is for the node: more of them at once, and its
    keep-alive would run out.
    """

    def __init__(self) -> None:
        self.chunks = FIRST_ROUND

    def took(self, chunks: int, time_s: float) -> None:
        """Take how long a round of so many chunks took, the answer included."""
        fitting = chunks * ROUND_S / max(time_s, 1e-3)
        bounded = min(max(fitting, self.chunks / 4), self.chunks * 2)
        self.chunks = max(1, min(MAX_ROUND, round(bounded)))


async def upload(
    station: GroundStation,
    source: Path,
    kind: Literal["image", "fdir_table"],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    say: Callable[[str, float], None] = lambda _text, _share: None,
) -> Verification:
    """Send a file up and have it taken over; return the completion of `upload_commit`.

    Parameters
    ----------
    station
        Runs; it need not be in contact.
    source
        The file.
    kind
        What it holds.
    chunk_bytes
        Size of a chunk, 256 to 65,536 bytes.
    say
        Told what is being done, and which share of the chunks the node has.

    Raises
    ------
    PenumbraError
        The file cannot be read, or the node refuses the upload.
    """
    size_bytes, sha256 = await asyncio.to_thread(_measure, source, MOST_BYTES[kind], kind)
    begin = UploadBegin(kind=kind, sha256=sha256, size_bytes=size_bytes, chunk_bytes=chunk_bytes)
    say("opening the upload", 0.0)
    _need(await _execute(station, begin))
    while True:
        await _send_missing(station, source, begin, say)
        say("committing", 1.0)
        _need(await _execute(station, Arm(command=UploadCommit.name, args={"sha256": sha256})))
        outcome = await _execute(station, UploadCommit(sha256=sha256))
        if outcome.code not in GO_ON:
            _need(outcome)
            return outcome
        say(f"not committed, goes on: {outcome.reason}", 0.0)


async def _send_missing(
    station: GroundStation, source: Path, begin: UploadBegin, say: Callable[[str, float], None]
) -> None:
    whole, rounds = bytes.fromhex(begin.sha256), Rounds()
    sent, begun_s = 0, 0.0
    while True:
        report = await _ask(station)
        if sent:
            rounds.took(sent, time.monotonic() - begun_s)
        if report.sha256 != begin.sha256:
            raise PenumbraError(
                f"the node has closed the upload of {source}", "see who else commands it, and begin again"
            )
        if not report.missing:
            return
        say("sending", report.received / report.chunks)
        wanted = list(_first(report.missing, rounds.chunks))
        sent, begun_s = len(wanted), time.monotonic()
        for at in range(0, len(wanted), AT_ONCE):
            some = wanted[at : at + AT_ONCE]
            pieces = _pieces(source, some, begin)
            sends = (station.send_chunk(whole, i, data) for i, data in zip(some, pieces, strict=True))
            if not all(await asyncio.gather(*sends)):
                break


async def _ask(station: GroundStation) -> UploadReport:
    """Ask what is missing, until the answer comes."""
    while True:
        before = station.upload_reports
        _need(await _execute(station, UploadStatus()))
        with suppress(TimeoutError):
            async with asyncio.timeout(REPORT_S):
                while station.upload_reports == before:  # noqa: ASYNC110 - the station tells by a count
                    await asyncio.sleep(POLL_S)
        if station.upload is not None and station.upload_reports > before:
            return station.upload


async def _execute(station: GroundStation, arguments: Arguments) -> Verification:
    """Have a command executed; return how it ended."""
    (ticket,) = station.uplink.queue([arguments])
    return await outcome_of(ticket)


async def outcome_of(ticket: Ticket, bound_s: float | None = None) -> Verification:
    """Wait until a command is over.

    Raises
    ------
    PenumbraError
        It was never sent, expired, or took longer than `bound_s`.
    """
    name, since_s = ticket.arguments.name, time.monotonic()
    while True:
        outcome = ticket.outcome
        if outcome is not None:
            return outcome
        if ticket.not_sent:
            raise PenumbraError(f"{name} is not sent: {ticket.not_sent}", "see docs/icd.md for its arguments")
        if ticket.expired:
            raise PenumbraError(f"{name} expired before the node answered", "send it again in contact")
        if bound_s is not None and time.monotonic() - since_s > bound_s:
            raise PenumbraError(f"{name}: no end of it within {bound_s:g} s")
        await asyncio.sleep(POLL_S)


def _need(outcome: Verification) -> None:
    if not outcome.ok:
        raise PenumbraError(f"the node refuses {outcome.name}: {outcome.code}: {outcome.reason}")


def _first(ranges: list[tuple[int, int]], count: int) -> Iterator[int]:
    for first, last in ranges:
        for index in range(first, last + 1):
            if count == 0:
                return
            count -= 1
            yield index


def _pieces(path: Path, indexes: list[int], begin: UploadBegin) -> list[bytes]:
    """Return chunks of the file. Raises `PenumbraError` when it is not what it was any more."""
    pieces = []
    with _readable(path), path.open("rb") as file:
        for index in indexes:
            at = index * begin.chunk_bytes
            file.seek(at)
            pieces.append(file.read(begin.chunk_bytes))
            if len(pieces[-1]) != min(begin.chunk_bytes, begin.size_bytes - at):
                raise PenumbraError(f"{path}: its size changed while it was sent", "send it again")
    return pieces


def _measure(path: Path, most_bytes: int, kind: str) -> tuple[int, str]:
    """Return size, bytes, and SHA-256 of a file that can be uploaded. Raises `PenumbraError` for another."""
    with _readable(path):
        # Before it is opened: a FIFO would be waited for.
        if not stat.S_ISREG(path.stat().st_mode):
            raise PenumbraError(f"{path}: not a regular file", f"give the path of a file of kind {kind}")
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if not 1 <= size_bytes <= most_bytes:
                found = f"{size_bytes} bytes; an upload of kind {kind} has at most {most_bytes}"
                raise PenumbraError(
                    f"{path}: {found if size_bytes else 'it is empty'}",
                    f"give the path of a file of kind {kind}",
                )
            digest = hashlib.file_digest(file, "sha256")
            return file.tell(), digest.hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PenumbraError(f"{path}: {error.strerror}", "give the path of a readable file") from None
