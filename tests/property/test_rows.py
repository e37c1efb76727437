"""Rows of a KV cache: damage is found, and repaired or reported, never silently accepted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fdir.rows import GROUP, RowBank, Words, exchange

PLANES, HEADS, ROOM, WORDS, POSITIONS = 4, 2, 40, 8, 120


@dataclass
class Bench:
    """A bank in the middle of others' memory, and what its rows were when they were written."""

    bank: RowBank
    rows: Words
    digests: npt.NDArray[np.uint64]
    parity: Words
    rng: np.random.Generator
    truth: Words
    """By absolute position, shape (PLANES, HEADS, POSITIONS, WORDS)."""

    def write(self, count: int) -> None:
        """Let the model write rows."""
        start = self.bank.written
        new = self.rng.integers(0, 2**32, (PLANES, HEADS, count, WORDS), dtype=np.uint32)
        self.truth[:, :, start : start + count] = new
        at = start - self.bank.base
        self.rows[:, :, at : at + count] = new
        self.bank.record(start, start + count)

    def commit(self, count: int) -> None:
        self.write(count)
        assert self.bank.prove()
        self.bank.commit()

    def flip(self, plane: int, head: int, position: int, word: int = 3, bit: int = 30) -> None:
        self.rows[plane, head, position - self.bank.base, word] ^= np.uint32(1 << bit)

    def check_proven(self) -> None:
        """Every proven row is what was written."""
        bank = self.bank
        np.testing.assert_array_equal(
            self.rows[:, :, : bank.proven - bank.base], self.truth[:, :, bank.base : bank.proven]
        )


