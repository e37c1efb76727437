"""The decoding of one epoch: sequences step together, prompts are read between two steps. Nothing counts yet.

What an epoch computed and which memory it read is all here, for the proof that follows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from node.inference.decoder import BatchDecoder, Hidden
from node.inference.head import Candidates, HeadFault, ScreenedHead, Wanted
from node.inference.sampling import choose, wanted
from node.inference.sequence import SequenceState

Rows = npt.NDArray[np.int64]


class Unequal(Exception):
    """Two computations of the same epoch differ."""

    def __init__(self, position: int, what: str) -> None:
        super().__init__(f"{what} at position {position} differ when computed twice")
        self.position = position


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question to the head, and its answer."""

    hidden: Hidden
    wants: list[Wanted]
    totals: list[bool]
    answer: list[Candidates]


@dataclass(frozen=True, slots=True)
class _Ran:
    """One run of the trunk, and the head's part of it."""

    seat: int | None
    """Seat of a chunk of a prompt; None for a step."""
    tokens: list[int]
    positions: list[int]
    """Of a chunk: where it begins, alone."""
    hidden: Hidden
    asked: _Asked | None


class Epoch:
    """Decode until it is time to prove.

    Parameters
    ----------
    decoder, head
        The model.
    stepping
        Sequences whose prompt is read, those of seats 0, 1, ... in this order.
    reading
        Sequences whose prompt is to be read, first things first.
    between
        Called after every run of the model with the time it took, s.
    keep
        Keep what `repeat` needs.

    Attributes
    ----------
    steps, steps_s
        Steps done, and the time they took, s.
    computed_s
        Time all runs took, s.
    prefilled
        Prompt tokens read.
    fed, positions, head_rows
        Tokens fed and where, and the rows of its table the head read: what of the tables has to be proven.
    """

    def __init__(
        self,
        decoder: BatchDecoder,
        head: ScreenedHead,
        stepping: Sequence[SequenceState],
        reading: Sequence[SequenceState],
        between: Callable[[float], None],
        *,
        keep: bool = False,
    ) -> None:
        self.steps = 0
        self.steps_s = 0.0
        self.computed_s = 0.0
        self.prefilled = 0
        self._decoder = decoder
        self._head = head
        self._stepping = list(stepping)
        self._reading = list(reading)
        self._between = between
        self._log: list[_Ran] | None = [] if keep else None
        self.fed: set[int] = set()
        self.positions: set[int] = set()
        self.head_rows: list[Rows] = []

    def run(self, enough_s: float, longest_s: float, leave: Callable[[], bool]) -> None:
        """Decode for `enough_s` of computing or `longest_s` of time, or until `leave`, or all is done.

        At least one run of the model is made where there is anything to do.

        Raises
        ------
        ComputeTrip, HeadFault
            A result is unsound: the epoch is dirty.
        """
        deadline = time.perf_counter() + longest_s
        busy = True
        while busy:
            busy = self._read()
            busy = self._step() or busy
            if self.computed_s >= enough_s or time.perf_counter() >= deadline or leave():
                return

    def repeat(self) -> None:
        """Compute everything again, in place, and compare.

        Rows are written again where they are; that they still hash to their digests is for the proof to see.

        Raises
        ------
        Unequal
            A hidden state or a logit is another one.
        ComputeTrip, HeadFault
            As in `run`.
        """
        for ran in self._log or ():
            started = time.perf_counter()
            if ran.seat is None:
                hidden = self._decoder.step(ran.tokens, ran.positions)
            else:
                hidden = self._decoder.prefill(ran.seat, ran.tokens, ran.positions[0])
            if hidden.tobytes() != ran.hidden.tobytes():
                raise Unequal(ran.positions[0], "hidden states")
            if ran.asked is not None:
                again = self._head.top(ran.asked.hidden, ran.asked.wants, ran.asked.totals)
                if not all(map(_same, ran.asked.answer, again)):
                    raise Unequal(ran.positions[0], "logits")
            self._rest(started)

    def _read(self) -> bool:
        """Read the next chunk of a prompt; tell whether there was one."""
        while self._reading:
            sequence = self._reading[0]
            tokens = sequence.chunk() if sequence.prefilling else []
            if tokens and len(tokens) <= sequence.free:
                break
            self._reading.pop(0)  # done, or its window has to slide first
        else:
            return False
        start = sequence.written
        stop = start + len(tokens)
        # Before they are read: what a check trips on has to be proven as well.
        self.fed.update(tokens)
        self.positions.update(range(start, stop))
        started = time.perf_counter()
        hidden = self._decoder.prefill(sequence.seat.index, tokens, start)
        sequence.record(start, stop)
        self.prefilled += len(tokens)
        asked = self._ask(hidden[np.newaxis], [sequence])
        if self._log is not None:
            self._log.append(_Ran(sequence.seat.index, tokens, [start], hidden.copy(), asked))
        joins = not sequence.prefilling and sequence.end is None
        if joins and sequence.seat.index == len(self._stepping):
            self._stepping.append(sequence)
        self._rest(started)
        return True

    def _step(self) -> bool:
        """Feed one token to each sequence; tell whether that could be done, and any is still open.

        One whose text has ended in this epoch is fed its last token again and again: nothing is made of the
        row after its last one, nor of what follows from it.
        """
        open_ones = [at for at, sequence in enumerate(self._stepping) if sequence.end is None]
        if not open_ones or min(sequence.free for sequence in self._stepping) < 1:
            return False
        started = time.perf_counter()
        positions = [sequence.written for sequence in self._stepping]
        tokens = [s.token_at(at) for s, at in zip(self._stepping, positions, strict=True)]
        self.fed.update(tokens)
        self.positions.update(positions)
        hidden = self._decoder.step(tokens, positions)
        for at in open_ones:
            self._stepping[at].record(positions[at], positions[at] + 1)
        asking = [at for at in open_ones if self._stepping[at].abreast]
        part = hidden if len(asking) == len(tokens) else hidden[asking]
        asked = self._ask(part, [self._stepping[at] for at in asking])
        if self._log is not None:
            self._log.append(_Ran(None, tokens, positions, hidden.copy(), asked))
        self.steps += 1
        self.steps_s += time.perf_counter() - started
        self._rest(started)
        return True

    def _ask(self, hidden: Hidden, sequences: Sequence[SequenceState]) -> _Asked | None:
        """Let the sequences that are abreast choose their next token."""
        asking = [sequence for sequence in sequences if sequence.abreast]
        if not asking:
            return None
        wants = [wanted(sequence.sampling, sequence.seen) for sequence in asking]
        totals = [sequence.sampling.logprobs for sequence in asking]
        try:
            answer = self._head.top(hidden, wants, totals)
        except HeadFault as fault:
            self.head_rows.append(fault.rows)
            raise
        for sequence, candidates in zip(asking, answer, strict=True):
            self.head_rows.append(candidates.rows)
            sequence.take(choose(candidates, sequence.sampling, sequence.index, sequence.seen))
        return None if self._log is None else _Asked(hidden.copy(), wants, totals, answer)

    def _rest(self, started: float) -> None:
        took_s = time.perf_counter() - started
        self.computed_s += took_s
        self._between(took_s)


def _same(one: Candidates, other: Candidates) -> bool:
    return (
        one.ids.tobytes() == other.ids.tobytes()
        and one.logits.tobytes() == other.logits.tobytes()
        and one.log_total == other.log_total
    )
