"""Choosing the next token from exact logits. Pure: the same arguments give the same token."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from node.inference.head import Candidates
from telemetry.sampling import Sampling


@dataclass(frozen=True)
class Choice:
    """A chosen token."""

    token: int
    logprob: float | None
    """Natural logarithm of its probability at temperature 1 without penalty; None if not asked for."""


def wanted(sampling: Sampling, seen: AbstractSet[int]) -> int:
    """Return the `k` to ask of the head so that `choose` sees every token it could choose.

    Parameters
    ----------
    sampling
        Of the job.
    seen
        Distinct token ids of the prompt and the text so far.
    """
    raise NotImplementedError


def choose(candidates: Candidates, sampling: Sampling, index: int, seen: AbstractSet[int]) -> Choice:
    """Choose a token.

    Parameters
    ----------
    candidates
        From the head, with at least `wanted` logits proven, and `log_total` if the job wants logprobs.
    sampling
        Of the job.
    index
        Number of the token in the text, from 0. With the seed it decides the draw.
    seen
        Distinct token ids of the prompt and the text so far.
    """
    raise NotImplementedError


class StopMatcher:
    """Finds stop strings in text that arrives as bytes, in pieces of any length.

    Parameters
    ----------
    stop
        The strings, not empty.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        raise NotImplementedError

    def feed(self, piece: bytes) -> bool:
        """Add the bytes of a token; tell whether a stop string is complete in the text so far.

        Once True it stays True. The string may lie across any number of pieces, and a piece may end within
        a character.
        """
        raise NotImplementedError
