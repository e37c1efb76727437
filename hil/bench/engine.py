"""The contenders of the bench: the flown engine with and without its proofs, and llama.cpp.

Only this module knows how the engine is put together; the bench sees `hil.bench.inference.Contender`.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from hil.bench.inference import Contender, Name, Parts, Plan
from hil.bench.llama import LlamaContext, LlamaPeer
from hil.bench.stats import spread
from hil.shared_memory import scratch
from node.inference.arena import ARENA_VERSION, ArenaShape, KvArena
from node.inference.decoder import PREFILL_CHUNK, BatchDecoder
from node.inference.guard import ComputeGuard, output_gain
from node.inference.manifest import TOKENIZER, Manifest, image_id
from node.inference.model import Model, open_model
from node.inference.protocol import Strike
from node.inference.sequence import JobSpec, Rules
from node.inference.tokenizer import Tokenizer
from node.inference.verified import Policy, VerifiedBatch
from node.inference.weights import ProtectedWeights
from telemetry.errors import PenumbraError
from telemetry.figures import Window

POSITIONS: Final = 1024
"""Room of a sequence: enough for the long prompt, and for every run without a slide of the window."""
PROMPT_TOKENS: Final = 24
BLOCK_TOKENS: Final = 32
_ROUNDS_OF_DIGESTS: Final = 64
_SHORT: Final = 0.01
"""Part of an epoch's length while prompts are read: the run to be timed then begins after a step or two, as
for the other contenders."""
_UNENDED: Final = -1
"""No token has this id: a text of the bench does not end by itself."""

T = TypeVar("T")


class PlainEngine:
    """The model and its head over an arena: chosen greedily, nothing recorded, nothing proven.

    Parameters
    ----------
    model
        The model, not checked.
    seats
        Most sequences together.
    """

    def __init__(self, model: Model, seats: int) -> None:
        self._model = model
        self._stack = ExitStack()
        self._arena = self._stack.enter_context(_arena(model, seats))
        guard = ComputeGuard(output_gain(model), None)
        self._decoder = BatchDecoder(model, self._arena, guard)
        self._tokens: list[int] = []
        self._position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self, batch: int) -> None:
        """See `Contender`."""
        self._tokens = [self._read(seat, prompt(seat)) for seat in range(batch)]
        self._position = PROMPT_TOKENS
        self._step()

    def decode(self, steps: int) -> tuple[int, float]:
        """See `Contender`."""
        started = time.perf_counter()
        for _ in range(steps):
            self._step()
        return steps * len(self._tokens), time.perf_counter() - started

    def end(self) -> None:
        """See `Contender`."""
        self._tokens = []

    def prefill(self, prompt: Sequence[int]) -> float:
        """See `Contender`."""
        started = time.perf_counter()
        self._read(0, prompt)
        return time.perf_counter() - started

    def times_us(self, steps: int) -> dict[str, list[float]]:
        """Time trunk and head apart, one sequence, us: `chunk` of a prompt, `step`, and `head` after it."""
        self._arena.reserve(0, self._arena.shape.positions)
        found: dict[str, list[float]] = {"chunk": [], "step": [], "head": []}
        tokens = [100 + place % 100 for place in range(PREFILL_CHUNK)]
        hidden = self._timed(found["chunk"], lambda: self._decoder.prefill(0, tokens, 0)[None])
        for position in range(PREFILL_CHUNK, PREFILL_CHUNK + steps):
            token = int(self._timed(found["head"], partial(self._model.head.top, hidden, [1]))[0].ids[0])
            hidden = self._timed(found["step"], partial(self._decoder.step, [token], [position]))
        return found

    @staticmethod
    def _timed(times_us: list[float], run: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = run()
        times_us.append((time.perf_counter() - started) * 1e6)
        return result

    def _read(self, seat: int, prompt: Sequence[int]) -> int:
        self._arena.reserve(seat, self._arena.shape.positions)
        for start in range(0, len(prompt), PREFILL_CHUNK):
            hidden = self._decoder.prefill(seat, prompt[start : start + PREFILL_CHUNK], start)
        return int(self._model.head.top(hidden[None], [1])[0].ids[0])

    def _step(self) -> None:
        count = len(self._tokens)
        hidden = self._decoder.step(self._tokens, [self._position] * count)
        self._tokens = [int(found.ids[0]) for found in self._model.head.top(hidden, [1] * count)]
        self._position += 1


class VerifiedEngine:
    """Verified decoding as the worker does it, without the worker's process around it.

    Parameters
    ----------
    model
        The model; a checked one also has its compute checks judged.
    threads
        Threads that hash in a proof.
    seats
        Most sequences together.
    policy
        How epochs are cut; by default as the worker does.
    """

    def __init__(
        self,
        model: Model,
        threads: int,
        seats: int,
        policy: Policy = Policy(),  # noqa: B008 - frozen
    ) -> None:
        self._stack = ExitStack()
        arena = self._stack.enter_context(_arena(model, seats))
        self._arena = arena
        self._numbers = itertools.count()
        self._jobs: list[str] = []
        self._epochs: list[tuple[int, float]] = []
        """Steps and length, s, of the epochs of the last `decode`."""
        self._scans_ms: list[float] = []
        self._batch = VerifiedBatch(
            model,
            arena,
            ProtectedWeights(model.directory, model.manifest, threads, checked=model.checked),
            Rules(
                image_id=image_id(model.manifest),
                block_tokens=BLOCK_TOKENS,
                eos=_UNENDED,
                text=Tokenizer(model.directory / TOKENIZER).token_bytes,
            ),
            policy,
            report=_refuse_strike,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self, batch: int) -> None:
        """See `Contender`."""
        room = self._arena.shape.positions - PROMPT_TOKENS
        for number in range(batch):
            self._admit(prompt(number), room)
        self._batch.epoch_factor = _SHORT
        # All of them, not so many tokens together: the first ones step while the last are still being read.
        while any(self._committed(job) < 2 for job in self._jobs):
            self._run_epoch()
        self._batch.epoch_factor = 1.0

    def decode(self, steps: int) -> tuple[int, float]:
        """See `Contender`; whole epochs are run."""
        counters, count = self._batch.counters, len(self._jobs)
        self._epochs, self._scans_ms = [], []
        first = counters.tokens_committed
        started = time.perf_counter()
        while counters.tokens_committed - first < steps * count:
            before, begun = counters.tokens_committed, time.perf_counter()
            self._run_epoch()
            self._epochs.append((counters.tokens_committed - before, time.perf_counter() - begun))
            self._scans_ms.append(counters.scan_ms)
        return counters.tokens_committed - first, time.perf_counter() - started

    def end(self) -> None:
        """See `Contender`."""
        for job in self._jobs:
            self._batch.cancel(job)
        self._batch.run_epoch()
        for job in self._jobs:
            self._batch.drop(job)
        self._jobs = []

    def prefill(self, prompt: Sequence[int]) -> float:
        """See `Contender`: the first token is proven and sealed in a block."""
        started = time.perf_counter()
        self._admit(prompt, 1)
        while not self._batch.run_epoch().blocks:
            pass
        taken_s = time.perf_counter() - started
        self.end()
        return taken_s

    def epochs_ms(self) -> list[float]:
        """Return the lengths of the epochs of the last `decode`, proofs included, ms."""
        return [length_s * 1e3 for _, length_s in self._epochs]

    def scans_ms(self) -> list[float]:
        """Return the lengths of their proofs, ms."""
        return list(self._scans_ms)

    def parts(self) -> Parts:
        """See `Verified`; for one sequence."""
        scan_ms = statistics.median(self._scans_ms)
        digest_us = self._digest_us()
        steps_ms = [
            (length_s * 1e3 - scan) / tokens - digest_us / 1e3
            for (tokens, length_s), scan in zip(self._epochs, self._scans_ms, strict=True)
        ]
        return Parts(
            scan_ms=scan_ms,
            epoch_tokens=statistics.median([tokens for tokens, _ in self._epochs]),
            step_ms=statistics.median(steps_ms),
            digest_us=digest_us,
        )

    def _committed(self, job: str) -> int:
        sequence = self._batch.sequence(job)
        return 0 if sequence is None else len(sequence.generated)

    def _run_epoch(self) -> None:
        if not self._batch.active:
            raise RuntimeError(
                f"all texts have ended: the arena holds {self._arena.shape.positions} positions"
            )
        self._batch.run_epoch()

    def _digest_us(self) -> float:
        """Time the digests of one position in an idle seat, both banks, us."""
        seat = self._arena.seats[-1]
        self._arena.reserve(seat.index, _ROUNDS_OF_DIGESTS)
        started = time.perf_counter()
        for position in range(_ROUNDS_OF_DIGESTS):
            seat.global_rows.record(position, position + 1)
            seat.window_rows.record(position, position + 1)
        taken_s = time.perf_counter() - started
        seat.global_rows.reset()
        seat.window_rows.reset()
        return taken_s / _ROUNDS_OF_DIGESTS * 1e6

    def _admit(self, prompt: Sequence[int], max_tokens: int) -> None:
        job = f"bench-{next(self._numbers)}"
        self._batch.admit(JobSpec(job, prompt, max_tokens))
        self._jobs.append(job)


class LlamaEngine:
    """llama.cpp as a contender."""

    def __init__(self, peer: LlamaPeer) -> None:
        self._peer = peer
        self._context: LlamaContext | None = None
        self._tokens: list[int] = []
        self._position = 0

    def begin(self, batch: int) -> None:
        """See `Contender`."""
        context = self._context = self._peer.context(batch, POSITIONS)
        self._tokens = [context.prefill(prompt(sequence), sequence) for sequence in range(batch)]
        self._position = PROMPT_TOKENS
        self._step(context)

    def decode(self, steps: int) -> tuple[int, float]:
        """See `Contender`."""
        if self._context is None:
            raise RuntimeError("decode before begin")
        started = time.perf_counter()
        for _ in range(steps):
            self._step(self._context)
        return steps * len(self._tokens), time.perf_counter() - started

    def end(self) -> None:
        """See `Contender`."""
        if self._context is not None:
            self._context.close()
        self._context = None

    def prefill(self, prompt: Sequence[int]) -> float:
        """See `Contender`; making the context is not timed."""
        context = self._peer.context(1, POSITIONS)
        started = time.perf_counter()
        context.prefill(prompt)
        taken_s = time.perf_counter() - started
        context.close()
        return taken_s

    def _step(self, context: LlamaContext) -> None:
        self._tokens = context.step(self._tokens, [self._position] * len(self._tokens))
        self._position += 1


@dataclass(frozen=True)
class Stand:
    """All contenders, loaded."""

    contenders: dict[Name, Contender]
    plain: PlainEngine
    verified: VerifiedEngine
    manifest: Manifest
    image_id: str
    token_bytes: int
    """Bytes of weights one token of one sequence reads."""
    vocab: int

    def windows(self, steps: int = 48) -> list[Window]:
        """Measure the times of `docs/verified-decoding.md`, at one sequence."""
        times = self.plain.times_us(steps)
        self.verified.begin(1)
        self.verified.decode(2 * steps)
        digest_us = self.verified.parts().digest_us
        epochs_us = [length * 1e3 for length in self.verified.epochs_ms()]
        scans_us = [length * 1e3 for length in self.verified.scans_ms()]
        self.verified.end()
        found = {
            "KV row written to its digest, step": [time_us + digest_us for time_us in times["step"]],
            "KV row written to its digest, chunk of a prompt": [
                time_us + digest_us * PREFILL_CHUNK for time_us in times["chunk"]
            ],
            "activation in use, step": times["step"],
            "hidden state to choice": times["head"],
            "token chosen to its commit": epochs_us,
            "token committed to the seal of its block": [
                BLOCK_TOKENS * (step + head)
                for step, head in zip(times["step"], times["head"][1:], strict=False)
            ],
            "page scanned to commit": scans_us,
        }
        return [Window(name=name, time_us=spread(length)) for name, length in found.items()]

    def warm(self, steps: int) -> None:
        """Let each contender touch its memory once."""
        for contender in self.contenders.values():
            contender.begin(1)
            contender.decode(steps)
            contender.end()


@contextmanager
def open_contenders(image: Path, gguf: Path | None, threads: int, plan: Plan) -> Iterator[Stand]:
    """Load all contenders: two models (plain and checked), an arena each, and llama.cpp.

    Raises
    ------
    PenumbraError
        An image cannot be loaded, shared memory is short, or the peer is wanted and not installed.
    """
    with ExitStack() as stack:
        peer = LlamaPeer(gguf, threads) if gguf is not None else None
        model = open_model(image, threads)
        checked = open_model(stack.enter_context(_twin(image)), threads, checked=True)
        # One seat more than sequences, idle: digests are timed there.
        seats, policy = max(plan.steps) + 1, Policy(epoch_s=plan.epoch_s)
        verified = stack.enter_context(VerifiedEngine(model, threads, seats, policy))
        plain = stack.enter_context(PlainEngine(model, seats))
        contenders: dict[Name, Contender] = {
            "off": plain,
            "on": verified,
            "checked": stack.enter_context(VerifiedEngine(checked, threads, seats, policy)),
        }
        if peer is not None:
            stack.callback(peer.close)
            contenders["llama.cpp"] = LlamaEngine(peer)
        yield Stand(
            contenders, plain, verified, model.manifest, image_id(model.manifest),
            token_bytes(model.manifest), model.shape.vocab,
        )  # fmt: skip


def token_bytes(manifest: Manifest) -> int:
    """Return the bytes of weights one token of one sequence reads: all tensors read whole.

    Rows of tables (embedding, rotary angles, candidates of the head: some 150 kB) are left out.
    """
    return sum(tensor.length for tensor in manifest.mapped(False) if not tensor.rows)


def prompt(number: int) -> list[int]:
    """Return a short prompt, a different one for each number up to the first token."""
    return [100 + (number * 131 + place * 17) % 150 for place in range(PROMPT_TOKENS)]


@contextmanager
def _twin(image: Path) -> Iterator[Path]:
    """Give the same image under a second name: a process proves its mappings of a file by the file's name.

    The twin is made of hard links, so both models map the same memory.

    Raises
    ------
    PenumbraError
        The links cannot be made.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".bench-", dir=image.parent))
            for file in image.iterdir():
                os.link(file, Path(folder) / file.name)
        except OSError as error:
            raise PenumbraError(
                f"{image.parent}: no hard links can be made there: {error.strerror or error}",
                "put the images in a writable directory: penumbra model build --images",
            ) from None
        yield Path(folder)


@contextmanager
def _arena(model: Model, seats: int) -> Iterator[KvArena]:
    shape = model.shape
    with scratch("bench") as folder:
        arena = KvArena(
            folder / "arena",
            ArenaShape(
                version=ARENA_VERSION,
                image_id=image_id(model.manifest),
                layers=shape.layers,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                positions=min(POSITIONS, shape.context),
                window=shape.window,
                window_step=model.manifest.window_step,
                global_every=shape.global_every,
                seats=seats,
            ),
        )
        try:
            yield arena
        finally:
            arena.close()


def _refuse_strike(strike: Strike) -> None:
    raise PenumbraError(
        f"memory or computation was struck while measuring: {strike.region} {strike.role}", "measure again"
    )
