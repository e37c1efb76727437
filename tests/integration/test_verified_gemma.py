"""Verified decoding of the real model: company and windows leave its texts alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_bench import Bench, finish, proven, texts

from hil.shared_memory import scratch
from node.inference.manifest import TOKENIZER
from node.inference.sequence import JobSpec
from node.inference.tokenizer import Tokenizer
from telemetry.sampling import Sampling

pytestmark = [pytest.mark.gemma, pytest.mark.timeout(300)]

STORY = (
    "The lighthouse keeper wrote down the weather every evening, and on the last page of the book there was "
    "a list of ships that had passed in the night without a light. "
)


@pytest.fixture
def bench(gemma_image: Path) -> Iterator[Bench]:
    with scratch("gemma") as folder:
        yield Bench(gemma_image, folder, positions=2048, seats=8, threads=2, copy=False, budget=0.01)


def _ids(bench: Bench, text: str) -> list[int]:
    return Tokenizer(bench.model.directory / TOKENIZER).encode(text)


def test_eight_jobs_say_together_what_each_says_alone(bench: Bench) -> None:
    words = _ids(bench, STORY)
    jobs = [
        JobSpec(
            f"job-{n}", words[: 5 + 4 * n], 16, Sampling(temperature=n % 3 * 0.5, seed=n, logprobs=n % 2 == 0)
        )
        for n in range(8)
    ]
    engine = bench.engine()
    for job in jobs:
        engine.admit(job)
    blocks = finish(engine)
    assert texts(blocks) == bench.plain(jobs)
    assert proven(bench.rules.image_id, blocks) == {job.job: 16 for job in jobs}
    assert bench.strikes == []


def test_a_context_over_the_window_is_that_of_the_full_cache(bench: Bench) -> None:
    job = JobSpec("long", (_ids(bench, STORY * 60))[:1400], 8, Sampling(temperature=1.0, seed=3))
    assert len(job.prompt) == 1400
    engine = bench.engine()
    engine.admit(job)
    assert texts(finish(engine)) == bench.plain([job])
    assert bench.arena.seats[0].window_rows.base > 0
