"""A random walk over the mission clock. `walk` may be run at any length."""

from __future__ import annotations

import random

from node.clock import (
    CONFIRM_AFTER_S,
    HOLD_S,
    STEP_S,
    ClockLocked,
    ClockLost,
    ClockStepped,
    MissionClock,
    StepHeld,
    StepRejected,
    Tick,
)
from telemetry.bus import BusTime

S = 1_000_000_000
T0 = 1_700_000_000 * S
RATES = (1.0, 1.0, 1.0, 60.0, 0.001)


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` random events; raise AssertionError when what must hold does not. Returns what it saw.

    The bus has a true clock, which now and then is set anew or runs at another rate, and between its samples
    come wrong ones, copies, bursts and silence.
    """
    rng = random.Random(seed)
    seen = {kind.__name__: 0 for kind in (ClockLocked, ClockStepped, StepHeld, StepRejected, ClockLost)}
    mono_ns, true_ns, rate = 0, T0 + rng.randrange(10**6) * S, 1.0
    clock = MissionClock(T0, mono_ns)
    heard: list[tuple[BusTime, int]] = []
    held_ns: int | None = None
    true_in_a_row = 0
    for _ in range(steps):
        pause_ns = round(rng.choice((0.001, 0.05, 0.2, 0.5, 0.5, 1.0, 4.0, 30.0)) * S)
        mono_ns, true_ns = mono_ns + pause_ns, true_ns + round(pause_ns * rate)
        before_ns, before_known, before_rate = clock.now_ns(mono_ns), clock.known, clock.rate
        event: BusTime | Tick = BusTime(t_ns=true_ns, rate=rate)
        match rng.random():
            case x if x < 0.25:
                event = Tick()
            case x if x < 0.35:
                event = BusTime(t_ns=T0 + rng.randrange(2 * 10**9) * S, rate=rng.choice(RATES))
            case x if x < 0.40 and heard:
                event = heard[-1][0]
            case x if x < 0.42:
                true_ns, rate = T0 + rng.randrange(10**6) * S, rng.choice(RATES)
                event = BusTime(t_ns=true_ns, rate=rate)
                true_in_a_row = 0
            case _:
                pass
        actions = clock.handle(event, mono_ns)
        now_ns = clock.now_ns(mono_ns)
        moved = abs(now_ns - before_ns) > 1 or clock.rate != before_rate
        if isinstance(event, Tick):
            assert not moved, "mission time moved without the bus"
        else:
            if moved:
                assert any(_same_clock(event, mono_ns, *other) for other in heard), "one sample moved it"
            true_in_a_row = true_in_a_row + 1 if event.t_ns == true_ns and event.rate == rate else 0
            if true_in_a_row and pause_ns < CONFIRM_AFTER_S * S:
                true_in_a_row -= 1
            if true_in_a_row >= 3:
                assert not clock.holding, "a bus that is right again is not followed"
                assert abs(now_ns - true_ns) <= STEP_S * S * rate + 1
                assert clock.locked
            heard = [*heard[-7:], (event, mono_ns)]
        for action in actions:
            seen[type(action).__name__] += 1
            match action:
                case StepHeld():
                    assert held_ns is None, "held twice"
                    assert before_known
                    held_ns = mono_ns
                case StepRejected():
                    assert held_ns is not None, "rejected what was not held"
                    assert abs(now_ns - before_ns) <= 1, "rejected, and made"
                    held_ns = None
                case ClockStepped():
                    held_ns = None
                case _:
                    pass
        assert clock.holding == (held_ns is not None), "each step that is held is confirmed or rejected"
        if held_ns is not None and isinstance(event, Tick):
            assert mono_ns - held_ns < HOLD_S * S, "held for ever"
        assert clock.known >= before_known
        assert not clock.locked or clock.known
    return seen


def _same_clock(sample: BusTime, mono_ns: int, before: BusTime, before_mono_ns: int) -> bool:
    elapsed_ns = mono_ns - before_mono_ns
    error_ns = sample.t_ns - before.t_ns - elapsed_ns * sample.rate
    return (
        elapsed_ns >= CONFIRM_AFTER_S * S
        and sample.rate == before.rate
        and sample.t_ns > before.t_ns
        and abs(error_ns) <= STEP_S * S * sample.rate
    )
