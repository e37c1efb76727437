"""The head against every logit computed in full, on tables and states of all kinds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from node.inference.head import Wanted
from tests.small_screen import SmallHead, small_head
from tests.strategies import hidden_states

SHAPES = [(640, 128, 32), (321, 64, 32), (352, 96, 16)]
smalls = st.builds(lambda shape, seed: small_head(*shape, seed), st.sampled_from(SHAPES), st.integers(0, 2))


def states_for(small: SmallHead, data: st.DataObject, count: int) -> NDArray[np.float32]:
    """States along a row, between rows, of single elements, of calibration, or of any numbers."""
    weights = small.table.to_float()
    return np.stack([data.draw(hidden_states(weights, small.hidden)) for _ in range(count)])


@settings(max_examples=60, deadline=None)
@given(small=smalls, data=st.data())
def test_none_of_the_largest_is_missing(small: SmallHead, data: st.DataObject) -> None:
    vocab = len(small.table.codes)
    states = states_for(small, data, data.draw(st.integers(1, 4)))
    asked = [
        Wanted(
            data.draw(st.integers(1, 80)), data.draw(st.frozensets(st.integers(0, vocab - 1), max_size=60))
        )
        for _ in states
    ]
    for state, each, found in zip(states, asked, small.head.top(states, asked), strict=True):
        logits = small.head.exact(state, np.arange(vocab))
        order = np.lexsort((np.arange(vocab), -logits))
        counting = [place for place, token in enumerate(order.tolist()) if token not in each.lowered]
        until = counting[each.k - 1] + 1
        np.testing.assert_array_equal(found.ids[:until], order[:until])
        np.testing.assert_array_equal(found.logits, logits[found.ids])
        full = small.logits(state)
        tolerance = 1e-6 * np.abs(full).max() + 1e-6 * np.linalg.norm(state)
        assert np.abs(full - logits).max() <= tolerance


@settings(max_examples=60, deadline=None)
@given(small=smalls, data=st.data())
def test_a_logit_depends_on_row_and_state_only(small: SmallHead, data: st.DataObject) -> None:
    vocab = len(small.table.codes)
    (state,) = states_for(small, data, 1)
    everything = small.head.exact(state, np.arange(vocab))
    rows = np.array(data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=700)))
    assert small.head.exact(state, rows).tobytes() == everything[rows].tobytes()


@settings(max_examples=40, deadline=None)
@given(small=smalls, data=st.data())
def test_neighbours_in_the_batch_change_nothing(small: SmallHead, data: st.DataObject) -> None:
    states = states_for(small, data, data.draw(st.integers(2, 9)))
    k = [data.draw(st.integers(1, 70)) for _ in states]
    together = small.head.top(states, k, [True] * len(k))
    for number, each in enumerate(together):
        (alone,) = small.head.top(states[number : number + 1], [k[number]], [True])
        assert each.ids[: k[number]].tobytes() == alone.ids[: k[number]].tobytes()
        assert each.logits[: k[number]].tobytes() == alone.logits[: k[number]].tobytes()
        assert each.log_total == pytest.approx(alone.log_total, rel=1e-6, abs=0.05)
