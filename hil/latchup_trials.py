"""Emulated latch-ups on real load traces: what the detector finds, misses and imagines, beside a threshold.

`penumbra campaign run latchup --trials 2000 --seed 1 --out DIR`

The load is real (`hil.load_trace`: CPU time of a worker decoding real text). The board that draws current for
it is modelled, for no board here measures its own: `BoardModel` says with what it is assumed to hide a step.
In each trial a step of current comes at a random moment; the detector flies as in the node, fitted as
`penumbra calibrate` fits it. A fixed threshold on the mean draw is set as well as it can be, on other trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from fdir.latchup import (
    PUBLISHED_STEP_A,
    CurrentModel,
    DrawSample,
    LatchupDetector,
    LatchupLimits,
    LatchupSuspected,
)
from hil.campaign.statistics import milliseconds, percent, proven_at_least, table
from hil.current_fit import fit_current
from hil.load_trace import LoadTrace, packaged_traces
from telemetry.errors import PenumbraError
from telemetry.figures import CurrentProfile

RATE_HZ: Final = 4
"""Samples of the node's power loop."""
LEAD_S: Final = (40.0, 160.0)
"""Shortest and longest time before the step, s."""
DAMAGE_S: Final = 300.0
"""Time in which a latch-up has to be found (Radshield: it damages after some five minutes)."""
FIT_S: Final = 240.0
FIT_EVERY: Final = 10
"""Trials a fit is used for."""
TRAINING: Final = 400
"""Trials the fixed threshold is set on."""
SWEEP_A: Final = (0.02, 0.035, 0.05, 0.07, 0.1, 0.15)
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BoardModel:
    """A board on a supply of 5 V, all assumed. It is not the model fitted to it: see `bend`, `leak`."""

    idle_w: float = 4.0
    core_w: float = 6.0
    """W for a busy core."""
    bend: float = 0.06
    """A second busy core draws that much less than the first, as a share: the fit takes draw as linear."""
    noise_w: float = 0.03
    """White noise of a sample, standard deviation."""
    step_w: float = 0.04
    """Resolution of the meter: 8 mA at 5 V (INA3221 with 5 mOhm)."""
    burst_hz: float = 0.5
    """Bursts of other work a second."""
    burst_w: float = 1.5
    """Mean draw of a burst, exponential; it lasts 20 to 200 ms."""
    leak: float = 0.02
    """W/K; the board's temperature follows its draw."""
    warm_k_per_w: float = 1.5
    warm_tau_s: float = 90.0

    def draw_w(self, share: _Floats, rng: np.random.Generator) -> tuple[_Floats, _Floats]:
        """Return draw, W, and temperature, degC, at samples of a load, CPU share, `RATE_HZ` a second."""
        extra = np.maximum(share - 1.0, 0.0)
        clean = self.idle_w + self.core_w * (share - self.bend * extra)
        heat = np.empty_like(clean)
        state, pull = float(clean[0]), 1.0 / (self.warm_tau_s * RATE_HZ)
        for number, power in enumerate(clean.tolist()):
            state += pull * (power - state)
            heat[number] = state
        temp_c = 25.0 + self.warm_k_per_w * heat
        bursts = rng.poisson(self.burst_hz / RATE_HZ, len(share))
        length = rng.uniform(0.02, 0.2, len(share)) * RATE_HZ
        power = (
            clean + self.leak * (temp_c - 35.0) + bursts * length * rng.exponential(self.burst_w, len(share))
        )
        power += rng.normal(0.0, self.noise_w, len(share))
        # The temperature sensor is coarse, and slow: a quarter of a degree.
        return power, np.round(temp_c * 4) / 4


class TrialResult(msgspec.Struct, frozen=True, kw_only=True):
    """One emulated latch-up."""

    found_s: float | None
    """Step to its detection, s; None: missed."""
    false_alarms: int
    """Suspicions before the step."""
    judged: int
    """Judgements before the step."""
    watched_s: float
    """Time before the step, s."""


