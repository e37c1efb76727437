"""Who sits where, how long an epoch lasts, and who has to go: pure decisions of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from node.inference.decoder import PREFILL_CHUNK


class Role(Enum):
    """What a seat does in the coming epoch."""

    STEP = "step"
    """Decodes, in lockstep with the others: those hold the first seats."""
    NEXT = "next"
    """Reads its prompt, and steps with the others as soon as it has: it holds the seat after theirs."""
    OTHER = "other"
    """Anything else."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A job that has a seat and does not decode."""

    job: str
    finished: bool
    """Its rows serve others as a prefix only; nothing is lost with it."""
    wanted: bool
    """It waits to go on, behind others: it would have to start again from its prompt."""
    used: int
    """Order of last use; larger is later."""


def epoch_seconds(scan_s: float, budget: float, longest_s: float, factor: float = 1.0) -> float:
    """Return how long an epoch is to compute.

    Parameters
    ----------
    scan_s
        Time the last proof took, s.
    budget
        Share of the computing time that proofs may take, above 0.
    longest_s
        Longest epoch, s: a strike stays unseen no longer.
    factor
        Shortens all epochs, where strikes are expected: above 0, to 1.

    Returns
    -------
    float
        Seconds, at most `longest_s`. The proof then takes `budget` of the epoch, or more if `longest_s`
        or `factor` say so.
    """
    return min(scan_s / budget, longest_s) * factor


def exchanges(roles: Sequence[Role]) -> list[tuple[int, int]]:
    """Return which seats to exchange, in turn, so that each role is where it belongs.

    Parameters
    ----------
    roles
        Of each seat in order; at most one is `Role.NEXT`.

    Returns
    -------
    list of pairs
        Few: a seat that steps and stands right is not moved.
    """
    seats = list(roles)
    count = seats.count(Role.STEP)
    wrong = [seat for seat in range(count) if seats[seat] is not Role.STEP]
    steppers = [seat for seat in range(count, len(seats)) if seats[seat] is Role.STEP]
    swaps = list(zip(wrong, steppers, strict=True))
    for low, high in swaps:
        seats[low], seats[high] = seats[high], seats[low]
    if Role.NEXT in seats and (at := seats.index(Role.NEXT)) != count:
        swaps.append((count, at))
    return swaps


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many rows a prompt `one` may take from a prompt `other`: whole chunks, and never its last.

    The chunk with the last token has to be read, since the first token of the text comes from it.
    """
    most = min((len(one) - 1) // PREFILL_CHUNK, len(other) // PREFILL_CHUNK) * PREFILL_CHUNK
    same = next((at for at in range(most) if one[at] != other[at]), most)
    return same // PREFILL_CHUNK * PREFILL_CHUNK


def first_to_go(holders: Iterable[Holder]) -> str | None:
    """Return the job whose seat is taken first; None if there is none.

    Finished ones go before parked ones, those before wanted ones, and the oldest use first.
    """
    order = sorted(holders, key=lambda holder: (holder.wanted, not holder.finished, holder.used))
    return order[0].job if order else None
