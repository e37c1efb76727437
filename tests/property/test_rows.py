"""Rows of a KV cache: damage is found, and repaired or reported, never silently accepted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdir.rows import GROUP, RowIntegrity

PLANES, POSITIONS, WORDS = 4, 40, 8


def _make(written: int, seed: int = 0) -> tuple[RowIntegrity, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = np.zeros((PLANES, POSITIONS, WORDS), np.uint32)
    digests = np.zeros((POSITIONS, PLANES), np.uint64)
    parity = np.zeros((POSITIONS // GROUP, PLANES, WORDS), np.uint32)
    guard = RowIntegrity(rows, digests, parity)
    rows[:, :written] = rng.integers(0, 2**32, (PLANES, written, WORDS), dtype=np.uint32)
    guard.record(0, written)
    return guard, rows, digests, parity


def _proven(written: int) -> tuple[RowIntegrity, np.ndarray, np.ndarray, np.ndarray]:
    guard, rows, digests, parity = _make(written)
    draft = guard.draft_parity()
    assert guard.prove()
    guard.commit(draft)
    return guard, rows, digests, parity


strikes = st.sets(
    st.tuples(st.integers(0, PLANES - 1), st.integers(0, 28), st.integers(0, WORDS - 1), st.integers(0, 31)),
    max_size=6,
)


@given(strikes)
def test_strikes_are_found_and_repaired_or_reported(hits: set[tuple[int, int, int, int]]) -> None:
    guard, rows, _, _ = _proven(29)
    whole = rows.copy()
    for plane, position, word, bit in hits:
        rows[plane, position, word] ^= np.uint32(1 << bit)
    damaged = {(plane, position) for plane, position, _, _ in hits}
    assert guard.prove() is (not damaged)
    bad = guard.rewind()
    assert {(row.plane, row.position) for row in bad} == damaged
    crowded = {
        at for at in damaged if sum(a[0] == at[0] and a[1] // GROUP == at[1] // GROUP for a in damaged) > 1
    }
    for row in bad:
        assert row.repaired is ((row.plane, row.position) not in crowded)
        if row.repaired:
            np.testing.assert_array_equal(rows[row.plane, row.position], whole[row.plane, row.position])
    if not crowded:
        assert guard.prove()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_epochs_of_any_length_keep_parity_of_partial_groups(epochs: list[int], data: st.DataObject) -> None:
    rows = np.zeros((PLANES, POSITIONS + 8, WORDS), np.uint32)[:, :POSITIONS].copy()
    digests = np.zeros((POSITIONS, PLANES), np.uint64)
    parity = np.zeros((POSITIONS // GROUP, PLANES, WORDS), np.uint32)
    guard, rng, at = RowIntegrity(rows, digests, parity), np.random.default_rng(1), 0
    for length in epochs:
        if at + length > POSITIONS:
            break
        rows[:, at : at + length] = rng.integers(0, 2**32, (PLANES, length, WORDS), dtype=np.uint32)
        guard.record(at, at + length)
        draft = guard.draft_parity()
        assert guard.prove()
        guard.commit(draft)
        at += length
    whole = rows.copy()
    plane, position = data.draw(st.integers(0, PLANES - 1)), data.draw(st.integers(0, at - 1))
    rows[plane, position, 3] ^= np.uint32(1 << 30)
    successor = RowIntegrity(rows, digests, parity)
    bad = successor.attach(at)
    assert [(row.plane, row.position, row.method) for row in bad] == [(plane, position, "parity")]
    np.testing.assert_array_equal(rows, whole)
    assert successor.proven == at
    assert successor.prove()


def test_a_struck_digest_is_voted_down_by_row_and_parity() -> None:
    guard, rows, digests, _ = _proven(20)
    whole = rows.copy()
    digests[7, 2] ^= np.uint64(1 << 40)
    assert [row.method for row in guard.rewind()] == ["digest"]
    np.testing.assert_array_equal(rows, whole)
    assert guard.repair(20) == []


def test_struck_parity_alone_changes_nothing_and_is_no_ground_to_write_a_wrong_row() -> None:
    guard, rows, _, parity = _proven(20)
    parity[1, 0, 0] ^= np.uint32(1)
    assert guard.rewind() == []
    rows[0, 9, 1] ^= np.uint32(2)
    struck = rows.copy()
    (row,) = guard.rewind()
    assert not row.repaired
    np.testing.assert_array_equal(rows, struck)


def test_a_strike_in_the_open_epoch_is_proven_wrong_and_never_enters_parity() -> None:
    guard, rows, _, parity = _proven(20)
    before = parity.copy()
    rows[:, 20:24] = 7
    guard.record(20, 24)
    rows[1, 21, 0] ^= np.uint32(1 << 5)
    guard.draft_parity()
    assert not guard.prove()
    assert [(row.plane, row.position, row.method) for row in guard.rewind()] == [(1, 21, "redo")]
    assert guard.written == guard.proven == 20
    np.testing.assert_array_equal(parity, before)


def test_attach_to_rows_beyond_repair_proves_nothing() -> None:
    _, rows, digests, parity = _proven(20)
    rows[0, 8, 0] ^= np.uint32(1)
    rows[0, 9, 0] ^= np.uint32(1)
    guard = RowIntegrity(rows, digests, parity)
    assert not all(row.repaired for row in guard.attach(20))
    assert guard.proven == 0


def test_rows_are_appended_in_order() -> None:
    guard, *_ = _make(4)
    with pytest.raises(ValueError, match="next is 4"):
        guard.record(6, 7)


def test_arrays_that_do_not_fit_are_refused() -> None:
    rows = np.zeros((2, 16, 4), np.uint32)
    with pytest.raises(ValueError, match="do not fit"):
        RowIntegrity(rows, np.zeros((16, 3), np.uint64), np.zeros((2, 2, 4), np.uint32))
