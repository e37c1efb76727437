"""Three copies of a value in one byte string, voted when it is read.

Each copy carries a CRC-32C of its own, which tells a sound copy from a damaged one; so one sound copy is
enough, and damage to all three is still mended when no bit was struck in two of them. A vote is refused
(`Unvoted`) rather than guessed. What voting cannot carry: the same bit struck in two copies and damage in the
third.

`fdir.voting` adds values held in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import crc32c

COPIES = 3
_HEAD = b"\x33"
"""First byte of a copy. Without it a blank copy of no bytes would have a right CRC of zero."""
_CRC = struct.Struct(">I")
_OVERHEAD_BYTES = len(_HEAD) + _CRC.size


class Unvoted(Exception):
    """The copies are damaged beyond a vote: the value is lost."""


@dataclass(frozen=True)
class Voted:
    """The outcome of a vote."""

    value: bytes
    repaired: bool
    """True when a copy was damaged: write the value anew."""


def encode3(value: bytes) -> bytes:
    """Return three copies of `value`, each with its CRC-32C, in ``3 * (len(value) + 5)`` bytes."""
    return seal(value) * COPIES


def decode3(blob: bytes) -> Voted:
    """Return the value that the three copies agree on, see `encode3`.

    Raises
    ------
    Unvoted
        No two sound copies agree, none stands alone, and the majority of every bit has no right CRC; or the
        length is not that of three copies.
    """
    size, rest = divmod(len(blob), COPIES)
    if rest or size < _OVERHEAD_BYTES:
        raise Unvoted(f"{len(blob)} bytes are not three copies with a checksum each")
    copies = [blob[i * size : (i + 1) * size] for i in range(COPIES)]
    sealed = vote(copies)
    return Voted(unseal(sealed), any(copy != sealed for copy in copies))


def seal(value: bytes) -> bytes:
    """Return one copy of `value` with its CRC-32C."""
    body = _HEAD + value
    return body + _CRC.pack(crc32c.crc32c(body))


def unseal(copy: bytes) -> bytes:
    """Return the value of a sound copy."""
    return copy[len(_HEAD) : -_CRC.size]


def _is_sound(copy: bytes) -> bool:
    if len(copy) < _OVERHEAD_BYTES:
        return False
    (expected,) = _CRC.unpack(copy[-_CRC.size :])
    return copy[:1] == _HEAD and crc32c.crc32c(copy[: -_CRC.size]) == expected


def vote(copies: Sequence[bytes]) -> bytes:
    """Return the sound copy that the vote over three of them settles on. Raises Unvoted."""
    sound = [copy for copy in copies if _is_sound(copy)]
    if len(set(sound)) == 1:
        return sound[0]
    # Sound copies that contradict each other (a copy is stale), or none is sound.
    if len({len(copy) for copy in copies}) > 1:
        raise Unvoted("the copies differ in length")
    a, b, c = (int.from_bytes(copy, "big") for copy in copies)
    majority = (a & b | b & c | a & c).to_bytes(len(copies[0]), "big")
    if _is_sound(majority):
        return majority
    if sound:
        raise Unvoted(f"{len(sound)} sound copies contradict each other")
    raise Unvoted("all three copies are damaged, some of them in the same place")
