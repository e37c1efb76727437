"""Messages between the node supervisor and its inference worker.

Unix stream socket; the supervisor listens, the worker connects. Each message is a 4-byte big-endian
length and a msgpack map tagged by `type`. The worker answers pings from the thread that decodes, between
two steps, so an answer proves that decoding itself is alive.

Several jobs run at once. A job is active from its `Start` to its last `Block`, its `Parked`, or its
`JobError`; the supervisor keeps at most `Pace.batch` of them active. Which jobs those are, and in what
order, is the supervisor's to decide; the worker takes them up in the order of their `Start`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from telemetry.packets import Certificate
from telemetry.sampling import Sampling

MAX_MESSAGE = 1 << 20
"""Largest message either side accepts, bytes."""
_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages."""


# Supervisor to worker.


class Start(Message, frozen=True, kw_only=True, tag="start"):
    """Run a job, or go on with it when the KV arena still holds it.

    A job that was active keeps its text to the byte, whether the arena still holds it or not: the choice of
    a token depends on the prompt, the sampling, and the index of the token only.
    """

    job: str
    prompt: str
    max_tokens: int
    known_tokens: int = 0
    """Tokens the supervisor has already stored: blocks before this index are not sent again."""
    sampling: Sampling = Sampling()
    """How tokens are chosen, when the text stops, and whether log-probabilities come with the blocks."""


class Park(Message, frozen=True, kw_only=True, tag="park"):
    """Stop decoding a job at the end of the current epoch; `Parked` answers. `Start` takes it up again."""

    job: str


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """End the job at the end of the current epoch; its last block, which may have no token, carries `finish`.

    A job that is not active is forgotten, without an answer.
    """

    job: str
    finish: str = "cancelled"
    """How it ended: `cancelled` or `deadline`."""


class Pace(Message, frozen=True, kw_only=True, tag="pace"):
    """Operating point, from the next run of the model on; None leaves a figure as it is."""

    duty: float
    """The share of time the worker may compute, 0.01 to 1."""
    threads: int | None = None
    """Processor cores used, 1 to the threads the worker was started with (more counts as that many)."""
    batch: int | None = None
    """Most jobs decoded together, 1 to the worker's seats. Fewer: the last ones wait in their seats, active,
    until there is room."""
    redundant: bool | None = None
    """Whether every epoch is computed twice and compared."""


class Repair(Message, frozen=True, kw_only=True, tag="repair"):
    """What the worker may mend by itself; all of it until told otherwise.

    The proof is never switched off: a token that it does not cover does not leave. Where mending is off, the
    worker does not report what it finds, but gives up with `Fatal`.
    """

    weights: bool
    kv: bool
    compute: bool


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Answer with the same key."""

    key: int


class Shutdown(Message, frozen=True, kw_only=True, tag="shutdown"):
    """Stop in order after the current step."""


# Worker to supervisor.


class Resumed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job found whole in the KV arena. It is not active before its `Start`."""

    job: str
    tokens: int
    """Tokens committed."""


class Ready(Message, frozen=True, kw_only=True, tag="ready"):
    """The session is loaded and its memory proven."""

    generation: int
    """Echo of the generation the supervisor started it with: two generations cannot be mixed."""
    pid: int
    image_id: str
    onnxruntime: str
    resumed: list[Resumed]
    """Jobs in the KV arena whose record is whole; one that could not be proven is missing."""
    load_s: float


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    """Answer to a ping."""

    key: int


class Block(Message, frozen=True, kw_only=True, tag="block"):
    """A committed block of tokens. Fields as in `telemetry.packets.Result`."""

    job: str
    first: int
    tokens: list[int]
    text: bytes
    certificate: Certificate
    prompt_tokens: list[int] | None
    finish: str | None
    logprobs: list[float] | None = None
    """Natural logarithm of each token's probability, where the job asked for it."""


class Parked(Message, frozen=True, kw_only=True, tag="parked"):
    """Answer to `Park`: the job is proven up to here, and not active. The arena keeps it while it can."""

    job: str


class JobError(Message, frozen=True, kw_only=True, tag="job_error"):
    """The job cannot be run: its prompt is too long, for example. Not a fault of the worker."""

    job: str
    reason: str


class Strike(Message, frozen=True, kw_only=True, tag="strike"):
    """Damage found, and what was done about it."""

    region: str
    """`weights`, `kv`, or `compute`: a result no memory accounts for."""
    page: int
    """Page number in weights.bin; position of a KV row; number of a matrix product, 0 for other checks."""
    role: str
    """Role of the tensor, or `digests` of pages; `global` or `window` rows; `matmul`, `hidden`, `logits` or
    `redundancy`."""
    detected_ns: int
    """CLOCK_REALTIME, ns."""
    recovered_ns: int | None
    """None when it could not be repaired in place. Rows to `recompute` are told a second time when they are
    whole again, with the same `detected_ns`."""
    method: str
    """`parity`, `golden`, `other_slot`, `digest`, `redo`, `recompute` or `none`."""
    evidence: dict[str, str | int | float | bool | None] = {}


class Status(Message, frozen=True, kw_only=True, tag="status"):
    """Counters since the worker started, at each epoch end and at least once a second."""

    tokens_committed: int
    tokens_discarded: int
    epochs_clean: int
    epochs_dirty: int
    scan_ms: float
    """Time of the last proof."""
    proof_ns: int = 0
    """When it began, CLOCK_REALTIME, ns; 0 before the first."""
    step_ms: float
    """Mean time of a decode step in the last epoch."""
    scrub_pass_s: float | None
    """Time the last full pass over pages outside the epoch's working set took."""
    active: int
    """Jobs active."""
    batch: int
    """Most jobs decoded together."""
    threads: int
    """Processor cores used."""
    prefill_tokens: int
    """Prompt tokens read since the worker started; those of a shared prefix are not read again."""
    tokens_s: float
    """Committed tokens of the last epoch by its time, pauses excluded, 1/s; 0 before the first."""


class Fatal(Message, frozen=True, kw_only=True, tag="fatal"):
    """The worker gives up: retries exhausted or memory beyond repair. It exits after this."""

    reason: str


FromSupervisor = Start | Park | Cancel | Pace | Repair | Ping | Shutdown
FromWorker = Ready | Pong | Block | Parked | JobError | Strike | Status | Fatal

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Return the message with its length in front."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


T = TypeVar("T")


class Reader(Generic[T]):
    """Cut a byte stream into messages of a union of types.

    Raises
    ------
    ValueError
        From `feed`: a length over `MAX_MESSAGE`, or a body that is no message of the union.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Add received bytes; yield every message now complete."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_MESSAGE:
                raise ValueError(f"message of {length} bytes, {MAX_MESSAGE} allowed")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                yield self._decoder.decode(body)
            except msgspec.DecodeError as error:
                raise ValueError(f"unreadable message: {error}") from error
