from __future__ import annotations

import pytest
import walk_boot
import walk_ladder

from fdir.table import Action


@pytest.mark.parametrize("seed", [1, 2])
def test_the_recovery_ladder(seed: int) -> None:
    seen = walk_ladder.walk(8_000, seed)
    assert (
        min(
            seen[action]
            for action in Action
            if action not in {Action.REDO, Action.POWER_CYCLE, Action.REJECT}
        )
        > 0
    )
    assert seen["boots"] > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_boots_one_after_the_other(seed: int) -> None:
    seen = walk_boot.walk(1_500, seed)
    assert min(seen.values()) > 0, seen
