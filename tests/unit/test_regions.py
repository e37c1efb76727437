"""The scrub of regions: what is read when, what is counted, what is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fdir.guarded import GuardedTable, Superseded
from fdir.region_book import (
    Added,
    Check,
    Checked,
    CheckNow,
    NowDone,
    Refresh,
    Refreshed,
    RegionBook,
    Removed,
    SetEnabled,
    Tick,
    Unreadable,
)
from fdir.regions import Damage, Kind, RegionScrubber
from telemetry.errors import PenumbraError


class FakeRegion:
    """A region of so many pieces; those in `bad` are damaged until they are checked."""

    kind = Kind.CODE

    def __init__(self, name: str, pieces: int, clock: Clock, piece_s: float = 1.0) -> None:
        self.name, self.pieces, self.clock, self.piece_s = name, pieces, clock, piece_s
        self.bad: dict[int, bool] = {}
        self.error: OSError | None = None
        self.log: list[int] = []
        self.recomputed = self.closed = 0

    @property
    def size(self) -> int:
        return 4096 * self.pieces

    def refresh(self) -> int:
        if self.error:
            raise self.error
        return self.pieces

    def check(self, piece: int) -> list[Damage]:
        if self.error:
            raise self.error
        self.clock.now_s += self.piece_s
        self.log.append(piece)
        if piece not in self.bad:
            return []
        return [Damage(self.name, self.kind, self.bad.pop(piece), "file", {"piece": piece})]

    def recompute(self) -> None:
        self.recomputed += 1

    def close(self) -> None:
        self.closed += 1


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Callable[..., tuple[RegionScrubber, list[FakeRegion]]]:
    def make(budget_s: float, *pieces: int) -> tuple[RegionScrubber, list[FakeRegion]]:
        scrubber = RegionScrubber(budget_s, clock)
        regions = [FakeRegion(f"r{number}", count, clock) for number, count in enumerate(pieces)]
        for region in regions:
            scrubber.add(region)
        return scrubber, regions

    return make


def test_a_cycle_ends_with_the_piece_that_uses_up_the_budget_and_the_next_goes_on(make, clock):
    scrubber, (first, second) = make(2.5, 4, 3)
    scrubber.cycle()
    assert (first.log, second.log) == ([0, 1, 2], [])
    scrubber.cycle()
    assert (first.log, second.log) == ([0, 1, 2, 3], [0, 1])
    scrubber.cycle()
    assert second.log == [0, 1, 2]
    assert scrubber.passes == 1
    assert scrubber.pass_s == 7.0
    status = scrubber.status()
    assert [(one.passes, one.pass_s, one.pass_work_s) for one in status] == [(1, 4.0, 4.0), (1, 3.0, 3.0)]
    assert [one.size for one in status] == [16384, 12288]


def test_a_cycle_makes_one_pass_at_most(make):
    scrubber, (only,) = make(1e9, 3)
    scrubber.cycle()
    assert only.log == [0, 1, 2]


def test_time_between_cycles_counts_in_a_pass_but_not_as_work(make, clock):
    scrubber, _ = make(1.0, 3)
    for _ in range(4):
        scrubber.cycle()
        clock.now_s += 9.0
    (status,) = scrubber.status()
    assert (status.pass_s, status.pass_work_s) == (21.0, 3.0)


def test_damage_is_told_and_counted(make):
    scrubber, (only,) = make(1e9, 4)
    only.bad = {1: True, 3: False}
    found = scrubber.cycle()
    assert [damage.evidence for damage in found.damages] == [{"piece": 1}, {"piece": 3}]
    (status,) = scrubber.status()
    assert (status.miscompares, status.repaired) == (2, 1)
    assert scrubber.cycle().damages == []


def test_a_region_switched_off_is_not_read_and_the_switch_of_all_leaves_it(make):
    scrubber, (first, second) = make(1e9, 2, 2)
    scrubber.set_enabled("r0", False)
    scrubber.cycle()
    assert (first.log, second.log) == ([], [0, 1])
    scrubber.set_enabled(None, False)
    scrubber.cycle()
    scrubber.cycle()
    assert not scrubber.enabled
    assert second.log == [0, 1]
    scrubber.set_enabled(None, True)
    scrubber.cycle()
    scrubber.cycle()
    assert (first.log, second.log) == ([], [0, 1, 0, 1, 0, 1])


def test_a_region_switched_off_in_the_middle_is_left_without_a_pass(make):
    scrubber, (first, second) = make(1.0, 3, 1)
    scrubber.cycle()
    scrubber.set_enabled("r0", False)
    scrubber.cycle()
    scrubber.cycle()
    assert (first.log, second.log) == ([0], [0])
    assert [one.passes for one in scrubber.status()] == [0, 1]


def test_when_all_are_off_no_pass_is_counted(make):
    scrubber, _ = make(1.0, 3)
    scrubber.set_enabled("r0", False)
    for _ in range(3):
        scrubber.cycle()
    assert scrubber.passes == 0


def test_one_out_of_turn_goes_first_also_when_off_and_leaves_the_pass_alone(make):
    scrubber, (first, second) = make(2.0, 3, 3)
    scrubber.set_enabled("r1", False)
    scrubber.cycle()
    second.bad = {0: True}
    scrubber.check_now("r1")
    with pytest.raises(PenumbraError, match="r1 is being checked out of turn"):
        scrubber.check_now("r0")
    found = scrubber.cycle()
    assert (first.log, second.log, found.done) == ([0, 1], [0, 1], [])
    found = scrubber.cycle()
    assert found.done == [NowDone("r1", 1, 1, "")]
    assert (first.log, second.log) == ([0, 1, 2], [0, 1, 2])
    assert [one.passes for one in scrubber.status()] == [1, 0]


def test_one_out_of_turn_that_is_also_in_turn_is_read_twice():
    """The answer to a piece asked for in turn does not count for the pass out of turn."""
    book = RegionBook(1e9)
    book.handle(Added("r"), 0)
    assert book.handle(Tick(), 0) == [Refresh("r")]
    assert book.handle(Refreshed("r", 2, 0.1), 0) == [Check("r", 0)]
    assert book.handle(CheckNow("r"), 0) == []
    assert book.handle(Checked("r", 0, 0.1), 0) == [Refresh("r")]
    assert book.handle(Refreshed("r", 2, 0.1), 0) == [Check("r", 0)]
    assert book.handle(Checked("r", 0, 0.1), 0) == [Check("r", 1)]
    assert book.handle(Checked("r", 1, 0.1, 1, 0), 0) == [NowDone("r", 1, 0, ""), Check("r", 1)]
    assert book.handle(Checked("r", 1, 0.1), 0) == []
    assert (book.passes, book.entry("r").passes) == (1, 1)


def test_a_region_that_cannot_be_read_is_left_told_once_and_tried_again(make):
    scrubber, (first, second) = make(1e9, 2, 2)
    first.error = PermissionError(1, "not allowed")
    assert scrubber.cycle().errors == [("r0", "not allowed")]
    assert scrubber.cycle().errors == []
    assert scrubber.status()[0].error == "not allowed"
    assert second.log == [0, 1, 0, 1]
    first.error = None
    scrubber.cycle()
    assert scrubber.status()[0].error == ""
    first.error = PermissionError(1, "not allowed")
    assert scrubber.cycle().errors == [("r0", "not allowed")]


def test_a_region_taken_away_is_closed_and_ends_what_was_ordered(make):
    scrubber, (first, second) = make(1.0, 3, 3)
    scrubber.check_now("r0")
    scrubber.cycle()
    scrubber.remove("r0")
    assert scrubber.cycle().done == [NowDone("r0", 0, 0, "the region is gone")]
    assert first.closed == 1
    assert second.log == [0]
    scrubber.close()
    assert second.closed == 1


@pytest.mark.parametrize("order", ["set_enabled", "check_now", "remove", "recompute"])
def test_an_unknown_region_is_refused_with_the_known_ones(make, order):
    scrubber, _ = make(1.0, 1, 1)
    arguments = ("nothing", True) if order == "set_enabled" else ("nothing",)
    with pytest.raises(PenumbraError, match=r"no region nothing; there are r0, r1"):
        getattr(scrubber, order)(*arguments)


def test_recompute_reaches_the_region(make):
    scrubber, (first, second) = make(1.0, 1, 1)
    scrubber.recompute("r1")
    assert (first.recomputed, second.recomputed) == (0, 1)


@pytest.mark.parametrize("event", [Checked("r", 1, 0.1), Checked("s", 0, 0.1), Refreshed("r", 2, 0.1)])
def test_an_answer_to_another_question_is_refused(event):
    book = RegionBook(1.0)
    book.handle(Added("r"), 0)
    with pytest.raises(ValueError, match="answers nothing"):
        book.handle(Unreadable("r", 0.1, ""), 0)
    book.handle(Tick(), 0)
    book.handle(Refreshed("r", 2, 0.1), 0)
    with pytest.raises(ValueError, match="answers Check"):
        book.handle(event, 0)


@pytest.mark.parametrize("event", [Added("r"), Removed("x"), SetEnabled("x", True), CheckNow("x")])
def test_what_cannot_be_is_refused(event):
    book = RegionBook(1.0)
    book.handle(Added("r"), 0)
    with pytest.raises(ValueError, match=r"region [rx]"):
        book.handle(event, 0)


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan")])
def test_a_budget_must_be_above_zero(budget_s):
    with pytest.raises(ValueError, match="budget_s"):
        RegionBook(budget_s)


# Tables.


class Table:
    """A table in use, and the region that watches it."""

    def __init__(self, restore: bool = True) -> None:
        self.values = b"limit = 4"
        self.region = GuardedTable("table", lambda: self.values, self.take if restore else None)

    def take(self, content: bytes) -> None:
        self.values = content

    def check(self) -> list[tuple[bool, str]]:
        return [(damage.repaired, str(damage.evidence["part"])) for damage in self.region.check(0)]


def test_a_sound_table_is_no_damage():
    assert Table().check() == []


def test_values_in_use_are_restored_from_the_copies():
    table = Table()
    table.values = b"limit = 5"
    assert table.check() == [(True, "values in use, from encoded byte 8 on")]
    assert table.values == b"limit = 4"
    assert table.check() == []


def test_without_a_way_to_restore_them_they_are_beyond_repair():
    table = Table(restore=False)
    table.values = b"limit"
    assert table.check() == [(False, "values in use, from encoded byte 5 on")]


def test_values_changed_on_purpose_are_the_new_baseline_and_no_damage():
    table = Table()

    def superseded(content: bytes) -> None:
        raise Superseded

    table.region._restore = superseded
    table.values = b"limit = 6"
    assert table.check() == []
    assert table.values == b"limit = 6"
    table.region._restore = table.take
    table.values = b"limit = 7"
    assert table.check() == [(True, "values in use, from encoded byte 8 on")]
    assert table.values == b"limit = 6"


@pytest.mark.parametrize("copy", [0, 1])
def test_a_struck_copy_is_mended_from_the_other(copy):
    table = Table()
    table.region._copies[copy][3] ^= 1
    assert table.check() == [(True, f"copy {copy} of the bytes")]
    assert table.region._copies[0] == table.region._copies[1] == table.values
    assert table.check() == []


@pytest.mark.parametrize("copy", [0, 1])
def test_a_struck_digest_is_mended_too(copy):
    table = Table()
    table.region._digests[copy] ^= 1
    assert table.check() == [(True, f"copy {copy} of the bytes")]
    assert table.check() == []


def test_both_copies_struck_come_back_from_the_values_in_use():
    table = Table()
    table.region._copies[0][3] ^= 1
    table.region._copies[1][4] ^= 1
    assert table.check() == [(True, "both copies of the bytes")]
    assert table.check() == []


def test_when_all_three_are_struck_none_is_believed():
    table = Table()
    table.region._copies[0][3] ^= 1
    table.region._copies[1][4] ^= 1
    table.values = b"limit = 5"
    assert table.check() == [(False, "both copies of the bytes, and the values in use")]


def test_values_that_cannot_be_encoded_are_damage_too():
    table = Table()
    table.region._encode = lambda: table.values.decode().encode() if table.values else b"".decode(1)  # type: ignore[arg-type]
    table.values = b""
    (damage,) = table.check()
    assert "cannot be encoded" in damage[1]
    assert damage[0]
    assert table.values == b"limit = 4"


def test_a_restore_that_fails_is_told():
    table = Table()
    table.region._restore = lambda content: b"".decode(1)  # type: ignore[arg-type]
    table.values = b"limit = 5"
    ((repaired, part),) = table.check()
    assert not repaired
    assert "restoring failed" in part


def test_a_legitimate_change_is_taken_as_baseline():
    table = Table()
    table.values = b"limit = 5"
    table.region.recompute()
    assert table.check() == []
