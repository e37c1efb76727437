"""A random walk over the life of the worker, with restarts of the node. `walk` may be run at any length."""

from __future__ import annotations

import random

from fdir import recovery
from fdir.recovery import RestartPolicy, WorkerRecovery, WorkerState

POLICY = RestartPolicy(limit=3, window_s=20.0, backoff_s=0.1, backoff_max_s=1.0, start_timeout_s=5.0)
ALIVE = (WorkerState.STARTING, WorkerState.RUNNING, WorkerState.STOPPING, WorkerState.KILLING)


def event_of(rng: random.Random, alive: bool) -> recovery.RecoveryEvent:
    pick = rng.random()
    if pick < 0.4:
        return recovery.Tick()
    if alive and pick < 0.55:
        return recovery.Ready()
    if alive and pick < 0.75:
        return recovery.Exited("e")
    if alive and pick < 0.85:
        return recovery.Fault("worker.ping", "r")
    if pick < 0.95:
        return recovery.Want()
    return recovery.Unwant() if pick < 0.985 else recovery.Rearm()


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` random events; raise AssertionError when what must hold does not. Returns what it saw."""
    rng = random.Random(seed)
    life = WorkerRecovery(POLICY, (), 0.0)
    now_s, alive, late_told, told = 0.0, False, False, False
    persisted: tuple[float, ...] = ()
    seen = dict.fromkeys(("starts", "kills", "stops", "restarts", "exhausted", "late", "boots"), 0)
    for _ in range(steps):
        now_s += rng.choice((0.0, 0.05, 0.05, 0.5, 3.0, 25.0 if rng.random() < 0.2 else 0.05))
        if rng.random() < 0.002:
            # The node dies, and its worker with it.
            life, alive, told = WorkerRecovery(POLICY, persisted, now_s), False, False
            seen["boots"] += 1
            life.handle(recovery.Unwant(), now_s)
        event = event_of(rng, alive)
        if isinstance(event, recovery.Exited):
            alive = False
        before = life.state
        actions = life.handle(event, now_s)
        for number, action in enumerate(actions):
            match action:
                case recovery.StartWorker():
                    assert not alive, "two workers"
                    alive, late_told = True, False
                    seen["starts"] += 1
                case recovery.KillWorker():
                    assert alive
                    seen["kills"] += 1
                case recovery.StopWorker():
                    assert alive
                    seen["stops"] += 1
                case recovery.PersistRestarts(times_s):
                    assert number == 0, "persist first"
                    persisted = times_s
                case recovery.ReportFault(restarts=restarts):
                    assert restarts <= POLICY.limit, "more restarts than the window allows"
                    told, seen["restarts"] = True, seen["restarts"] + 1
                case recovery.ReportRestarted():
                    assert told, "restarted without a fault"
                    told = False
                case recovery.StartLate():
                    assert before is WorkerState.STARTING
                    assert not late_told, "late twice for one start"
                    late_told, seen["late"] = True, seen["late"] + 1
                case recovery.Exhausted():
                    in_window = [t for t in persisted if now_s - t < POLICY.window_s]
                    assert len(in_window) >= POLICY.limit, "gave up with restarts left"
                    seen["exhausted"] += 1
        assert alive == (life.state in ALIVE)
        assert len([t for t in persisted if now_s - t < POLICY.window_s]) <= POLICY.limit
        if before is WorkerState.GIVEN_UP and life.state is not WorkerState.GIVEN_UP:
            assert isinstance(event, recovery.Rearm | recovery.Unwant)
        assert not (life.is_at_rest and alive)
    return seen
