"""A random walk over a voted channel with sensors that fail and recover. `walk` may be run at any length."""

from __future__ import annotations

import math
import random

from fdir.sensors import (
    ChannelSpec,
    Lost,
    Reading,
    Regained,
    Rejected,
    Restored,
    SensorVoter,
    Source,
    Tick,
    Why,
)

SPEC = ChannelSpec(
    "v", 0.0, 100.0, tolerance=0.5, max_rate_per_s=2.0, stuck_samples=12, restore_samples=5,
    stale_after_s=3.0, lost_after_s=3.0,
)  # fmt: skip
FAULTS = ("nan", "range", "spike", "stuck", "offset", "stale", "none")


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` readings; raise AssertionError when what must hold does not. Returns what was seen.

    At most one of the three sensors is faulty at a time: then the vote has to be right all the time.
    """
    rng = random.Random(seed)
    voter = SensorVoter([SPEC])
    now_s, truth, rate = 0.0, 50.0, 0.0
    faulty, fault, since, held = 0, "none", 0, 0.0
    rejected: set[int] = set()
    lost = False
    seen = dict.fromkeys((*Why, "restored", "lost", "regained"), 0)
    for step in range(steps):
        now_s += rng.choice((0.5, 1.0, 1.0))
        if rng.random() < 0.02:
            rate = rng.uniform(-0.3, 0.3)
        truth = min(max(truth + rate, 20.0), 80.0)
        if fault == "none" and not rejected and rng.random() < 0.05:
            faulty, fault, since, held = rng.randrange(3), rng.choice(FAULTS), step, truth
        elif fault != "none" and step - since > rng.randrange(5, 60):
            fault = "none"
        values: list[float | None] = [truth + rng.gauss(0, 0.05) for _ in range(3)]
        fresh = [True] * 3
        match fault:
            case "nan":
                values[faulty] = rng.choice((math.nan, math.inf, None))
            case "range":
                values[faulty] = rng.choice((-5.0, 250.0))
            case "spike" if rng.random() < 0.5:
                values[faulty] = min(99.0, truth + 15.0)
            case "stuck":
                values[faulty] = held
            case "offset":
                values[faulty] = truth + 3.0
            case "stale":
                fresh[faulty] = False
            case _:
                pass
        if rng.random() < 0.01:
            now_s += 10.0  # the bus is silent for a while
            actions = voter.handle(Tick(), now_s)
        else:
            actions = []
        actions += voter.handle(Reading("v", tuple(values), None, tuple(fresh)), now_s)
        for action in actions:
            match action:
                case Rejected(_, number, why):
                    assert number not in rejected, "rejected twice"
                    rejected.add(number)
                    seen[why] += 1
                case Restored(_, number):
                    assert number in rejected, "restored without having been rejected"
                    rejected.discard(number)
                    seen["restored"] += 1
                case Lost():
                    assert not lost
                    lost, seen["lost"] = True, seen["lost"] + 1
                case Regained():
                    assert lost
                    lost, seen["regained"] = False, seen["regained"] + 1
        assert set(voter.rejected("v")) == rejected
        voted = voter.value("v", now_s)
        assert (voted.value is None) == (voted.source is Source.NONE)
        if voted.value is not None and voted.age_s == 0.0:
            assert SPEC.low <= voted.value <= SPEC.high
            assert abs(voted.value - truth) <= SPEC.tolerance, "a liar is believed"
    return seen
