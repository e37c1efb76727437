"""A table in use (configuration, FDIR table), watched: its values, and two copies of them as bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import xxhash

from fdir.regions import Damage, Kind


class Superseded(Exception):
    """Raised by `restore`: the values in use were changed on purpose, and what is held is out of date."""


class GuardedTable:
    """A table as a region of one piece.

    The values in use are objects all over the heap, so they are encoded and the bytes compared. Sound bytes
    are held in two copies with a digest each; a bad copy is mended from the other, or from the values in use.

    Parameters
    ----------
    name
        Name of the region.
    encode
        Returns the bytes of the values in use; the same values give the same bytes.
    restore
        Puts values in use again from sound bytes, before it returns; or raises `Superseded`. None: damage to
        the values in use is beyond repair.
    """

    def __init__(
        self, name: str, encode: Callable[[], bytes], restore: Callable[[bytes], None] | None = None
    ) -> None:
        self._name = name
        self._encode = encode
        self._restore = restore
        self._copies: list[bytearray] = []
        self._digests: list[int] = []
        self._lock = threading.Lock()
        """Held while copies and digests are used: a baseline may be taken while another thread checks."""
        self.recompute()

    @property
    def name(self) -> str:
        """Name of the region."""
        return self._name

    @property
    def kind(self) -> Kind:
        """`TABLE`."""
        return Kind.TABLE

    @property
    def size(self) -> int:
        """Bytes of the table as encoded."""
        return len(self._copies[0])

    def refresh(self) -> int:
        """Return the number of pieces: one."""
        return 1

    def check(self, piece: int) -> list[Damage]:
        """Compare copies and values in use, and mend what differs."""
        del piece
        with self._lock:
            return self._check()

    def _check(self) -> list[Damage]:
        sound = [
            xxhash.xxh3_64_intdigest(copy) == digest
            for copy, digest in zip(self._copies, self._digests, strict=True)
        ]
        damages: list[Damage] = []
        if any(sound) and not all(sound):
            good, bad = (0, 1) if sound[0] else (1, 0)
            self._copies[bad] = bytearray(self._copies[good])
            self._digests[bad] = xxhash.xxh3_64_intdigest(self._copies[bad])
            whole = self._copies[0] == self._copies[1] and self._digests[0] == self._digests[1]
            damages.append(self._damage(whole, "copy", f"copy {bad} of the bytes"))
        return damages + self._check_use(any(sound))

    def recompute(self) -> None:
        """Take the values in use for the baseline."""
        with self._lock:
            self._take_baseline()

    def _take_baseline(self) -> None:
        content = self._encode()
        self._copies = [bytearray(content), bytearray(content)]
        self._digests = [xxhash.xxh3_64_intdigest(copy) for copy in self._copies]

    def close(self) -> None:
        """Do nothing: nothing is held open."""

    def _check_use(self, copies_sound: bool) -> list[Damage]:
        used, error = self._encoded()
        if not copies_sound:
            if not error and xxhash.xxh3_64_intdigest(used) in self._digests:
                self._take_baseline()
                return [self._damage(True, "copy", "both copies of the bytes")]
            return [self._damage(False, "none", "both copies of the bytes, and the values in use")]
        if used == self._copies[0]:
            return []
        part = error or f"values in use, from encoded byte {_first_difference(used, self._copies[0])} on"
        return self._mend_use(part)

    def _mend_use(self, part: str) -> list[Damage]:
        """Put the values in use again from the sound copies."""
        if self._restore is None:
            return [self._damage(False, "none", part)]
        try:
            self._restore(bytes(self._copies[0]))
        except Superseded:
            self._take_baseline()
            return []
        except Exception as failed:
            # Whatever the values in use make it raise: they are damaged, and it is told.
            return [self._damage(False, "none", f"{part}; restoring failed: {failed}")]
        return [self._damage(self._encoded()[0] == self._copies[0], "copy", part)]

    def _encoded(self) -> tuple[bytes, str]:
        """Return the bytes of the values in use, or why they cannot be encoded."""
        try:
            return self._encode(), ""
        except Exception as error:
            return b"", f"values in use, which cannot be encoded: {error}"

    def _damage(self, repaired: bool, method: str, part: str) -> Damage:
        evidence: dict[str, str | int | float | bool | None] = {"process": "supervisor", "part": part}
        return Damage(self._name, Kind.TABLE, repaired, method if repaired else "none", evidence)


def _first_difference(one: bytes, other: bytes | bytearray) -> int:
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))