class LatchupResult(msgspec.Struct, frozen=True, kw_only=True):
    """All trials at one step."""

    step_a: float
    trials: int
    misses: int
    false_alarms: int
    alarmed: int
    """Trials with a suspicion before the step."""
    judged: int
    watched_h: float
    delays_s: list[float]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The detector and the threshold on the same trials, and the detector at other steps."""

    seed: int
    detector: LatchupResult
    threshold: LatchupResult
    threshold_w: float
    sweep: list[LatchupResult]
    profile: CurrentProfile
    traces: list[str]


@dataclass(frozen=True)
class _Trial:
    power_w: _Floats
    share: _Floats
    temp_c: _Floats
    step_at: int

    def with_step(self, watts: float, resolution_w: float) -> _Floats:
        """Return the draw with the step, as the meter gives it."""
        power = self.power_w.copy()
        power[self.step_at :] += watts
        return np.round(power / resolution_w) * resolution_w


def shares_of(trace: LoadTrace) -> _Floats:
    """Return the CPU share of a trace at `RATE_HZ`."""
    size = trace.head.rate_hz // RATE_HZ
    count = len(trace.share) // size
    mean: _Floats = trace.share[: count * size].reshape(count, size).mean(axis=1)
    return mean


def _piece(shares: Sequence[_Floats], length: int, rng: np.random.Generator) -> _Floats:
    share = shares[int(rng.integers(len(shares)))]
    start = int(rng.integers(len(share)))
    return np.take(share, np.arange(start, start + length), mode="wrap")


def _make(shares: Sequence[_Floats], board: BoardModel, rng: np.random.Generator) -> _Trial:
    step_at = int(rng.uniform(*LEAD_S) * RATE_HZ)
    share = _piece(shares, step_at + int(DAMAGE_S * RATE_HZ), rng)
    power, temp_c = board.draw_w(share, rng)
    return _Trial(power, share, temp_c, step_at)


def _fit(shares: Sequence[_Floats], board: BoardModel, rng: np.random.Generator) -> CurrentProfile:
    share = _piece(shares, int(FIT_S * RATE_HZ), rng)
    power, temp_c = board.draw_w(share, rng)
    power = np.round(power / board.step_w) * board.step_w
    samples = [
        DrawSample(p, s, None, t)
        for p, s, t in zip(power.tolist(), share.tolist(), temp_c.tolist(), strict=True)
    ]
    profile = fit_current(samples, 1 / RATE_HZ)
    if profile is None:
        raise PenumbraError("the load trace is too even to fit a model of the draw to", "record another one")
    return profile


def fly_detector(
    trial: _Trial, power_w: _Floats, profile: CurrentProfile, limits: LatchupLimits | None = None
) -> TrialResult:
    """Lead a detector through a trial; a false alarm is acted on, and the detector reset, as in the node."""
    detector = LatchupDetector(CurrentModel(profile), limits)
    false_alarms = 0
    judged_before = 0
    rows = zip(power_w.tolist(), trial.share.tolist(), trial.temp_c.tolist(), strict=True)
    for number, (power, share, temp_c) in enumerate(rows):
        if number == trial.step_at:
            judged_before = detector.judged
        for action in detector.handle(DrawSample(power, share, None, temp_c), number / RATE_HZ):
            if not isinstance(action, LatchupSuspected):
                continue
            if number >= trial.step_at:
                found_s = (number - trial.step_at) / RATE_HZ
                return TrialResult(
                    found_s=found_s, false_alarms=false_alarms, judged=judged_before,
                    watched_s=trial.step_at / RATE_HZ,
                )  # fmt: skip
            false_alarms += 1
            detector.reset()
    return TrialResult(
        found_s=None, false_alarms=false_alarms, judged=judged_before, watched_s=trial.step_at / RATE_HZ
    )


def fly_threshold(trial: _Trial, power_w: _Floats, threshold_w: float, window_s: float = 2.5) -> TrialResult:
    """Hold the mean draw over a window against a fixed limit."""
    size = int(window_s * RATE_HZ)
    mean = np.convolve(power_w, np.ones(size) / size, mode="valid")
    over = mean > threshold_w
    at = trial.step_at - size + 1
    rising = np.flatnonzero(over[1:at] & ~over[: at - 1])
    after = np.flatnonzero(over[at:])
    return TrialResult(
        found_s=float(after[0]) / RATE_HZ if len(after) else None,
        false_alarms=len(rising) + int(over[0]), judged=at, watched_s=trial.step_at / RATE_HZ,
    )  # fmt: skip


def gather(step_a: float, results: Sequence[TrialResult]) -> LatchupResult:
    """Add trials up. One that was alarmed before the step has found nothing by what follows."""
    return LatchupResult(
        step_a=step_a,
        trials=len(results),
        misses=sum(r.found_s is None for r in results),
        false_alarms=sum(r.false_alarms for r in results),
        alarmed=sum(r.false_alarms > 0 for r in results),
        judged=sum(r.judged for r in results),
        watched_h=sum(r.watched_s for r in results) / 3600,
        delays_s=[r.found_s for r in results if r.found_s is not None],
    )


def best_threshold(trials: Sequence[_Trial], step_w: float, board: BoardModel) -> float:
    """Return the limit with the fewest errors, misses and false alarms together, on some trials."""
    draws = [trial.with_step(step_w, board.step_w) for trial in trials]
    candidates = np.linspace(min(d.min() for d in draws), max(d.max() for d in draws), 60)

    def errors(limit: float) -> int:
        results = [fly_threshold(t, d, limit) for t, d in zip(trials, draws, strict=True)]
        return sum((r.found_s is None) + (r.false_alarms > 0) for r in results)

    return float(min(candidates, key=errors))


def run_latchup(
    trials: int, seed: int, *, board: BoardModel | None = None, traces: Sequence[LoadTrace] | None = None
) -> Comparison:
    """Run the trials.

    Parameters
    ----------
    trials
        Steps.
    seed
        Chooses pieces of the traces, moments and noise.
    board
        What draws the current.
    traces
        Loads; the packaged ones if not given.
    """
    board = board or BoardModel()
    traces = list(packaged_traces() if traces is None else traces)
    shares = [shares_of(trace) for trace in traces]
    rng = np.random.default_rng([seed, 0x1A7C4])
    profile = _fit(shares, board, rng)
    supply_v = LatchupLimits().supply_v
    step_w = PUBLISHED_STEP_A * supply_v
    training = [_make(shares, board, rng) for _ in range(min(TRAINING, trials))]
    threshold_w = best_threshold(training, step_w, board)
    detector, threshold = [], []
    sweep: dict[float, list[TrialResult]] = {step_a: [] for step_a in SWEEP_A}
    for number in range(trials):
        if number % FIT_EVERY == 0:
            # Another board is another fit, with its own luck.
            profile = _fit(shares, board, rng)
        trial = _make(shares, board, rng)
        power = trial.with_step(step_w, board.step_w)
        detector.append(fly_detector(trial, power, profile))
        threshold.append(fly_threshold(trial, power, threshold_w))
        if number % 10 == 0:
            for step_a, found in sweep.items():
                found.append(fly_detector(trial, trial.with_step(step_a * supply_v, board.step_w), profile))
    return Comparison(
        seed=seed,
        detector=gather(PUBLISHED_STEP_A, detector),
        threshold=gather(PUBLISHED_STEP_A, threshold),
        threshold_w=threshold_w,
        sweep=[gather(step_a, found) for step_a, found in sweep.items()],
        profile=profile,
        traces=[f"{trace.name} ({trace.head.seconds:g} s, {trace.head.machine.cpu})" for trace in traces],
    )


def markdown(result: Comparison) -> str:
    """Return the section of the report."""
    rows = []
    for name, each in (
        ("residual detector", result.detector),
        (f"threshold {result.threshold_w:.2f} W", result.threshold),
    ):
        rows.append(
            [
                name,
                f"{each.trials:,}",
                percent(each.misses, each.trials),
                percent(each.alarmed, each.trials),
                percent(each.false_alarms, each.judged, 4),
                f"{each.false_alarms / each.watched_h:.2f}",
                milliseconds(each.delays_s),
            ]
        )
    swept = [
        [
            f"{each.step_a:g}", f"{each.trials:,}", percent(each.misses, each.trials, 1),
            milliseconds(each.delays_s),
        ]
        for each in result.sweep
    ]  # fmt: skip
    p, found = result.profile, result.detector
    proven = 100 * proven_at_least(found.misses, found.trials)
    head = (
        "", "steps", "missed, % (95 %)", "trials with a false alarm, % (95 %)",
        "false alarms, % of judgements (95 %)", "false alarms an hour",
        "step to detection, s, p50 / p99 / max",
    )  # fmt: skip
    return "\n".join(
        [
            "## Emulated latch-up\n",
            f"`penumbra campaign run latchup --trials {found.trials} --seed {result.seed} --out DIR`\n",
            f"Steps of {found.step_a:g} A at 5 V on real load ({', '.join(result.traces)}); the board is "
            "modelled, with assumed noise, bursts, bend and leakage (`hil.latchup_trials.BoardModel`). Fit: "
            f"idle {p.idle_w:.2f} W, {p.core_w:.2f} W a core, {p.w_per_c:.3f} W/K, scatter "
            f"{p.residual_sigma_w:.2f} W. The threshold is set to the fewest errors on other trials of the "
            "same kind.\n",
            table(head, rows),
            f"Found, with 95 % confidence: at least {proven:.2f} % of steps. Published (Radshield's ILD, on "
            "hardware): no misses, 0.02 % false positives.\n",
            table(("step, A", "steps", "missed, % (95 %)", "step to detection, s, p50 / p99 / max"), swept),
        ]
    )
