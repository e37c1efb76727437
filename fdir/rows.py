"""Integrity of rows that are appended, read often, and never change: the KV cache of one sequence.

A bank holds the rows of several planes that grow together, one row a plane at each position. Four references
watch it, so that any one of them may itself be struck:

- a digest per position (xxh3_64 over the rows of all planes), taken the moment the rows are written: names
  the bad position;
- a running digest per plane: proves all rows of a plane with one call over contiguous memory, at memory
  speed;
- a running digest of the digests;
- a parity row per plane and group of `GROUP` positions (XOR): tells the bad plane, and gives the row back.

No window is left between the references. Whatever an epoch adds to a reference (running digests, parity) is
computed from memory *before* the rows it covers are checked against their own digests. A strike that the
reference took in is still in memory when the check reads it (flips do not undo themselves), so it is found
and the reference is thrown away; a strike that comes later is not in the reference, so the next proof finds
it. What stays is the time between the model's write and `record`, in which a strike is taken for the truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import xxhash

GROUP = 8
"""Positions a parity row covers. One damaged row of a plane and group can be rebuilt; memory cost 1/8."""
PASSES = 3
"""How often a bank is checked again after a repair before the memory counts as broken for good."""
GATHER_BYTES = 128 * 1024
"""Rows gathered at a time for hashing: they stay in the second-level cache."""

Words = npt.NDArray[np.uint32]
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A position whose rows differ from their digest, and whether they are whole again."""

    position: int
    """Absolute."""
    repaired: bool
    method: str
    """`parity`: rebuilt; `digest`: rows and parity agreed, the digest was what was struck; `redo`: a position
    of the open epoch, which is written anew; `none`."""
    planes: tuple[int, ...] = ()
    """Planes (plane * heads + head of the bank) where rows and parity disagreed; empty when not known."""


@dataclass(slots=True)
class _References:
    """What lives in this process alone: rebuilt from checked rows after a restart."""

    planes: list[xxhash.xxh3_64]
    """Over the rows of each plane, from the first row of the bank."""
    ledger: xxhash.xxh3_64
    """Over the digests of all positions, from position 0."""

    @staticmethod
    def empty(planes: int) -> _References:
        return _References([xxhash.xxh3_64() for _ in range(planes)], xxhash.xxh3_64())

    def copy(self) -> _References:
        return _References([running.copy() for running in self.planes], self.ledger.copy())


@dataclass(frozen=True, slots=True)
class _Draft:
    """What `commit` will store, made by a proof that found everything whole."""

    written: int
    parity: list[tuple[int, Words]]
    references: _References


