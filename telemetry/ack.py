"""The ground's acknowledgement: what its archive has committed, so that the node may delete it.

    msgpack [version, key id, node, boot, stream, upto, [[first, last], ...]] | HMAC-SHA-256, 32 bytes

A forged acknowledgement would delete data, so it is authenticated. A replayed one is harmless: what was
archived stays archived. Nothing else removes an undamaged record from the node's disk but drop policy.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from telemetry.frame import Boot, Sequence
from telemetry.keys import Domain, Key, KeyRing
from telemetry.packets import Stream
from telemetry.signed import SignedError, open_signed, sign

ACK_VERSION = 1
MAX_GAPS = 1000
"""Most gaps one acknowledgement lists; an archive with more acknowledges less (assumed)."""


class AckError(ValueError):
    """Bytes that are no acknowledgement of the ground."""


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """Every record of (node, boot, stream) with seq < `upto` is archived, except those in `gaps`."""

    node: str
    boot: int
    stream: Stream
    upto: int
    """First sequence number not covered."""
    gaps: list[tuple[int, int]] = []
    """Ranges (first, last), both included, not archived: ascending, apart, all below `upto`."""

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the archived ranges (first, last), both included, ascending."""
        start = 0
        for first, last in self.gaps:
            if first > start:
                yield start, first - 1
            start = last + 1
        if start < self.upto:
            yield start, self.upto - 1


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    key_id: str
    node: str
    boot: Boot
    stream: Stream
    upto: Sequence
    gaps: list[tuple[Sequence, Sequence]]


_decoder = msgspec.msgpack.Decoder(_Wire)


def _check(upto: int, gaps: list[tuple[int, int]]) -> None:
    if len(gaps) > MAX_GAPS:
        raise AckError(f"{len(gaps)} gaps, at most {MAX_GAPS} allowed")
    after = 0
    for first, last in gaps:
        if not after <= first <= last < upto:
            raise AckError(f"gap {first} to {last} is out of order or not below {upto}")
        after = last + 2  # Two gaps that touch are one gap.


def encode_ack(ack: Ack, key: Key) -> bytes:
    """Return the acknowledgement signed with `key`.

    Raises
    ------
    AckError
        Gaps out of order, touching, not below `upto`, or more than `MAX_GAPS`.
    """
    _check(ack.upto, ack.gaps)
    wire = _Wire(ACK_VERSION, key.id, ack.node, ack.boot, ack.stream, ack.upto, ack.gaps)
    return sign(wire, key, Domain.ACK)


def decode_ack(data: bytes, ring: KeyRing) -> Ack:
    """Authenticate and decode an acknowledgement.

    Raises
    ------
    AckError
        No such shape, unknown or retired key, wrong MAC, or inconsistent ranges.
    """
    try:
        wire = open_signed(data, _decoder, ACK_VERSION, ring, Domain.ACK)
    except SignedError as error:
        raise AckError(f"no acknowledgement: {error}") from None
    _check(wire.upto, wire.gaps)
    return Ack(node=wire.node, boot=wire.boot, stream=wire.stream, upto=wire.upto, gaps=wire.gaps)
