"""How the next token is chosen: the sampling part of a job, as it goes over the wire."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

MAX_TOP_K: Final = 1024
"""Largest number of candidates a job may ask for."""

Temperature = Annotated[float, Meta(ge=0, le=2, description="0 (greedy) to 2")]
TopK = Annotated[int, Meta(ge=1, le=MAX_TOP_K, description=f"1 to {MAX_TOP_K} tokens")]
TopP = Annotated[float, Meta(gt=0, le=1, description="above 0, to 1")]
RepetitionPenalty = Annotated[float, Meta(ge=1, le=2, description="1 (none) to 2")]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1, description="0 to 2^63 - 1")]
StopString = Annotated[str, Meta(min_length=1, max_length=64, description="1 to 64 characters")]
StopStrings = Annotated[tuple[StopString, ...], Meta(max_length=4, description="at most 4 strings")]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How tokens are chosen. The default is greedy: the token of the largest logit.

    The order is: repetition penalty, then the `top_k` largest logits, then temperature, then the smallest
    set of them whose probabilities reach `top_p`, then one draw. The same prompt, sampling and seed
    give the same text, whatever else runs beside it.
    """

    temperature: Temperature = 0.0
    """Logits are divided by it before the draw. 0 takes the largest, and `top_k` and `top_p` do nothing."""
    top_k: TopK = 64
    """Only the so many largest logits can be drawn."""
    top_p: TopP = 1.0
    """Only the most probable tokens can be drawn that together have at least this probability."""
    repetition_penalty: RepetitionPenalty = 1.0
    """A token of the prompt or the text has its logit divided by this if positive, multiplied if negative."""
    seed: Seed = 0
    """Draw `n` of a job is a function of the seed and `n` only."""
    stop: StopStrings = ()
    """The text ends with the first token that completes one of these. The string stays in the text: the
    blocks it began in may have been sent."""
    logprobs: bool = False
    """Also return the natural logarithm of each token's probability at temperature 1, without penalty."""


GREEDY: Final = Sampling()
"""The largest logit, no stop strings."""


def check_sampling(sampling: Sampling) -> Sampling:
    """Return `sampling` if every field is in its range: the constructor does not check.

    Raises
    ------
    msgspec.ValidationError
        A field is out of its range; the message names the field and the range.
    """
    return msgspec.convert(msgspec.to_builtins(sampling), Sampling)
