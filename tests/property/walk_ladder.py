"""A random walk over the recovery ladder, with restarts of the node. `walk` may be run at any length."""

from __future__ import annotations

import random

from some_rows import ladder_table

from fdir.ladder import (
    Act,
    DeEscalated,
    Detected,
    Escalate,
    ExternalControl,
    Failed,
    Ladder,
    LadderEvent,
    PersistResets,
    Recovered,
    ResetCount,
    ResetCounters,
    SafeChanged,
    SetStates,
    Suppressed,
    Tick,
)
from fdir.table import Action, RowState
from telemetry.packets import Level

TABLE = ladder_table()
LIMIT = 3


def event_of(rng: random.Random, ladder: Ladder, external: bool) -> LadderEvent:  # noqa: PLR0911
    running = ladder.running()
    match rng.random():
        case x if x < 0.45:
            return Detected(TABLE.row(rng.choice(TABLE.ids)), {"n": 1}, "found")
        case x if x < 0.60:
            return Recovered(rng.choice(running or TABLE.ids))
        case x if x < 0.70:
            return Failed(rng.choice(running or TABLE.ids), "no")
        case x if x < 0.90:
            return Tick()
        case x if x < 0.93:
            return ExternalControl(on=not external if rng.random() < 0.5 else False)
        case x if x < 0.96:
            return SafeChanged(safe=rng.random() < 0.3)
        case x if x < 0.99:
            return SetStates({row: rng.choice(tuple(RowState)) for row in TABLE.ids if rng.random() < 0.2})
        case _:
            return ResetCounters()


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` random events; raise AssertionError when what must hold does not.

    Returns how often each action was asked for, and how often the node started anew.
    """
    rng = random.Random(seed)
    now_s, persisted, external, safe = 0.0, 0, False, False
    states: dict[str, RowState] = {}
    ladder = Ladder(TABLE, ResetCount(0, LIMIT), now_s)
    acts: dict[str, list[float]] = {row: [] for row in TABLE.ids}
    seen = dict.fromkeys([*(str(a) for a in Action), "boots", "forgotten"], 0)
    for _ in range(steps):
        now_s += rng.choice((0.0, 0.5, 1.0, 3.0, 20.0, 200.0, 9000.0 if rng.random() < 0.1 else 1.0))
        if rng.random() < 0.002:
            # The node dies and comes back with what was persisted; safe mode is kept elsewhere.
            ladder = Ladder(TABLE, ResetCount(persisted, LIMIT), now_s, safe=safe, external_control=external)
            states, acts = {}, {row: [] for row in TABLE.ids}
            seen["boots"] += 1
        event = event_of(rng, ladder, external)
        running = set(ladder.running())
        actions = ladder.handle(event, now_s)
        match event:
            case ExternalControl(on):
                external = on
            case SafeChanged(new):
                if safe and not new:
                    acts = {row: [] for row in TABLE.ids}
                safe = new
            case SetStates(new):
                states = dict(new)
            case ResetCounters():
                acts = {row: [] for row in TABLE.ids}
            case Failed(row) if TABLE.row(row).action is Action.SAFE_MODE and row in acts:
                if any(isinstance(a, Suppressed) for a in actions):
                    safe = False
            case _:
                pass
        level = -1
        for number, action in enumerate(actions):
            match action:
                case PersistResets(count):
                    persisted = count
                    assert 0 <= count <= LIMIT, "more resets than allowed"
                    seen["forgotten"] += count == 0
                case Escalate(below, above):
                    assert above.level > below.level, "it does not escalate upwards"
                    assert isinstance(actions[number + 1], Act | PersistResets | Escalate)
                    acts[below.id] = []
                case Act(row, attempt):
                    seen[row.action] += 1
                    assert not external, "something is done under external control"
                    assert states.get(row.id, row.state) is RowState.ENABLED
                    assert row.level > level, "one event leads down the ladder"
                    level = row.level
                    if row.action in {Action.RESTART_WORKER, Action.SWITCH_IMAGE}:
                        assert not safe, "the worker is touched in safe mode"
                    if row.action in {Action.SWITCH_IMAGE, Action.RESTART_NODE}:
                        assert row.id not in running or isinstance(event, Failed | Tick), "started twice"
                    if row.level is Level.NODE_RESTART:
                        assert isinstance(actions[number - 1], PersistResets), "a reset is not counted first"
                    if row.attempts:
                        times = [t for t in acts[row.id] if now_s - t < row.window_s]
                        acts[row.id] = [*times, now_s]
                        assert attempt <= row.attempts
                        assert len(acts[row.id]) <= row.attempts, "more attempts than the row has"
                    if row.action is Action.SAFE_MODE:
                        assert not safe
                        safe = True
                case DeEscalated(row):
                    assert now_s >= TABLE.row(row).clean_s
                    acts[row] = []
                case Suppressed():
                    assert isinstance(event, Detected | Failed | Tick)
        assert ladder.resets.count == persisted, "the count in use is not the one persisted"
        assert (ladder.level is Level.SAFE_MODE) == safe
        assert len(ladder.running()) == len(set(ladder.running()))
    return seen
