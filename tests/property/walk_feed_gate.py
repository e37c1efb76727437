"""A random walk over what a watchdog is fed on. `walk` may be run at any length."""

from __future__ import annotations

import math
import random

from node.feed_gate import (
    Feed,
    FeedGate,
    FeedLimits,
    GateEvent,
    LagBeat,
    PingReport,
    RestartRequested,
    Stopping,
    Withheld,
)

LIMITS = FeedLimits(period_s=1.0, lag_s=2.0, report_s=3.0, start_s=20.0, stop_s=15.0)
LIFE_STEPS = 400
"""Steps of one node's life: a restart or a stop ends what can still be fed."""


def walk(steps: int, seed: int) -> None:
    """Take `steps` random events; raise AssertionError when what must hold does not."""
    rng = random.Random(seed)
    for begin in range(0, steps, LIFE_STEPS):
        _life(rng, min(LIFE_STEPS, steps - begin))


def _life(rng: random.Random, steps: int) -> None:
    began_s = now_s = rng.uniform(0, 1e6)
    gate = FeedGate(LIMITS, now_s)
    report: tuple[str, ...] | None = None
    report_s = fed_s = -math.inf
    stopping_s: float | None = None
    restart = False
    told_withheld = False
    # Some nodes never come so far as to look at their patients, or only late.
    silent_until_s = began_s + rng.choice((0.0, 0.0, 30.0, math.inf))
    for _ in range(steps):
        now_s += rng.choice((0.0, 0.1, 0.1, 0.3, 1.0, 4.0))
        lag_s = 0.0
        event: GateEvent
        match rng.random():
            case x if x < 0.5:
                lag_s = rng.choice((0.0, 0.0, 0.0, 0.0, 1.9, 2.1, math.nan))
                event = LagBeat(lag_s)
            case x if x < 0.995 and now_s >= silent_until_s:
                report, report_s = rng.choice(((), (), (), ("jobs",), ("jobs", "link"))), now_s
                event = PingReport(report)
            case x if x < 0.996:
                continue
            case x if x < 0.998:
                stopping_s = now_s if stopping_s is None else stopping_s
                event = Stopping()
            case _:
                restart = True
                event = RestartRequested("r")
        feeds = gate.feeds
        actions = gate.handle(event, now_s)
        if not isinstance(event, LagBeat):
            assert actions == [], "something else than a beat acts"
            continue
        if stopping_s is not None:
            excused_or_well = now_s - stopping_s <= LIMITS.stop_s
        elif report is None:
            excused_or_well = now_s - began_s <= LIMITS.start_s
        else:
            excused_or_well = report == () and now_s - report_s <= LIMITS.report_s
        may = lag_s <= LIMITS.lag_s and not restart and excused_or_well
        due = now_s - fed_s >= LIMITS.period_s
        assert (Feed() in actions) == (may and due), "fed when it must not be, or not fed when it must be"
        assert gate.feeds == feeds + (Feed() in actions)
        assert (gate.withheld == ()) == may
        fed_s = now_s if Feed() in actions else fed_s
        words = [a for a in actions if a != Feed()]
        if words:
            (word,) = words
            assert isinstance(word, Withheld) or told_withheld, "resumed what was not withheld"
            told_withheld = isinstance(word, Withheld)
        assert told_withheld == (not may), "the last word on feeding is out of date"
