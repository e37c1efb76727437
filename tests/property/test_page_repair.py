"""Random strikes on mapped pages: always found, restored up to the code's strength, never silently wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdir.pages import PAGE_SIZE, MappedTensor, PageTable, WeightMemory
from fdir.parity import PARITY_PAGES, ParityFile, encode, group_count, repair

PAGES = 75
BITS = PAGE_SIZE * 8

flips = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(0, BITS - 1)), min_size=1, max_size=12, unique=True
)


class Struck:
    """Memory of two tensors, and its parity; `reset` makes it sound again."""

    def __init__(self, directory: Path) -> None:
        self.good = np.random.default_rng(1).integers(0, 256, PAGES * PAGE_SIZE, dtype=np.uint8)
        extra = bytearray(group_count(PAGES) * PARITY_PAGES * PAGE_SIZE)

        def write(at: int, block: bytes) -> None:
            extra[at : at + len(block)] = block

        encode(memoryview(self.good.tobytes()), write)
        (directory / "parity").write_bytes(extra)
        self.absent = directory / "absent"
        tensors = [_tensor(0, 30), _tensor(30, PAGES - 30)]
        table = PageTable.build(memoryview(self.good.tobytes()), memoryview(bytes(extra)), tensors)
        self.live = self.good.copy()
        addresses = [self.live.ctypes.data + tensor.offset for tensor in tensors]
        self.memory = WeightMemory(tensors, addresses, table)
        self.parity = ParityFile(directory / "parity", table)

    def reset(self) -> None:
        self.live[:] = self.good

    def strike(self, page: int, bit: int) -> None:
        self.live[page * PAGE_SIZE + bit // 8] ^= 1 << bit % 8


def _tensor(first: int, count: int) -> MappedTensor:
    return MappedTensor(
        name=f"t{first}",
        role="other",
        layer=None,
        offset=first * PAGE_SIZE,
        length=count * PAGE_SIZE,
        first_page=first,
        page_count=count,
        read=True,
    )


@pytest.fixture(scope="module")
def struck(tmp_path_factory):
    return Struck(tmp_path_factory.mktemp("parity"))


@given(flips=flips)
def test_exactly_the_struck_pages_are_found(struck, flips):
    struck.reset()
    for flip in flips:
        struck.strike(*flip)
    assert [bad.page for bad in struck.memory.scan()] == sorted({page for page, _ in flips})


@given(flips=flips)
def test_a_group_is_restored_exactly_or_reported_lost(struck, flips):
    struck.reset()
    for flip in flips:
        struck.strike(*flip)
    bad = [found.page for found in struck.memory.scan()]
    hits = Counter(page % struck.parity.groups for page in bad)
    outcome = repair(struck.memory, struck.parity, bad, struck.absent)

    restorable = tuple(page for page in bad if hits[page % struck.parity.groups] <= PARITY_PAGES)
    assert outcome.from_parity == restorable
    assert outcome.from_file == ()
    assert outcome.lost == tuple(page for page in bad if page not in restorable)
    assert [found.page for found in struck.memory.scan()] == list(outcome.lost)
    wrong = (struck.live != struck.good).reshape(PAGES, PAGE_SIZE).any(axis=1)
    assert np.flatnonzero(wrong).tolist() == list(outcome.lost)
