"""The head: exact logits, the proof that none is missing, and what it makes of faults."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from node.inference.gguf_source import QuantMatrix
from node.inference.head import CHUNK, HeadFault, ScreenedHead, Wanted
from node.inference.screen import Screen
from tests.small_screen import SmallHead, open_head, open_screen, small_head


def damaged(small: SmallHead, name: str, change: object, at: object = ...) -> ScreenedHead:
    """The head on a screen of which one tensor is another."""
    tensor = small.screen.tensors[name].copy()
    tensor[at] = change(tensor[at]) if callable(change) else change  # type: ignore[index]
    screen = Screen(
        small.screen.model,
        {**small.screen.tensors, name: tensor},
        small.screen.rotation,
        small.screen.bounds,
    )
    return open_head(small.table, screen, open_screen(screen))


def test_largest_logits_are_found() -> None:
    small = small_head()
    found = small.head.top(small.hidden[:8], [1, 2, 3, 5, 8, 13, 21, 640])
    for state, each, k in zip(small.hidden, found, (1, 2, 3, 5, 8, 13, 21, 640), strict=False):
        order = np.argsort(-small.head.exact(state, np.arange(640)), kind="stable")
        np.testing.assert_array_equal(each.ids[:k], order[:k])
        np.testing.assert_array_equal(each.rows, np.sort(each.ids))
        np.testing.assert_allclose(each.logits, small.logits(state)[each.ids], rtol=1e-6, atol=1e-5)


def test_few_rows_are_read() -> None:
    small = small_head(vocab=4096)
    found = small.head.top(small.hidden[:8], [1] * 8)
    assert max(len(each.rows) for each in found) < 400


def test_exact_logit_is_the_rounded_product() -> None:
    small = small_head()
    state = small.hidden[0]
    expected = small.logits(state).astype(np.float32)
    np.testing.assert_allclose(small.head.exact(state, np.arange(640)), expected, rtol=2**-23)


def test_more_rows_than_a_chunk() -> None:
    small = small_head(vocab=2 * CHUNK + 100)
    (all_of_them,) = small.head.top(small.hidden[:1], [2 * CHUNK + 100])
    assert len(all_of_them.rows) == 2 * CHUNK + 100
    rows = np.random.default_rng(0).permutation(2 * CHUNK + 100)
    logits = small.head.exact(small.hidden[0], rows)
    np.testing.assert_array_equal(logits[np.argsort(rows)][all_of_them.ids], all_of_them.logits)


def test_tokens_that_do_not_count_are_found_besides() -> None:
    small = small_head()
    state = small.hidden[:1]
    (plain,) = small.head.top(state, [40])
    lowered = frozenset(plain.ids[:30].tolist())
    (found,) = small.head.top(state, [Wanted(2, lowered)])
    np.testing.assert_array_equal(found.ids[:32], plain.ids[:32])


def test_hardly_any_token_counts() -> None:
    small = small_head()
    (found,) = small.head.top(small.hidden[:1], [Wanted(3, frozenset(range(639)))])
    assert len(found.ids) == 640


def test_zero_state_gives_the_lowest_ids() -> None:
    (found,) = small_head().head.top(np.zeros((1, 128), np.float32), [3])
    assert found.ids[:3].tolist() == [0, 1, 2]
    assert not found.logits.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e36])
def test_states_of_any_size(scale: float) -> None:
    small = small_head()
    state = (small.hidden[:1] * np.float32(scale)).astype(np.float32)
    (found,) = small.head.top(state, [5])
    np.testing.assert_array_equal(found.ids[:5], np.argsort(-small.logits(state[0]), kind="stable")[:5])


def test_total_is_exact_if_every_row_is_read() -> None:
    small = small_head()
    (found,) = small.head.top(small.hidden[:1], [640], [True])
    logits = small.logits(small.hidden[0])
    expected = logits.max() + math.log(np.exp(logits - logits.max()).sum())
    assert found.log_total == pytest.approx(expected, abs=1e-5)


def test_total_is_estimated_for_the_rest() -> None:
    small = small_head(vocab=4096)
    found = small.head.top(small.hidden[:8], [1] * 8, [True] * 7 + [False])
    assert found[7].log_total is None
    for state, each in zip(small.hidden[:7], found, strict=False):
        logits = small.logits(state)
        assert each.log_total == pytest.approx(
            logits.max() + math.log(np.exp(logits - logits.max()).sum()), abs=0.05
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_state_that_is_no_number(bad: float) -> None:
    states = small_head().hidden[:2].copy()
    states[1, 7] = bad
    with pytest.raises(HeadFault, match="not finite"):
        small_head().head.top(states, [1, 1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("screen.high.scale", np.float32(np.nan)),
        ("screen.low.scale", np.float32(np.inf)),
        ("screen.high.scale", lambda value: value * 64),
        ("screen.low.weight", lambda value: value ^ 0x88),
        ("screen.row_bound", lambda value: value + np.float32(1)),
        ("screen.row_bound", lambda value: value - np.float32(0.04)),
    ],
)
def test_fault_in_the_screen_is_seen(name: str, change: object) -> None:
    small = small_head()
    (best,) = small.head.top(small.hidden[:1], [1])
    with pytest.raises(HeadFault):
        damaged(small, name, change, at=slice(int(best.ids[0]), int(best.ids[0]) + 1)).top(
            small.hidden[:1], [1]
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_fault_in_the_sums_is_seen(value: float) -> None:
    small = small_head()
    with pytest.raises(HeadFault, match="off their sum"):
        damaged(small, "screen.row_bound.sum", np.float32(value)).top(small.hidden[:1], [1])


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0, 3e38, np.inf, np.nan])
def test_fault_in_the_table_is_seen(scale: float) -> None:
    small = small_head()
    (best,) = small.head.top(small.hidden[:1], [1])
    scales = small.table.scales.copy()
    scales[best.ids[0]] = scale
    table = QuantMatrix(small.table.codes, scales)
    with pytest.raises(HeadFault, match="outside the bounds"):
        open_head(table, small.screen, small.session).top(small.hidden[:1], [1])


def test_fault_in_the_rotation_is_seen() -> None:
    small = small_head()
    rotation = small.screen.rotation.copy()
    rotation[:, 0] *= -1
    screen = replace(small.screen, rotation=rotation)
    with pytest.raises(HeadFault, match="outside the bounds"):
        open_head(small.table, screen, small.session).top(small.hidden[:1], [1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300])
def test_rotation_that_is_no_number_is_seen(value: float) -> None:
    small = small_head()
    rotation = small.screen.rotation.copy()
    rotation[3, 5] = value
    screen = replace(small.screen, rotation=rotation)
    with pytest.raises(HeadFault, match="not finite"):
        open_head(small.table, screen, small.session).top(small.hidden[:1], [1])


def test_shapes_that_do_not_fit() -> None:
    small = small_head()
    codes = small.table.codes.reshape(640, 4, 32)
    scales, rotation, bounds = small.table.scales, small.screen.rotation, small.screen.bounds
    with pytest.raises(ValueError, match="scales"):
        ScreenedHead(small.session, codes, scales[:, :3], rotation, bounds)
    with pytest.raises(ValueError, match="do not fit each other"):
        ScreenedHead(small.session, codes.reshape(640, 2, 64), scales[:, :2], rotation, bounds)
    with pytest.raises(ValueError, match="rotation"):
        ScreenedHead(small.session, codes, scales, rotation[:64, :64], bounds)