def make(*epochs: int, seed: int = 0) -> Bench:
    rows = np.zeros((PLANES, 3, HEADS, ROOM, WORDS), np.uint32)[:, 1]
    digests = np.zeros(POSITIONS, np.uint64)
    parity = np.zeros((ROOM // GROUP, PLANES * HEADS, WORDS), np.uint32)
    truth = np.zeros((PLANES, HEADS, POSITIONS, WORDS), np.uint32)
    bench = Bench(RowBank(rows, digests, parity), rows, digests, parity, np.random.default_rng(seed), truth)
    for count in epochs:
        bench.commit(count)
    return bench


places = st.tuples(
    st.integers(0, PLANES - 1),
    st.integers(0, HEADS - 1),
    st.integers(0, 28),
    st.integers(0, WORDS - 1),
    st.integers(0, 31),
)


@given(st.sets(places, max_size=6))
def test_strikes_are_found_and_repaired_or_reported(hits: set[tuple[int, int, int, int, int]]) -> None:
    bench = make(10, 19)
    for plane, head, position, word, bit in hits:
        bench.flip(plane, head, position, word, bit)
    damaged = {position for _, _, position, _, _ in hits}
    assert bench.bank.prove() is (not damaged)
    bad = bench.bank.rewind()
    assert {row.position for row in bad} == damaged
    if all(row.repaired for row in bad):
        bench.check_proven()
        assert bench.bank.prove()
    else:
        by_group: dict[tuple[int, int, int], set[int]] = {}
        for plane, head, position, _, _ in hits:
            by_group.setdefault((plane, head, position // GROUP), set()).add(position)
        crowded = any(len(positions) > 1 for positions in by_group.values())
        in_several = any(
            len({hit[:2] for hit in hits if hit[2] == at}) > 1
            and any(other != at and other // GROUP == at // GROUP for other in damaged)
            for at in damaged
        )
        assert crowded or in_several
        assert not bench.bank.prove()


@given(places)
def test_one_flip_is_always_repaired(hit: tuple[int, int, int, int, int]) -> None:
    bench = make(29)
    plane, head, position, word, bit = hit
    bench.flip(plane, head, position, word, bit)
    (row,) = bench.bank.rewind()
    assert (row.position, row.method, row.planes) == (position, "parity", (plane * HEADS + head,))
    bench.check_proven()


def test_two_flips_of_a_group_on_different_planes_are_repaired() -> None:
    bench = make(16)
    bench.flip(0, 0, 3)
    bench.flip(2, 1, 5)
    assert [(row.position, row.repaired) for row in bench.bank.rewind()] == [(3, True), (5, True)]
    bench.check_proven()


def test_two_flips_of_a_group_on_one_plane_are_not() -> None:
    bench = make(16)
    bench.flip(0, 0, 3)
    bench.flip(0, 0, 5, bit=2)
    assert [row.repaired for row in bench.bank.rewind()] == [False, False]
    assert not bench.bank.prove()
    bench.bank.reset()
    bench.commit(16)
    bench.check_proven()


def test_the_same_bit_struck_in_two_rows_of_a_group_is_no_struck_digest() -> None:
    bench = make(16)
    bench.flip(1, 0, 3)
    bench.flip(1, 0, 5)
    assert [(row.method, row.planes) for row in bench.bank.rewind()] == [("none", ())] * 2


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.data())
def test_epochs_of_any_length_keep_parity_of_partial_groups(epochs: list[int], data: st.DataObject) -> None:
    bench = make(*epochs)
    at = sum(epochs)
    plane, position = data.draw(st.integers(0, PLANES - 1)), data.draw(st.integers(0, at - 1))
    bench.flip(plane, 0, position)
    successor = RowBank(bench.rows, bench.digests, bench.parity)
    bad = successor.attach(at)
    assert [(row.position, row.method) for row in bad] == [(position, "parity")]
    bench.check_proven()
    assert successor.proven == at
    assert successor.prove()


def test_a_struck_digest_fails_the_proof_and_is_voted_down_by_row_and_parity() -> None:
    bench = make(20)
    bench.digests[7] ^= np.uint64(1 << 40)
    assert not bench.bank.prove()
    assert [(row.position, row.method) for row in bench.bank.rewind()] == [(7, "digest")]
    bench.check_proven()
    assert bench.bank.prove()
    assert bench.bank.rewind() == []


def test_struck_parity_alone_changes_nothing_and_is_no_ground_to_write_a_wrong_row() -> None:
    bench = make(20)
    bench.parity[1, 0, 0] ^= np.uint32(1)
    assert bench.bank.rewind() == []
    bench.flip(0, 0, 9)
    struck = bench.rows.copy()
    (row,) = bench.bank.rewind()
    assert not row.repaired
    np.testing.assert_array_equal(bench.rows, struck)


def test_parity_struck_on_another_plane_does_not_hinder_a_repair() -> None:
    bench = make(20)
    bench.parity[1, 5, 0] ^= np.uint32(1)
    bench.flip(0, 0, 9)
    assert [(row.repaired, row.planes) for row in bench.bank.rewind()] == [(True, (0,))]
    bench.check_proven()


@given(st.integers(0, PLANES - 1), st.integers(20, 23))
def test_a_strike_in_the_open_epoch_is_proven_wrong_and_never_enters_a_reference(
    plane: int, position: int
) -> None:
    bench = make(20)
    before = bench.parity.copy()
    bench.write(4)
    bench.flip(plane, 1, position)
    assert not bench.bank.prove()
    with pytest.raises(ValueError, match="not proven"):
        bench.bank.commit()
    assert [(row.position, row.method) for row in bench.bank.rewind()] == [(position, "redo")]
    assert bench.bank.written == bench.bank.proven == 20
    np.testing.assert_array_equal(bench.parity, before)
    bench.commit(4)
    bench.check_proven()


def test_a_strike_at_any_moment_of_a_proof_is_found_by_it_or_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strike an old and an open row before the n-th hash of a proof, for every n."""
    import fdir.rows as module

    whole = xxhash.xxh3_64_intdigest
    calls, strike_at, hit = [0], [-1], [0]
    current: list[Bench] = []

    def counted(data: object) -> int:
        if calls[0] == strike_at[0]:
            current[0].flip(2, 1, hit[0])
        calls[0] += 1
        return whole(data)

    stub = type("Hashes", (), {"xxh3_64": xxhash.xxh3_64, "xxh3_64_intdigest": staticmethod(counted)})
    for position in (5, 21):
        for moment in range(40):
            bench = make(20)
            bench.write(4)
            current[:] = [bench]
            calls[0], strike_at[0], hit[0] = 0, moment, position
            with monkeypatch.context() as patch:
                patch.setattr(module, "xxhash", stub)
                clean = bench.bank.prove()
            if calls[0] <= moment:
                assert clean
                break
            if clean:
                bench.bank.commit()
                assert not bench.bank.prove()
                assert [row.position for row in bench.bank.rewind()] == [position]
                bench.check_proven()
            else:
                assert position in {row.position for row in bench.bank.rewind()}
        else:
            raise AssertionError("a proof takes fewer hashes than that")


def test_a_proof_does_not_cover_what_is_written_after_it() -> None:
    bench = make(8)
    bench.write(2)
    assert bench.bank.prove()
    bench.write(1)
    with pytest.raises(ValueError, match="not proven"):
        bench.bank.commit()


def test_two_threads_prove_the_same() -> None:
    bench = make(20)
    with ThreadPoolExecutor(1) as executor:
        bench.write(4)
        assert bench.bank.prove(executor)
        bench.bank.commit()
        for plane in range(PLANES):
            bench.flip(plane, 1, 11)
            assert not bench.bank.prove(executor)
            bench.flip(plane, 1, 11)
        assert bench.bank.prove(executor)


def test_attach_to_rows_beyond_repair_proves_nothing() -> None:
    bench = make(20)
    bench.flip(0, 0, 8)
    bench.flip(0, 0, 9)
    successor = RowBank(bench.rows, bench.digests, bench.parity)
    assert not all(row.repaired for row in successor.attach(20))
    assert successor.proven == 0


def test_memory_that_does_not_keep_its_repair_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(20)
    bench.flip(0, 0, 9)
    mend = RowBank._mend_one

    def stuck(self: RowBank, *args: object) -> object:
        mended = mend(self, *args)  # type: ignore[arg-type]
        bench.flip(0, 0, 9)
        return mended

    monkeypatch.setattr(RowBank, "_mend_one", stuck)
    assert not bench.bank.rewind()[-1].repaired
    assert not bench.bank.prove()


def test_slide_moves_rows_and_keeps_them_proven_and_repairable() -> None:
    bench = make(30)
    parity = bench.parity.copy()
    assert bench.bank.slide(16) == []
    assert (bench.bank.base, bench.bank.proven, bench.bank.free) == (16, 30, 26)
    np.testing.assert_array_equal(bench.parity, parity)
    bench.check_proven()
    bench.commit(20)
    for position in (16, 29, 30, 33, 41, 49):
        bench.flip(1, 1, position)
        assert not bench.bank.prove()
        assert [(row.position, row.method) for row in bench.bank.rewind()] == [(position, "parity")]
    bench.check_proven()
    successor = RowBank(bench.rows, bench.digests, bench.parity)
    assert successor.attach(50, 16) == []
    assert successor.prove()


def test_rewind_after_a_slide() -> None:
    bench = make(30)
    bench.bank.slide(24)
    bench.write(5)
    assert bench.bank.rewind() == []
    assert (bench.bank.base, bench.bank.written) == (24, 30)
    bench.commit(5)
    bench.check_proven()


def test_slide_repairs_what_was_struck_before_it() -> None:
    bench = make(30)
    bench.flip(3, 0, 20)
    bench.digests[25] ^= np.uint64(2)
    assert [(row.position, row.method) for row in bench.bank.slide(16)] == [(20, "parity"), (25, "digest")]
    bench.check_proven()
    assert bench.bank.prove()


def test_a_digest_struck_below_the_base_is_found_and_not_repaired() -> None:
    bench = make(30)
    bench.bank.slide(16)
    bench.digests[3] ^= np.uint64(1)
    assert not bench.bank.prove()
    assert [(row.position, row.method) for row in bench.bank.rewind()] == [(15, "none")]
    assert not bench.bank.prove()


def test_slide_is_refused_in_an_open_epoch_and_out_of_range() -> None:
    bench = make(30)
    for base in (4, 32, -8):
        with pytest.raises(ValueError, match="base"):
            bench.bank.slide(base)
    bench.write(1)
    with pytest.raises(ValueError, match="open"):
        bench.bank.slide(8)


def test_a_bank_takes_over_a_prefix_of_another() -> None:
    bench, other = make(30), make(12, seed=7)
    assert other.bank.adopt(bench.bank, 16)
    assert (other.bank.base, other.bank.proven, other.bank.written) == (0, 16, 16)
    np.testing.assert_array_equal(other.rows[:, :, :16], bench.truth[:, :, :16])
    assert other.bank.digest(0, 16) == bench.bank.digest(0, 16)
    other.truth[:, :, :16] = bench.truth[:, :, :16]
    other.commit(9)
    other.flip(0, 1, 14)
    assert [row.method for row in other.bank.rewind()] == ["parity"]
    other.check_proven()


def test_a_prefix_is_taken_from_a_bank_that_has_slid_as_far_as_it_goes() -> None:
    bench, other = make(40), make()
    bench.bank.slide(8)
    assert other.bank.adopt(bench.bank, 24)
    assert (other.bank.base, other.bank.proven) == (8, 24)
    assert other.bank.prove()
    with pytest.raises(ValueError, match="are there"):
        other.bank.adopt(bench.bank, 0)
    with pytest.raises(ValueError, match="are there"):
        other.bank.adopt(bench.bank, 41)


@pytest.mark.parametrize("what", ["row", "digest", "digest below"])
def test_nothing_struck_is_taken_over(what: str) -> None:
    bench, other = make(40), make()
    bench.bank.slide(8)
    if what == "row":
        bench.flip(0, 0, 12)
    else:
        bench.digests[12 if what == "digest" else 2] ^= np.uint64(4)
    assert not other.bank.adopt(bench.bank, 24)
    assert other.bank.written == 0
    assert not bench.bank.prove()


@given(st.integers(0, ROOM), st.integers(0, ROOM))
@settings(max_examples=30)
def test_banks_change_places(mine: int, theirs: int) -> None:
    one, other = make(*([mine] if mine else []), seed=1), make(*([theirs] if theirs else []), seed=2)
    if mine > 16:
        one.bank.slide(8)
    one.bank.trade(other.bank)
    assert (one.bank.proven, other.bank.proven) == (theirs, mine)
    one.truth, other.truth = other.truth, one.truth
    for bench in (one, other):
        bench.check_proven()
        assert bench.bank.prove()
        successor = RowBank(bench.rows, bench.digests, bench.parity)
        assert successor.attach(bench.bank.proven, bench.bank.base) == []
    if mine:
        other.flip(1, 1, mine - 1)
        assert not other.bank.prove()
        assert [row.method for row in other.bank.rewind()] == ["parity"]


def test_a_bank_with_an_open_epoch_stays_in_its_place() -> None:
    one, other = make(8), make(8)
    other.write(1)
    with pytest.raises(ValueError, match="open epoch"):
        one.bank.trade(other.bank)


@given(st.integers(0, 300_000), st.integers(0, 300_000))
@settings(max_examples=20)
def test_exchange_of_any_sizes(mine: int, theirs: int) -> None:
    rng = np.random.default_rng(mine)
    a, b = (bytearray(rng.bytes(300_000)) for _ in range(2))
    was_a, was_b = bytes(a), bytes(b)
    exchange(memoryview(a), memoryview(b), mine, theirs)
    assert a[:theirs] == was_b[:theirs]
    assert b[:mine] == was_a[:mine]


def test_a_bank_without_planes_counts_positions() -> None:
    bank = RowBank(
        np.zeros((0, 1, 16, 4), np.uint32), np.zeros(16, np.uint64), np.zeros((2, 0, 4), np.uint32)
    )
    bank.record(0, 3)
    bank.record(3, 4)
    assert bank.prove()
    bank.commit()
    assert bank.slide(0) == bank.rewind() == bank.attach(4) == []


def test_rows_are_appended_in_order_while_there_is_room() -> None:
    bench = make(4)
    with pytest.raises(ValueError, match="next is 4"):
        bench.bank.record(6, 7)
    with pytest.raises(ValueError, match="36 are free"):
        bench.bank.record(4, ROOM + 1)


def test_arrays_and_positions_that_do_not_fit_are_refused() -> None:
    rows = np.zeros((2, 1, 16, 4), np.uint32)
    with pytest.raises(ValueError, match="do not fit"):
        RowBank(rows, np.zeros(16, np.uint64), np.zeros((2, 3, 4), np.uint32))
    bank = RowBank(rows, np.zeros(32, np.uint64), np.zeros((2, 2, 4), np.uint32))
    for positions, base in ((17, 0), (8, 16), (8, 3), (33, 24)):
        with pytest.raises(ValueError, match="do not fit"):
            bank.attach(positions, base)


class Walk(RuleBasedStateMachine):
    """Any order of what the engine does, and of single strikes on rows, digests and parity.

    At most one strike is open at a time: it must be found by the next proof (rows, digests), and repaired.
    """

    @initialize(seed=st.integers(0, 99))
    def start(self, seed: int) -> None:
        self.bench = make(seed=seed)
        self.struck = ""
        self.spoiled_parity = False

    @property
    def bank(self) -> RowBank:
        return self.bench.bank

    @precondition(lambda self: self.bank.free > 0)
    @rule(count=st.integers(1, 11))
    def write(self, count: int) -> None:
        self.bench.write(min(count, self.bank.free))

    @precondition(lambda self: not self.struck and self.bank.written > self.bank.base)
    @rule(data=st.data())
    def strike_row(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(self.bank.base, self.bank.written - 1))
        plane, head = data.draw(st.integers(0, PLANES - 1)), data.draw(st.integers(0, HEADS - 1))
        if self.spoiled_parity and position < self.bank.proven:
            return
        self.bench.flip(plane, head, position, bit=data.draw(st.integers(0, 31)))
        self.struck = "open" if position >= self.bank.proven else "proven"

    @precondition(lambda self: not self.struck and self.bank.written > self.bank.base)
    @rule(data=st.data())
    def strike_digest(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(self.bank.base, self.bank.written - 1))
        if self.spoiled_parity and position < self.bank.proven:
            return
        self.bench.digests[position] ^= np.uint64(1 << data.draw(st.integers(0, 63)))
        self.struck = "open" if position >= self.bank.proven else "proven"

    @precondition(lambda self: not self.struck and not self.spoiled_parity)
    @rule(slot=st.integers(0, ROOM // GROUP - 1), plane=st.integers(0, PLANES * HEADS - 1))
    def strike_parity(self, slot: int, plane: int) -> None:
        self.bench.parity[slot, plane, 2] ^= np.uint32(1)
        self.spoiled_parity = True

    @rule()
    def epoch_ends(self) -> None:
        if self.bank.prove():
            assert not self.struck
            self.bank.commit()
        else:
            assert self.struck
            self.repair(self.bank.rewind())
        self.bench.check_proven()

    @rule()
    def rewind(self) -> None:
        self.repair(self.bank.rewind())

    @rule(groups=st.integers(0, 3))
    def slide(self, groups: int) -> None:
        if self.bank.written == self.bank.proven:
            base = min(self.bank.base + groups * GROUP, self.bank.proven // GROUP * GROUP)
            before = self.bank.base
            bad = self.bank.slide(base)
            if bad and not all(row.repaired for row in bad):
                # The strike was on a digest whose rows are dropped: repaired before they go.
                raise AssertionError(f"from {before} to {base}: {bad}")
            # A strike on a row that is dropped is gone with it.
            self.struck = ""
            self.bench.check_proven()

    @rule()
    def restart(self) -> None:
        bench, old = self.bench, self.bank
        bench.bank = RowBank(bench.rows, bench.digests, bench.parity)
        bad = bench.bank.attach(old.proven, old.base)
        self.repair(bad)

    @precondition(lambda self: self.spoiled_parity)
    @rule()
    def parity_made_anew(self) -> None:
        """Spare the walk two strikes in one group: the sequence is computed anew."""
        bank, count = self.bank, min(self.bank.proven, ROOM)
        bank.reset()
        self.struck, self.spoiled_parity = "", False
        self.bench.parity[:] = 0
        if count:
            self.bench.commit(count)

    def repair(self, bad: list) -> None:  # type: ignore[type-arg]
        assert all(row.repaired for row in bad)
        assert len(bad) <= 1
        self.struck = ""
        self.bench.check_proven()

    @invariant()
    def unstruck_rows_are_whole(self) -> None:
        if not self.struck:
            self.bench.check_proven()


Walk.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWalk = Walk.TestCase
