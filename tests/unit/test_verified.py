"""Verified decoding on a tiny model: company, restarts and strikes at any moment never change a text."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from engine_bench import BLOCK, Bench, finish, mixed_jobs, proven, texts

from node.inference.decoder import PREFILL_CHUNK
from node.inference.epoch import Epoch
from node.inference.head import HeadFault
from node.inference.proof import BeyondRepair, Mended
from node.inference.protocol import Block
from node.inference.sequence import JobSpec
from node.inference.verified import VerifiedBatch
from telemetry.sampling import Sampling

TOKENS = 40
PROMPT = [2, *range(20, 45)]
WARM = Sampling(temperature=1.0, seed=11)
"""The tiny model repeats itself when greedy: drawn tokens show more of what goes wrong."""
SPEC = JobSpec("job", PROMPT, TOKENS, WARM)


@pytest.fixture
def bench(tiny_image: Path, tmp_path: Path) -> Bench:
    return Bench(tiny_image, tmp_path)


def _run(engine: VerifiedBatch, *specs: JobSpec) -> list[Block]:
    blocks = [block for spec in specs for block in engine.admit(spec)]
    return blocks + finish(engine)


# One job.


def test_verified_text_is_the_plain_text_in_certified_blocks(bench: Bench) -> None:
    engine = bench.engine()
    blocks = _run(engine, SPEC)
    assert texts(blocks) == bench.plain([SPEC])
    assert [len(block.tokens) for block in blocks] == [BLOCK] * (TOKENS // BLOCK)
    assert [block.finish for block in blocks] == [None] * 4 + ["length"]
    assert blocks[0].prompt_tokens == PROMPT
    assert proven(bench.rules.image_id, blocks) == {"job": TOKENS}
    assert bench.strikes == []
    assert (engine.counters.epochs_clean, engine.counters.epochs_dirty) == (1, 0)
    assert engine.counters.tokens_committed == TOKENS
    assert engine.counters.prefill_tokens == len(PROMPT)


def test_a_changed_token_breaks_the_chain(bench: Bench) -> None:
    blocks = _run(bench.engine(), SPEC)
    blocks[2].tokens[3] ^= 1
    assert proven(bench.rules.image_id, blocks) == {"job": 2 * BLOCK}


def test_how_long_epochs_take_does_not_change_the_blocks(bench: Bench) -> None:
    runs = []
    for epoch_s in (60.0, 0.0):
        bench.epoch_s = epoch_s
        engine = bench.engine()
        runs.append(_run(engine, SPEC))
        engine.drop("job")
    assert runs[0] == runs[1]
    assert engine.counters.epochs_clean == TOKENS - 1  # the first has the prompt and a step


def test_the_budget_sets_how_long_an_epoch_computes(bench: Bench) -> None:
    counts = []
    for budget in (1e9, 0.5, 1e-9):
        bench.budget = budget
        engine = bench.engine()
        engine.counters.scan_ms = 1e3
        _run(engine, SPEC)
        engine.drop("job")
        counts.append(engine.counters.epochs_clean)
    assert counts[0] == TOKENS - 1
    assert counts[2] == 1
    assert counts[0] > counts[1] >= counts[2]


def test_the_end_of_text_token_ends_the_job(bench: Bench) -> None:
    expected = bench.plain([SPEC])["job"]
    bench.rules = replace(bench.rules, eos=expected[11])
    blocks = _run(bench.engine(), SPEC)
    assert blocks[-1].finish == "eos"
    assert texts(blocks)["job"] == expected[: expected.index(bench.rules.eos) + 1]


def test_a_stop_string_ends_the_job_and_stays_in_the_text(bench: Bench) -> None:
    expected = bench.plain([SPEC])["job"]
    whole = bench.rules.text(expected)
    stop = whole[17:20].decode()
    blocks = _run(bench.engine(), replace(SPEC, sampling=msgspec.structs.replace(WARM, stop=(stop,))))
    assert blocks[-1].finish == "stop"
    said = b"".join(block.text for block in blocks)
    assert whole.startswith(said)
    assert stop.encode() in said
    assert stop.encode() not in said[: -len(bench.rules.text(blocks[-1].tokens[-1:]))]


def test_log_probabilities_come_on_request_and_survive_a_restart(bench: Bench) -> None:
    spec = replace(SPEC, sampling=msgspec.structs.replace(WARM, logprobs=True))
    blocks = _run(bench.engine(), spec)
    values = [value for block in blocks for value in block.logprobs or []]
    assert len(values) == TOKENS
    assert all(math.isfinite(value) and value <= 0 for value in values)
    assert all(block.logprobs is None for block in _run(bench.engine(), replace(SPEC, job="other")))
    assert bench.successor().admit(spec) == blocks


@pytest.mark.parametrize(("prompt", "tokens"), [([], 4), (PROMPT, 256)])
def test_a_job_that_cannot_fit_is_refused(bench: Bench, prompt: list[int], tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"prompt of {len(prompt)} tokens .* holds 256 positions"):
        bench.engine().admit(JobSpec("job", prompt, tokens))


def test_a_job_may_fill_the_arena_to_the_last_position(bench: Bench) -> None:
    spec = replace(SPEC, max_tokens=256 - len(PROMPT))
    assert texts(_run(bench.engine(), spec)) == bench.plain([spec])


def test_blocks_are_messages(bench: Bench) -> None:
    for block in _run(bench.engine(), SPEC):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(block), type=Block) == block


# Company.


def test_sixty_mixed_jobs_say_together_what_each_says_alone(bench: Bench) -> None:
    jobs = mixed_jobs(60, seed=1)
    expected = bench.plain(jobs)
    engine = bench.engine()
    engine.batch = 4
    bench.epoch_s, rng = 60.0, random.Random(2)
    blocks: list[Block] = []
    waiting = list(jobs)
    while waiting or engine.active:
        for _ in range(rng.randrange(3)):
            if waiting and len(engine.active) < 8:
                blocks += engine.admit(waiting.pop(0))
        engine.batch = rng.randint(1, 6)
        engine.epoch_factor = rng.choice((1.0, 0.001))
        blocks += engine.run_epoch().blocks
    assert texts(blocks) == expected
    assert {job: len(tokens) for job, tokens in expected.items()} == proven(bench.rules.image_id, blocks)
    assert {block.finish for block in blocks} == {None, "length", "stop"}
    assert engine.counters.shared_tokens >= 64
    assert bench.strikes == []


def test_certificates_too_depend_on_nothing_but_the_job(bench: Bench) -> None:
    jobs = mixed_jobs(8, seed=12)
    engine = bench.engine()
    together = _run(engine, *jobs)
    for job in jobs:
        engine.drop(job.job)
    assert sorted(map(_certified, together)) == sorted(
        _certified(block) for job in jobs for block in _run(engine, job)
    )


def _certified(block: Block) -> tuple[str, int, list[int], bytes, bytes, bytes]:
    c = block.certificate
    return block.job, block.first, block.tokens, block.text, c.kv_digest, c.chain


def test_jobs_parked_and_taken_up_at_random_say_the_same(bench: Bench) -> None:
    jobs = mixed_jobs(24, seed=3)
    expected = bench.plain(jobs)
    rng, blocks, parked = random.Random(4), [], 0
    bench.budget = 1e9  # an epoch is one round
    engine = bench.engine()
    specs = {spec.job: spec for spec in jobs}
    resting, known = list(specs), dict.fromkeys(specs, 0)
    while resting or engine.active:
        while resting and len(engine.active) < 4:
            job = resting.pop(rng.randrange(len(resting)))
            blocks += engine.admit(specs[job], known[job])
        if rng.random() < 0.3 and engine.active:
            engine.park(rng.choice(engine.active))
        progress = engine.run_epoch()
        for block in progress.blocks:
            if block.first >= known[block.job]:  # a job that was evicted makes its blocks again
                blocks.append(block)
                known[block.job] = block.first + len(block.tokens)
        parked += len(progress.parked)
        resting += progress.parked
    assert parked > 20
    assert texts(blocks) == expected


def test_a_joining_job_does_not_wait_for_the_end_of_a_long_epoch(bench: Bench) -> None:
    engine = bench.engine()
    engine.admit(replace(SPEC, max_tokens=200))
    other = replace(SPEC, job="other", max_tokens=5)
    bench.on_run = lambda run: engine.admit(other) and None if run == 10 else None
    blocks = engine.run_epoch().blocks
    assert bench.runs == 10
    blocks += finish(engine)
    assert texts(blocks)["other"] == bench.plain([other])["other"]


def test_a_long_prompt_does_not_stall_the_others(bench: Bench) -> None:
    bench.budget = 1e9
    engine = bench.engine()
    engine.admit(replace(SPEC, job="first", max_tokens=100))
    engine.run_epoch()
    long = JobSpec("long", [2, *range(4, 220)], 10, WARM)
    engine.admit(long)
    for chunk in range(1, 4):
        engine.run_epoch()
        first, reading = engine.sequence("first"), engine.sequence("long")
        assert first is not None
        assert reading is not None
        assert reading.written == chunk * PREFILL_CHUNK
        assert len(first.generated) == 2 + chunk
    blocks = finish(engine)
    assert texts(blocks)["long"] == bench.plain([long])["long"]


def test_a_shared_prompt_is_read_once_even_when_all_come_at_once(bench: Bench) -> None:
    system = [2, *range(10, 10 + 2 * PREFILL_CHUNK)]
    jobs = [JobSpec(f"job-{n}", [*system, 300 + n, 310], 12, WARM) for n in range(5)]
    engine = bench.engine()
    blocks = _run(engine, *jobs)
    assert texts(blocks) == bench.plain(jobs)
    assert engine.counters.shared_tokens == 4 * 2 * PREFILL_CHUNK
    assert engine.counters.prefill_tokens == sum(len(job.prompt) for job in jobs) - 8 * PREFILL_CHUNK


def test_a_finished_job_leaves_its_prefix_until_its_seat_is_needed(bench: Bench) -> None:
    system = [2, *range(10, 10 + PREFILL_CHUNK)]
    engine = bench.engine()
    _run(engine, JobSpec("one", [*system, 300], 4))
    _run(engine, JobSpec("two", [*system, 301], 4))
    assert engine.counters.shared_tokens == PREFILL_CHUNK
    others = [JobSpec(f"job-{n}", [2, 5 + n, 6], 4) for n in range(6)]
    _run(engine, *others)
    assert engine.sequence("one") is engine.sequence("two") is None


def test_more_jobs_than_seats_wait_and_say_the_same(tiny_image: Path, tmp_path: Path) -> None:
    bench = Bench(tiny_image, tmp_path, seats=2)
    jobs = mixed_jobs(7, seed=5)
    assert texts(_run(bench.engine(), *jobs)) == bench.plain(jobs)


def test_a_smaller_batch_lets_the_last_ones_wait_in_their_seats(bench: Bench) -> None:
    bench.budget = 1e9
    engine = bench.engine()
    jobs = [replace(SPEC, job=f"job-{n}") for n in range(4)]
    for job in jobs:
        engine.admit(job)
    engine.run_epoch()
    engine.run_epoch()
    before = [len(engine.sequence(job.job).generated) for job in jobs]  # type: ignore[union-attr]
    engine.batch = 2
    engine.run_epoch()
    after = [len(engine.sequence(job.job).generated) for job in jobs]  # type: ignore[union-attr]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 0, 0]
    engine.batch = 6
    assert set(map(tuple, texts(finish(engine)).values())) <= {tuple(bench.plain([SPEC])["job"])}


# Leaving.


def test_cancel_ends_a_job_between_epochs_with_what_it_has(bench: Bench) -> None:
    engine = bench.engine()
    engine.admit(SPEC)
    bench.on_run = lambda run: engine.cancel("job", "deadline") if run == 12 else None
    blocks = finish(engine)
    assert blocks[-1].finish == "deadline"
    count = len(texts(blocks)["job"])
    assert count == 12
    assert texts(blocks)["job"] == bench.plain([SPEC])["job"][:count]
    assert proven(bench.rules.image_id, blocks) == {"job": count}


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_job_cancelled_before_its_first_token_ends_with_an_empty_block(bench: Bench, epochs: int) -> None:
    bench.budget = 1e9
    engine = bench.engine()
    engine.admit(JobSpec("job", [2, *range(4, 220)], 9))
    for _ in range(epochs):
        engine.run_epoch()
    engine.cancel("job")
    (block,) = engine.run_epoch().blocks
    assert (block.tokens, block.text, block.finish) == ([], b"", "cancelled")
    assert block.prompt_tokens == [2, *range(4, 220)]
    assert proven(bench.rules.image_id, [block]) == {"job": 0}
    assert engine.active == []


def test_a_job_cancelled_at_the_end_of_a_block_ends_with_an_empty_one(bench: Bench) -> None:
    bench.budget = 1e9
    engine = bench.engine()
    blocks = engine.admit(SPEC)
    while len(texts(blocks).get("job", [])) < BLOCK:
        blocks += engine.run_epoch().blocks
    engine.cancel("job")
    blocks += engine.run_epoch().blocks
    assert [len(block.tokens) for block in blocks] == [BLOCK, 0]
    assert blocks[-1].finish == "cancelled"
    assert proven(bench.rules.image_id, blocks) == {"job": BLOCK}


def test_a_job_that_is_not_active_is_forgotten_on_cancel(bench: Bench) -> None:
    engine = bench.engine()
    _run(engine, SPEC)
    engine.cancel("job")
    engine.cancel("never seen")
    assert engine.sequence("job") is None
    assert engine.run_epoch().blocks == []


# Restarts.


@pytest.mark.parametrize("stop_after", [0, 1, 3, 9, 12, 25, 80, 130])
def test_a_successor_goes_on_with_the_same_texts(bench: Bench, stop_after: int) -> None:
    class Killed(Exception):
        pass

    def kill(run: int) -> None:
        if run == stop_after:
            raise Killed

    jobs = mixed_jobs(5, seed=6)
    expected = bench.plain(jobs)
    bench.on_run, bench.epoch_s = kill, 0.01
    first, sent = bench.engine(), []
    for job in jobs:
        first.admit(job)
    with contextlib.suppress(Killed):
        while stop_after and first.active:
            sent += first.run_epoch().blocks
    bench.on_run = lambda run: None
    second = bench.successor()
    known = {job: len(tokens) for job, tokens in texts(sent).items()}
    ended = {block.job for block in sent if block.finish}
    for job in jobs:
        again = second.admit(job)
        assert again == [block for block in sent if block.job == job.job]
        assert second.admit(job, known.get(job.job, 0)) == []
    assert set(second.active) == {job.job for job in jobs} - ended
    assert texts([*sent, *finish(second)]) == expected


@pytest.mark.parametrize("rows", [[(0, 3)], [(0, 3), (0, 4)], [(1, 0), (2, 30)]])
def test_a_successor_repairs_what_was_struck_meanwhile(bench: Bench, rows: list[tuple[int, int]]) -> None:
    bench.epoch_s = 0.0
    first = bench.engine()
    first.admit(SPEC)
    sent = [block for _ in range(18) for block in first.run_epoch().blocks]
    for plane, position in rows:
        bench.flip_row(0, "window", plane, position)
    second = bench.successor()
    assert len(bench.strikes) == len(rows)
    second.admit(SPEC)
    assert texts([*sent, *finish(second)]) == bench.plain([SPEC])


@pytest.mark.parametrize(("epochs", "position"), [(20, len(PROMPT) + 2), (20, len(PROMPT) + 18), (2, 3)])
def test_a_damaged_record_of_the_job_is_not_gone_on_with(bench: Bench, epochs: int, position: int) -> None:
    """Whether a block's certificate covers the token yet or not."""
    bench.epoch_s = 0.0
    first = bench.engine()
    first.admit(SPEC)
    for _ in range(epochs):
        first.run_epoch()
    bench.arena.seats[0].tokens[position] ^= 1
    second = bench.successor()
    assert second.sequence("job") is None
    assert texts(_run(second, SPEC)) == bench.plain([SPEC])


