"""Faults that leave no trace in memory: guards, checksums, redundancy. Injected around the session."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from engine_bench import Bench, finish, mixed_jobs, proven, texts

from fdir.pages import memory_view
from node.inference.guard import ComputeGuard, ComputeTrip, output_gain
from node.inference.head import HeadFault
from node.inference.proof import BeyondRepair
from node.inference.sequence import JobSpec
from node.inference.verified import VerifiedBatch
from telemetry.sampling import Sampling

SPEC = JobSpec("job", [2, *range(20, 45)], 40, Sampling(temperature=1.0, seed=11))
Floats = npt.NDArray[np.float32]
Fault = Callable[[int, list[Floats]], None]


class FaultyTrunk:
    """A session whose results a test spoils: `fault` gets the number of the run, hidden and residual."""

    def __init__(self, session: Any, fault: Fault) -> None:
        self._session, self._fault, self._runs = session, fault, 0

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)
        self._runs += 1
        outputs = [value for value in binding.get_outputs() if len(value.shape()) == 3]
        self._fault(self._runs, [_array(value) for value in outputs])


def _array(value: Any) -> Floats:
    shape = value.shape()
    return np.frombuffer(memory_view(value.data_ptr(), 4 * math.prod(shape)), np.float32).reshape(shape)


@pytest.fixture
def bench(tiny_image: Path, tmp_path: Path) -> Bench:
    return Bench(tiny_image, tmp_path)


@pytest.fixture
def checked(tiny_image: Path, tmp_path: Path) -> Bench:
    return Bench(tiny_image, tmp_path, checked=True)


def _engine(bench: Bench, fault: Fault) -> VerifiedBatch:
    return bench.engine(model=replace(bench.model, trunk=FaultyTrunk(bench.model.trunk, fault)))  # type: ignore[arg-type]


def _at(run: int, change: Callable[[Floats], None], output: int = 0) -> Fault:
    return lambda number, outputs: change(outputs[output]) if number == run else None


def _set(value: float) -> Callable[[Floats], None]:
    def change(array: Floats) -> None:
        array[0, -1, 7] = value

    return change


def _negate(array: Floats) -> None:
    array[0, -1] *= -1


# The guard alone.


def test_the_bound_of_hidden_states_holds_for_any_input_of_the_norm() -> None:
    rng = np.random.default_rng(0)
    gain = rng.normal(1, 0.3, 64).astype(np.float32)
    guard = ComputeGuard(gain, None)
    for x in (*rng.normal(0, 1e4, (50, 64)), *np.eye(64)):
        hidden = (x / np.sqrt(np.mean(x * x) + 1e-6) * gain).astype(np.float32)
        guard.check(hidden[None], None, [0], [5])
    spike = np.zeros((1, 64), np.float32)
    spike[0, 3] = 8 * abs(gain[3]) * 1.01
    with pytest.raises(ComputeTrip, match="hidden 3 at position 5"):
        guard.check(spike, None, [0], [5])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_within_no_limit_and_never_excused(value: float) -> None:
    guard = ComputeGuard(np.ones(64, np.float32), np.full(3, 1e30, np.float32))
    hidden, residual = np.zeros((2, 64), np.float32), np.zeros((2, 3), np.float32)
    hidden[1, 9] = value
    with pytest.raises(ComputeTrip) as trip:
        guard.check(hidden, residual, [0, 4], [5, 8])
    (finding,) = trip.value.findings
    assert (finding.check, finding.number, finding.seat, finding.position) == ("hidden", 9, 4, 8)
    guard.excuse(trip.value)
    with pytest.raises(ComputeTrip):
        guard.check(hidden, residual, [0, 4], [5, 8])
    residual[0, 2] = value
    with pytest.raises(ComputeTrip) as trip:
        guard.check(np.zeros_like(hidden), residual, [0, 4], [5, 8])
    if math.isnan(value):
        guard.excuse(trip.value)
        with pytest.raises(ComputeTrip):
            guard.check(np.zeros_like(hidden), residual, [0, 4], [5, 8])


def test_a_residual_that_comes_again_to_the_bit_is_excused_and_no_other() -> None:
    guard = ComputeGuard(np.ones(64, np.float32), np.ones(3, np.float32))
    hidden, residual = np.zeros((1, 64), np.float32), np.array([[0, 1.5, 0]], np.float32)
    with pytest.raises(ComputeTrip, match=r"matmul 1 at position 5 is 1\.5, its limit 1") as trip:
        guard.check(hidden, residual, [0], [5])
    guard.excuse(trip.value)
    guard.check(hidden, residual, [0], [5])
    with pytest.raises(ComputeTrip):
        guard.check(hidden, residual, [0], [6])
    with pytest.raises(ComputeTrip):
        guard.check(hidden, np.nextafter(residual, 2, dtype=np.float32), [0], [5])


def test_the_gain_is_that_of_the_output_norm(bench: Bench) -> None:
    from tiny_gemma import tensors

    assert np.array_equal(output_gain(bench.model), tensors()["output_norm.weight"][0])


# In an epoch.


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("run", [1, 9])
def test_a_hidden_state_out_of_its_bound_makes_the_epoch_dirty(bench: Bench, value: float, run: int) -> None:
    engine = _engine(bench, _at(run, _set(value)))
    engine.admit(SPEC)
    assert texts(finish(engine)) == bench.plain([SPEC])
    (strike,) = bench.strikes
    assert (strike.region, strike.page, strike.role, strike.method) == ("compute", 7, "hidden", "redo")
    assert strike.evidence["position"] == len(SPEC.prompt) + run - 2
    assert (engine.counters.trips, engine.counters.epochs_dirty) == (1, 1)


def test_a_fault_that_stays_ends_in_beyond_repair(bench: Bench) -> None:
    engine = _engine(bench, lambda run, outputs: _set(math.nan)(outputs[0]))
    engine.admit(SPEC)
    with pytest.raises(BeyondRepair, match="after 6 retries"):
        engine.run_epoch()
    assert len(bench.strikes) == engine.counters.trips == 7


def test_struck_memory_accounts_for_a_trip(bench: Bench) -> None:
    """A weight that makes hidden states NaN is reported as what it is, and as nothing else."""
    gain = output_gain(bench.model)

    def strike(run: int) -> None:
        if run == 5:
            gain.view(np.uint32)[9] = 0x7FC00000

    bench.on_run = strike
    engine = bench.engine()
    engine.admit(SPEC)
    assert texts(finish(engine)) == bench.plain([SPEC])
    assert [strike.region for strike in bench.strikes] == ["weights"]
    assert engine.counters.trips == 1


def test_a_fault_of_the_head_makes_the_epoch_dirty(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    top, calls = bench.model.head.top, 0

    def faulty(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise HeadFault("logit 5 above its bound")
        return top(*args)

    expected = bench.plain([SPEC])
    monkeypatch.setattr(bench.model.head, "top", faulty)
    engine = bench.engine()
    engine.admit(SPEC)
    assert texts(finish(engine)) == expected
    (strike,) = bench.strikes
    assert (strike.region, strike.role) == ("compute", "logits")
    assert strike.evidence == {"reason": "logit 5 above its bound"}


def test_a_checked_model_says_the_same_and_stays_within_its_limits(checked: Bench) -> None:
    jobs = mixed_jobs(12, seed=8)
    engine = checked.engine()
    for job in jobs:
        engine.admit(job)
    assert texts(finish(engine)) == checked.plain(jobs)
    assert checked.strikes == []


def test_a_residual_over_its_limit_makes_the_epoch_dirty(checked: Bench) -> None:
    engine = _engine(checked, _at(6, _set(1e3), output=1))
    engine.admit(SPEC)
    assert texts(finish(engine)) == checked.plain([SPEC])
    (strike,) = checked.strikes
    assert (strike.region, strike.page, strike.role) == ("compute", 7, "matmul")
    assert strike.evidence["value"] == 1e3


def test_limits_too_narrow_cost_dirty_epochs_and_never_the_job(checked: Bench) -> None:
    expected = checked.plain([SPEC])
    limits = checked.model.check_limits
    assert limits is not None
    largest = np.zeros_like(limits)

    def measure(run: int, outputs: list[Floats]) -> None:
        np.maximum(largest, outputs[1].max(axis=(0, 1)), out=largest)

    first = _engine(checked, measure)
    first.admit(SPEC)
    finish(first)
    assert checked.strikes == []
    first.drop("job")
    narrow = limits.copy()
    narrow[[1, 5, 9]] = largest[[1, 5, 9]] * 0.999
    engine = checked.engine(model=replace(checked.model, check_limits=narrow))
    engine.admit(SPEC)
    assert texts(finish(engine)) == expected
    assert 1 <= engine.counters.trips <= 3
    assert sum(int(strike.evidence["findings"] or 0) for strike in checked.strikes) == 3
    assert {strike.role for strike in checked.strikes} == {"matmul"}


def test_a_silent_fault_changes_the_text_without_redundancy(bench: Bench) -> None:
    engine = _engine(bench, _at(9, _negate))
    engine.admit(SPEC)
    assert texts(finish(engine)) != bench.plain([SPEC])
    assert bench.strikes == []


@pytest.mark.parametrize("run", [1, 9, 45])
def test_redundancy_finds_a_silent_fault_in_either_pass(bench: Bench, run: int) -> None:
    engine = _engine(bench, _at(run, _negate))
    engine.redundant = True
    engine.admit(SPEC)
    blocks = finish(engine)
    assert texts(blocks) == bench.plain([SPEC])
    assert proven(bench.rules.image_id, blocks) == {"job": SPEC.max_tokens}
    (strike,) = bench.strikes
    assert (strike.region, strike.role, strike.method) == ("compute", "redundancy", "redo")


def test_redundancy_leaves_texts_alone_and_may_come_and_go(bench: Bench) -> None:
    jobs = mixed_jobs(10, seed=9)
    bench.epoch_s = 0.02
    engine = bench.engine()
    for job in jobs:
        engine.admit(job)

    def toggle(progress: object) -> None:
        engine.redundant = not engine.redundant

    assert texts(finish(engine, toggle)) == bench.plain(jobs)
    assert bench.strikes == []


def test_redundancy_finds_a_fault_of_the_head(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    top, calls = bench.model.head.top, 0

    def faulty(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        found = top(*args)
        if calls == 9:
            found[0] = replace(found[0], logits=np.roll(found[0].logits, 1))
        return found

    expected = bench.plain([SPEC])
    monkeypatch.setattr(bench.model.head, "top", faulty)
    engine = bench.engine()
    engine.redundant = True
    engine.admit(replace(SPEC, sampling=msgspec.structs.replace(SPEC.sampling, top_k=8)))
    engine.admit(replace(SPEC, job="second"))
    assert texts(finish(engine))["second"] == expected["job"]
    assert [strike.role for strike in bench.strikes] == ["redundancy"]
