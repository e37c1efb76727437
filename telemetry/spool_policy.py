"""Which record gives way to which when the spool is full. Pure; `telemetry.spool` carries it out.

When the store is full (`capacity_bytes`, or the disk itself):

- housekeeping and plans give way, oldest first, housekeeping before plans, and to every other stream;
- results and products are refused (`SpoolRefused`): their producer keeps them and waits. They may fill a
  share of the store only, so that a fault can still be reported, and for a product nothing gives way;
- event, verification, security, boot and ledger records give way only when no housekeeping or plan is left,
  and only to a record of the same or a higher priority: lowest priority first, oldest first;
- FDIR records never give way: with nothing else left, the new one is dropped.
"""

from __future__ import annotations

from enum import StrEnum

from telemetry.packets import PRIORITY, Stream

REFUSED_ABOVE = {Stream.RESULT: 0.8, Stream.PRODUCT: 0.5}
"""Streams that are refused when the store is full, and the share of it they may fill it to (assumed)."""
GIVES_WAY = (Stream.HOUSEKEEPING, Stream.PLAN)
"""Streams that give way to all others, in this order."""
NEVER_DROPPED = Stream.FDIR
"""The stream whose records stay: it says what went wrong."""
PROTECTED = tuple(
    sorted(
        (s for s in Stream if s not in (*GIVES_WAY, *REFUSED_ABOVE)),
        key=lambda stream: (-PRIORITY[stream], stream.value),
    )
)
"""Streams whose records are dropped only when nothing else is left, in this order, and FDIR's not at all."""


class DropReason(StrEnum):
    """Why a record was dropped."""

    FULL = "full"
    """Gave way when the store was full."""
    CORRUPT = "corrupt"
    """Its CRC did not match when it was to be sent: storage was struck."""
    TOO_LARGE = "too_large"
    """Larger than the share of the store its stream may fill."""


def victims(wanting: Stream) -> tuple[Stream, ...]:
    """Return the streams that give way to a record of a stream, in this order, each its oldest first."""
    if wanting is Stream.PRODUCT:
        return ()
    if wanting is Stream.HOUSEKEEPING:
        return (Stream.HOUSEKEEPING,)
    if wanting in PROTECTED:
        lower = (s for s in PROTECTED if PRIORITY[s] >= PRIORITY[wanting] and s is not NEVER_DROPPED)
        return (*GIVES_WAY, *lower)
    return GIVES_WAY
