"""Contexts longer than the window's room: banks slide, and results are those of the full cache to the bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_bench import BLOCK, Bench, finish, proven, texts
from tiny_gemma import Size, write_tiny_gguf

from hil.reference import full_arena
from node.inference.builder import build_image
from node.inference.decoder import PREFILL_CHUNK, BatchDecoder
from node.inference.guard import ComputeGuard, output_gain
from node.inference.sequence import JobSpec
from telemetry.sampling import Sampling

POSITIONS = 1536
WARM = Sampling(temperature=1.0, seed=11)


@pytest.fixture(scope="module")
def long_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context is longer than its window's room."""
    folder = tmp_path_factory.mktemp("long")
    gguf = write_tiny_gguf(folder / "long.gguf", size=Size(context=2048, head_dim=64))
    return build_image(gguf, folder / "images", "a")


@pytest.fixture
def bench(long_image: Path, tmp_path: Path) -> Bench:
    bench = Bench(long_image, tmp_path, positions=POSITIONS, seats=4)
    assert bench.shape.rooms["window"] < POSITIONS // 2
    return bench


def _jobs() -> list[JobSpec]:
    rng = random.Random(1)

    def prompt(length: int) -> list[int]:
        return [2, *(rng.randrange(4, 350) for _ in range(length - 1))]

    return [
        JobSpec("long text", prompt(30), 700, WARM),
        JobSpec("long prompt", prompt(1300), 200, WARM),
        JobSpec("filled", prompt(570), POSITIONS - 570, WARM),
    ]


def test_every_hidden_state_is_that_of_the_full_cache_wherever_the_window_begins(bench: Bench) -> None:
    model, rng = bench.model, random.Random(2)
    guard = ComputeGuard(output_gain(model), None)
    sliding = BatchDecoder(model, bench.arena, guard)
    tokens = [2, *(rng.randrange(4, 350) for _ in range(POSITIONS - 1))]
    seat = bench.arena.seats[0]
    bench.arena.reserve(0, POSITIONS)
    with full_arena(model, POSITIONS) as arena:
        full = BatchDecoder(model, arena, guard)
        arena.reserve(0, POSITIONS)
        at = slides = 0
        while at < POSITIONS:
            count = PREFILL_CHUNK if at < 640 else 1
            short = seat.window_rows.free < count
            if at > 100 and (short or rng.random() < 0.01):
                for rows in seat.banks.values():
                    assert rows.prove()
                    rows.commit()
                assert seat.slide() == []
                slides += 1
            if count > 1:
                pair = [one.prefill(0, tokens[at : at + count], at).copy() for one in (sliding, full)]
            else:
                pair = [one.step([tokens[at]], [at]).copy() for one in (sliding, full)]
            assert np.array_equal(*pair), at
            for rows in seat.banks.values():
                rows.record(at, at + count)
            at += count
    assert slides > 5
    assert seat.window_rows.base > 900


def test_long_texts_together_are_those_of_the_full_cache(bench: Bench) -> None:
    jobs = _jobs()
    engine = bench.engine()
    for job in jobs:
        engine.admit(job)
    blocks = finish(engine)
    expected = bench.plain(jobs)
    assert texts(blocks) == expected
    assert proven(bench.rules.image_id, blocks) == {job: len(text) for job, text in expected.items()}
    assert all(seat.window_rows.base for seat in bench.arena.seats[:3])
    assert bench.strikes == []


def test_long_texts_survive_strikes_kills_and_lost_rows(bench: Bench) -> None:
    jobs, rng = _jobs(), random.Random(4)
    expected = bench.plain(jobs)
    bench.epoch_s, bench.retries = 0.1, 12

    def strike(run: int) -> None:
        if rng.random() < 0.004:
            bench.flip_any_row(rng)

    bench.on_run = strike
    engine, blocks, known = bench.engine(), [], dict.fromkeys((job.job for job in jobs), 0)
    ended: set[str] = set()
    epochs = 0
    for job in jobs:
        engine.admit(job)
    while engine.active:
        for block in engine.run_epoch().blocks:
            blocks.append(block)
            known[block.job] += len(block.tokens)
            ended |= {block.job} if block.finish else set()
        epochs += 1
        if epochs % 30 == 0:
            if len(blocks) > 12 and epochs == 60:  # two rows of a group: neither can be repaired
                seat = bench.arena.seats[0]
                at = max(seat.window_rows.base, seat.window_rows.proven - 3)
                bench.flip_row(0, "window", 0, at)
                bench.flip_row(0, "window", 0, at - at % 8 + (at + 1) % 8)
            engine = bench.successor()
            for job in jobs:
                if job.job not in ended:
                    assert engine.admit(job, known[job.job]) == []
    assert texts(blocks) == expected
    assert {strike.method for strike in bench.strikes} >= {"parity"}


def test_a_prefix_is_shared_only_while_its_window_is_there(bench: Bench) -> None:
    rng = random.Random(5)
    system = [2, *(rng.randrange(4, 350) for _ in range(2 * PREFILL_CHUNK))]
    first = JobSpec("first", [*system, 5], 40, WARM)
    engine = bench.engine()
    engine.admit(first)
    finish(engine)
    second = replace(first, job="second", prompt=[*system, 6], max_tokens=900)
    engine.admit(second)
    assert texts(finish(engine)) == bench.plain([second])
    assert engine.counters.shared_tokens == 2 * PREFILL_CHUNK
    engine.drop("first")
    third = replace(first, job="third", prompt=[*system, 7])
    engine.admit(third)
    assert texts(finish(engine)) == bench.plain([third])
    assert engine.counters.shared_tokens == 2 * PREFILL_CHUNK


def test_blocks_have_one_size_wherever_windows_slide(bench: Bench) -> None:
    engine = bench.engine()
    engine.admit(_jobs()[0])
    assert {len(block.tokens) for block in finish(engine)[:-1]} == {BLOCK}
