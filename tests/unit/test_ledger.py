"""The ledger check: it finds a single missing record, and does not cry wolf."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from telemetry.ledger import count_below, merge, reconcile, to_ranges
from telemetry.packets import Stream, StreamLedger

KEY = (1, Stream.EVENT)


def entry(generated: int, acked: int, stored: int, **dropped: int) -> StreamLedger:
    return StreamLedger(
        boot=1, stream=Stream.EVENT, generated=generated, acked=acked, stored=stored, dropped=dropped
    )


def test_all_archived() -> None:
    check = reconcile([entry(10, 10, 0)], {KEY: [(0, 9)]}, final=True)
    assert check.consistent
    assert (check.generated, check.acked, check.stored, check.dropped, check.lost) == (10, 10, 0, 0, 0)
    assert check.problems == []


def test_sums_over_streams() -> None:
    other = StreamLedger(boot=2, stream=Stream.PLAN, generated=5, acked=2, stored=2, dropped={"full": 1})
    archived = {KEY: [(0, 9)], (2, Stream.PLAN): [(0, 1)]}
    check = reconcile([entry(10, 9, 1), other], archived)
    assert (check.generated, check.acked, check.stored, check.dropped) == (15, 11, 3, 1)
    assert check.consistent


def test_a_lost_record_is_found() -> None:
    check = reconcile([entry(10, 10, 0)], {KEY: [(0, 3), (5, 9)]})
    assert check.lost == 1
    assert not check.consistent
    assert "1 lost" in " ".join(check.problems)
    assert "deleted 10 as archived, the archive has 9" in " ".join(check.problems)


def test_a_loss_behind_a_later_arrival_is_found_with_the_sequence_numbers() -> None:
    ledger = [entry(11, 10, 1)]
    archived = {KEY: [(0, 3), (5, 10)]}
    assert reconcile(ledger, archived).lost == 0  # By counts alone it cannot be seen, as documented.
    check = reconcile(ledger, archived, stored={KEY: [(10, 10)]}, dropped={})
    assert check.lost == 1
    assert not check.consistent


def test_stored_and_dropped_are_not_lost() -> None:
    ledger = [entry(10, 5, 3, full=1, corrupt=1)]
    archived = {KEY: [(0, 4)]}
    check = reconcile(ledger, archived, stored={KEY: [(6, 8)]}, dropped={KEY: [(5, 5), (9, 9)]}, final=True)
    assert check.consistent
    assert check.dropped == 2


def test_a_ledger_that_does_not_balance() -> None:
    check = reconcile([entry(10, 5, 4)], {KEY: [(0, 9)]})
    assert not check.consistent
    assert "generated 10" in check.problems[0]


def test_records_newer_than_the_ledger_are_no_problem_unless_it_was_the_last() -> None:
    ledger, archived = [entry(5, 5, 0)], {KEY: [(0, 7)], (1, Stream.PLAN): [(0, 0)]}
    assert reconcile(ledger, archived).consistent
    check = reconcile(ledger, archived, final=True)
    assert not check.consistent
    assert len(check.problems) == 2
    assert check.lost == 0


def test_conflicts_and_repeated_entries() -> None:
    check = reconcile([entry(1, 1, 0)], {KEY: [(0, 0)]}, duplicated=2)
    assert (check.duplicated, check.consistent) == (2, False)
    assert not reconcile([entry(1, 1, 0)] * 2, {KEY: [(0, 0)]}).consistent


numbers = st.sets(st.integers(0, 60))


@given(numbers, numbers)
def test_ranges_are_sets(first: set[int], second: set[int]) -> None:
    def members(ranges: list[tuple[int, int]]) -> set[int]:
        return {n for low, high in ranges for n in range(low, high + 1)}

    for ranges in (to_ranges(first), merge(to_ranges(first), to_ranges(second))):
        assert ranges == sorted(ranges)
        assert all(b[0] > a[1] + 1 for a, b in pairwise(ranges))
    assert members(to_ranges(first)) == first
    assert members(merge(to_ranges(first), to_ranges(second))) == first | second
    assert all(count_below(to_ranges(first), end) == len({n for n in first if n < end}) for end in range(62))


@given(st.integers(0, 30), st.data())
def test_lost_is_what_is_nowhere(generated: int, data: st.DataObject) -> None:
    places = data.draw(
        st.lists(st.sampled_from("asdx"), min_size=generated, max_size=generated), label="where each went"
    )
    where = {mark: to_ranges(i for i, place in enumerate(places) if place == mark) for mark in "asdx"}
    counts = {mark: places.count(mark) for mark in "asdx"}
    ledger = [entry(generated, counts["a"] + counts["x"], counts["s"], full=counts["d"])]
    check = reconcile(
        ledger, {KEY: where["a"]}, stored={KEY: where["s"]}, dropped={KEY: where["d"]}, final=True
    )
    assert check.lost == counts["x"]
    assert reconcile(ledger, {KEY: where["a"]}).lost == counts["x"]
    assert check.consistent == (counts["x"] == 0)
