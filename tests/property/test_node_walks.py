"""Random walks of the node's pure machines: what must hold after every step, whatever happens."""

from __future__ import annotations

import strategies
from hypothesis import given
from hypothesis import strategies as st

from fdir import health, recovery
from fdir.recovery import RestartPolicy, WorkerRecovery, WorkerState
from node import modes
from node.clock import MissionClock, Tick
from node.downlink import DownlinkWindow, covers
from node.modes import InvalidTransition, ModeMachine
from telemetry.ack import Ack
from telemetry.bus import BusTime
from telemetry.packets import Mode, Stream
from telemetry.spool import SpoolRecord

S = 1_000_000_000


@given(st.lists(st.tuples(strategies.ping_events, strategies.steps_s), max_size=60))
def test_ping_monitor(walk: list[tuple[health.PingEvent, float]]) -> None:
    limits = health.PingLimits(0.1, 0.2, 0.5, 0.1)
    monitor = health.PingMonitor(limits)
    now_s, outstanding, passive = 0.0, None, True
    keys: list[int] = []
    for event, step_s in walk:
        now_s += step_s
        actions = monitor.handle(event, now_s)
        if isinstance(event, health.Arm):
            passive = False
        elif isinstance(event, health.Disarm):
            passive, outstanding = True, None
        elif isinstance(event, health.Pong) and event.key == outstanding:
            outstanding = None
        for action in actions:
            assert not passive
            match action:
                case health.SendPing(key):
                    keys.append(key)
                    outstanding = key
                case health.PingFatal(reason, silent_s):
                    # Fatal only for a wrong key, or for silence past the limit.
                    assert "wrong key" in reason or silent_s >= limits.fatal_s
                    passive, outstanding = True, None
                case health.PingLate(_, silent_s):
                    assert limits.warn_s <= silent_s < limits.fatal_s
                case health.PingRecovered():
                    assert outstanding is None
        assert (monitor.state is health.PingState.PASSIVE) == passive
        assert not (monitor.in_limits and monitor.silent_s >= limits.warn_s)
    assert keys == sorted(set(keys))


@given(
    st.lists(st.tuples(strategies.recovery_events, strategies.steps_s), max_size=80),
    st.lists(st.floats(-100, 100), max_size=5),
)
def test_worker_recovery(walk: list[tuple[recovery.RecoveryEvent, float]], before_s: list[float]) -> None:
    policy = RestartPolicy(limit=3, window_s=20.0, backoff_s=0.1, backoff_max_s=1.0, start_timeout_s=5.0)
    ladder = WorkerRecovery(policy, before_s, 0.0)
    now_s, alive = 0.0, False
    persisted = tuple(sorted(min(t, 0.0) for t in before_s))
    restarts: list[float] = list(persisted)
    for event, step_s in walk:
        now_s += step_s
        if isinstance(event, (recovery.Exited, recovery.Ready, recovery.Fault)) and not alive:
            # The shell reports these of a process only.
            continue
        if isinstance(event, recovery.Exited):
            alive = False
        before = ladder.state
        actions = ladder.handle(event, now_s)
        kinds = [type(a) for a in actions]
        for action in actions:
            match action:
                case recovery.StartWorker():
                    assert not alive, "never two workers"
                    alive = True
                case recovery.PersistRestarts(times_s):
                    assert kinds.index(recovery.PersistRestarts) == 0, "persist first"
                    restarts = list(times_s)
                case recovery.KillWorker() | recovery.StopWorker():
                    assert alive
                case recovery.Exhausted():
                    assert sum(1 for t in restarts if now_s - t < policy.window_s) >= policy.limit
        assert len([t for t in restarts if now_s - t < policy.window_s]) <= max(policy.limit, len(before_s))
        assert alive == (
            ladder.state
            in (WorkerState.STARTING, WorkerState.RUNNING, WorkerState.STOPPING, WorkerState.KILLING)
        )
        if before is WorkerState.GIVEN_UP and ladder.state is not WorkerState.GIVEN_UP:
            assert isinstance(event, recovery.Rearm | recovery.Unwant)


