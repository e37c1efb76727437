from __future__ import annotations

import pytest
import walk_clock
import walk_modes
import walk_supervision
import walk_worker_life


@pytest.mark.parametrize("seed", [1, 2])
def test_the_life_of_the_worker(seed: int) -> None:
    seen = walk_worker_life.walk(10_000, seed)
    assert min(seen.values()) > 0, seen


@pytest.mark.parametrize("seed", [1, 2])
def test_modes(seed: int) -> None:
    seen = walk_modes.walk(10_000, seed)
    assert min(count for name, count in seen.items() if name != "boot") > 0, seen


@pytest.mark.parametrize("seed", [1, 2])
def test_the_parent_of_the_node(seed: int) -> None:
    seen = walk_supervision.walk(10_000, seed)
    assert min(seen.values()) > 0, seen


@pytest.mark.parametrize("seed", [1, 2])
def test_the_mission_clock(seed: int) -> None:
    seen = walk_clock.walk(10_000, seed)
    assert min(seen.values()) > 0, seen
