"""The fault-free run a flight is compared with, and what protection costs, measured in pairs.

Both run in a process of the bench on the image's own files: no injection, no proof, no arena. The text of
the reference is what the model says; the flight must have said the same to the byte.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from node.inference.arena import ARENA_VERSION, SHARED_MEMORY, ArenaShape, KvArena
from node.inference.decoder import Decoder, greedy
from node.inference.image import open_session
from node.inference.manifest import TOKENIZER, image_id, load_manifest
from node.inference.tokenizer import Tokenizer
from node.inference.verified import VerifiedDecoder
from node.inference.weights import ProtectedWeights

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


class _Plain:
    """A decoder with its KV cache in ordinary memory, and the session it runs."""

    def __init__(self, image_dir: Path, positions: int, threads: int) -> None:
        manifest = load_manifest(image_dir)
        self.shape, self.eos = manifest.shape, manifest.eos
        planes = self.shape.layers * 2 * self.shape.kv_heads
        kv = np.zeros((planes, positions, self.shape.head_dim), np.float32)
        self.tokenizer = Tokenizer(image_dir / TOKENIZER)
        self.session = open_session(image_dir, threads)
        self.decoder = Decoder(self.session, self.shape, kv)

    def decode(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        tokens = [greedy(self.decoder.prefill(prompt))]
        while len(tokens) < max_tokens and tokens[-1] != self.eos:
            tokens.append(greedy(self.decoder.step(tokens[-1], len(prompt) + len(tokens) - 1)))
        return tokens


def run_reference(
    image_dir: Path,
    jobs: Sequence[tuple[str, str, int]],
    *,
    positions: int = 1024,
    threads: int = 2,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, list[int]]:
    """Decode jobs with nothing struck and nothing checked.

    Parameters
    ----------
    image_dir
        The image slot the flight used.
    jobs
        (job id, prompt, number of tokens wanted) each.
    positions
        KV positions; at least the longest prompt and text together.
    threads
        Threads of the session. They do not change the text (measured.md).
    progress
        Called with the fraction done, 0 to 1.

    Returns
    -------
    dict
        Token ids by job, no longer than wanted (shorter only where the text ended).
    """
    plain = _Plain(image_dir, positions, threads)
    total = sum(count for _, _, count in jobs) or 1
    done, texts = 0, {}
    for job, prompt, count in jobs:
        texts[job] = plain.decode(plain.tokenizer.encode(prompt), count) if count else []
        done += count
        progress(done / total)
    return texts


def measure_overhead(
    image_dir: Path,
    *,
    epoch_tokens: int,
    epoch_s: float = 1.0,
    tokens: int = 48,
    pairs: int = 8,
    threads: int = 2,
) -> Overhead:
    """Time the same text decoded with and without verification, in interleaved pairs.

    Parameters
    ----------
    image_dir
        The image slot.
    epoch_tokens, epoch_s
        Longest epoch as flown, tokens and s.
    tokens, pairs
        Tokens of a run, and pairs of runs; the order within a pair alternates.
    """
    plain = _Plain(image_dir, 512, threads)
    prompt = plain.tokenizer.encode(OVERHEAD_PROMPT)
    manifest = load_manifest(image_dir)
    shape = plain.shape
    with tempfile.TemporaryDirectory(prefix=f"penumbra-bench-{os.getpid()}-", dir=SHARED_MEMORY) as folder:
        arena = KvArena(
            Path(folder) / "arena",
            ArenaShape(
                version=ARENA_VERSION,
                image_id=image_id(manifest),
                layers=shape.layers,
                kv_heads=shape.kv_heads,
                positions=512,
                head_dim=shape.head_dim,
            ),
        )
        verified = VerifiedDecoder(
            Decoder(plain.session, shape, arena.kv),
            arena,
            ProtectedWeights(image_dir, manifest, threads),
            image_id=image_id(manifest),
            block_tokens=epoch_tokens,
            epoch_s=epoch_s,
            retries=0,
            eos=-1,
            text=plain.tokenizer.token_bytes,
            report=lambda strike: None,
        )
        plain.eos = -1

        def protected(number: int) -> float:
            started = time.perf_counter()
            verified.begin(f"pair-{number}", prompt, tokens)
            while verified.finish is None:
                verified.run_epoch()
            return time.perf_counter() - started

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
        arena.close()
    return Overhead(statistics.median(costs), min(costs), max(costs), pairs, tokens)