@given(st.lists(strategies.mode_events, max_size=60))
def test_modes(walk: list[modes.ModeEvent]) -> None:
    machine = ModeMachine()
    allowed, persisted = False, False
    for event in walk:
        before = machine.mode
        try:
            actions = machine.handle(event, 0)
        except InvalidTransition:
            assert machine.mode is before
            continue
        for action in actions:
            match action:
                case modes.PersistSafe(safe):
                    persisted = safe
                case modes.AllowInference():
                    allowed = True
                case modes.ForbidInference():
                    allowed = False
        if before is not Mode.BOOT:
            assert persisted == (machine.mode is Mode.SAFE) or not actions
        assert allowed == (machine.mode in (Mode.NOMINAL, Mode.ECLIPSE))
        assert bool(actions) == (machine.mode is not before)
        if before is Mode.SAFE and machine.mode is not Mode.SAFE:
            assert isinstance(event, modes.Command)


@given(
    st.sampled_from([1.0, 60.0, 0.5, 1000.0]),
    st.lists(st.tuples(st.floats(0, 5), st.floats(-0.49, 0.49)), max_size=30),
)
def test_mission_time_never_runs_backwards_while_errors_are_small(
    rate: float, walk: list[tuple[float, float]]
) -> None:
    mono_ns, t0 = S, 1_700_000_000 * S
    clock = MissionClock(0, 0)
    clock.handle(BusTime(t_ns=t0 - round(rate * S), rate=rate), 0)
    clock.handle(BusTime(t_ns=t0, rate=rate), mono_ns)
    last_ns = clock.now_ns(mono_ns)
    assert last_ns == t0
    for step_s, error_s in walk:
        for part in (0.3, 0.7, 1.0):
            now_ns = clock.now_ns(mono_ns + round(part * step_s * S))
            assert now_ns >= last_ns
            last_ns = now_ns
        mono_ns += round(step_s * S)
        assert clock.handle(Tick(), mono_ns) == [] or step_s >= 3
        truth_ns = clock.now_ns(mono_ns) + round(error_s * rate * S)
        clock.handle(BusTime(t_ns=truth_ns, rate=rate), mono_ns)
        assert clock.now_ns(mono_ns) >= last_ns
        settled_ns = clock.now_ns(mono_ns + 2 * S)
        assert abs(settled_ns - (truth_ns + round(2 * rate * S))) <= 2


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("sent"), st.integers(0, 20)),
            st.tuples(st.just("ack"), st.integers(0, 20)),
            st.tuples(st.just("failed"), st.integers(0, 20)),
            st.tuples(st.just("down"), st.just(0)),
            st.tuples(st.just("wait"), st.integers(0, 30)),
        ),
        max_size=80,
    )
)
def test_downlink_window_never_holds_an_unacknowledged_record_back_for_ever(
    walk: list[tuple[str, int]],
) -> None:
    window = DownlinkWindow(4, 1.0)
    now_s = 0.0
    for what, number in walk:
        now_s += 0.05
        record = SpoolRecord(number, Stream.EVENT, 1, number, b"")
        match what:
            case "sent" if number not in window.waiting(now_s) and window.room(now_s) > 0:
                window.on_sent(record, now_s)
                assert number in window.waiting(now_s)
            case "ack":
                window.on_ack(Ack(node="n", boot=1, stream=Stream.EVENT, upto=number + 1))
                assert not any(row <= number for row in window.waiting(now_s))
            case "failed":
                window.on_failed(record)
                assert number not in window.waiting(now_s)
            case "down":
                window.on_disconnected()
                assert window.room(now_s) == window.limit
            case "wait":
                now_s += number
        assert 0 <= window.room(now_s) <= window.limit
    assert window.waiting(now_s + 64.001) == set()
    assert window.room(now_s + 1.001) == window.limit


@given(strategies.acks(), st.integers(0, 400))
def test_an_acknowledgement_covers_what_its_ranges_say(ack: Ack, seq: int) -> None:
    within = any(first <= seq <= last for first, last in ack.ranges())
    assert covers(ack, ack.stream, ack.boot, seq) == within
    assert not covers(ack, ack.stream, ack.boot + 1, seq)
