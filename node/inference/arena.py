"""The KV arena: one named shared mapping that outlives the worker.

It holds the KV caches ONNX Runtime reads and writes in place, the digests and parity that watch them, and
the state of each job, so that a restarted worker proves the rows and goes on where the last committed
token was. It lives in a file on shared memory (`/dev/shm`), so the bench finds it from outside.

A *seat* is the place of one sequence; its rows form two *banks*, one of the layers that attend to all
positions and one of those that attend to a window (`node.inference.arena_layout` has the layout).

The file is sparse. `KvArena.reserve` gets the memory of a seat in steps of `KV_PAGE` positions before it is
written, so that full shared memory is an error there, never a SIGBUS; `KvArena.release` makes it spare.

A state is written only after everything it counts is in place, and to the older copy, so a process killed at
any instant leaves the state before or after.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from fdir.rows import GROUP, BadRow, RowBank, exchange
from node.inference.arena_layout import (
    ARENA_VERSION,
    BANKS,
    BLOCK,
    KV_PAGE,
    PAGE,
    SHARED_MEMORY,
    ArenaShape,
    Bank,
    SeatState,
    arena_path,
    frame_record,
    newest_state,
    read_record,
)
from telemetry.errors import PenumbraError

__all__ = [
    "ARENA_VERSION",
    "BANKS",
    "BLOCK",
    "KV_PAGE",
    "PAGE",
    "SHARED_MEMORY",
    "ArenaFull",
    "ArenaShape",
    "Bank",
    "KvArena",
    "Seat",
    "SeatState",
    "arena_path",
    "newest_state",
    "read_record",
]

Floats = npt.NDArray[np.float32]


class ArenaFull(PenumbraError):
    """Shared memory has no room for what a seat needs."""


class _Text:
    """Running digests of the committed tokens of a seat and of their log-probabilities."""

    def __init__(self) -> None:
        self.count = 0
        self._tokens, self._logprobs = xxhash.xxh3_64(), xxhash.xxh3_64()

    def extended(self, seat: Seat, state: SeatState) -> int:
        """Add what `state` counts beyond the last time; return the digest of both."""
        count = state.prompt_tokens + state.generated
        self._tokens.update(seat.tokens[self.count : count].tobytes())
        self._logprobs.update(seat.logprobs[self.count : count].tobytes())
        self.count = count
        return int(xxhash.xxh3_64_intdigest(self._tokens.digest() + self._logprobs.digest()))


class Seat:
    """The place of one sequence; made by `KvArena`.

    Attributes
    ----------
    index
        Its number.
    tokens, logprobs
        int32 and float32, shape (positions,): prompt, then generated tokens, and the logarithms of their
        probabilities at the same places.
    blocks
        Records of `BLOCK`, shape (positions,).
    global_rows, window_rows
        The two banks.
    state
        The last committed state.
    reserved
        Positions the seat was promised memory for.
    held
        Positions it has memory for: some may be left from an earlier job, see `KvArena.release`.
    """

    def __init__(self, arena: KvArena, index: int) -> None:
        shape = arena.shape
        n, positions = index, shape.positions
        self.index = index
        self.tokens: npt.NDArray[np.int32] = arena.view(f"tokens.{n}", np.int32, positions)
        self.logprobs: Floats = arena.view(f"logprobs.{n}", np.float32, positions)
        self.blocks: npt.NDArray[Any] = arena.view(f"blocks.{n}", BLOCK, positions)
        self.banks: dict[Bank, RowBank] = {}
        for bank, room in shape.rooms.items():
            planes = shape.planes_of(bank)
            self.banks[bank] = RowBank(
                arena.kv[bank].view(np.uint32)[:, n],
                arena.view(f"digests.{bank}.{n}", np.uint64, positions),
                arena.view(f"parity.{bank}.{n}", np.uint32, room // GROUP, planes, shape.head_dim),
            )
        self.global_rows, self.window_rows = self.banks["global"], self.banks["window"]
        self.state = SeatState()
        self.reserved = self.held = 0
        self._arena = arena
        self._text = _Text()

    def commit(self, state: SeatState) -> None:
        """Make `state` the committed one. Everything it counts must be in the arena already.

        `serial` and `text_digest` are filled in: the digest covers new tokens as they are now, and earlier
        ones as they were when they were committed.

        Raises
        ------
        ValueError
            The record does not fit its page.
        """
        if state.job != self.state.job or state.prompt_tokens + state.generated < self._text.count:
            self._text = _Text()
        digest = self._text.extended(self, state) if state.job else 0
        state = msgspec.structs.replace(state, serial=self.state.serial + 1, text_digest=digest)
        self._arena.write_record(1 + 2 * self.index + state.serial % 2, state)
        self.state = state

    def clear(self) -> None:
        """Forget the job and its rows. The memory stays reserved: see `KvArena.release`."""
        self.commit(SeatState())
        for bank in self.banks.values():
            bank.reset()

    def attach(self) -> dict[Bank, list[BadRow]]:
        """Take over the rows another worker left in the seat: see `RowBank.attach`.

        Returns
        -------
        dict
            Bad rows by bank. If one of them is not `repaired`, its bank is empty: `reset` the other, too,
            and compute all rows anew.
        """
        bases: dict[Bank, int] = {"global": 0, "window": self.state.base}
        return {bank: rows.attach(self.state.positions, bases[bank]) for bank, rows in self.banks.items()}

    def slide(self) -> list[BadRow]:
        """Drop the window rows no later position attends to, and commit the new base.

        Call between epochs, when `window_rows.free` no longer holds the next one. A process killed while
        rows move leaves rows that do not fit their digests: they are found, and computed anew.

        Returns
        -------
        list of BadRow
            As `RowBank.slide`; the base is committed only when all are repaired.

        Raises
        ------
        ValueError
            An epoch is open.
        """
        rows = self.window_rows
        shape = self._arena.shape
        base = max(rows.base, (rows.proven - shape.window + 1) // shape.window_step * shape.window_step)
        bad = rows.slide(base)
        if all(row.repaired for row in bad):
            self.commit(msgspec.structs.replace(self.state, base=base))
        return bad

    def take_seat(self, state: SeatState, text: _Text) -> None:
        """Commit the state of a job whose tokens have just been moved here, with their digest from there."""
        self.state = msgspec.structs.replace(state, serial=self.state.serial)
        self._text = text
        self.commit(state)

    def take_over(self, state: SeatState) -> bool:
        """Adopt the state another worker committed; False, and nothing done, when its tokens are struck."""
        text = _Text()
        if state.job and text.extended(self, state) != state.text_digest:
            return False
        self.state, self._text = state, text
        return True

    def can_share(self, positions: int) -> bool:
        """Tell whether a job with the same first `positions` tokens can take their rows from here.

        They must be proven, made by prefill, and the window rows its next position attends to still here.
        """
        needed = max(0, positions - self._arena.shape.window + 1)
        return positions <= self.state.prefill_rows and self.window_rows.base <= needed


class KvArena:
    """Map the arena, alone.

    Seats whose job another worker left keep the memory of their committed rows; the rest is given back.

    Parameters
    ----------
    path
        File on shared memory; made when missing, remade when it was for another shape.
    shape
        What the running model needs.
    lock_timeout_s
        How long to wait for a dying worker to let go of the arena, s.

    Attributes
    ----------
    seats
        All seats.
    kv
        Rows by bank, shape (layers of the bank * 2, seats, kv_heads, room, head_dim); writing to them writes
        the arena.

    Raises
    ------
    PenumbraError
        Another process holds the arena, or shared memory is not writable.
    ArenaFull
        Shared memory is full.
    """

    def __init__(self, path: Path, shape: ArenaShape, lock_timeout_s: float = 5.0) -> None:
        self.path = path
        self.shape = shape
        self._offsets = shape.offsets()
        self.size_bytes = self._offsets["end"]
        self._file = _open(path, lock_timeout_s)
        try:
            head = os.pread(self._file, PAGE, 0)
            fresh = read_record(head, 0, ArenaShape) != shape
            if fresh:
                os.ftruncate(self._file, 0)
            os.ftruncate(self._file, self.size_bytes)
            self._allocate(0, shape.state_pages * PAGE, f"{shape.seats} seats")
            self._map = mmap.mmap(self._file, self.size_bytes)
        except BaseException:
            os.close(self._file)
            raise
        self.kv: dict[Bank, Floats] = {
            bank: self.view(
                f"kv.{bank}", np.float32, len(shape.layers_of(bank)) * 2, shape.seats, shape.kv_heads, room,
                shape.head_dim,
            )
            for bank, room in shape.rooms.items()
        }  # fmt: skip
        self.seats = [Seat(self, index) for index in range(shape.seats)]
        if fresh:
            for page in range(1, shape.state_pages):
                self.write_record(page, SeatState())
            self.write_record(0, shape)
        else:
            self._take_over()

    def view(self, name: str, dtype: npt.DTypeLike, *dims: int) -> npt.NDArray[Any]:
        """Return a section of the file as an array."""
        return np.ndarray(dims, dtype, self._map, self._offsets[name])

    def planes(self, layer: int) -> tuple[Floats, Floats]:
        """Return K and V of a layer, each C-contiguous, shape (seats, kv_heads, room, head_dim)."""
        bank = self.shape.bank_of(layer)
        at = self.shape.layers_of(bank).index(layer) * 2
        return self.kv[bank][at], self.kv[bank][at + 1]

    def reserve(self, seat: int, positions: int) -> None:
        """Get the memory a seat needs for so many positions; call before any of them is written.

        Raises
        ------
        ArenaFull
            Shared memory is full; the seat has what it had before.
        ValueError
            More positions than the arena holds.
        """
        held = self.seats[seat]
        room = self.shape.rooms["global"]
        if positions > room:
            raise ValueError(f"{positions} positions of {room}")
        positions = -(-positions // KV_PAGE) * KV_PAGE
        try:
            self._hold(held, positions)
        except ArenaFull:
            if not self.trim():
                raise
            self._hold(held, positions)
        held.reserved = max(held.reserved, positions)

    def release(self, seat: int) -> None:
        """Take the memory of a free seat as spare.

        The next job of the seat uses it again, which spares the kernel its work. It is given back when
        shared memory runs short, or by `trim`.

        Raises
        ------
        ValueError
            The seat is not free.
        """
        held = self.seats[seat]
        if held.state.phase != "free":
            raise ValueError(f"seat {seat} is not free: {held.state.job}")
        held.reserved = 0

    def trim(self) -> int:
        """Give back all spare memory; return how many positions it was for."""
        spare = sum(seat.held - seat.reserved for seat in self.seats)
        for seat in self.seats:
            self._shrink(seat, seat.reserved)
        return spare

    def swap(self, i: int, j: int) -> None:
        """Exchange two seats: rows, digests, parity, tokens, blocks, states and promises of memory.

        The running digests go with the rows, so the next proof of a seat proves what was copied. Moving a
        job to a free seat never loses it: both seats name it for a moment, and a new worker keeps one.
        While two jobs change places both seats count as free; a process killed then loses the two jobs, and
        the supervisor starts them again from their prompts, which gives the same text.

        Raises
        ------
        ValueError
            An epoch is open in one of the seats.
        ArenaFull
            There is no memory for the larger in the place of the smaller; nothing was moved.
        """
        one, other = self.seats[i], self.seats[j]
        if i == j:
            return
        for seat in (one, other):
            if any(rows.written != rows.proven for rows in seat.banks.values()):
                raise ValueError(f"seat {seat.index} has an open epoch")
        promised = one.reserved, other.reserved
        self.reserve(i, promised[1])
        self.reserve(j, promised[0])
        states, texts = (one.state, other.state), (one._text, other._text)
        if all(state.job for state in states):
            one.commit(SeatState())
            other.commit(SeatState())
        for bank in BANKS:
            one.banks[bank].trade(other.banks[bank])
        counts = [state.prompt_tokens + state.generated for state in states]
        _trade(one.tokens, other.tokens, *counts)
        _trade(one.logprobs, other.logprobs, *counts)
        _trade(one.blocks, other.blocks, states[0].blocks, states[1].blocks)
        # The seat that gets a job first: should this process die between the two, none is lost.
        moves = (one, states[1], texts[1]), (other, states[0], texts[0])
        for seat, state, text in sorted(moves, key=lambda move: not move[1].job):
            seat.take_seat(state, text)
        one.reserved, other.reserved = promised[1], promised[0]

    def copy_prefix(self, src: int, dst: int, positions: int) -> bool:
        """Copy the rows of the first positions of a seat to a free one, checked against their digests.

        Parameters
        ----------
        positions
            A multiple of `KV_PAGE` for which the source `can_share`.

        Returns
        -------
        bool
            True: the banks of `dst` have proven them; tokens and state are left to the caller. False: a row
            or digest was struck (the next proof of `src` will find it), and `dst` is empty.

        Raises
        ------
        ValueError
            Seats or positions do not allow it.
        ArenaFull
            There is no memory for the copy.
        """
        source, target = self.seats[src], self.seats[dst]
        if target.state.phase != "free" or positions % KV_PAGE or not source.can_share(positions):
            raise ValueError(f"{positions} positions of seat {src} cannot be shared with seat {dst}")
        self.reserve(dst, positions)
        whole = all(target.banks[bank].adopt(source.banks[bank], positions) for bank in BANKS)
        if not whole:
            for rows in target.banks.values():
                rows.reset()
        return whole

    def close(self) -> None:
        """Let go of the lock; the mapping goes with the last view of it."""
        fcntl.flock(self._file, fcntl.LOCK_UN)  # the mapping holds a copy of the descriptor, and so the lock
        os.close(self._file)

    def write_record(self, page: int, record: msgspec.Struct) -> None:
        """Write a framed record to a page of the head.

        Raises
        ------
        ValueError
            It does not fit.
        """
        data, at = frame_record(record), page * PAGE
        self._map[at : at + len(data)] = data

    def _take_over(self) -> None:
        """Read the states; keep the memory of committed rows, give back all other."""
        jobs: set[str] = set()
        for seat in self.seats:
            state = newest_state(self._map, seat.index) or SeatState()
            if not seat.take_over(state):
                seat.state = SeatState(serial=state.serial)
                seat.commit(SeatState())  # the supervisor starts the job again, which gives the same text
            if seat.state.job in jobs:  # left by a `swap` that was cut short after its copy was whole
                seat.commit(SeatState())
            if seat.state.job:
                jobs.add(seat.state.job)
                counted = max(seat.state.positions, seat.state.prompt_tokens + seat.state.generated)
                seat.reserved = -(-counted // KV_PAGE) * KV_PAGE
            seat.held = self.shape.rooms["global"]  # at most: what the process before had got is not known
        self.trim()

    def _hold(self, seat: Seat, positions: int) -> None:
        """Get the memory for `positions`, beyond what the seat holds."""
        if positions <= seat.held:
            return
        wanted = list(self._new_ranges(seat.index, seat.held, positions))
        try:
            for offset, length in wanted:
                self._allocate(offset, length, f"{positions} positions of seat {seat.index}", wanted)
        except ArenaFull:
            self._give_back(wanted)
            raise
        seat.held = positions

    def _shrink(self, seat: Seat, positions: int) -> None:
        if positions < seat.held:
            self._give_back(self._new_ranges(seat.index, positions, seat.held))
            seat.held = positions

    def _new_ranges(self, seat: int, held: int, wanted: int) -> Iterator[tuple[int, int]]:
        """Yield offset and length of what `wanted` positions of a seat need beyond `held`, in whole pages."""
        shape = self.shape
        for name, size in (("tokens", 4), ("logprobs", 4), ("blocks", BLOCK.itemsize)):
            yield from _grown(self._offsets[f"{name}.{seat}"], held * size, wanted * size)
        for bank, room in shape.rooms.items():
            yield from _grown(self._offsets[f"digests.{bank}.{seat}"], held * 8, wanted * 8)
            have, want = min(held, room), min(wanted, room)
            planes, row = shape.planes_of(bank), shape.head_dim * 4
            group = planes * row
            parity = self._offsets[f"parity.{bank}.{seat}"]
            yield from _grown(parity, have // GROUP * group, want // GROUP * group)
            for plane in range(planes):
                yield from _grown(shape.row_offset(bank, plane, seat, 0), have * row, want * row)

    def _allocate(self, offset: int, length: int, what: str, of: list[tuple[int, int]] | None = None) -> None:
        try:
            os.posix_fallocate(self._file, offset, length)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.ENOMEM}:
                raise
            needed = sum(size for _, size in of) if of else length
            raise ArenaFull(
                f"KV arena {self.path}: {needed} bytes of shared memory for {what}: {error.strerror}",
                "free shared memory, or lower [worker] seats or positions",
            ) from error

    def _give_back(self, ranges: Iterable[tuple[int, int]]) -> None:
        for offset, length in ranges:
            self._map.madvise(mmap.MADV_REMOVE, offset, length)


def _open(path: Path, lock_timeout_s: float) -> int:
    """Open and lock the file."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PenumbraError(
            f"KV arena {path}: {error.strerror}", "make shared memory writable for this user"
        ) from error
    deadline = time.monotonic() + lock_timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise PenumbraError(
                    f"KV arena {path} is held by another process",
                    "stop the other node, or give this one another [node] state_dir",
                ) from None
            time.sleep(0.02)


def _grown(offset: int, held: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Yield the whole pages between two sizes of a section that begins at `offset`."""
    start, stop = (-(-size // PAGE) * PAGE for size in (held, wanted))
    if stop > start:
        yield offset + start, stop - start


def _trade(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic], mine: int, theirs: int) -> None:
    a, b = (array.view(np.uint8).data for array in (one, other))
    exchange(a, b, mine * one.itemsize, theirs * one.itemsize)
