"""Who sits where, how long an epoch lasts, who has to go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.inference.decoder import PREFILL_CHUNK
from node.inference.seating import Holder, Role, common_prefix, epoch_seconds, exchanges, first_to_go

STEP, NEXT, OTHER = Role.STEP, Role.NEXT, Role.OTHER


@pytest.mark.parametrize(
    ("scan_s", "budget", "longest_s", "factor", "expected"),
    [
        (0.013, 0.01, 2.0, 1.0, 1.3),
        (0.013, 0.01, 1.0, 1.0, 1.0),
        (0.013, 0.02, 1.0, 1.0, 0.65),
        (0.013, 0.02, 1.0, 0.1, 0.065),
        (0.0, 0.01, 1.0, 1.0, 0.0),
    ],
)
def test_an_epoch_is_as_long_as_the_budget_asks_and_no_longer_than_allowed(
    scan_s: float, budget: float, longest_s: float, factor: float, expected: float
) -> None:
    assert epoch_seconds(scan_s, budget, longest_s, factor) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ([], []),
        ([OTHER, OTHER], []),
        ([STEP, STEP, NEXT, OTHER], []),
        ([STEP, OTHER, STEP], [(1, 2)]),
        ([NEXT, STEP], [(0, 1)]),
        ([OTHER, OTHER, NEXT], [(0, 2)]),
        ([OTHER, STEP, NEXT, STEP], [(0, 3)]),
    ],
)
def test_few_seats_are_exchanged(roles: list[Role], expected: list[tuple[int, int]]) -> None:
    assert exchanges(roles) == expected


@given(st.lists(st.sampled_from([STEP, OTHER]), max_size=12), st.integers(0, 11), st.booleans())
def test_after_the_exchanges_each_role_is_where_it_belongs(
    roles: list[Role], at: int, has_next: bool
) -> None:
    if has_next and roles:
        roles[at % len(roles)] = NEXT
    seats = list(roles)
    swaps = exchanges(roles)
    for one, other in swaps:
        seats[one], seats[other] = seats[other], seats[one]
    count = roles.count(STEP)
    assert seats[:count] == [STEP] * count
    assert NEXT not in seats or seats[count] is NEXT
    assert len(swaps) <= count + 1
    assert sorted(seats, key=str) == sorted(roles, key=str)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=200), st.lists(st.integers(0, 1), max_size=200))
def test_a_common_prefix_is_whole_chunks_and_leaves_the_last_token_to_read(
    one: list[int], other: list[int]
) -> None:
    shared = common_prefix(one, other)
    assert shared % PREFILL_CHUNK == 0
    assert one[:shared] == other[:shared]
    assert shared < len(one)
    assert shared <= len(other)


def test_the_common_prefix_is_the_longest_there_is() -> None:
    head = list(range(3 * PREFILL_CHUNK))
    assert common_prefix([*head, 1], head) == 3 * PREFILL_CHUNK
    assert common_prefix(head, head) == 2 * PREFILL_CHUNK
    assert common_prefix([*head, 1], [*head[:-1], 0]) == 2 * PREFILL_CHUNK


def test_finished_jobs_go_before_parked_ones_and_the_oldest_use_first() -> None:
    holders = [
        Holder("a", finished=False, wanted=False, used=1),
        Holder("b", finished=True, wanted=False, used=4),
        Holder("c", finished=True, wanted=False, used=3),
        Holder("d", finished=False, wanted=False, used=2),
        Holder("e", finished=False, wanted=True, used=0),
    ]
    order = []
    while holders:
        job = first_to_go(holders)
        order.append(job)
        holders = [holder for holder in holders if holder.job != job]
    assert order == ["c", "b", "a", "d", "e"]
    assert first_to_go([]) is None
