"""Layout of the KV arena: what lies where, and the records that say so (read from outside, too).

A *seat* is the place of one sequence. Its rows form two *banks*: `global` (layers that attend to all
positions) and `window` (the others, which keep their window and some room to grow; the bank slides when that
is used up). Layout (little-endian; every section starts on a 4 KiB page):

    page 0            shape record: msgpack of `ArenaShape`, framed
    page 1+2i, 2+2i   state record of seat i, two copies: the newer whole one counts (`SeatState`, framed)
    of each seat:
      tokens          int32  [positions]      prompt, then generated tokens
      logprobs        float32 [positions]     of the generated tokens, at the same places
      blocks          record [positions] of `BLOCK`   one per whole block of tokens
      digests.BANK    uint64 [positions]      xxh3_64 over the rows of all planes of the bank at a position
      parity.BANK     uint32 [room / 8, planes, head_dim]
    kv.BANK           float32 [layers of the bank * 2, seats, kv_heads, room, head_dim]

In `kv.BANK` K of a layer comes before its V, so each of them is one array over all seats that ONNX Runtime
can bind, whole or its first seats. A plane of a bank is (layer in the bank * 2 + (0 for K, 1 for V)) *
kv_heads + head.

A framed record is CRC-32C (4 bytes), length (4 bytes), body. A state is written only after everything it
counts is in place, and to the older copy, so a process killed at any instant leaves the state before or
after.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, TypeVar

import crc32c
import msgspec
import numpy as np

from fdir.rows import GROUP
from telemetry.certificate import CHAIN_BYTES
from telemetry.sampling import Sampling

Bank = Literal["global", "window"]
Phase = Literal["free", "active", "parked", "resident"]
Record = TypeVar("Record")

PAGE: Final = 4096
ARENA_VERSION: Final = 3
BANKS: Final[tuple[Bank, ...]] = ("global", "window")
KV_PAGE: Final = 64
"""Positions memory is reserved in."""
WINDOW_SLACK: Final = 512
"""Least rows of a window bank beyond the window: it slides at most once in so many positions but a step, and
an epoch may add as many."""
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - the point is a name others can find
BLOCK: Final = np.dtype(
    [("first", "<u4"), ("count", "<u4"), ("kv", "u1", (8,)), ("chain", "u1", (CHAIN_BYTES,))]
)
_FRAME = struct.Struct("<II")


class ArenaShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the arena was made for: another model or size needs a new one."""

    version: int
    image_id: str
    layers: int
    kv_heads: int
    head_dim: int
    """A multiple of 16, so that `KV_PAGE` rows fill whole memory pages."""
    positions: int
    """Longest prompt and text together."""
    window: int
    """Positions a window layer attends to, its own included."""
    window_step: int
    """Positions at whose multiples a window begins, a multiple of `GROUP`: as the manifest says."""
    global_every: int
    """Layers N-1, 2N-1, ... counted from 0 attend to all positions."""
    seats: int

    def __post_init__(self) -> None:
        if self.head_dim % 16:
            raise ValueError(f"rows of {self.head_dim} values; {KV_PAGE} rows must fill memory pages")
        if min(self.layers, self.kv_heads, self.head_dim, self.positions, self.global_every, self.seats) < 1:
            raise ValueError("every dimension of an arena is at least 1")
        if self.window_step < 1 or self.window_step % GROUP:
            raise ValueError(f"windows begin at multiples of {self.window_step}: no multiple of {GROUP}")

    @property
    def rooms(self) -> dict[Bank, int]:
        """Rows of each bank of a seat, multiples of `KV_PAGE`."""
        positions, window = (-(-n // KV_PAGE) * KV_PAGE for n in (self.positions, self.window))
        slack = max(WINDOW_SLACK, 2 * self.window_step)
        return {"global": positions, "window": min(positions, window + slack)}

    @property
    def state_pages(self) -> int:
        """Pages of the file's head: shape and states."""
        return 1 + 2 * self.seats

    def bank_of(self, layer: int) -> Bank:
        """Return the bank of a layer of the model."""
        return "global" if (layer + 1) % self.global_every == 0 else "window"

    def layers_of(self, bank: Bank) -> tuple[int, ...]:
        """Return the layers of a bank, in their order in it."""
        return tuple(layer for layer in range(self.layers) if self.bank_of(layer) == bank)

    def planes_of(self, bank: Bank) -> int:
        """Return the number of (layer, K or V, head) planes of a bank."""
        return len(self.layers_of(bank)) * 2 * self.kv_heads

    def offsets(self) -> dict[str, int]:
        """Return where each section begins in the file, bytes: `NAME.SEAT`, `kv.BANK`; `end` is its size."""
        return dict(_offsets(self))

    def row_offset(self, bank: Bank, plane: int, seat: int, row: int) -> int:
        """Return where a row lies in the file, bytes. `row` counts from the bank's base."""
        layer_kv, head = divmod(plane, self.kv_heads)
        index = ((layer_kv * self.seats + seat) * self.kv_heads + head) * self.rooms[bank] + row
        return _offsets(self)[f"kv.{bank}"] + index * self.head_dim * 4

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yield name and bytes of each section in order."""
        positions = self.rooms["global"]
        for seat in range(self.seats):
            yield f"tokens.{seat}", 4 * positions
            yield f"logprobs.{seat}", 4 * positions
            yield f"blocks.{seat}", BLOCK.itemsize * positions
            for bank, room in self.rooms.items():
                yield f"digests.{bank}.{seat}", 8 * positions
                yield f"parity.{bank}.{seat}", room // GROUP * self.planes_of(bank) * self.head_dim * 4
        for bank, room in self.rooms.items():
            yield f"kv.{bank}", self.planes_of(bank) * self.seats * room * self.head_dim * 4


@lru_cache
def _offsets(shape: ArenaShape) -> dict[str, int]:
    found, at = {}, shape.state_pages * PAGE
    for name, size in shape.sizes():
        found[name] = at
        at += -(-size // PAGE) * PAGE
    return found | {"end": at}


class SeatState(msgspec.Struct, frozen=True, kw_only=True):
    """The job of a seat as of its last committed epoch."""

    serial: int = 0
    """Counts commits of the seat; the higher of the two copies is the newer."""
    job: str = ""
    """Empty: the seat is free."""
    prompt_tokens: int = 0
    generated: int = 0
    """Tokens committed after the prompt."""
    positions: int = 0
    """KV rows proven: those of the prompt so far while it is read, prompt_tokens + generated - 1 later."""
    blocks: int = 0
    """Whole blocks; the tokens after the last of them are proven but have no certificate yet."""
    max_tokens: int = 0
    finish: str | None = None
    base: int = 0
    """First position of the window bank."""
    sampling: Sampling = Sampling()
    parked: bool = False
    """The job waits: its rows stay, and are proven when it goes on."""
    text_digest: int = 0
    """xxh3_64 of tokens, then log-probabilities, up to prompt_tokens + generated; 0 of a free seat. Set by
    `Seat.commit`, so that a token struck in the arena is never taken over by a new worker."""

    @property
    def phase(self) -> Phase:
        """What the seat is: `resident` has finished, and its rows may still serve as a prefix."""
        if not self.job:
            return "free"
        if self.finish is not None:
            return "resident"
        return "parked" if self.parked else "active"

    @property
    def prefill_rows(self) -> int:
        """Head positions that a prefill made: the rows another job with the same prompt would make."""
        return min(self.positions, self.prompt_tokens)


def arena_path(node: str, state_dir: Path) -> Path:
    """Return where the arena of a node lives: its name is a function of node and state directory."""
    tag = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:8]
    return SHARED_MEMORY / f"penumbra-{node}-{tag}"


def frame_record(record: msgspec.Struct) -> bytes:
    """Return a record as it is written to a page.

    Raises
    ------
    ValueError
        It does not fit a page.
    """
    body = msgspec.msgpack.encode(record)
    if len(body) > PAGE - _FRAME.size:
        raise ValueError(f"record of {len(body)} bytes; a page holds {PAGE - _FRAME.size}")
    return _FRAME.pack(crc32c.crc32c(body), len(body)) + body


def read_record(data: bytes | mmap.mmap, page: int, kind: type[Record]) -> Record | None:
    """Return the framed record that begins at `page` of an arena, None when it is not whole."""
    at = page * PAGE
    if len(data) < at + PAGE:
        return None
    crc, length = _FRAME.unpack_from(data, at)
    body = data[at + _FRAME.size : at + _FRAME.size + min(length, PAGE - _FRAME.size)]
    if crc32c.crc32c(body) != crc:
        return None
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.DecodeError:
        return None


def newest_state(data: bytes | mmap.mmap, seat: int) -> SeatState | None:
    """Return the newer whole copy of a seat's state in the head of an arena, None when neither is whole."""
    pages = (1 + 2 * seat, 2 + 2 * seat)
    copies = [state for page in pages if (state := read_record(data, page, SeatState)) is not None]
    return max(copies, key=lambda state: state.serial, default=None)
