from __future__ import annotations

from node.scheduler import End, Park, Start, Task, plan


def test_the_batch_is_filled_by_priority_then_deadline_then_age() -> None:
    queued = [
        Task("old", 1),
        Task("late", 2, deadline_ns=900),
        Task("soon", 3, deadline_ns=500),
        Task("high", 4, priority=9),
        Task("low", 5, priority=0, deadline_ns=200),
    ]
    assert plan([], queued, 4, 0) == [Start("high"), Start("soon"), Start("late"), Start("old")]


def test_a_higher_job_takes_the_place_of_the_lowest_and_youngest() -> None:
    active = [Task("a", 1, priority=5), Task("b", 2, priority=3), Task("c", 3, priority=3)]
    assert plan(active, [Task("d", 4, priority=7)], 3, 0) == [Park("c")]
    leaving = [active[0], active[1], Task("c", 3, priority=3, leaving=True)]
    assert plan(leaving, [Task("d", 4, priority=7)], 3, 0) == []
    assert plan(active[:2], [Task("c", 3, priority=3), Task("d", 4, priority=7)], 3, 0) == [Start("d")]


def test_an_equal_job_waits_even_with_an_earlier_deadline() -> None:
    active = [Task("a", 2)]
    assert plan(active, [Task("b", 1, deadline_ns=10)], 1, 0) == []


def test_a_smaller_batch_parks_what_is_beyond_it_and_a_larger_one_takes_it_back() -> None:
    active = [Task("a", 1), Task("b", 2), Task("c", 3, priority=6)]
    assert plan(active, [], 1, 0) == [Park("a"), Park("b")]
    queued = [Task("a", 1), Task("b", 2)]
    assert plan([active[2]], queued, 2, 0) == [Start("a")]


def test_a_job_that_leaves_keeps_its_place_until_it_has() -> None:
    leaving = Task("y", 2, leaving=True)
    assert plan([Task("z", 1, priority=9), leaving], [Task("x", 3)], 2, 0) == []
    assert plan([Task("z", 1, priority=9), leaving], [Task("x", 3)], 3, 0) == [Start("x")]


def test_deadlines_end_active_and_queued_jobs_at_their_time_and_not_before() -> None:
    active, queued = [Task("a", 1, deadline_ns=100)], [Task("b", 2, deadline_ns=100), Task("c", 3)]
    assert plan(active, queued, 1, 99) == []
    assert plan(active, queued, 1, 100) == [End("a", "deadline"), End("b", "deadline")]
    # The place of a is free only when the worker says so.
    leaving = [Task("a", 1, deadline_ns=100, leaving=True)]
    assert plan(leaving, [Task("c", 3)], 1, 101) == []


def test_no_deadline_is_judged_while_mission_time_is_unknown() -> None:
    assert plan([Task("a", 1, deadline_ns=-5)], [], 1, None) == []


def test_a_cancelled_job_ends_as_cancelled_even_past_its_deadline() -> None:
    tasks = [Task("a", 1, deadline_ns=1, cancel=True)]
    assert plan(tasks, [], 1, 5) == [End("a", "cancelled")]
    assert plan([], tasks, 1, 5) == [End("a", "cancelled")]


def test_places_that_ended_jobs_still_hold_at_the_worker_are_not_given_away() -> None:
    assert plan([], [Task("a", 1)], 1, 0, closing=1) == []
    assert plan([], [Task("a", 1), Task("b", 2)], 2, 0, closing=1) == [Start("a")]
