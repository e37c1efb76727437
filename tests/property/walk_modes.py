"""A random walk over the node's modes. `walk` may be run at any length."""

from __future__ import annotations

import random

from node import modes
from node.modes import InvalidTransition, ModeMachine
from telemetry.packets import Mode


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` random events; raise AssertionError when what must hold does not. Returns what it saw."""
    rng = random.Random(seed)
    machine, allowed, persisted, dark = ModeMachine(), False, False, False
    seen = {**{str(mode): 0 for mode in Mode}, "refused": 0}
    for _ in range(steps):
        if rng.random() < 0.002:
            machine, allowed = ModeMachine(), False  # a new boot
        event: modes.ModeEvent
        match rng.random():
            case x if x < 0.1:
                event = modes.Restored(persisted)
            case x if x < 0.7:
                event = modes.Sunlight(rng.choice((0.0, 0.3, 0.5, 0.7, 1.0)))
            case x if x < 0.9:
                event = modes.Command(rng.choice((Mode.NOMINAL, Mode.NOMINAL, Mode.SAFE)))
            case _:
                event = modes.FdirSafe("r")
        before = machine.mode
        try:
            actions = machine.handle(event, 0)
        except InvalidTransition:
            assert machine.mode is before, "a refused event changed the mode"
            seen["refused"] += 1
            continue
        for number, action in enumerate(actions):
            match action:
                case modes.PersistSafe(safe):
                    assert number == 0, "persist first"
                    persisted = safe
                case modes.AllowInference():
                    allowed = True
                case modes.ForbidInference():
                    allowed = False
        if isinstance(event, modes.Sunlight) and event.fraction != 0.5:
            dark = event.fraction < 0.5
            assert machine.mode not in {Mode.ECLIPSE if not dark else Mode.NOMINAL}, (
                "the wrong side of the shadow"
            )
        assert allowed == (machine.mode in {Mode.NOMINAL, Mode.ECLIPSE})
        assert bool(actions) == (machine.mode is not before)
        assert machine.mode is not Mode.SAFE or persisted
        if before is Mode.SAFE and machine.mode is not Mode.SAFE:
            assert isinstance(event, modes.Command), "safe mode was left without a command"
        seen[machine.mode] += 1
    return seen
