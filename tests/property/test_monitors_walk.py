from __future__ import annotations

import pytest
import walk_monitors


@pytest.mark.parametrize("seed", [1, 2])
def test_monitors_of_every_kind_of_check(seed: int) -> None:
    fired = walk_monitors.walk(4_000, seed)
    assert min(count for row, count in fired.items() if row != "a.fill") > 0, fired