def test_a_damaged_certificate_is_not_gone_on_with(bench: Bench) -> None:
    bench.epoch_s = 0.0
    first = bench.engine()
    first.admit(SPEC)
    for _ in range(20):
        first.run_epoch()
    bench.arena.seats[0].blocks["kv"][0, 3] ^= 1
    second = bench.successor()
    assert second.sequence("job") is None
    assert texts(_run(second, SPEC)) == bench.plain([SPEC])


def test_a_job_of_the_same_name_but_another_prompt_is_another_job(bench: Bench) -> None:
    engine = bench.engine()
    _run(engine, SPEC)
    other = replace(SPEC, prompt=[2, 30, 31])
    assert texts(_run(engine, other)) == bench.plain([other])


# Strikes.


@pytest.mark.parametrize("seed", range(6))
def test_weight_strikes_at_any_moment_leave_the_texts_alone(bench: Bench, seed: int) -> None:
    rng, jobs = random.Random(seed), mixed_jobs(5, seed)
    expected = bench.plain(jobs)
    moments = {rng.randrange(1, 60) for _ in range(4)}
    struck: list[int] = []
    bench.on_run = lambda run: struck.append(bench.flip_weight(rng)) if run in moments else None
    engine = bench.engine()
    assert texts(_run(engine, *jobs)) == expected
    bench.on_run = lambda run: None
    engine.check_idle()
    assert {strike.page for strike in bench.strikes} == set(struck)
    assert all(strike.method == "parity" and strike.recovered_ns is not None for strike in bench.strikes)
    assert bench.weights.check(()) == []


