from __future__ import annotations

import pytest
import walk_feed_gate
import walk_health_board


@pytest.mark.parametrize("seed", [1, 2])
def test_a_board_of_patients(seed: int) -> None:
    walk_health_board.walk(3_000, seed)


@pytest.mark.parametrize("seed", [1, 2])
def test_what_a_watchdog_is_fed_on(seed: int) -> None:
    walk_feed_gate.walk(4_000, seed)
