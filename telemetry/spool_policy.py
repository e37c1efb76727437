"""Which record gives way to which when the spool is full. Pure; `telemetry.spool_room` carries it out.

When the store is full (`capacity_bytes`, or the disk itself):

- housekeeping and plans give way, oldest first, housekeeping before plans, and to every other stream;
- results and products are refused (`SpoolRefused`): their producer keeps them and waits. They may fill a
  share of the store only, so that a fault can still be reported, and for a product nothing gives way;
- event, verification, security, boot and ledger records give way only when no housekeeping or plan is left,
  and only to a record of the same or a higher priority: lowest priority first, oldest first;
- FDIR reports do not give way. When nothing of the above is left, a record of the FDIR makes room in its own
  stream, in this order: a status that a newer one replaces is dropped; reports of the same row and outcome
  are merged, where there are most; a new report is merged with the stored one of its row and outcome, with
  as much evidence as has room; the oldest flight record, or the last status, is dropped.

A merged report is a record of its own. It holds the count, and of the first and of the last finding the time
and the evidence (`FdirReport.covers`, `first`). The records it replaces are counted as `merged`.

What can still be dropped of the FDIR, counted as `full`: flight records and statuses as said, and a new
report, when the store holds nothing but results, products and one report of each row and outcome, and the new
one has no room even without evidence. Results and products leave a fifth of the store, and evidence is cut so
that a report has `REPORT_BYTES` at most. So no report is dropped for want of room where

    spool_max_bytes >= 5 * REPORT_BYTES * (rows and outcomes of which there are reports)

By default (64 MiB) that is so for 6,553 of them, more than the rows of a table times the 7 outcomes. The
smallest store allowed (64 KiB) is enough for 6. A damaged report is dropped as `corrupt`; a report of an
earlier version is neither merged nor dropped.
"""

from __future__ import annotations

from enum import StrEnum

from telemetry.packets import PRIORITY, Stream

REFUSED_ABOVE = {Stream.RESULT: 0.8, Stream.PRODUCT: 0.5}
"""Streams that are refused when the store is full, and the share of it they may fill it to (assumed)."""
GIVES_WAY = (Stream.HOUSEKEEPING, Stream.PLAN)
"""Streams that give way to all others, in this order."""
REPORT_BYTES = 2048
"""Most bytes of the frame of an FDIR report, merged or not, that has evidence (assumed: a few times those of
the rows of the table; two reports as one keep the evidence of both)."""
PROTECTED = tuple(
    sorted(
        (s for s in Stream if s not in (*GIVES_WAY, *REFUSED_ABOVE)),
        key=lambda stream: (-PRIORITY[stream], stream.value),
    )
)
"""Streams whose records are kept while anything else is left; between them, this order gives way first."""


class DropReason(StrEnum):
    """Why a record was dropped."""

    FULL = "full"
    """Gave way when the store was full."""
    CORRUPT = "corrupt"
    """Its CRC did not match when it was to be sent: storage was struck."""
    MERGED = "merged"
    """A report of the FDIR that a later record stands for."""
    TOO_LARGE = "too_large"
    """Larger than the share of the store its stream may fill."""


def victims(wanting: Stream) -> tuple[Stream, ...]:
    """Return the streams that give way to a record of a stream, in this order, each its oldest first.

    What the FDIR's own stream gives way to its records is not among them.
    """
    if wanting is Stream.PRODUCT:
        return ()
    if wanting is Stream.HOUSEKEEPING:
        return (Stream.HOUSEKEEPING,)
    if wanting in PROTECTED:
        lower = (s for s in PROTECTED if PRIORITY[s] >= PRIORITY[wanting] and s is not Stream.FDIR)
        return (*GIVES_WAY, *lower)
    return GIVES_WAY
