"""Any walk of joins, parks, cancels, operating points, strikes and kills leaves every text as it was."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_bench import Bench, mixed_jobs, proven
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from node.inference.arena import SHARED_MEMORY
from node.inference.protocol import Block
from node.inference.verified import Progress, VerifiedBatch

JOBS = mixed_jobs(9, seed=21)


class BatchWalk(RuleBasedStateMachine):
    """A supervisor that does what it likes, above an engine whose memory is struck."""

    bench: Bench
    expected: dict[str, list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, list[Block]] = {job.job: [] for job in JOBS}
        self.ended: dict[str, str] = {}
        self.cancelled: set[str] = set()

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bench.on_run = lambda run: None
        self.bench.strikes.clear()
        for seat in self.bench.arena.seats:
            if seat.state.job:
                seat.clear()
                self.bench.arena.release(seat.index)
        self.engine: VerifiedBatch = self.bench.engine()

    def take(self, progress: Progress) -> None:
        assert progress.refused == []
        for block in progress.blocks:
            self.keep(block)

    def keep(self, block: Block) -> None:
        got = self.received[block.job]
        known = sum(len(one.tokens) for one in got)
        if block.first < known:  # made again after its seat was taken
            assert block.tokens == next(one for one in got if one.first == block.first).tokens
            return
        assert block.first == known
        got.append(block)
        if block.finish is not None:
            assert block.job not in self.ended
            self.ended[block.job] = block.finish

    @rule(number=st.integers(0, len(JOBS) - 1))
    def start(self, number: int) -> None:
        job = JOBS[number]
        if job.job not in self.ended:
            known = sum(len(block.tokens) for block in self.received[job.job])
            for block in self.engine.admit(job, known):
                self.keep(block)

    @rule(number=st.integers(0, len(JOBS) - 1))
    def park(self, number: int) -> None:
        self.engine.park(JOBS[number].job)

    @rule(number=st.integers(0, len(JOBS) - 1))
    def cancel(self, number: int) -> None:
        job = JOBS[number].job
        if job in self.engine.active:
            self.cancelled.add(job)
            self.engine.cancel(job)

    @rule(batch=st.integers(1, 4), factor=st.sampled_from((1e-6, 1e-3)), redundant=st.booleans())
    def operate(self, batch: int, factor: float, redundant: bool) -> None:
        self.engine.batch, self.engine.epoch_factor, self.engine.redundant = batch, factor, redundant

    @rule()
    def strike_a_row(self) -> None:
        self.bench.flip_any_row(self.rng)

    @rule()
    def strike_a_weight(self) -> None:
        self.bench.flip_weight(self.rng)

    @rule(runs=st.integers(1, 4), weight=st.booleans())
    def strike_within_the_next_epoch(self, runs: int, weight: bool) -> None:
        moment = self.bench.runs + runs

        def strike(run: int) -> None:
            if run == moment and weight:
                self.bench.flip_weight(self.rng)
            elif run == moment:
                self.bench.flip_any_row(self.rng)

        self.bench.on_run = strike

    @rule(epochs=st.integers(1, 12))
    def decode(self, epochs: int) -> None:
        for _ in range(epochs):
            self.take(self.engine.run_epoch())

    @rule(runs=st.integers(1, 6))
    @precondition(lambda self: self.engine.active)
    def kill(self, runs: int) -> None:
        class Killed(Exception):
            pass

        moment = self.bench.runs + runs

        def kill(run: int) -> None:
            if run == moment:
                raise Killed

        self.bench.on_run = kill
        try:
            while self.engine.active:
                self.take(self.engine.run_epoch())
        except Killed:
            pass
        self.bench.on_run = lambda run: None
        self.engine = self.bench.successor()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.bench.on_run = lambda run: None
        self.engine.batch, self.engine.epoch_factor, self.engine.redundant = 4, 1.0, False
        for number in range(len(JOBS)):
            self.start(number)
        while self.engine.active:
            self.take(self.engine.run_epoch())
        for job in JOBS:
            blocks, expected = self.received[job.job], self.expected[job.job]
            tokens = [token for block in blocks for token in block.tokens]
            whole = self.ended[job.job] != "cancelled"
            assert whole or job.job in self.cancelled
            assert tokens == (expected if whole else expected[: len(tokens)])
            assert proven(self.bench.rules.image_id, blocks)[job.job] == len(tokens)


@pytest.fixture(scope="module")
def bench(tiny_image: Path) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="penumbra-walk-", dir=SHARED_MEMORY))
    BatchWalk.bench = Bench(tiny_image, folder, seats=5, retries=12)
    BatchWalk.expected = BatchWalk.bench.plain(JOBS)
    yield
    shutil.rmtree(folder)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("bench")
class TestBatchWalk(BatchWalk.TestCase):  # type: ignore[misc]
    settings = settings(max_examples=25, stateful_step_count=30, suppress_health_check=list(HealthCheck))


def test_the_jobs_of_the_walk_are_of_all_kinds() -> None:
    assert len({replace(job, job="").sampling for job in JOBS}) > 5
    assert any(len(job.prompt) > 64 for job in JOBS)
