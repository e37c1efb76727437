"""Two parity blocks: every pair of missing blocks comes back; an oracle multiplies bit by bit."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from fdir.erasure import MOST_DATA_BLOCKS, parity, restore


def product(left: int, right: int) -> int:
    """Multiply two elements as polynomials, then reduce: the definition, by hand."""
    whole = 0
    for bit in range(8):
        whole ^= (left << bit) * (right >> bit & 1)
    for bit in range(14, 7, -1):
        if whole >> bit & 1:
            whole ^= 0b1_0001_1101 << (bit - 8)
    return whole


def blocks(count: int, size: int = 64, seed: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size), dtype=np.uint8))


@pytest.mark.parametrize("count", [1, 2, 16, MOST_DATA_BLOCKS])
def test_parity_is_the_sum_and_the_weighted_sum(count):
    data = blocks(count)
    p, q = parity(data)
    assert p.tolist() == np.bitwise_xor.reduce(data).tolist()
    expected, weight = [0] * 64, 1
    for block in data:
        expected = [
            total ^ product(weight, value) for total, value in zip(expected, block.tolist(), strict=True)
        ]
        weight = product(weight, 2)
    assert q.tolist() == expected


def test_every_one_and_every_two_of_eighteen_blocks_come_back():
    data = blocks(16)
    sound = [*data, *parity(data)]
    for gone in [*combinations(range(18), 1), *combinations(range(18), 2), ()]:
        left = [None if number in gone else block for number, block in enumerate(sound)]
        extra = {number: block for number, block in enumerate(left[16:]) if block is not None}
        found = restore(left[:16], extra)
        assert found is not None
        assert [block.tolist() for block in found] == [block.tolist() for block in data], gone


def test_every_pair_of_the_most_blocks_that_there_may_be():
    data = blocks(MOST_DATA_BLOCKS, 8)
    extra = dict(enumerate(parity(data)))
    for pair in [(0, 1), (0, 254), (253, 254), (100, 200)]:
        left = [None if number in pair else block for number, block in enumerate(data)]
        found = restore(left, extra)
        assert found is not None
        assert all((a == b).all() for a, b in zip(found, data, strict=True))


def test_more_missing_than_parity_is_no_answer():
    data = blocks(16)
    p, q = parity(data)
    assert restore([None, None, None, *data[3:]], {0: p, 1: q}) is None
    assert restore([None, None, *data[2:]], {1: q}) is None
    assert restore([None, *data[1:]], {}) is None


def test_data_is_left_as_it_was():
    data = blocks(16)
    before = [block.copy() for block in data]
    extra = dict(enumerate(parity(data)))
    restore([None, *data[1:]], extra)
    assert all((a == b).all() for a, b in zip(data, before, strict=True))