@pytest.mark.parametrize("seed", range(6))
def test_strikes_on_rows_and_weights_at_any_moment_leave_fifty_texts_alone(
    tiny_image: Path, tmp_path: Path, seed: int
) -> None:
    bench = Bench(tiny_image, tmp_path, retries=12, epoch_s=0.05)
    rng, jobs = random.Random(seed), mixed_jobs(9, 100 + seed)
    expected = bench.plain(jobs)

    def strike(run: int) -> None:
        if rng.random() < 0.03:
            bench.flip_any_row(rng)
        if rng.random() < 0.02:
            bench.flip_weight(rng)

    bench.on_run = strike
    engine = bench.engine()
    blocks = _run(engine, *jobs)
    assert texts(blocks) == expected
    assert proven(bench.rules.image_id, blocks) == {job: len(text) for job, text in expected.items()}
    assert bench.strikes
    assert engine.counters.epochs_dirty > 0


@pytest.mark.parametrize("position", [0, 5, 25, 30])
@pytest.mark.parametrize("bank", ["global", "window"])
def test_a_struck_row_is_repaired_from_parity(bench: Bench, bank: str, position: int) -> None:
    bench.budget = 1e9
    engine = bench.engine()
    engine.admit(SPEC)
    for _ in range(8):
        engine.run_epoch()
    bench.flip_row(0, bank, 1, position)  # type: ignore[arg-type]
    engine.run_epoch()
    (strike,) = bench.strikes
    assert (strike.region, strike.role, strike.page, strike.method) == ("kv", bank, position, "parity")
    assert strike.evidence == {"job": "job", "seat": 0, "position": position, "planes": "1"}
    # One token came of it; or none, where kernels make no number of so large a value and the guard trips.
    assert engine.counters.tokens_discarded + engine.counters.trips == 1
    sequence = engine.sequence("job")
    assert sequence is not None
    finish(engine)
    assert sequence.generated == bench.plain([SPEC])["job"]


