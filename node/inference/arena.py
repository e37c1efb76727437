"""The KV arena: one named shared mapping that outlives the worker.

It holds the KV cache ONNX Runtime reads and writes in place, the digests and parity that watch it, and
the state of the job, so that a restarted worker proves the rows and goes on where the last committed
token was. It lives in a file on shared memory (`/dev/shm`), so the bench finds it from outside.

Layout (little-endian; every section starts on a 4 KiB page):

    page 0      shape record: msgpack of `ArenaShape`, framed
    page 1, 2   state record, two copies: the newer whole one counts (msgpack of `ArenaState`, framed)
    tokens      int32  [positions]               prompt, then generated tokens
    blocks      record [positions] of `BLOCK`    one per whole block of tokens: first, count, KV digest, chain
    digests     uint64 [positions, planes]       xxh3_64 of each KV row
    parity      uint32 [positions / 8, planes, head_dim]
    kv          float32 [planes, positions, head_dim]

plane = (layer * 2 + (0 for K, 1 for V)) * kv_heads + head. A framed record is CRC-32C (4 bytes), length
(4 bytes), body. The state is written only after tokens, blocks, digests and parity of an epoch are in
place, and to the older copy, so a process killed at any instant leaves the state before or after.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import time
from pathlib import Path
from typing import TypeVar

import crc32c
import msgspec
import numpy as np
import numpy.typing as npt

from fdir.rows import GROUP
from telemetry.certificate import CHAIN_BYTES
from telemetry.errors import PenumbraError

PAGE = 4096
ARENA_VERSION = 1
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the point is a name others can find
BLOCK = np.dtype([("first", "<u4"), ("count", "<u4"), ("kv", "u1", (8,)), ("chain", "u1", (CHAIN_BYTES,))])
_FRAME = struct.Struct("<II")
Record = TypeVar("Record")


class ArenaShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the arena was made for: another model or size needs a new one."""

    version: int
    image_id: str
    layers: int
    kv_heads: int
    positions: int
    head_dim: int

    @property
    def planes(self) -> int:
        """Number of (layer, K or V, head) planes."""
        return self.layers * 2 * self.kv_heads

    def offsets(self) -> dict[str, int]:
        """Return where each section begins in the file, bytes; `end` is the file's size."""
        groups = -(-self.positions // GROUP)
        sizes = {
            "tokens": 4 * self.positions,
            "blocks": BLOCK.itemsize * self.positions,
            "digests": 8 * self.positions * self.planes,
            "parity": 4 * groups * self.planes * self.head_dim,
            "kv": 4 * self.planes * self.positions * self.head_dim,
        }
        found, at = {}, 3 * PAGE
        for name, size in sizes.items():
            found[name] = at
            at += -(-size // PAGE) * PAGE
        return found | {"end": at}


class ArenaState(msgspec.Struct, frozen=True, kw_only=True):
    """The job as of the last committed epoch."""

    serial: int = 0
    """Counts commits; the higher of the two copies is the newer."""
    job: str = ""
    """Empty: no job."""
    prompt_tokens: int = 0
    generated: int = 0
    """Tokens committed after the prompt."""
    positions: int = 0
    """KV rows proven: prompt_tokens + generated - 1 once the first epoch is committed, else 0."""
    blocks: int = 0
    """Whole blocks; the tokens after the last of them are proven but have no certificate yet."""
    max_tokens: int = 0
    finish: str | None = None


def arena_path(node: str, state_dir: Path) -> Path:
    """Return where the arena of a node lives: its name is a function of node and state directory."""
    tag = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:8]
    return SHARED_MEMORY / f"penumbra-{node}-{tag}"


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


def newest_state(data: bytes | mmap.mmap) -> ArenaState | None:
    """Return the newer whole copy of the state in the head of an arena, None when neither is whole."""
    copies = [state for page in (1, 2) if (state := read_record(data, page, ArenaState)) is not None]
    return max(copies, key=lambda state: state.serial, default=None)


class KvArena:
    """Map the arena, alone.

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
    tokens, blocks, digests, parity, kv
        Views as in the module docstring; writing to them writes the arena.
    state
        The last committed state.

    Raises
    ------
    PenumbraError
        Another process holds the arena, or shared memory is full or not writable.
    """

    def __init__(self, path: Path, shape: ArenaShape, lock_timeout_s: float = 5.0) -> None:
        self.path = path
        self.shape = shape
        planes, positions, words = shape.planes, shape.positions, shape.head_dim
        groups = -(-positions // GROUP)
        offsets = shape.offsets()
        at = self.size_bytes = offsets["end"]
        self._file = self._open(path, at, lock_timeout_s)
        self._map = mmap.mmap(self._file, at)

        def view(name: str, dtype: npt.DTypeLike, dims: tuple[int, ...]) -> npt.NDArray[np.generic]:
            count = int(np.prod(dims))
            return np.frombuffer(self._map, dtype, count, offsets[name]).reshape(dims)

        self.tokens = view("tokens", "<i4", (positions,)).view(np.int32)
        self.blocks = view("blocks", BLOCK, (positions,))
        self.digests = view("digests", "<u8", (positions, planes)).view(np.uint64)
        self.parity = view("parity", "<u4", (groups, planes, words)).view(np.uint32)
        self.kv = view("kv", "<f4", (planes, positions, words)).view(np.float32)
        if read_record(self._map, 0, ArenaShape) != shape:
            self._write(1, msgspec.msgpack.encode(ArenaState()))
            self._write(2, msgspec.msgpack.encode(ArenaState()))
            self._write(0, msgspec.msgpack.encode(shape))
        self.state = newest_state(self._map) or ArenaState()

    def commit(self, state: ArenaState) -> None:
        """Make `state` the committed one. Everything it counts must be in the arena already."""
        state = msgspec.structs.replace(state, serial=self.state.serial + 1)
        self._write(1 + state.serial % 2, msgspec.msgpack.encode(state))
        self.state = state

    def clear(self) -> None:
        """Forget the job."""
        self.commit(ArenaState())

    def close(self) -> None:
        """Let go of the lock; the mapping goes with the last view of it."""
        fcntl.flock(self._file, fcntl.LOCK_UN)  # the mapping holds a copy of the descriptor, and so the lock
        os.close(self._file)

    def _write(self, page: int, body: bytes) -> None:
        at = page * PAGE
        self._map[at : at + _FRAME.size + len(body)] = _FRAME.pack(crc32c.crc32c(body), len(body)) + body

    @staticmethod
    def _open(path: Path, size: int, lock_timeout_s: float) -> int:
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
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(file)
                    raise PenumbraError(
                        f"KV arena {path} is held by another process",
                        "stop the other node, or give this one another [node] state_dir",
                    ) from None
                time.sleep(0.02)
        try:
            if os.fstat(file).st_size != size:
                os.ftruncate(file, 0)
                os.posix_fallocate(file, 0, size)
        except OSError as error:
            os.close(file)
            raise PenumbraError(
                f"KV arena {path}: {size} bytes of shared memory: {error.strerror}",
                "free shared memory, or lower [worker] positions",
            ) from error
        return file
