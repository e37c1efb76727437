"""Integrity of rows that are appended, read often, and never change: the KV cache.

Three references watch each row, so that any one of them may itself be struck:

- a digest per row (xxh3_64), taken the moment the row is written: names the bad row;
- a running digest per plane: proves all rows of a plane with one call over contiguous memory;
- a parity row per group of `GROUP` rows (XOR): gives a bad row back.

Parity is computed *before* the proof and stored *after* it. A strike that parity took in is still in
memory when the proof reads it (flips do not undo themselves), so wrong parity is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

GROUP = 8
"""Rows a parity row covers. 1 damaged row a group can be rebuilt; memory cost 1/8."""

Words = npt.NDArray[np.uint32]
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that differs from its digest, and whether it is whole again."""

    plane: int
    position: int
    repaired: bool
    method: str
    """`parity`: row rebuilt; `digest`: row and parity agreed, the digest was what was struck;
    `redo`: a row of the open epoch, which is written anew; `none`."""


class RowIntegrity:
    """Watch over rows of several planes that grow together.

    Parameters
    ----------
    rows
        The protected memory as uint32 words, shape (planes, positions, words), C-contiguous.
    digests
        Digest per row, shape (positions, planes), uint64.
    parity
        Parity rows, shape (ceil(positions / GROUP), planes, words), uint32.

    Notes
    -----
    Positions below `proven` are proven and have parity; positions from `proven` to `written` are of the
    open epoch. All arrays are caller's memory (they outlive the process); this object adds only the
    running digests, which are rebuilt from proven rows by `attach`.
    """

    def __init__(self, rows: Words, digests: Digests, parity: Words) -> None:
        planes, positions, words = (int(n) for n in rows.shape)
        groups = -(-positions // GROUP)
        if digests.shape != (positions, planes) or parity.shape != (groups, planes, words):
            raise ValueError(f"rows {rows.shape} do not fit digests {digests.shape}, parity {parity.shape}")
        self._rows = rows
        self._digests = digests
        self._parity = parity
        self._bytes = [memoryview(rows[plane]).cast("B") for plane in range(planes)]
        self._row_bytes = words * rows.itemsize
        self._planes = planes
        self.proven = 0
        self.written = 0
        self._committed = [xxhash.xxh3_64() for _ in range(planes)]
        self._running = [h.copy() for h in self._committed]

    @property
    def planes(self) -> int:
        """Number of planes."""
        return self._planes

    def reset(self) -> None:
        """Forget all rows: the planes are free for a new sequence."""
        self.proven = self.written = 0
        self._committed = [xxhash.xxh3_64() for _ in range(self._planes)]
        self._running = [h.copy() for h in self._committed]

    def attach(self, positions: int) -> list[BadRow]:
        """Take over `positions` rows that another process proved: check each, repair what can be.

        If every row is whole afterwards (all returned are `repaired`), they count as proven; else none does.
        """
        self.reset()
        bad = self.repair(positions)
        if all(row.repaired for row in bad):
            for plane, running in enumerate(self._running):
                running.update(self._bytes[plane][: positions * self._row_bytes])
            self.proven = self.written = positions
            self._committed = [h.copy() for h in self._running]
        return bad

    def record(self, start: int, stop: int) -> None:
        """Take the digests of rows `start` to `stop` (exclusive), just written, on every plane."""
        if start != self.written:
            raise ValueError(f"rows are appended in order: next is {self.written}, got {start}")
        digest, size = xxhash.xxh3_64_intdigest, self._row_bytes
        for plane, running in enumerate(self._running):
            part = self._bytes[plane][start * size : stop * size]
            running.update(part)
            self._digests[start:stop, plane] = [
                digest(part[at : at + size]) for at in range(0, len(part), size)
            ]
        self.written = stop

    def digest(self, start: int, stop: int) -> bytes:
        """Return xxh3_64 over the row digests of positions `start` to `stop`, 8 bytes big-endian."""
        return xxhash.xxh3_64_digest(self._digests[start:stop].tobytes())

    def prove(self) -> bool:
        """Return True when every written row still is what was written."""
        size = self.written * self._row_bytes
        return all(
            xxhash.xxh3_64_intdigest(plane[:size]) == running.intdigest()
            for plane, running in zip(self._bytes, self._running, strict=True)
        )

    def draft_parity(self) -> Words:
        """Return the parity of all groups the open epoch touches; call before `prove`."""
        first, last = self.proven // GROUP, -(-self.written // GROUP)
        return (
            np.stack([self._xor(group, self.written) for group in range(first, last)])
            if last > first
            else (self._parity[:0])
        )

    def commit(self, draft: Words) -> None:
        """Close the open epoch, which is proven: store its parity, move `proven` up to `written`."""
        first = self.proven // GROUP
        self._parity[first : first + len(draft)] = draft
        self.proven = self.written
        self._committed = [h.copy() for h in self._running]

    def rewind(self) -> list[BadRow]:
        """Drop the open epoch, then check and repair the proven rows one by one.

        Damaged rows of the dropped epoch are in the list too, with method `redo`.
        """
        dropped = [BadRow(*at, True, "redo") for at in self._damaged(self.proven, self.written)]
        self.written = self.proven
        bad = self.repair(self.proven) + dropped
        self._running = [h.copy() for h in self._committed]
        return bad

    def repair(self, positions: int) -> list[BadRow]:
        """Check rows 0 to `positions` of every plane against their digests; repair in place.

        Returns
        -------
        list of BadRow
            Every row found bad, in order of plane and position; `repaired` is False where two rows of a
            group are damaged, or row and parity are.
        """
        return [self._mend(plane, position, positions) for plane, position in self._damaged(0, positions)]

    def _damaged(self, start: int, stop: int, only: int | None = None) -> Iterator[tuple[int, int]]:
        digest, size = xxhash.xxh3_64_intdigest, self._row_bytes
        for plane in range(self._planes) if only is None else (only,):
            expected: list[int] = self._digests[start:stop, plane].tolist()
            rows = self._bytes[plane]
            for position, want in enumerate(expected, start):
                if digest(rows[position * size : (position + 1) * size]) != want:
                    yield plane, position

    def _mend(self, plane: int, position: int, positions: int) -> BadRow:
        group = position // GROUP
        start, stop = group * GROUP, min((group + 1) * GROUP, positions)
        rebuilt = self._parity[group, plane].copy()
        for other in range(start, stop):
            if other != position:
                rebuilt ^= self._rows[plane, other]
        got = xxhash.xxh3_64_intdigest(rebuilt)
        if got == int(self._digests[position, plane]):
            self._rows[plane, position] = rebuilt
            return BadRow(plane, position, True, "parity")
        # Only if all other rows are whole: two rows with the same bit struck agree with parity as well.
        others_whole = [at for at in self._damaged(start, stop, plane) if at[1] != position] == []
        if others_whole and np.array_equal(rebuilt, self._rows[plane, position]):
            self._digests[position, plane] = got
            return BadRow(plane, position, True, "digest")
        return BadRow(plane, position, False, "none")

    def _xor(self, group: int, positions: int) -> Words:
        start, stop = group * GROUP, min((group + 1) * GROUP, positions)
        parity: Words = np.bitwise_xor.reduce(self._rows[:, start:stop], axis=1)
        return parity