def test_a_struck_row_of_the_open_epoch_is_written_anew(bench: Bench) -> None:
    engine = bench.engine()
    engine.admit(SPEC)
    bench.on_run = lambda run: bench.flip_row(0, "window", 0, len(PROMPT) + 2) if run == 6 else None
    assert texts(finish(engine)) == bench.plain([SPEC])
    assert [strike.method for strike in bench.strikes] == ["redo"]


def test_lost_rows_are_made_anew_beside_the_others_and_are_those_certified(bench: Bench) -> None:
    bench.epoch_s = 0.0
    jobs = [SPEC, replace(SPEC, job="other", sampling=Sampling(temperature=1.0, seed=5))]
    engine = bench.engine()
    blocks = [block for job in jobs for block in engine.admit(job)]
    while len(texts(blocks).get("job", [])) < 2 * BLOCK:
        blocks += engine.run_epoch().blocks
    at = engine.sequence("job")
    assert at is not None
    bench.flip_row(at.seat.index, "window", 0, 8)
    bench.flip_row(at.seat.index, "window", 0, 9)
    blocks += engine.run_epoch().blocks
    assert at.written < len(PROMPT) + len(at.generated) - 1
    assert [strike.method for strike in bench.strikes] == ["recompute", "recompute"]
    blocks += finish(engine)
    assert texts(blocks) == bench.plain(jobs)
    found, again = bench.strikes[:2], bench.strikes[2:]
    assert [(s.page, s.method, s.detected_ns) for s in again] == [
        (s.page, s.method, s.detected_ns) for s in found
    ]
    assert all(s.recovered_ns is None for s in found)
    assert all(s.recovered_ns is not None and s.recovered_ns > s.detected_ns for s in again)


