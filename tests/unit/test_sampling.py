"""The choice of a token, and stop strings."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from node.inference.head import Candidates, Wanted
from node.inference.sampling import StopMatcher, choose, uniform, wanted
from telemetry.sampling import GREEDY, Sampling, check_sampling
from tests.small_screen import small_head

NONE: frozenset[int] = frozenset()


def candidates(logits: dict[int, float], log_total: float | None = None) -> Candidates:
    order = sorted(logits, key=lambda token: (-logits[token], token))
    ids = np.array(order, np.int64)
    return Candidates(ids, np.array([logits[token] for token in order], np.float32), np.sort(ids), log_total)


def draws(found: Candidates, sampling: Sampling, count: int) -> np.ndarray:
    return np.array([choose(found, sampling, index, NONE).token for index in range(count)])


def test_greedy_takes_the_lowest_id_of_the_largest() -> None:
    assert choose(candidates({7: 2.0, 3: 2.0, 9: 1.0}), GREEDY, 0, NONE).token == 3


def test_greedy_pays_no_heed_to_top_k_and_top_p() -> None:
    sampling = Sampling(top_k=1000, top_p=0.1, seed=9)
    assert wanted(sampling, NONE) == Wanted(1)
    assert choose(candidates({4: 1.0, 5: 3.0}), sampling, 3, NONE).token == 5


def test_penalty_lowers_a_seen_token_below_another() -> None:
    sampling = Sampling(repetition_penalty=1.5)
    found = candidates({1: 3.0, 2: 2.5, 3: -1.0})
    assert choose(found, sampling, 0, NONE).token == 1
    assert choose(found, sampling, 0, {1}).token == 2
    assert choose(candidates({1: -1.0, 2: -1.2}), sampling, 0, {1}).token == 2


def test_penalty_of_a_seen_token_need_not_change_the_choice() -> None:
    assert choose(candidates({1: 3.0, 2: 1.5}), Sampling(repetition_penalty=1.5), 0, {1}).token == 1


def test_seen_tokens_do_not_count_where_there_is_a_penalty() -> None:
    assert wanted(Sampling(temperature=1, top_k=7), {3, 4}) == Wanted(7)
    assert wanted(Sampling(temperature=1, top_k=7, repetition_penalty=1.1), {3, 4}) == Wanted(
        7, frozenset({3, 4})
    )


@pytest.mark.parametrize("seed", range(5))
def test_penalty_with_the_head_equals_penalty_of_every_logit(seed: int) -> None:
    small = small_head()
    state = small.hidden[seed]
    sampling = Sampling(temperature=1.3, top_k=9, repetition_penalty=1.7, seed=seed)
    (plain,) = small.head.top(state[np.newaxis], [60])
    seen = set(plain.ids[: 20 + seed].tolist())
    (found,) = small.head.top(state[np.newaxis], [wanted(sampling, seen)])
    logits = small.head.exact(state, np.arange(640))
    everything = candidates(dict(enumerate(logits.tolist())))
    assert [choose(found, sampling, index, seen) for index in range(40)] == [
        choose(everything, sampling, index, seen) for index in range(40)
    ]


def test_more_candidates_than_asked_for_change_nothing() -> None:
    few = {token: 1.0 / (1 + token) for token in range(4)}
    sampling = Sampling(temperature=1.5, top_k=4, seed=2)
    more = candidates({**few, 9: 0.0, 11: -0.5})
    assert draws(candidates(few), sampling, 200).tolist() == draws(more, sampling, 200).tolist()


def test_frequencies_follow_the_softmax() -> None:
    logits = {10: 2.0, 11: 1.0, 12: 0.5, 13: -0.5, 14: -1.0}
    sampling = Sampling(temperature=0.8, seed=20260101)
    count = 20_000
    drawn = draws(candidates(logits), sampling, count)
    shares = np.exp(np.array(list(logits.values())) / 0.8)
    expected = count * shares / shares.sum()
    observed = np.array([(drawn == token).sum() for token in logits])
    chi_square = float((np.square(observed - expected) / expected).sum())
    assert chi_square < 18.5  # 99.9 % of 4 degrees of freedom


def test_top_p_keeps_the_smallest_set() -> None:
    found = candidates({1: math.log(0.5), 2: math.log(0.3), 3: math.log(0.15), 4: math.log(0.05)})
    for top_p, kept in ((0.4, {1}), (0.6, {1, 2}), (0.9, {1, 2, 3}), (1.0, {1, 2, 3, 4})):
        drawn = draws(found, Sampling(temperature=1, top_p=top_p, seed=5), 500)
        assert set(drawn.tolist()) == kept


def test_draws_of_a_seed_are_fixed() -> None:
    assert [uniform(7, index) for index in range(3)] == [uniform(7, index) for index in range(3)]
    assert uniform(7, 0) != uniform(8, 0)
    assert uniform(2**63 - 1, 2**31) < 1
    # Written down: these decide texts that may have to be computed again years later.
    assert [uniform(1, 0), uniform(1, 1)] == [0.7497482413580301, 0.37239342287916577]


def test_draws_are_uniform_over_seeds_and_indices() -> None:
    numbers = np.array([uniform(seed, index) for seed in range(200) for index in range(200)])
    counts, _ = np.histogram(numbers, 50, (0, 1))
    assert float((np.square(counts - 800.0) / 800).sum()) < 85.4  # 99.9 % of 49 degrees of freedom
    table = numbers.reshape(200, 200)
    for one, other in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1]), (table, table.T)):
        apart = one != other
        assert abs(np.corrcoef(one[apart], other[apart])[0, 1]) < 0.02


def test_logprob_is_at_temperature_1_without_penalty() -> None:
    total = math.log(math.exp(3) + math.exp(2.5))
    sampling = Sampling(temperature=0.5, top_k=1, repetition_penalty=2, logprobs=True)
    choice = choose(candidates({1: 3.0, 2: 2.5}, total), sampling, 0, {1})
    assert choice.token == 2
    assert choice.logprob == pytest.approx(2.5 - total)


def test_logprob_needs_the_total() -> None:
    with pytest.raises(ValueError, match="log-probabilities"):
        choose(candidates({1: 3.0}), Sampling(logprobs=True), 0, NONE)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", 2.1, "<= 2"),
        ("temperature", -0.1, ">= 0"),
        ("top_k", 0, ">= 1"),
        ("top_k", 1025, "<= 1024"),
        ("top_p", 0.0, "> 0"),
        ("top_p", 1.1, "<= 1"),
        ("repetition_penalty", 0.9, ">= 1"),
        ("repetition_penalty", 2.1, "<= 2"),
        ("seed", -1, ">= 0"),
        ("stop", ("",), "length >= 1"),
        ("stop", ("x" * 65,), "length <= 64"),
        ("stop", ("a", "b", "c", "d", "e"), "length <= 4"),
    ],
)
def test_fields_out_of_range(field: str, value: object, says: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=says) as caught:
        check_sampling(Sampling(**{field: value}))  # type: ignore[arg-type]
    assert f"$.{field}" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_is_no_temperature(value: float) -> None:
    with pytest.raises(msgspec.ValidationError):
        check_sampling(Sampling(temperature=value))


def test_unknown_field() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"temprature": 1.0}, Sampling)


def test_default_takes_no_room_on_the_wire() -> None:
    assert msgspec.to_builtins(GREEDY) == {}


@pytest.mark.parametrize(
    ("stop", "pieces", "found_at"),
    [
        (("end",), [b"the e", b"n", b"d of"], 2),
        (("end",), [b"eend"], 0),
        (("aab",), [b"aa", b"aab"], 1),
        (("\u00e9",), ["caf\u00e9".encode()[:-1], "\u00e9".encode()[1:]], 1),
        (("\U0001f6f0!",), [bytes([each]) for each in "\U0001f6f0!".encode()], 4),
        (("x", "long one"), [b"a long", b" one"], 1),
        (("\n\n",), [b"a\n", b"b\n", b"\n"], 2),
        (("never",), [b"neve", b"", b"neve"], None),
        ((), [b"anything"], None),
    ],
)
def test_stop_strings(stop: tuple[str, ...], pieces: list[bytes], found_at: int | None) -> None:
    matcher = StopMatcher(stop)
    found = [matcher.feed(piece) for piece in pieces]
    first = len(pieces) if found_at is None else found_at
    assert found == [number >= first for number in range(len(pieces))]


def test_a_found_stop_string_stays_found() -> None:
    matcher = StopMatcher(("stop",))
    assert matcher.feed(b"stop")
    assert matcher.feed(b"and go on for a while")
