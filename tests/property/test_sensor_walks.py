from __future__ import annotations

import pytest
import walk_latchup
import walk_sensors

from fdir.sensors import Why


@pytest.mark.parametrize("seed", [1, 2])
def test_one_liar_among_three_is_never_believed(seed: int) -> None:
    seen = walk_sensors.walk(8_000, seed)
    assert min(seen[why] for why in Why) > 0, seen
    assert seen["restored"] > 0
    assert seen["lost"] == seen["regained"] > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_the_latch_up_detector(seed: int) -> None:
    seen = walk_latchup.walk(20_000, seed)
    assert min(seen.values()) > 0, seen