def test_a_job_killed_while_its_rows_are_made_anew_goes_on(bench: Bench) -> None:
    bench.epoch_s = 0.0
    engine = bench.engine()
    blocks = engine.admit(SPEC)
    while len(texts(blocks).get("job", [])) < 2 * BLOCK:
        blocks += engine.run_epoch().blocks
    bench.flip_row(0, "window", 0, 8)
    bench.flip_row(0, "window", 0, 9)
    for _ in range(4):
        blocks += engine.run_epoch().blocks
    second = bench.successor()
    second.admit(SPEC)
    assert texts([*blocks, *finish(second)]) == bench.plain([SPEC])


def test_a_job_cancelled_while_its_rows_are_made_anew_keeps_its_certified_tokens(bench: Bench) -> None:
    bench.epoch_s = 0.0
    engine = bench.engine()
    blocks = engine.admit(SPEC)
    for _ in range(2 * BLOCK + 3):
        blocks += engine.run_epoch().blocks
    bench.flip_row(0, "window", 0, 8)
    bench.flip_row(0, "window", 0, 9)
    blocks += engine.run_epoch().blocks
    engine.cancel("job")
    blocks += engine.run_epoch().blocks
    assert [len(block.tokens) for block in blocks] == [BLOCK, BLOCK, 0]
    assert proven(bench.rules.image_id, blocks) == {"job": 2 * BLOCK}
    assert bench.successor().admit(SPEC) == blocks


