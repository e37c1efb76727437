"""Values that matter, held in three copies and voted when they are read.

For what is small, lives long, and must not be wrong: mode, counters, sequence numbers, keys.

- `encode3` and `decode3` keep the copies in one byte string, for a value on disk (see `telemetry.voting`).
- `Triplicate` keeps them in three buffers in memory, and writes the voted value back over a damaged one.

What voting cannot carry besides the same bit struck in two copies and damage in the third: a fault of the
objects around the buffers, which the process does not survive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from telemetry.voting import COPIES, Unvoted, Voted, decode3, encode3, seal, unseal, vote

__all__ = ["COPIES", "Triplicate", "Unvoted", "Voted", "decode3", "encode3"]

T = TypeVar("T")


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
        sealed = seal(encoded)
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
            sealed = vote(copies)
        except Unvoted as error:
            raise Unvoted(f"{self.name}: {error}") from None
        damaged = [i for i, copy in enumerate(copies) if copy != sealed]
        for index in damaged:
            self._copies[index][:] = sealed
        if damaged:
            self.repairs += len(damaged)
            if self._on_repair is not None:
                self._on_repair(self.name, len(damaged))
        value: T = self._decoder.decode(unseal(sealed))
        return value

    def buffers(self) -> tuple[bytearray, ...]:
        """Return the copies themselves, for a scrubber that reads them, or a test that strikes them."""
        return tuple(self._copies)
