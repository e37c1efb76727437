"""Choosing the next token from exact logits. Pure: the same arguments give the same token.

Everything is computed from the logits `wanted`, which the head proves, and in float64; so the text does not
depend on what else the head happened to compute. The draw is by inversion: candidates by falling
probability, the lower id first where two are equal, and a uniform number that is a function of the seed and
the index only, so that a text can be continued, or computed again, from any index.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from node.inference.head import Candidates, Wanted
from telemetry.sampling import Sampling

SMALLEST_TEMPERATURE: Final = 1e-6
"""A smaller one, but for 0, counts as this: only logits within 1e-4 of the largest share in the draw."""
_GAMMA: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1


@dataclass(frozen=True)
class Choice:
    """A chosen token."""

    token: int
    logprob: float | None
    """Natural logarithm of its probability at temperature 1 without penalty; None if not asked for."""


def wanted(sampling: Sampling, seen: AbstractSet[int]) -> Wanted:
    """Return what to ask of the head so that `choose` sees every token it could choose.

    The penalty only lowers. A token among the `top_k` after it has at least the logit of the `top_k`-th
    token that is not seen, so the head need not count the seen ones.

    Parameters
    ----------
    sampling
        Of the job.
    seen
        Distinct token ids of the prompt and the text so far.
    """
    lowered = frozenset(seen) if sampling.repetition_penalty > 1 else frozenset()
    return Wanted(sampling.top_k if sampling.temperature > 0 else 1, lowered)


def choose(candidates: Candidates, sampling: Sampling, index: int, seen: AbstractSet[int]) -> Choice:
    """Choose a token.

    Parameters
    ----------
    candidates
        From the head, as `wanted`, and `log_total` if the job wants logprobs.
    sampling
        Of the job.
    index
        Number of the token in the text, from 0. With the seed it decides the draw.
    seen
        Distinct token ids of the prompt and the text so far.

    Raises
    ------
    ValueError
        The job wants logprobs and the candidates have no `log_total`.
    """
    asked = wanted(sampling, seen)
    count = _proven(candidates, asked) if asked.lowered else asked.k
    ids = candidates.ids[:count]
    logits = candidates.logits[:count].astype(np.float64)
    if sampling.repetition_penalty > 1:
        ids, logits = _penalised(ids, logits, sampling.repetition_penalty, seen)
    place = 0
    if sampling.temperature > 0:
        shares = _shares(logits[: sampling.top_k], sampling)
        place = _draw(shares, uniform(sampling.seed, index))
    token = int(ids[place])
    return Choice(token, _logprob(candidates, token) if sampling.logprobs else None)


def uniform(seed: int, index: int) -> float:
    """Return the uniform number, 0 to below 1, of draw `index` of a seed.

    Output `index` of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)
    started from the mixed seed, so that neighbouring seeds do not draw the same numbers one place apart.
    """
    return (_mix(_mix(seed) + (index + 1) * _GAMMA) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _proven(candidates: Candidates, asked: Wanted) -> int:
    """Return how many candidates are certain to be the largest: down to the k-th that counts."""
    counting = np.fromiter((token not in asked.lowered for token in candidates.ids.tolist()), bool)
    places = np.flatnonzero(counting)[: asked.k]
    return int(places[-1]) + 1 if len(places) == asked.k else len(candidates.ids)


def _penalised(
    ids: NDArray[np.int64], logits: NDArray[np.float64], penalty: float, seen: AbstractSet[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Lower the logits of seen tokens, and put the candidates in order again."""
    repeated = np.fromiter((token in seen for token in ids.tolist()), bool)
    lowered = np.where(logits > 0, logits / penalty, logits * penalty)
    logits = np.where(repeated, lowered, logits)
    order = np.lexsort((ids, -logits))
    return ids[order], logits[order]


def _shares(logits: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Return the probabilities of the tokens that can be drawn, falling, up to a common factor."""
    shares = np.exp((logits - logits[0]) / max(sampling.temperature, SMALLEST_TEMPERATURE))
    running = np.cumsum(shares)
    enough = int(np.searchsorted(running, sampling.top_p * running[-1])) + 1
    kept: NDArray[np.float64] = shares[:enough]
    return kept


def _draw(shares: NDArray[np.float64], number: float) -> int:
    running = np.cumsum(shares)
    return min(int(np.searchsorted(running, number * running[-1], side="right")), len(shares) - 1)


def _logprob(candidates: Candidates, token: int) -> float:
    if candidates.log_total is None:
        raise ValueError("the job wants log-probabilities, and the head was not asked for the total")
    place = int(np.flatnonzero(candidates.ids == token)[0])
    return min(0.0, float(candidates.logits[place]) - candidates.log_total)


class StopMatcher:
    """Finds stop strings in text that arrives as bytes, in pieces of any length.

    Parameters
    ----------
    stop
        The strings; none is found if there are none.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(text.encode() for text in stop)
        self._keep = max((len(text) for text in self._stop), default=1) - 1
        self._tail = b""
        self._found = False

    def feed(self, piece: bytes) -> bool:
        """Add the bytes of a token; tell whether a stop string is complete in the text so far.

        Once True it stays True. The string may lie across any number of pieces, and a piece may end within
        a character: UTF-8 is matched byte by byte, and no character's bytes lie inside another's.
        """
        text = self._tail + piece
        self._found = self._found or any(stop in text for stop in self._stop)
        self._tail = text[-self._keep :] if self._keep else b""
        return self._found