def test_rows_made_anew_that_are_not_those_certified_end_in_beyond_repair(bench: Bench) -> None:
    bench.epoch_s = 0.0
    engine = bench.engine()
    blocks = engine.admit(SPEC)
    while len(texts(blocks).get("job", [])) < BLOCK:
        blocks += engine.run_epoch().blocks
    bench.arena.seats[0].blocks[0]["kv"][0] ^= 1
    bench.flip_row(0, "window", 0, 8)
    bench.flip_row(0, "window", 0, 9)
    with pytest.raises(BeyondRepair, match="not those certified"):
        finish(engine)


def test_rows_of_a_parked_job_are_proven_when_it_goes_on(bench: Bench) -> None:
    bench.budget = 1e9
    engine = bench.engine()
    blocks = engine.admit(SPEC)
    for _ in range(5):
        blocks += engine.run_epoch().blocks
    engine.park("job")
    assert engine.run_epoch().parked == ["job"]
    bench.flip_row(0, "global", 0, 7)
    blocks += _run(engine, replace(SPEC, job="other", max_tokens=3))
    assert bench.strikes == []
    blocks += engine.admit(SPEC)
    blocks += finish(engine)
    assert [strike.page for strike in bench.strikes] == [7]
    assert texts(blocks)["job"] == bench.plain([SPEC])["job"]


def test_a_struck_prefix_is_not_shared(bench: Bench) -> None:
    system = [2, *range(10, 10 + PREFILL_CHUNK)]
    engine = bench.engine()
    _run(engine, JobSpec("one", [*system, 300], 4))
    bench.flip_row(0, "global", 0, 7)
    other = JobSpec("two", [*system, 301], 20, WARM)
    assert texts(_run(engine, other)) == bench.plain([other])
    assert engine.counters.shared_tokens == 0


class _Blind:
    def check(self, tokens: object = (), rows: object = (), positions: object = ()) -> list[Mended]:
        return []


