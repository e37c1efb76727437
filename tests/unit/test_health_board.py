from __future__ import annotations

import pytest

from fdir.health import (
    Arm,
    Disarm,
    ForPatient,
    HealthBoard,
    PingFatal,
    PingLate,
    PingLimits,
    PingRecovered,
    Pong,
    SendPing,
    SetEnabled,
    SetLimits,
    Tick,
)

LIMITS = PingLimits(period_s=0.5, warn_s=1.0, fatal_s=2.0, stall_s=0.5)
SLOW = PingLimits(period_s=1.0, warn_s=3.0, fatal_s=6.0, stall_s=0.5)


def armed() -> HealthBoard:
    board = HealthBoard({"jobs": LIMITS, "link": SLOW})
    assert board.handle(ForPatient("jobs", Arm()), 0.0) == [ForPatient("jobs", SendPing(1))]
    assert board.handle(ForPatient("link", Arm()), 0.0) == [ForPatient("link", SendPing(1))]
    return board


def kinds(actions: list[ForPatient]) -> list[tuple[str, type]]:
    return [(a.name, type(a.what)) for a in actions]


def test_a_patient_that_was_never_armed_is_out_of_limits() -> None:
    board = HealthBoard({"jobs": LIMITS, "link": SLOW})
    assert board.names == ("jobs", "link")
    assert board.out_of_limits == ("jobs", "link")
    board.handle(ForPatient("jobs", Arm()), 0.0)
    assert board.out_of_limits == ("link",)
    assert not board.in_limits
    board.handle(ForPatient("link", Arm()), 0.0)
    assert board.in_limits


def test_each_patient_is_judged_by_its_own_limits() -> None:
    board = armed()
    assert board.handle(Tick(), 0.5) == []
    assert kinds(board.handle(Tick(), 1.0)) == [("jobs", PingLate)]
    assert board.out_of_limits == ("jobs",)
    assert board.silent_s("link") == 1.0
    assert board.handle(ForPatient("jobs", Pong(1)), 1.1) == [ForPatient("jobs", PingRecovered(1, 1.0))]
    assert board.in_limits


def test_a_lost_patient_stays_out_of_limits_until_it_is_armed_again() -> None:
    board = armed()
    for now_s in (0.5, 1.0, 1.5):
        board.handle(Tick(), now_s)
    assert kinds(board.handle(Tick(), 2.0)) == [("jobs", PingFatal)]
    board.handle(ForPatient("link", Pong(1)), 2.0)
    assert board.out_of_limits == ("jobs",)
    assert kinds(board.handle(Tick(), 2.5)) == [("link", SendPing)]
    # The answer to the ping that was given up on comes at last: late, and no second finding.
    assert board.handle(ForPatient("jobs", Pong(1)), 2.6) == []
    assert board.out_of_limits == ("jobs",)
    assert board.handle(ForPatient("jobs", Arm()), 3.0) == [ForPatient("jobs", SendPing(2))]
    assert board.in_limits
    assert board.handle(ForPatient("jobs", Pong(2)), 3.1) == []


def test_an_answer_overtaken_by_a_new_ping_is_not_a_wrong_key() -> None:
    board = armed()
    assert board.handle(ForPatient("jobs", Arm()), 0.1) == [ForPatient("jobs", SendPing(2))]
    assert board.handle(ForPatient("jobs", Pong(1)), 0.2) == []
    assert board.in_limits
    # But it is let pass only once.
    assert kinds(board.handle(ForPatient("jobs", Pong(1)), 0.3)) == [("jobs", PingFatal)]


def test_a_wrong_key_is_fatal() -> None:
    board = armed()
    assert kinds(board.handle(ForPatient("jobs", Pong(5)), 0.2)) == [("jobs", PingFatal)]
    assert board.out_of_limits == ("jobs",)


def test_who_is_disarmed_on_purpose_is_excused() -> None:
    board = armed()
    assert board.handle(ForPatient("jobs", Disarm()), 0.1) == []
    assert board.in_limits
    assert kinds(board.handle(Tick(), 0.6)) == []
    assert board.silent_s("jobs") == 0.0


def test_who_is_not_enabled_is_neither_pinged_nor_counted() -> None:
    board = armed()
    assert board.handle(SetEnabled("jobs", False), 0.1) == []
    assert not board.is_enabled("jobs")
    for tick in range(1, 11):
        assert all(a.name == "link" for a in board.handle(Tick(), 0.5 * tick))
    assert board.out_of_limits == ("link",)
    # Taken in again it gets a new ping, and the answer to the old one is not held against it.
    assert board.handle(SetEnabled("jobs", True), 6.0) == [ForPatient("jobs", SendPing(2))]
    assert board.handle(ForPatient("jobs", Pong(1)), 6.0) == []
    assert board.handle(ForPatient("jobs", Pong(2)), 6.1) == []
    assert board.out_of_limits == ("link",)


def test_enabling_arms_only_who_was_armed() -> None:
    board = HealthBoard({"jobs": LIMITS})
    board.handle(SetEnabled("jobs", False), 0.0)
    assert board.in_limits
    assert board.handle(SetEnabled("jobs", True), 0.0) == []
    assert board.out_of_limits == ("jobs",)

    board.handle(SetEnabled("jobs", False), 0.0)
    assert board.handle(ForPatient("jobs", Arm()), 0.0) == []
    assert board.handle(SetEnabled("jobs", True), 0.0) == [ForPatient("jobs", SendPing(1))]
    assert board.handle(SetEnabled("jobs", True), 0.0) == []


def test_new_limits_apply_to_the_ping_under_way() -> None:
    board = armed()
    board.handle(SetLimits("jobs", SLOW), 0.0)
    assert board.limits("jobs") == SLOW
    for tick in range(1, 6):
        assert board.handle(Tick(), 0.5 * tick) == []
    assert board.in_limits
    board.handle(SetLimits("jobs", LIMITS), 2.5)
    assert kinds(board.handle(Tick(), 3.0)) == [("jobs", PingFatal), ("link", PingLate)]


@pytest.mark.parametrize(
    "event", [ForPatient("power", Arm()), SetEnabled("power", True), SetLimits("power", LIMITS)]
)
def test_an_unknown_patient_is_refused_by_name(event: ForPatient | SetEnabled | SetLimits) -> None:
    with pytest.raises(ValueError, match="no patient 'power', there are: jobs, link"):
        armed().handle(event, 0.0)


def test_an_action_is_no_event() -> None:
    with pytest.raises(ValueError, match="not an event of one patient"):
        armed().handle(ForPatient("jobs", SendPing(3)), 0.0)
