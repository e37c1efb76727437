"""The books of the memory scrub under random events."""

from __future__ import annotations

import pytest
from walk_regions import walk


@pytest.mark.parametrize("seed", range(3))
def test_the_scrub_reads_in_order_within_its_budget(seed: int) -> None:
    walk(3000, seed)