def test_without_the_weight_guard_a_strike_does_change_the_text(bench: Bench) -> None:
    """The tests above would pass on a model no flip can disturb: show that this one can be."""
    rng, changed = random.Random(3), 0
    expected = bench.plain([SPEC])["job"]
    for number in range(10):
        engine = bench.engine(weights=_Blind())
        job = f"job-{number}"
        bench.flip_weight(rng, role="norm", bit=6)
        try:
            changed += texts(_run(engine, replace(SPEC, job=job)))[job] != expected
        except BeyondRepair:  # a guard of computing saw it, again and again
            changed += 1
        engine.drop(job)
        bench.weights.check(())
    assert changed > 0


def test_without_the_row_guard_a_strike_does_change_the_text(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.plain([SPEC])["job"]
    monkeypatch.setattr("fdir.rows.RowBank._damaged", lambda self, start, stop: [])
    monkeypatch.setattr("fdir.rows._all_same", lambda planes, size: True)
    bench.budget, changed = 1e9, 0
    for plane in range(bench.shape.planes_of("global")):
        engine = bench.engine()
        job = f"job-{plane}"
        engine.admit(replace(SPEC, job=job))
        engine.run_epoch()
        for position in range(len(PROMPT)):
            bench.flip_row(0, "global", plane, position, bit=24)
        finish(engine)
        sequence = engine.sequence(job)
        assert sequence is not None
        changed += sequence.generated != expected
        engine.drop(job)
    assert changed > 0


def test_a_page_nothing_can_restore_ends_in_beyond_repair(bench: Bench) -> None:
    class Rotten:
        bad: bool = False

        def check(self, tokens: Collection[int], rows: object = (), positions: object = ()) -> list[Mended]:
            return [Mended(7, "head", "none")] if self.bad else []

    rotten = Rotten()
    engine = bench.engine(weights=rotten)
    rotten.bad = True
    engine.admit(SPEC)
    with pytest.raises(BeyondRepair, match="could not be restored"):
        engine.run_epoch()
    assert bench.strikes[0].recovered_ns is None
    assert bench.arena.seats[0].state.generated == 0


def test_strikes_faster_than_retries_end_in_beyond_repair(tiny_image: Path, tmp_path: Path) -> None:
    bench, rng = Bench(tiny_image, tmp_path, retries=3), random.Random(1)
    bench.on_run = lambda run: bench.flip_weight(rng) and None
    engine = bench.engine()
    engine.admit(SPEC)
    with pytest.raises(BeyondRepair, match="after 3 retries"):
        engine.run_epoch()
    assert engine.counters.epochs_dirty == 4
    assert bench.arena.seats[0].state.generated == 0


def test_tables_are_proven_where_they_were_read(bench: Bench) -> None:
    """A struck row of the embedding is found by the epoch that fed it, or whose head weighed it."""
    memory = bench.weights._memory
    tensor = next(t for t in memory.tensors if t.role == "embed" and t.rows and t.name.endswith("weight"))
    offset = tensor.offset + PROMPT[3] * (tensor.length // tensor.rows)
    bench.weights._next_scrub = len(memory.row_blocks)  # the scrub would find it too
    engine = bench.engine()
    engine.admit(SPEC)
    bench.on_run = lambda run: _flip(memory.page_view(offset // 4096), offset % 4096) if run == 1 else None
    assert texts(finish(engine)) == bench.plain([SPEC])
    assert [strike.page for strike in bench.strikes] == [offset // 4096]


def _flip(view: np.ndarray, at: int) -> None:
    view[at] ^= 4


def test_rows_and_tokens_that_a_check_tripped_on_are_for_the_proof_to_see():
    class Head:
        def top(self, *_):
            raise HeadFault("a logit is outside its bounds", np.array([5, 9]))

    class Decoder:
        def step(self, tokens, positions):
            raise HeadFault("a hidden state is not finite")

    class Sequence:
        abreast, sampling, seen, end, free, written = True, Sampling(), frozenset(), None, 4, 17

        def token_at(self, at):
            return 33

    epoch = Epoch(Decoder(), Head(), [Sequence()], [], lambda _: None)
    with pytest.raises(HeadFault):
        epoch._ask(np.zeros((1, 4), np.float32), [Sequence()])
    assert [rows.tolist() for rows in epoch.head_rows] == [[5, 9]]
    with pytest.raises(HeadFault):
        epoch._step()
    assert (epoch.fed, epoch.positions) == ({33}, {17})
