"""A random walk over the parent of the node. `walk` may be run at any length."""

from __future__ import annotations

import random

from node.supervision import (
    AskStop,
    End,
    Exited,
    Fed,
    Kill,
    Limits,
    Start,
    StopAsked,
    Supervision,
    Tick,
    Wait,
)

LIMITS = Limits(feed_s=5.0, start_s=20.0, stop_s=8.0, quick_s=10.0, wait_s=1.0, longest_wait_s=4.0)


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` random events; raise AssertionError when what must hold does not. Returns what it saw."""
    rng = random.Random(seed)
    seen = dict.fromkeys(("starts", "kills", "waits", "ends"), 0)
    now_s = 0.0
    supervision, running, killed, stopping, fed_s = Supervision(LIMITS), False, False, False, 0.0
    actions = supervision.begin(now_s)
    for _ in range(steps):
        for action in actions:
            match action:
                case Start():
                    assert not running, "two nodes"
                    running, killed, fed_s = True, False, now_s
                    seen["starts"] += 1
                case Kill():
                    assert running
                    assert not killed, "killed twice"
                    assert now_s - fed_s >= LIMITS.feed_s, "a node that feeds was killed"
                    killed, seen["kills"] = True, seen["kills"] + 1
                case AskStop():
                    assert running
                    stopping, fed_s = True, now_s  # from now on feeds do not matter, only the time
                case Wait(for_s):
                    assert not running
                    assert LIMITS.wait_s <= for_s <= LIMITS.longest_wait_s
                    seen["waits"] += 1
                case End():
                    assert not running
                    seen["ends"] += 1
                    supervision, running, stopping = Supervision(LIMITS), False, False
                    for first in supervision.begin(now_s):
                        assert isinstance(first, Start)
                        running, killed, fed_s = True, False, now_s
        now_s += rng.choice((0.1, 0.5, 1.0, 2.0, 6.0))
        match rng.random():
            case x if x < 0.4 and running and not killed:
                event: Fed | Exited | StopAsked | Tick = Fed()
                fed_s = fed_s if stopping else now_s
            case x if x < 0.45 and running:
                event, running = Exited(rng.choice((75, 70, -9, 0, 2))), False
            case x if x < 0.46:
                event = StopAsked()
            case _:
                event = Tick()
                if killed and running and rng.random() < 0.5:
                    event, running = Exited(-9), False
        actions = supervision.handle(event, now_s)
        assert supervision.next_s(now_s) >= 0
    return seen
