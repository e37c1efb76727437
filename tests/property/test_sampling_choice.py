"""Properties of the choice of a token, for any logits and any settings."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from node.inference.head import Candidates
from node.inference.sampling import SMALLEST_TEMPERATURE, StopMatcher, choose, uniform, wanted
from telemetry.sampling import Sampling, check_sampling
from tests.strategies import samplings

VOCAB = 40
logits = st.lists(st.floats(-30, 30, width=32), min_size=VOCAB, max_size=VOCAB)
tied = st.lists(st.sampled_from([0.0, 1.0, -1.0]), min_size=VOCAB, max_size=VOCAB)
seen_tokens = st.sets(st.integers(0, VOCAB - 1), max_size=20)
indices = st.integers(0, 2**31)


def everything(values: list[float]) -> Candidates:
    array = np.array(values, np.float32)
    order = np.lexsort((np.arange(VOCAB), -array))
    return Candidates(order, array[order], np.arange(VOCAB), 40.0)


def penalised(values: list[float], sampling: Sampling, seen: set[int]) -> np.ndarray:
    array = np.array(values, np.float32).astype(np.float64)
    for token in seen:
        factor = sampling.repetition_penalty
        array[token] = array[token] / factor if array[token] > 0 else array[token] * factor
    return array


@given(values=logits | tied, sampling=samplings, index=indices, seen=seen_tokens)
def test_the_choice_is_among_the_top_k_and_the_smallest_set(
    values: list[float], sampling: Sampling, index: int, seen: set[int]
) -> None:
    choice = choose(everything(values), sampling, index, seen)
    array = penalised(values, sampling, seen)
    order = np.lexsort((np.arange(VOCAB), -array))
    place = order.tolist().index(choice.token)
    if sampling.temperature == 0:
        assert place == 0
        return
    assert place < sampling.top_k
    kept = array[order][: sampling.top_k]
    shares = np.exp((kept - kept[0]) / max(sampling.temperature, SMALLEST_TEMPERATURE))
    shares /= shares.sum()
    assert shares[:place].sum() < sampling.top_p + 1e-9


@given(values=logits | tied, sampling=samplings, index=indices, seen=seen_tokens)
def test_the_proven_ones_decide(values: list[float], sampling: Sampling, index: int, seen: set[int]) -> None:
    full = everything(values)
    asked = wanted(sampling, seen)
    counting = [place for place, token in enumerate(full.ids.tolist()) if token not in asked.lowered]
    until = counting[asked.k - 1] + 1 if len(counting) >= asked.k else VOCAB
    few = Candidates(full.ids[:until], full.logits[:until], np.sort(full.ids[:until]), 40.0)
    assert choose(few, sampling, index, seen) == choose(full, sampling, index, seen)


@given(values=logits, sampling=samplings, index=indices)
def test_a_penalty_of_1_is_none(values: list[float], sampling: Sampling, index: int) -> None:
    none = Sampling(temperature=sampling.temperature, top_k=sampling.top_k, seed=sampling.seed)
    found = everything(values)
    assert choose(found, none, index, set(range(VOCAB))) == choose(found, none, index, set())


@given(seed=st.integers(0, 2**63 - 1), index=indices)
def test_a_draw_is_a_function_of_seed_and_index(seed: int, index: int) -> None:
    assert 0 <= uniform(seed, index) < 1
    assert uniform(seed, index) == uniform(seed, index)


@given(sampling=samplings)
def test_drawn_settings_are_in_range(sampling: Sampling) -> None:
    assert check_sampling(sampling) == sampling


@settings(max_examples=200)
@given(
    stop=st.lists(st.text("ab\u00e9\U0001f6f0", min_size=1, max_size=4), max_size=4).map(tuple),
    text=st.text("ab\u00e9\U0001f6f0", max_size=30),
    cuts=st.lists(st.integers(0, 120), max_size=12),
)
def test_stop_strings_are_found_wherever_the_pieces_are_cut(
    stop: tuple[str, ...], text: str, cuts: list[int]
) -> None:
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    matcher = StopMatcher(stop)
    for start, end in pairwise(edges):
        assert matcher.feed(data[start:end]) == any(each.encode() in data[:end] for each in stop)
