"""The latch-up detector, its fit, and its trials."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from fdir.latchup import (
    PUBLISHED_STEP_A,
    CurrentModel,
    DrawSample,
    LatchupCleared,
    LatchupDetector,
    LatchupLimits,
    LatchupSuspected,
    QuietWanted,
)
from hil.current_fit import fit_current
from hil.latchup_trials import BoardModel, fly_detector, fly_threshold, run_latchup, shares_of
from hil.load_trace import load_trace, packaged_traces, resample, save_trace
from telemetry.errors import PenumbraError
from telemetry.figures import CurrentProfile

PROFILE = CurrentProfile(idle_w=4.0, core_w=6.0, residual_sigma_w=0.05, samples=100, sample_s=0.25)
STEP_W = 0.35


class Bench:
    """A detector at four samples a second."""

    def __init__(self, profile: CurrentProfile = PROFILE, limits: LatchupLimits | None = None) -> None:
        self.detector = LatchupDetector(CurrentModel(profile), limits)
        self.now_s = 0.0

    def draw(self, seconds: float, extra_w: float = 0.0, share: float = 0.0, **known: float) -> list[object]:
        actions: list[object] = []
        for _ in range(round(seconds * 4)):
            self.now_s += 0.25
            power_w = 4.0 + 6.0 * share + extra_w
            actions += self.detector.handle(DrawSample(power_w, share, **known), self.now_s)
        return actions


def test_a_step_in_quiet_is_suspected_once_with_evidence():
    bench = Bench()
    assert bench.draw(10) == []
    (suspected,) = bench.draw(10, STEP_W)
    assert isinstance(suspected, LatchupSuspected)
    assert suspected.evidence["residual_w"] == pytest.approx(STEP_W, abs=STEP_W / 2)
    assert suspected.evidence["threshold_w"] == pytest.approx(STEP_W / 2)
    assert bench.detector.suspected
    assert bench.draw(20, STEP_W) == []


def test_control_without_a_step_nothing_is_suspected_and_with_half_of_one_neither():
    assert Bench().draw(60) == []
    assert Bench().draw(60, 0.45 * STEP_W) == []


def test_an_excess_that_goes_away_is_cleared_and_a_reset_forgets_it():
    bench = Bench()
    bench.draw(10)
    bench.draw(10, STEP_W)
    assert [type(a) for a in bench.draw(10)] == [LatchupCleared]
    bench.draw(10, STEP_W)
    bench.detector.reset()
    assert not bench.detector.suspected
    assert [type(a) for a in bench.draw(10, STEP_W)] == [LatchupSuspected]


def test_load_is_no_latch_up_and_is_not_judged():
    bench = Bench()
    bench.draw(5)
    judged = bench.detector.judged
    assert bench.draw(60, share=1.5) == []
    assert bench.draw(60, 3 * STEP_W, share=1.5) == []
    assert bench.detector.judged == judged


def test_bursts_that_only_add_are_taken_out():
    bench = Bench()
    for _ in range(100):
        assert bench.draw(0.75) == []
        assert bench.draw(0.25, 5.0) == []


def test_quiet_is_asked_for_when_the_load_never_rests_and_again_until_it_comes():
    bench = Bench()
    wanted = bench.draw(200, share=1.0)
    assert {type(a) for a in wanted} == {QuietWanted}
    assert len(wanted) == 4, "after 150 s, then every 15 s"
    assert bench.draw(4) == []
    assert bench.draw(100, share=1.0) == []


def test_slow_drift_is_followed_but_not_beyond_its_limit():
    bench = Bench()
    assert [a for n in range(60) for a in bench.draw(10, n / 60 * 0.2)] == []
    assert bench.detector.baseline_w == pytest.approx(0.2, abs=0.06)
    late = Bench()
    assert [type(a) for a in late.draw(60, 2 * STEP_W)] == [LatchupSuspected], (
        "latched up before the first sample"
    )


@pytest.mark.parametrize("power_w", [math.nan, math.inf])
def test_samples_that_are_no_numbers_are_passed_over(power_w):
    bench = Bench()
    bench.draw(10)
    assert bench.draw(10, power_w) == []
    assert bench.draw(10) == []


def test_a_model_with_unknown_quantities_expects_nothing():
    profile = msgspec.structs.replace(PROFILE, core_w_per_ghz=1.0, freq_ghz=2.0, w_per_c=0.1, temp_c=40.0)
    model = CurrentModel(profile)
    assert model.expected_w(DrawSample(5.0, 1.0)) is None
    assert model.expected_w(DrawSample(5.0, 1.0, 2.5)) is None
    assert model.expected_w(DrawSample(5.0, 1.0, 2.5, 50.0)) == pytest.approx(4 + 6 + 0.5 + 1.0)
    assert Bench(profile).draw(100) == []


def test_limits_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match="must be above window_s"):
        LatchupLimits(quiet_for_s=2.0, window_s=2.5)


def samples(count=200, bend=0.0, seed=1):
    rng = np.random.default_rng(seed)
    share = np.where(rng.random(count) < 0.3, 0.0, rng.random(count) * 2)
    power = 4.0 + 6.0 * (share - bend * np.maximum(share - 1, 0)) + rng.normal(0, 0.02, count)
    return [DrawSample(p, s) for p, s in zip(power.tolist(), share.tolist(), strict=True)]


def test_the_fit_gives_the_settings_back_and_its_scatter():
    found = fit_current(samples(), 0.25)
    assert found is not None
    assert (found.idle_w, found.core_w) == (pytest.approx(4.0, abs=0.02), pytest.approx(6.0, abs=0.02))
    assert found.residual_sigma_w == pytest.approx(0.02, abs=0.006)
    assert (found.core_w_per_ghz, found.w_per_c, found.samples) == (0.0, 0.0, 200)


def test_the_fit_is_right_where_it_is_quiet_even_if_draw_bends_above():
    found = fit_current(samples(bend=0.3), 0.25)
    assert found is not None
    assert found.residual_sigma_w > 0.2
    assert found.idle_w == pytest.approx(4.0, abs=0.02)


@pytest.mark.parametrize("few", [samples(5), [DrawSample(4.0, 1.0)] * 50, [DrawSample(math.nan, 1.0)] * 50])
def test_too_few_or_too_even_samples_give_no_fit(few):
    assert fit_current(few, 0.25) is None


def test_the_packaged_trace_is_real_load_with_its_record():
    (trace,) = packaged_traces()
    assert trace.head.seconds >= 400
    assert 0 < trace.share.mean() < 2
    assert 0.02 < (shares_of(trace) < 0.25).mean() < 0.5, "there is some quiet in it"


def test_a_trace_survives_its_file_and_what_is_none_is_refused(tmp_path):
    (trace,) = packaged_traces()
    save_trace(tmp_path / "t.npz", trace.head, trace.share[:500])
    again = load_trace(tmp_path / "t.npz")
    assert np.allclose(again.share, trace.share[:500], atol=1e-4)
    (tmp_path / "bad.npz").write_bytes(b"no trace")
    for name in ("bad.npz", "none.npz"):
        with pytest.raises(PenumbraError, match="no load trace"):
            load_trace(tmp_path / name)


def test_uneven_readings_are_spread_over_even_intervals():
    share = resample([0.0, 0.5, 1.0], [0.0, 1.0, 1.0], 10)
    assert share.tolist() == pytest.approx([2.0] * 5 + [0.0] * 5)


def test_trials_find_steps_and_a_threshold_does_worse_on_moving_load():
    result = run_latchup(30, 3)
    errors = result.detector.misses + result.detector.alarmed
    assert errors <= 1
    assert errors < result.threshold.misses + result.threshold.alarmed
    assert min(each.step_a for each in result.sweep) < PUBLISHED_STEP_A
    assert run_latchup(30, 3) == result


def test_control_a_board_that_steps_by_itself_alarms_the_detector():
    noisy = BoardModel(noise_w=1.0, burst_hz=0.0)
    assert run_latchup(20, 3, board=noisy).detector.misses > 0, "noise hides steps: the trials can tell"


def test_control_trials_without_a_step_find_none():
    from hil.latchup_trials import _fit, _make

    rng = np.random.default_rng(5)
    shares, board = [shares_of(trace) for trace in packaged_traces()], BoardModel()
    profile = _fit(shares, board, rng)
    trial = _make(shares, board, rng)
    assert fly_detector(trial, trial.with_step(0.0, board.step_w), profile).found_s is None
    assert fly_threshold(trial, trial.with_step(0.0, board.step_w), 1e9).found_s is None