class RowBank:
    """Watch over the rows of one bank of one sequence.

    Parameters
    ----------
    rows
        The protected memory as uint32 words, shape (planes, heads, room, words); each [plane, head] is
        C-contiguous, the whole may be strided. Row `r` holds position `base + r`.
    digests
        Digest per absolute position, shape (positions,), uint64.
    parity
        Parity rows, shape (ceil(room / GROUP), planes * heads, words), uint32. The group of absolute
        positions `g * GROUP ...` has slot `g % len(parity)`, so that parity need not move when rows do.

    Attributes
    ----------
    base
        Absolute position of the first row, a multiple of `GROUP`.
    proven
        Absolute positions below are proven and have parity.
    written
        Positions from `proven` to `written` are of the open epoch.

    Notes
    -----
    All arrays are caller's memory, and outlive the process. A bank may have no planes: then only positions
    are counted.

    Digests of positions below `base` have no rows any more. A strike on one of them is found as long as this
    process lives, and cannot be repaired; after a restart it goes unseen, and what it can spoil is a
    certificate, never a token.
    """

    def __init__(self, rows: Words, digests: Digests, parity: Words) -> None:
        planes, heads, room, words = (int(n) for n in rows.shape)
        if parity.shape != (-(-room // GROUP), planes * heads, words) or digests.ndim != 1:
            raise ValueError(f"rows {rows.shape} do not fit digests {digests.shape}, parity {parity.shape}")
        self._rows = rows
        self._digests = digests
        self._parity = parity
        self._bytes = [memoryview(rows[p, h]).cast("B") for p in range(planes) for h in range(heads)]
        self._row_bytes = words * rows.itemsize
        self._room = room
        size = planes * heads * self._row_bytes
        self._lot = max(1, min(room, GATHER_BYTES // size)) if size else room
        self._gathered: Words = np.empty((self._lot, planes, heads, words), np.uint32)
        # Rows of one position for each lot entry, seen as bytes once and for all: slices are dear here.
        self._one = self._gathered[0]
        flat = _flat(self._gathered)
        self._positions = [flat[n * size : (n + 1) * size] for n in range(self._lot)]
        self.reset()

    @property
    def room(self) -> int:
        """Positions the bank holds at a time."""
        return self._room

    @property
    def free(self) -> int:
        """Positions that can still be written before the bank has to slide."""
        return min(self.base + self._room, len(self._digests)) - self.written

    @property
    def planes(self) -> int:
        """Number of planes times heads."""
        return len(self._bytes)

    def reset(self) -> None:
        """Forget all rows: the bank is free for a new sequence."""
        self.base = self.proven = self.written = 0
        self._references = _References.empty(len(self._bytes))
        self._below = xxhash.xxh3_64_intdigest(b"")
        self._draft: _Draft | None = None

    def attach(self, positions: int, base: int = 0) -> list[BadRow]:
        """Take over the rows of positions `base` to `positions` that another process proved.

        Each is checked, and repaired where it can be. If every row is whole then (all returned are
        `repaired`), they count as proven; else the bank is empty, and the rows have to be computed anew.

        Raises
        ------
        ValueError
            Base and positions do not fit the bank.
        """
        if base % GROUP or not base <= positions <= min(base + self._room, len(self._digests)):
            raise ValueError(f"positions {base} to {positions} do not fit a bank of {self._room}")
        self.reset()
        self.base, self.proven, self.written = base, positions, positions
        self._below = self._ledger_of(base)
        bad = self._settle()
        if not all(row.repaired for row in bad):
            self.reset()
        return bad

    def record(self, start: int, stop: int) -> None:
        """Take the digests of positions `start` to `stop` (exclusive). Call at once after they are written.

        Raises
        ------
        ValueError
            `start` is not the next position, or the bank has no room.
        """
        if start != self.written or stop - start > self.free:
            raise ValueError(
                f"got rows {start} to {stop}: they are appended in order, next is {self.written}, "
                f"and {self.free} are free"
            )
        if stop == start + 1:
            np.copyto(self._one, self._rows[:, :, start - self.base])
            self._digests[start] = xxhash.xxh3_64_intdigest(self._positions[0])
        else:
            self._digests[start:stop] = list(self._digests_of(start, stop))
        self.written = stop
        self._draft = None

    def digest(self, start: int, stop: int) -> bytes:
        """Return xxh3_64 over the digests of absolute positions `start` to `stop`, 8 bytes big-endian."""
        return xxhash.xxh3_64_digest(self._digests[start:stop].tobytes())

    def prove(self, executor: Executor | None = None) -> bool:
        """Return True when every row, old and of the open epoch, and every digest still is what was written.

        Parameters
        ----------
        executor
            Has at least one thread; it takes half of the planes. None: this thread does all.
        """
        self._draft = None
        parity = self._draft_parity()
        references = self._references.copy()
        old, written = self._size(self.proven), self._size(self.written)
        for running, rows in zip(references.planes, self._bytes, strict=True):
            running.update(rows[old:written])
        references.ledger.update(self._digests[self.proven : self.written].tobytes())
        planes = list(zip(self._bytes, self._references.planes, strict=True))
        other = executor.submit(_all_same, planes[1::2], old) if executor else None
        clean = _all_same(planes[::2] if other else planes, old)
        clean = (other is None or other.result()) and clean
        clean = clean and self._ledger_of(self.proven) == self._references.ledger.intdigest()
        if clean and not self._damaged(self.proven, self.written):
            self._draft = _Draft(self.written, parity, references)
        return self._draft is not None

    def commit(self) -> None:
        """Close the open epoch: store its parity, move `proven` up to `written`.

        Raises
        ------
        ValueError
            The epoch is not proven.
        """
        if self._draft is None or self._draft.written != self.written:
            raise ValueError(f"positions {self.proven} to {self.written} are not proven")
        for slot, rows in self._draft.parity:
            self._parity[slot] = rows
        self.proven = self.written
        self._references = self._draft.references
        self._draft = None

    def rewind(self) -> list[BadRow]:
        """Drop the open epoch, then check and repair the proven rows position by position.

        Returns
        -------
        list of BadRow
            Every position found bad; damaged ones of the dropped epoch are in it with method `redo`. If any
            is not `repaired`, the bank is unsound: no proof of it will be clean until it is `reset`.
        """
        dropped = [BadRow(at, True, "redo") for at in self._damaged(self.proven, self.written)]
        self.written, self._draft = self.proven, None
        return self._settle() + dropped

    def slide(self, base: int) -> list[BadRow]:
        """Drop the positions below `base`; move the rest down to the first row and check each of them.

        Parameters
        ----------
        base
            New first position, a multiple of `GROUP`, from the present base to `proven`.

        Returns
        -------
        list of BadRow
            As `rewind`.

        Raises
        ------
        ValueError
            An epoch is open, or `base` is out of range.
        """
        if self.written != self.proven:
            raise ValueError(f"positions {self.proven} to {self.written} are open: only whole epochs slide")
        if base % GROUP or not self.base <= base <= self.proven:
            raise ValueError(f"base {base} is no multiple of {GROUP} from {self.base} to {self.proven}")
        below = self._ledger_of(base)
        bad: list[BadRow] = []
        if self._ledger_of(self.proven) != self._references.ledger.intdigest():
            bad = self._settle()
            if not all(row.repaired for row in bad):
                return bad
            below = self._ledger_of(base)
        first, last = self._size(base), self._size(self.proven)
        for rows in self._bytes:
            rows[: last - first] = rows[first:last]
        self.base, self._below, self._draft = base, below, None
        return bad + self._settle()

    def adopt(self, source: RowBank, positions: int) -> bool:
        """Take a copy of the rows another bank has proven for the positions before `positions`.

        Rows are checked against their digests as they are here, so that nothing struck is taken over.

        Returns
        -------
        bool
            True: they are proven here. False: something was struck, and this bank is empty.

        Raises
        ------
        ValueError
            The source has not proven, or has dropped, some of them.
        """
        if not source.base <= positions <= source.proven:
            raise ValueError(f"positions to {positions}: {source.base} to {source.proven} are there")
        self.reset()
        self.base = self.proven = source.base
        self.written = positions
        size = self._size(positions)
        for own, rows in zip(self._bytes, source._bytes, strict=True):
            own[:size] = rows[:size]
        self._digests[:positions] = source._digests[:positions]
        self._references.ledger.update(self._digests[: self.base].tobytes())
        self._below = source._below
        if self._ledger_of(self.base) == self._below and self.prove():
            self.commit()
            return True
        self.reset()
        return False

    def trade(self, other: RowBank) -> None:
        """Exchange all rows, digests and parity with a bank of the same shape.

        The running digests go with the rows, so the next proof of either bank proves the copy as well.

        Raises
        ------
        ValueError
            An epoch is open in one of the two.
        """
        if self.written != self.proven or other.written != other.proven:
            raise ValueError("only banks without an open epoch may be exchanged")
        mine, theirs = self._size(self.proven), other._size(other.proven)
        for own, rows in zip(self._bytes, other._bytes, strict=True):
            exchange(own, rows, mine, theirs)
        groups = [min(-(-bank.proven // GROUP), len(self._parity)) for bank in (self, other)]
        if self._bytes:
            slot = self._parity[0].nbytes
            exchange(_flat(self._parity), _flat(other._parity), groups[0] * slot, groups[1] * slot)
        exchange(_flat(self._digests), _flat(other._digests), 8 * self.proven, 8 * other.proven)
        for name in ("base", "proven", "written", "_references", "_below", "_draft"):
            ours = getattr(self, name)
            setattr(self, name, getattr(other, name))
            setattr(other, name, ours)

    def _size(self, position: int) -> int:
        """Return how many bytes of a plane lie before an absolute position."""
        return (position - self.base) * self._row_bytes

    def _ledger_of(self, stop: int) -> int:
        return xxhash.xxh3_64_intdigest(self._digests[:stop].tobytes())

    def _digests_of(self, start: int, stop: int) -> Iterator[int]:
        """Digest each position as its rows are in memory now."""
        for first in range(start, stop, self._lot):
            count = min(self._lot, stop - first)
            row = first - self.base
            np.copyto(self._gathered[:count], self._rows[:, :, row : row + count].transpose(2, 0, 1, 3))
            yield from map(xxhash.xxh3_64_intdigest, self._positions[:count])

    def _damaged(self, start: int, stop: int) -> list[int]:
        """Return the positions whose rows do not hash to their digest."""
        expected: list[int] = self._digests[start:stop].tolist()
        found = self._digests_of(start, stop)
        return [at for at, (want, got) in enumerate(zip(expected, found, strict=True), start) if want != got]

    def _settle(self) -> list[BadRow]:
        """Check and repair every proven position; take the references anew once all are whole."""
        bad: list[BadRow] = []
        for _ in range(PASSES):
            references = _References.empty(len(self._bytes))
            size = self._size(self.proven)
            for running, rows in zip(references.planes, self._bytes, strict=True):
                running.update(rows[:size])
            references.ledger.update(self._digests[: self.proven].tobytes())
            found = self._repair()
            bad += found
            if not found:
                if self._ledger_of(self.base) != self._below:
                    return [*bad, BadRow(self.base - 1, False, "none")]
                self._references = references
                return bad
            if not all(row.repaired for row in found):
                return bad
        return [*bad, *(BadRow(row.position, False, "none", row.planes) for row in found)]

    def _repair(self) -> list[BadRow]:
        damaged = self._damaged(self.base, self.proven)
        return [
            row
            for group, positions in groupby(damaged, lambda at: at // GROUP)
            for row in self._mend(group, list(positions))
        ]

    def _mend(self, group: int, damaged: list[int]) -> list[BadRow]:
        """Repair the damaged positions of a group, those first that parity can tell alone."""
        mended: list[BadRow] = []
        left = damaged
        while left:
            syndrome = self._parity[self._slot(group)] ^ self._xor(group, self.proven)
            planes = tuple(int(n) for n in np.flatnonzero(syndrome.any(axis=1)))
            done = next((row for at in left if (row := self._mend_one(at, syndrome, planes))), None)
            if done is None and not planes and len(left) == 1:
                # Only if all other positions are whole: two rows with the same bit struck agree with parity.
                done = BadRow(left[0], True, "digest")
                self._digests[left[0]] = next(self._digests_of(left[0], left[0] + 1))
            if done is None:
                return mended + [BadRow(at, False, "none", planes) for at in left]
            mended.append(done)
            left = [at for at in left if at != done.position]
        return mended

    def _mend_one(self, position: int, syndrome: Words, planes: tuple[int, ...]) -> BadRow | None:
        """Undo the syndrome at a position: on all planes that show one, else on one of them alone.

        One alone, because another may come from another position of the group, or from struck parity.
        """
        row = self._rows[:, :, position - self.base]
        want = int(self._digests[position])
        for tried in (planes, *((plane,) for plane in planes if len(planes) > 1)):
            if not tried:
                return None
            np.copyto(self._one, row)
            rebuilt = self._one.reshape(syndrome.shape)
            rebuilt[list(tried)] ^= syndrome[list(tried)]
            if xxhash.xxh3_64_intdigest(self._positions[0]) == want:
                np.copyto(row, self._one)
                return BadRow(position, True, "parity", tried)
        return None

    def _slot(self, group: int) -> int:
        return group % len(self._parity)

    def _draft_parity(self) -> list[tuple[int, Words]]:
        """Return slot and parity of all groups the open epoch touches."""
        groups = range(self.proven // GROUP, -(-self.written // GROUP)) if self.written > self.proven else ()
        return [(self._slot(group), self._xor(group, self.written)) for group in groups]

    def _xor(self, group: int, positions: int) -> Words:
        """XOR the rows of a group up to `positions`, shape (planes * heads, words)."""
        start, stop = group * GROUP - self.base, min((group + 1) * GROUP, positions) - self.base
        parity: Words = np.bitwise_xor.reduce(self._rows[:, :, start:stop], axis=2)
        return parity.reshape(self._parity.shape[1:])


def exchange(one: memoryview, other: memoryview, size_one: int, size_other: int) -> None:
    """Exchange the first bytes of two stretches of memory: `size_one` of the one for `size_other`."""
    common = min(size_one, size_other)
    for at in range(0, common, GATHER_BYTES):
        end = min(at + GATHER_BYTES, common)
        kept = bytes(one[at:end])
        one[at:end] = other[at:end]
        other[at:end] = kept
    one[common:size_other] = other[common:size_other]
    other[common:size_one] = one[common:size_one]


def _all_same(planes: Iterable[tuple[memoryview, xxhash.xxh3_64]], size: int) -> bool:
    return all(xxhash.xxh3_64_intdigest(rows[:size]) == running.intdigest() for rows, running in planes)


def _flat(array: npt.NDArray[np.generic]) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")
