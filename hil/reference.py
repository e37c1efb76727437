"""The fault-free run a flight is compared with, and what protection costs, measured in pairs.

Both run in a process of the bench on the image's own files. The reference has no injection, no proof, no
batch and no windows: one job at a time, with the rows of all positions kept for every layer. Its text is what
the model says; the flight must have said the same to the byte.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from hil.shared_memory import scratch
from node.inference.arena import ArenaShape, KvArena
from node.inference.decoder import PREFILL_CHUNK, BatchDecoder, Hidden, arena_shape
from node.inference.guard import ComputeGuard, output_gain
from node.inference.manifest import TOKENIZER, image_id
from node.inference.model import Model, open_model
from node.inference.sampling import StopMatcher, choose, wanted
from node.inference.sequence import JobSpec, Rules
from node.inference.tokenizer import Tokenizer
from node.inference.verified import Policy, VerifiedBatch
from node.inference.weights import ProtectedWeights
from telemetry.sampling import GREEDY, Sampling

OVERHEAD_PROMPT = (
    "The first satellites were simple machines. They carried a radio, a battery and little else, and"
)


@dataclass(frozen=True, slots=True)
class Overhead:
    """Cost of verified decoding against the same decoder without it, percent of time, over the pairs."""

    median_pct: float
    min_pct: float
    max_pct: float
    pairs: int
    tokens: int
    """Tokens decoded in each run of a pair."""


class ReferenceJob(NamedTuple):
    """What is to be decoded for comparison."""

    job: str
    prompt: str
    tokens: int
    """How many are wanted."""
    sampling: Sampling = GREEDY


class PlainDecoder:
    """Decode one sequence at a time with nothing recorded and nothing proven.

    Parameters
    ----------
    model
        The model.
    arena
        Room for one sequence; its windows must hold all positions, see `full_arena`.
    """

    def __init__(self, model: Model, arena: KvArena) -> None:
        self._head = model.head
        self._decoder = BatchDecoder(model, arena, ComputeGuard(output_gain(model), model.check_limits))
        self._text = Tokenizer(model.directory / TOKENIZER).token_bytes
        arena.reserve(0, arena.shape.positions)

    def decode(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY, eos: int = -1
    ) -> list[int]:
        """Return the tokens after `prompt`: `max_tokens`, or up to `eos` or a stop string."""
        sampling = msgspec.structs.replace(sampling, logprobs=False)
        matcher = StopMatcher(sampling.stop) if sampling.stop else None
        tokens: list[int] = []
        seen = set(prompt)
        hidden = self._read(prompt)
        while True:
            (candidates,) = self._head.top(hidden, [wanted(sampling, seen)])
            token = choose(candidates, sampling, len(tokens), seen).token
            tokens.append(token)
            seen.add(token)
            stopped = matcher is not None and matcher.feed(self._text([token]))
            if stopped or token == eos or len(tokens) >= max_tokens:
                return tokens
            hidden = self._decoder.step([token], [len(prompt) + len(tokens) - 1])

    def _read(self, prompt: Sequence[int]) -> Hidden:
        for start in range(0, len(prompt), PREFILL_CHUNK):
            hidden = self._decoder.prefill(0, prompt[start : start + PREFILL_CHUNK], start)
        return hidden[None]


@contextmanager
def scratch_arena(shape: ArenaShape) -> Iterator[KvArena]:
    """Yield an arena of the bench's own, on shared memory, gone afterwards."""
    with scratch("bench") as folder:
        arena = KvArena(folder / "arena", shape)
        try:
            yield arena
        finally:
            arena.close()


@contextmanager
def full_arena(model: Model, positions: int) -> Iterator[KvArena]:
    """Yield an arena of one seat whose window layers keep all positions, as if there were no windows."""
    shape = arena_shape(model, positions, 1)
    with scratch_arena(msgspec.structs.replace(shape, window=shape.positions)) as arena:
        yield arena


def run_reference(
    image_dir: Path,
    jobs: Sequence[ReferenceJob | tuple[str, str, int]],
    *,
    positions: int = 4096,
    threads: int = 2,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, list[int]]:
    """Decode jobs with nothing struck and nothing checked.

    Parameters
    ----------
    image_dir
        The image slot the flight used.
    jobs
        What to decode; a plain (job id, prompt, number of tokens wanted) is decoded greedily.
    positions
        Longest prompt and text together.
    threads
        Threads of the session. They do not change the text (measured.md).
    progress
        Called with the fraction done, 0 to 1.

    Returns
    -------
    dict
        Token ids by job, no longer than wanted (shorter only where the text ended).
    """
    model = open_model(image_dir, threads)
    tokenizer = Tokenizer(image_dir / TOKENIZER)
    wanted_jobs = [ReferenceJob(*job) for job in jobs]
    total = sum(job.tokens for job in wanted_jobs) or 1
    done, texts = 0, {}
    with full_arena(model, positions) as arena:
        plain = PlainDecoder(model, arena)
        for job in wanted_jobs:
            prompt = tokenizer.encode(job.prompt)
            texts[job.job] = (
                plain.decode(prompt, job.tokens, job.sampling, model.manifest.eos) if job.tokens else []
            )
            done += job.tokens
            progress(done / total)
    return texts


def measure_overhead(
    image_dir: Path,
    *,
    epoch_tokens: int,
    epoch_s: float = 2.0,
    budget: float = 0.01,
    tokens: int = 48,
    pairs: int = 8,
    threads: int = 2,
) -> Overhead:
    """Time the same text decoded with and without verification, in interleaved pairs.

    Parameters
    ----------
    image_dir
        The image slot.
    epoch_tokens, epoch_s, budget
        Tokens of a block, longest epoch, s, and share of time for proofs, as flown.
    tokens, pairs
        Tokens of a run, and pairs of runs; the order within a pair alternates.
    """
    model = open_model(image_dir, threads)
    tokenizer = Tokenizer(image_dir / TOKENIZER)
    prompt = tokenizer.encode(OVERHEAD_PROMPT)
    positions = len(prompt) + tokens + PREFILL_CHUNK
    with (
        full_arena(model, positions) as bare_arena,
        scratch_arena(arena_shape(model, positions, 1)) as arena,
        ThreadPoolExecutor(1) as executor,
    ):
        plain = PlainDecoder(model, bare_arena)
        verified = VerifiedBatch(
            model,
            arena,
            ProtectedWeights(image_dir, model.manifest, threads),
            Rules(image_id(model.manifest), epoch_tokens, -1, tokenizer.token_bytes),
            Policy(epoch_s=epoch_s, budget=budget, retries=0),
            report=lambda strike: None,
            executor=executor if threads > 1 else None,
        )

        def protected(number: int) -> float:
            started = time.perf_counter()
            verified.admit(JobSpec(f"pair-{number}", prompt, tokens))
            while verified.active:
                verified.run_epoch()
            spent = time.perf_counter() - started
            verified.drop(f"pair-{number}")
            return spent

        def bare(number: int) -> float:
            started = time.perf_counter()
            plain.decode(prompt, tokens)
            return time.perf_counter() - started

        protected(-1)
        bare(-1)
        costs = []
        for number in range(pairs):
            order = (protected, bare) if number % 2 else (bare, protected)
            spent = {run: run(number) for run in order}
            costs.append((spent[protected] / spent[bare] - 1) * 100)
    return Overhead(statistics.median(costs), min(costs), max(costs), pairs, tokens)
