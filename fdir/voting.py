"""Three copies of a value that matters, voted when it is read.

For what is small, lives long, and must not be wrong: mode, counters, sequence numbers, keys. Each copy
carries a CRC-32C of its own, which tells a sound copy from a damaged one; so one sound copy is enough, and
damage to all three is still mended when no bit was struck in two of them.

- `encode3` and `decode3` keep the copies in one byte string, for a value on disk.
- `Triplicate` keeps them in three buffers in memory, and writes the voted value back over a damaged one.

A vote is refused (`Unvoted`) rather than guessed. What voting cannot carry: the same bit struck in two copies
and damage in the third, and a fault of the objects around the buffers, which the process does not survive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import crc32c
import msgspec

T = TypeVar("T")

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
    return _seal(value) * COPIES


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
    sealed = _vote(copies)
    return Voted(_unseal(sealed), any(copy != sealed for copy in copies))


def _seal(value: bytes) -> bytes:
    body = _HEAD + value
    return body + _CRC.pack(crc32c.crc32c(body))


def _unseal(copy: bytes) -> bytes:
    return copy[len(_HEAD) : -_CRC.size]


def _is_sound(copy: bytes) -> bool:
    if len(copy) < _OVERHEAD_BYTES:
        return False
    (expected,) = _CRC.unpack(copy[-_CRC.size :])
    return copy[:1] == _HEAD and crc32c.crc32c(copy[: -_CRC.size]) == expected


def _vote(copies: list[bytes]) -> bytes:
    """Return the sound copy the vote settles on."""
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


class Triplicate(Generic[T]):
    """A value held in memory as three separate encoded copies. For one thread or task at a time.

    Every read votes, writes a damaged copy anew and counts it: nothing is cached in between, since a cached
    value could be struck as well.

    Parameters
    ----------
    name
        What the value is, for `on_repair` and for error messages.
    value
        Anything msgspec encodes as msgpack and decodes as `kind`.
    kind
        Type of the value, as for `msgspec.msgpack.decode`.
    on_repair
        Called with (name, copies mended) after a read that had to mend.

    Attributes
    ----------
    repairs
        Copies mended so far.

    Examples
    --------
    >>> boot = Triplicate("boot", 7, int)
    >>> boot.get()
    7
    """

    def __init__(
        self, name: str, value: T, kind: Any, on_repair: Callable[[str, int], None] | None = None
    ) -> None:
        self.name = name
        self.repairs = 0
        self._on_repair = on_repair
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._copies: list[bytearray] = []
        self.set(value)

    def set(self, value: T) -> None:
        """Replace the value in all three copies.

        Raises
        ------
        msgspec.ValidationError
            The value is not of the kind this holds; the value before stays.
        """
        encoded = msgspec.msgpack.encode(value)
        self._decoder.decode(encoded)
        sealed = _seal(encoded)
        self._copies = [bytearray(sealed) for _ in range(COPIES)]

    def get(self) -> T:
        """Return the voted value.

        Raises
        ------
        Unvoted
            The copies are damaged beyond a vote.
        """
        copies = [bytes(copy) for copy in self._copies]
        try:
            sealed = _vote(copies)
        except Unvoted as error:
            raise Unvoted(f"{self.name}: {error}") from None
        damaged = [i for i, copy in enumerate(copies) if copy != sealed]
        for index in damaged:
            self._copies[index][:] = sealed
        if damaged:
            self.repairs += len(damaged)
            if self._on_repair is not None:
                self._on_repair(self.name, len(damaged))
        value: T = self._decoder.decode(_unseal(sealed))
        return value

    def buffers(self) -> tuple[bytearray, ...]:
        """Return the copies themselves, for a scrubber that reads them, or a test that strikes them."""
        return tuple(self._copies)
