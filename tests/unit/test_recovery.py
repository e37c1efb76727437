from __future__ import annotations

import pytest

from fdir.recovery import (
    Exhausted,
    Exited,
    Fault,
    KillWorker,
    PersistRestarts,
    Ready,
    Rearm,
    ReportFault,
    ReportRestarted,
    RestartPolicy,
    StartLate,
    StartWorker,
    StopWorker,
    Tick,
    Unwant,
    Want,
    WorkerRecovery,
    WorkerState,
)

POLICY = RestartPolicy(limit=3, window_s=60.0, backoff_s=1.0, backoff_max_s=10.0, start_timeout_s=5.0)


def running(restarts_s: tuple[float, ...] = ()) -> WorkerRecovery:
    ladder = WorkerRecovery(POLICY, restarts_s, 0.0)
    assert ladder.handle(Want(), 0.0) == [StartWorker()]
    assert ladder.handle(Ready(), 0.0) == []
    assert ladder.state is WorkerState.RUNNING
    return ladder


def test_a_crash_is_persisted_reported_and_restarted_at_once() -> None:
    ladder = running()
    assert ladder.handle(Exited("killed"), 1.0) == [
        PersistRestarts((1.0,)),
        ReportFault("worker.exit", "killed", 1, 0.0),
        StartWorker(),
    ]
    assert ladder.handle(Ready(), 2.0) == [ReportRestarted()]
    assert ladder.handle(Ready(), 2.0) == []


def test_a_faulty_worker_is_killed_first_and_the_fault_keeps_its_cause() -> None:
    ladder = running()
    assert ladder.handle(Fault("worker.ping", "silent"), 1.0) == [KillWorker()]
    assert ladder.handle(Fault("worker.ping", "again"), 1.1) == []
    actions = ladder.handle(Exited("killed by signal 9"), 1.2)
    assert ReportFault("worker.ping", "silent", 1, 0.0) in actions


def test_the_second_restart_waits_and_the_wait_doubles() -> None:
    ladder = running()
    ladder.handle(Exited("x"), 1.0)
    assert ladder.handle(Exited("x"), 2.0)[-1] == ReportFault("worker.exit", "x", 2, 1.0)
    assert ladder.state is WorkerState.BACKOFF
    assert ladder.handle(Tick(), 2.9) == []
    assert ladder.handle(Tick(), 3.0) == [StartWorker()]
    assert ladder.handle(Exited("x"), 4.0)[-1] == ReportFault("worker.exit", "x", 3, 2.0)


def test_one_fault_beyond_the_limit_exhausts_restarts_until_rearmed() -> None:
    ladder = running((-1.0, -2.0, -3.0))
    assert ladder.handle(Exited("x"), 1.0) == [Exhausted("worker.exit", "x")]
    assert ladder.state is WorkerState.GIVEN_UP
    for event in (Tick(), Want(), Ready(), Exited("y"), Fault("m", "r")):
        assert ladder.handle(event, 500.0) == []
    assert ladder.handle(Rearm(), 501.0) == [PersistRestarts(()), StartWorker()]


def test_exhausted_restarts_are_not_forgotten_when_the_worker_is_held_and_released() -> None:
    ladder = running((-1.0, -2.0, -3.0))
    ladder.handle(Exited("x"), 1.0)
    assert not ladder.is_at_rest
    assert ladder.handle(Unwant(), 2.0) == []
    assert ladder.is_at_rest
    assert ladder.handle(Want(), 3.0) == [StartWorker()]
    assert ladder.handle(Exited("y"), 4.0) == [Exhausted("worker.exit", "y")]


def test_old_restarts_do_not_count() -> None:
    ladder = running((-1.0, -2.0, -3.0))
    assert ladder.restarts_in_window(0.0) == 3
    assert ladder.restarts_in_window(58.5) == 1
    actions = ladder.handle(Exited("x"), 100.0)
    assert actions[0] == PersistRestarts((100.0,))


def test_restarts_stored_before_the_host_was_restarted_count_as_now() -> None:
    ladder = WorkerRecovery(POLICY, (1e9, 1e9, 1e9), 5.0)
    assert ladder.restarts_in_window(5.0) == 3
    assert ladder.restarts_in_window(66.0) == 0


def test_a_worker_that_does_not_get_ready_in_time_is_told_once_a_start() -> None:
    ladder = WorkerRecovery(POLICY, (), 0.0)
    ladder.handle(Want(), 10.0)
    assert ladder.handle(Tick(), 14.9) == []
    assert ladder.handle(Tick(), 15.0) == [StartLate("not ready 5 s after its start")]
    assert ladder.handle(Tick(), 25.0) == []
    assert ladder.handle(Fault("worker.start", "late"), 25.1) == [KillWorker()]
    report = ladder.handle(Exited("killed"), 25.2)[1]
    assert isinstance(report, ReportFault)
    assert report.monitor == "worker.start"
    assert ladder.state is WorkerState.STARTING
    assert ladder.handle(Tick(), 31.0) == [StartLate("not ready 5 s after its start")]


def test_a_late_worker_that_nobody_minds_may_still_get_ready() -> None:
    ladder = WorkerRecovery(POLICY, (), 0.0)
    ladder.handle(Want(), 0.0)
    assert ladder.handle(Tick(), 6.0)
    ladder.handle(Ready(), 60.0)
    assert ladder.state is WorkerState.RUNNING


def test_an_ordered_stop_is_no_fault() -> None:
    ladder = running()
    assert ladder.handle(Unwant(), 1.0) == [StopWorker()]
    assert ladder.handle(Fault("worker.ping", "late"), 1.1) == []
    assert ladder.handle(Exited("code 0"), 1.2) == []
    assert ladder.state is WorkerState.STOPPED


def test_wanted_again_while_stopping_it_is_started_when_the_old_one_is_gone() -> None:
    ladder = running()
    ladder.handle(Unwant(), 1.0)
    assert ladder.handle(Want(), 1.1) == []
    assert ladder.handle(Exited("code 0"), 1.2) == [StartWorker()]


def test_not_wanted_while_backing_off_or_being_killed_it_stays_down() -> None:
    ladder = running()
    ladder.handle(Exited("x"), 1.0)
    ladder.handle(Exited("x"), 2.0)
    assert ladder.handle(Unwant(), 2.1) == []
    assert ladder.handle(Tick(), 100.0) == []
    assert ladder.state is WorkerState.STOPPED
    ladder = running()
    ladder.handle(Fault("m", "r"), 1.0)
    assert ladder.handle(Unwant(), 1.1) == []
    assert ladder.handle(Exited("killed"), 1.2) == []
    assert ladder.state is WorkerState.STOPPED


def test_the_wait_is_bounded() -> None:
    assert [POLICY.delay_s(n) for n in (0, 1, 2, 3, 6, 5000)] == [0.0, 0.0, 1.0, 2.0, 10.0, 10.0]


@pytest.mark.parametrize(
    "wrong",
    [{"limit": 0}, {"window_s": 0.0}, {"backoff_s": -1.0}, {"backoff_max_s": 0.0}, {"start_timeout_s": 0.0}],
)
def test_bounds_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="required"):
        RestartPolicy(**wrong)  # type: ignore[arg-type]
