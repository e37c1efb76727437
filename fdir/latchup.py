"""Latch-up: more current than load, clocks and temperature explain, for longer than any of them hesitates.

A latch-up adds a small steady current (published emulations add 0.07 A) to a draw that moves by many times
that with the load. `CurrentModel` says what the draw should be; `LatchupDetector` watches what remains.
Pure: no clock, no I/O.

Three things make a small step visible (the first two after Radshield's ILD, ASPLOS'26):

* a rolling minimum takes out what only ever adds: bursts of other work;
* only *quiet* samples count, because the error of any model of a working processor grows with its work. Where
  the load gives no quiet time by itself, the detector asks for a pause (`QuietWanted`);
* the residual is compared with its own slow average, within limits, so that ageing and whatever the
  temperature term misses do not add up to a step.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from telemetry.figures import CurrentProfile

Evidence = dict[str, str | int | float | bool | None]
PUBLISHED_STEP_A = 0.07
"""Step that latch-ups are emulated with (Radshield, ASPLOS'26, on a supply of 5 V)."""


@dataclass(frozen=True)
class DrawSample:
    """Event: what the board drew over the last moment, and what it did."""

    power_w: float
    """Measured draw, W. A sample that is not finite is passed over."""
    cpu_share: float
    """CPU seconds a second over the same time, 1 = one core."""
    freq_ghz: float | None = None
    """Mean clock of the cores; None where it is not known."""
    temp_c: float | None = None
    """Temperature of the board, degC; None where it is not known."""


@dataclass(frozen=True)
class LatchupSuspected:
    """Action: ask for a power cycle. Not said again before `reset`, or the excess is over."""

    evidence: Evidence


@dataclass(frozen=True)
class LatchupCleared:
    """Action: report that the excess went away by itself."""

    evidence: Evidence


@dataclass(frozen=True)
class QuietWanted:
    """Action: pause the load for this long, s. Said again, every `quiet_retry_s`, until there was quiet."""

    for_s: float
    unjudged_s: float
    """Time since the draw was last judged, s."""


LatchupAction = LatchupSuspected | LatchupCleared | QuietWanted


@dataclass(frozen=True)
class CurrentModel:
    """Expected draw of the board, linear in what is known of its load.

    expected = idle + core * share + core_ghz * share * (f - f0) + temp * (T - T0)
    """

    profile: CurrentProfile

    def expected_w(self, sample: DrawSample) -> float | None:
        """Return the draw that load, clock and temperature explain, W.

        None when the profile has a term whose quantity the sample does not know.
        """
        p = self.profile
        expected_w = p.idle_w + p.core_w * sample.cpu_share
        if p.core_w_per_ghz != 0.0:
            if sample.freq_ghz is None:
                return None
            expected_w += p.core_w_per_ghz * sample.cpu_share * (sample.freq_ghz - p.freq_ghz)
        if p.w_per_c != 0.0:
            if sample.temp_c is None:
                return None
            expected_w += p.w_per_c * (sample.temp_c - p.temp_c)
        return expected_w


class LatchupLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tuning of the detector. Times are physical, s; all assumed unless a source is named."""

    supply_v: Annotated[float, Meta(gt=0, le=100)] = 5.0
    """Voltage the step of current is drawn at."""
    step_a: Annotated[float, Meta(gt=0, le=100)] = PUBLISHED_STEP_A
    """Smallest step to be found, A."""
    threshold: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    """Mean residual that tells of a latch-up, as a share of the step: a half errs least either way."""
    window_s: Annotated[float, Meta(gt=0, le=60)] = 2.5
    """Quiet time the residual is averaged over (Radshield: 3 s in all with the filter)."""
    minimum_samples: Annotated[int, Meta(ge=1, le=100)] = 5
    """Samples the rolling minimum is taken over."""
    quiet_share: Annotated[float, Meta(gt=0)] = 0.25
    """CPU share up to which a sample is quiet, 1 = one core."""
    quiet_period_s: Annotated[float, Meta(gt=0, le=3600)] = 150.0
    """Time without a judgement after which quiet is asked for: damage takes about 300 s (Radshield)."""
    quiet_for_s: Annotated[float, Meta(gt=0, le=60)] = 4.0
    """Quiet that is asked for."""
    quiet_retry_s: Annotated[float, Meta(gt=0, le=600)] = 15.0
    gap_s: Annotated[float, Meta(gt=0, le=60)] = 1.5
    """Gap between two samples after which the window begins anew."""
    baseline_s: Annotated[float, Meta(gt=0)] = 60.0
    """Quiet time the slow average takes to follow."""
    baseline_limit: Annotated[float, Meta(ge=0, le=1)] = 0.8
    """Most the slow average may be, as a share of the step: a board that had latched up before the first
    sample is found all the same."""

    def __post_init__(self) -> None:
        if self.quiet_for_s <= self.window_s:
            raise ValueError(f"quiet_for_s {self.quiet_for_s:g} must be above window_s {self.window_s:g}")

    @property
    def step_w(self) -> float:
        """Smallest step to be found, W."""
        return self.step_a * self.supply_v


class LatchupDetector:
    """Watch the residual of the draw.

    Parameters
    ----------
    model
        Of the draw.
    limits
        Tuning.
    """

    def __init__(self, model: CurrentModel, limits: LatchupLimits | None = None) -> None:
        self.model = model
        self.limits = limits or LatchupLimits()
        self.judged = 0
        """Samples that a judgement was made at."""
        self.baseline_w = 0.0
        """Slow average of the residual."""
        self.residual_w: float | None = None
        """Mean residual over the last full window, against the slow average; None before the first."""
        self._recent: deque[float] = deque(maxlen=self.limits.minimum_samples)
        self._window: deque[tuple[float, float, float, float]] = deque()
        self._last_s: float | None = None
        self._judged_s: float | None = None
        self._asked_s = -math.inf
        self._suspect_s: float | None = None

    @property
    def suspected(self) -> bool:
        """Whether a latch-up is suspected now."""
        return self._suspect_s is not None

    def reset(self) -> None:
        """Forget the suspicion and what led to it: the supply was taken away, or the ground says so."""
        self._suspect_s = None
        self._recent.clear()
        self._window.clear()

    def handle(self, sample: DrawSample, now_s: float) -> list[LatchupAction]:
        """Take a sample at `now_s` (monotonic, s); several a second are meant."""
        limits = self.limits
        if self._judged_s is None:
            self._judged_s = now_s
        gap_s = 0.0 if self._last_s is None else now_s - self._last_s
        expected_w = self.model.expected_w(sample)
        if expected_w is None or not (math.isfinite(sample.power_w) and math.isfinite(expected_w)):
            return self._ask(now_s)
        self._last_s = now_s
        if gap_s > limits.gap_s or sample.cpu_share > limits.quiet_share:
            # Quiet must be unbroken: the draw settles only some time after the work has ended.
            self._recent.clear()
            self._window.clear()
        if sample.cpu_share > limits.quiet_share:
            return self._ask(now_s)
        self._recent.append(sample.power_w - expected_w)
        if len(self._recent) < limits.minimum_samples:
            return self._ask(now_s)
        self._window.append((now_s, min(self._recent), expected_w, sample.power_w))
        if now_s - self._window[0][0] < limits.window_s:
            return self._ask(now_s)
        actions = self._judge(now_s, min(gap_s, limits.gap_s))
        while now_s - self._window[0][0] >= limits.window_s:
            self._window.popleft()
        return actions

    def _judge(self, now_s: float, dt_s: float) -> list[LatchupAction]:
        limits, count = self.limits, len(self._window)
        self.judged += 1
        self._judged_s = now_s
        self._asked_s = -math.inf
        mean_w = math.fsum(entry[1] for entry in self._window) / count
        excess_w = mean_w - self.baseline_w
        self.residual_w = excess_w
        bar_w = limits.threshold * limits.step_w
        actions: list[LatchupAction] = []
        if excess_w > bar_w:
            if self._suspect_s is None:
                self._suspect_s = self._window[0][0]
                actions.append(LatchupSuspected(self._evidence(excess_w, now_s)))
        elif self._suspect_s is not None and excess_w < bar_w / 2:
            actions.append(LatchupCleared(self._evidence(excess_w, now_s)))
            self._suspect_s = None
        if abs(excess_w) < bar_w / 2 or excess_w <= -bar_w / 2:
            # Only what cannot be the beginning of a latch-up moves the slow average.
            follow = 1.0 - math.exp(-dt_s / limits.baseline_s)
            limit_w = limits.baseline_limit * limits.step_w
            moved_w = self.baseline_w + follow * excess_w
            self.baseline_w = min(max(moved_w, -limit_w), limit_w)
        return actions

    def _evidence(self, excess_w: float, now_s: float) -> Evidence:
        entries = self._window
        return {
            "residual_w": excess_w,
            "baseline_w": self.baseline_w,
            "sigma_w": self.model.profile.residual_sigma_w,
            "threshold_w": self.limits.threshold * self.limits.step_w,
            "expected_w": math.fsum(entry[2] for entry in entries) / len(entries),
            "measured_w": math.fsum(entry[3] for entry in entries) / len(entries),
            "for_s": now_s - (self._suspect_s if self._suspect_s is not None else entries[0][0]),
        }

    def _ask(self, now_s: float) -> list[LatchupAction]:
        limits = self.limits
        unjudged_s = 0.0 if self._judged_s is None else now_s - self._judged_s
        if unjudged_s < limits.quiet_period_s or now_s - self._asked_s < limits.quiet_retry_s:
            return []
        self._asked_s = now_s
        return [QuietWanted(limits.quiet_for_s, unjudged_s)]
