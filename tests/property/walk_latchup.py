"""A random walk of load, draw and time over the latch-up detector. `walk` may be run at any length."""

from __future__ import annotations

import math
import random

from fdir.latchup import (
    CurrentModel,
    DrawSample,
    LatchupCleared,
    LatchupDetector,
    LatchupLimits,
    LatchupSuspected,
    QuietWanted,
)
from telemetry.figures import CurrentProfile

LIMITS = LatchupLimits(quiet_period_s=40.0)
PROFILE = CurrentProfile(idle_w=4.0, core_w=6.0, residual_sigma_w=0.05, samples=100, sample_s=0.25)


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` samples; raise AssertionError when what must hold does not. Returns what it saw."""
    rng = random.Random(seed)
    detector = LatchupDetector(CurrentModel(PROFILE), LIMITS)
    now_s, share, extra_w, suspected, asked_s, judged = 0.0, 0.0, 0.0, False, -math.inf, 0
    quiet_since = 0.0
    seen = dict.fromkeys(("suspected", "cleared", "quiet", "reset", "judged"), 0)
    for _ in range(steps):
        gap_s = rng.choice((0.25, 0.25, 0.25, 0.25, 0.5)) if rng.random() < 0.999 else 30.0
        now_s += gap_s
        if rng.random() < 0.01:
            share = rng.choice((0.0, 0.0, 0.1, 0.9, 1.8))
        if rng.random() < 0.005:
            extra_w = rng.choice((0.0, 0.0, 0.05, 0.35, 1.0, -0.5))
        power_w = PROFILE.idle_w + PROFILE.core_w * share + extra_w + rng.gauss(0, 0.02)
        if rng.random() < 0.01:
            power_w = rng.choice((math.nan, math.inf, power_w + 5.0))
        if rng.random() < 0.002:
            detector.reset()
            suspected, seen["reset"] = False, seen["reset"] + 1
        if share > LIMITS.quiet_share or gap_s > LIMITS.gap_s:
            quiet_since = now_s
        for action in detector.handle(DrawSample(power_w, share), now_s):
            match action:
                case LatchupSuspected(evidence):
                    assert not suspected, "suspected twice"
                    assert share <= LIMITS.quiet_share, "judged under load"
                    assert now_s - quiet_since >= LIMITS.window_s, "judged too early"
                    assert float(evidence["residual_w"] or 0) > float(evidence["threshold_w"] or 0)
                    suspected, seen["suspected"] = True, seen["suspected"] + 1
                case LatchupCleared():
                    assert suspected, "cleared without a suspicion"
                    suspected, seen["cleared"] = False, seen["cleared"] + 1
                case QuietWanted(for_s, unjudged_s):
                    assert now_s - asked_s >= LIMITS.quiet_retry_s or detector.judged > judged
                    assert unjudged_s >= LIMITS.quiet_period_s
                    assert for_s == LIMITS.quiet_for_s
                    asked_s, seen["quiet"] = now_s, seen["quiet"] + 1
        judged = detector.judged
        assert detector.suspected == suspected
        assert abs(detector.baseline_w) <= LIMITS.baseline_limit * LIMITS.step_w + 1e-9
    seen["judged"] = detector.judged
    return seen
