"""One job in a seat of the arena: its committed tokens, and those of the open epoch.

Rows may lag behind tokens: a sequence whose rows were lost feeds its known tokens again, each on the path
that first made its row (prompt by chunks, text by steps), and nothing is chosen until it is abreast. So
making rows anew is ordinary decoding, in epochs, beside other sequences, and proven like the rest; at its
end the rows must be those that the certificates of the text name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash

from node.inference.arena import Seat, SeatState
from node.inference.decoder import PREFILL_CHUNK
from node.inference.protocol import Block
from node.inference.sampling import Choice, StopMatcher
from telemetry.certificate import chain_next, chain_start
from telemetry.packets import Certificate
from telemetry.sampling import Sampling

Text = Callable[[Sequence[int]], bytes]


class Diverged(Exception):
    """Rows computed anew are not those the certificates name."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What to decode."""

    job: str
    prompt: Sequence[int]
    """Token ids, 1 or more."""
    max_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True)
class Rules:
    """What is the same for all sequences of a worker."""

    image_id: str
    block_tokens: int
    """Tokens of a block, 1 or more."""
    eos: int
    """Token that ends a text."""
    text: Text
    """Turns token ids into the UTF-8 bytes they add to the text."""


class SequenceState:
    """The job of a seat, from the last committed state on.

    Make one with `begin` or `resume`.

    Attributes
    ----------
    seat
        Where its rows are; changes when seats are exchanged.
    prompt, generated
        Committed token ids.
    end
        How the text ends with the tokens of the open epoch: None while it goes on.
    """

    def __init__(self, seat: Seat, rules: Rules) -> None:
        state = seat.state
        tokens: list[int] = seat.tokens[: state.prompt_tokens + state.generated].tolist()
        self.seat = seat
        self.prompt, self.generated = tokens[: state.prompt_tokens], tokens[state.prompt_tokens :]
        self.logprobs: list[float] = seat.logprobs[state.prompt_tokens :][: state.generated].tolist()
        self.end: str | None = None
        self._rules = rules
        self._new: list[int] = []
        self._new_logprobs: list[float] = []
        self._seen = set(tokens)
        self._chain = chain_start(rules.image_id, state.job, self.prompt)
        self._matcher = self._match_again()

    @classmethod
    def begin(cls, seat: Seat, rules: Rules, spec: JobSpec) -> SequenceState:
        """Put a new job in a seat whose rows are empty or already hold the head of its prompt."""
        seat.tokens[: len(spec.prompt)] = spec.prompt
        seat.commit(
            SeatState(
                job=spec.job, prompt_tokens=len(spec.prompt), max_tokens=spec.max_tokens,
                positions=seat.global_rows.proven, base=seat.window_rows.base, sampling=spec.sampling,
            )
        )  # fmt: skip
        return cls(seat, rules)

    @classmethod
    def resume(cls, seat: Seat, rules: Rules) -> SequenceState | None:
        """Take over what another worker left in a seat; None when its tokens and certificates disagree.

        Rows are not looked at.
        """
        sequence = cls(seat, rules)
        for block in sequence.blocks(0):
            c = block.certificate
            sequence._chain = chain_next(sequence._chain, c.epoch, block.first, block.tokens, c.kv_digest)
            if sequence._chain != c.chain:
                return None
        return sequence

    @property
    def job(self) -> str:
        """Name of the job."""
        return self.seat.state.job

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        return self.seat.state.sampling

    @property
    def finish(self) -> str | None:
        """How the job ended, None while it goes on."""
        return self.seat.state.finish

    @property
    def seen(self) -> set[int]:
        """Distinct tokens of prompt and text, those of the open epoch included."""
        return self._seen

    @property
    def new_tokens(self) -> int:
        """Tokens of the open epoch."""
        return len(self._new)

    @property
    def written(self) -> int:
        """Positions whose rows are written: the next token is fed there."""
        return self.seat.global_rows.written

    @property
    def prefilling(self) -> bool:
        """Whether rows of the prompt are still to be made."""
        return self.written < len(self.prompt)

    @property
    def lagging(self) -> bool:
        """Whether rows that were lost are still to be computed anew."""
        return self.written < len(self.prompt) + len(self.generated) - 1

    @property
    def free(self) -> int:
        """Rows that can be written before the window has to slide."""
        return self.seat.window_rows.free

    def token_at(self, position: int) -> int:
        """Return the token fed at a position."""
        at = position - len(self.prompt)
        if at < 0:
            return self.prompt[position]
        done = len(self.generated)
        return self.generated[at] if at < done else self._new[at - done]

    def chunk(self) -> list[int]:
        """Return the next tokens of the prompt to feed, from `written` on."""
        start = self.written
        return self.prompt[start : (start // PREFILL_CHUNK + 1) * PREFILL_CHUNK]

    def record(self, start: int, stop: int) -> None:
        """Take the digests of the rows at `start` to `stop`, just written."""
        self.seat.global_rows.record(start, stop)
        self.seat.window_rows.record(start, stop)

    @property
    def index(self) -> int:
        """Index in the text of the next token to choose."""
        return len(self.generated) + len(self._new)

    @property
    def abreast(self) -> bool:
        """Whether the last row written leads to the next token to choose: it does not while rows lag."""
        return self.written == len(self.prompt) + self.index

    def take(self, choice: Choice) -> None:
        """Add the token the model chose."""
        self._new.append(choice.token)
        # As the arena keeps it, so that a block sent again is the same.
        self._new_logprobs.append(math.nan if choice.logprob is None else float(np.float32(choice.logprob)))
        self._seen.add(choice.token)
        if choice.token == self._rules.eos:
            self.end = "eos"
        elif self._matcher is not None and self._matcher.feed(self._rules.text([choice.token])):
            self.end = "stop"
        elif self.index >= self.seat.state.max_tokens:
            self.end = "length"

    def is_of(self, spec: JobSpec) -> bool:
        """Tell whether the job is the one of a specification."""
        state = self.seat.state
        return (self.prompt, state.max_tokens, state.sampling) == (
            list(spec.prompt), spec.max_tokens, spec.sampling,
        )  # fmt: skip

    def set_parked(self, parked: bool) -> None:
        """Note in the arena whether the job rests."""
        if self.seat.state.parked != parked:
            self.seat.commit(msgspec.structs.replace(self.seat.state, parked=parked))

    def drop(self) -> None:
        """Forget the tokens of the open epoch."""
        if self._new:
            self._new, self._new_logprobs, self.end = [], [], None
            self._seen = {*self.prompt, *self.generated}
            self._matcher = self._match_again()

    def lose_rows(self) -> None:
        """Give up the rows, which are to be made anew from the first position on."""
        self.seat.global_rows.reset()
        self.seat.window_rows.reset()
        self.seat.commit(msgspec.structs.replace(self.seat.state, positions=0, base=0))

    def commit(self, ended: str | None = None) -> list[Block]:
        """Make the open epoch, which is proven, the committed state; return the blocks it completed.

        Parameters
        ----------
        ended
            Ends the job here, for a reason outside its text. Its last block may then have no tokens; tokens
            whose rows are not all there cannot be sealed, and are given up.

        Raises
        ------
        Diverged
            Rows were computed anew, and are others. Nothing is committed.
        """
        seat, size = self.seat, self._rules.block_tokens
        self._check_rebuilt()
        for rows in (seat.global_rows, seat.window_rows):
            if rows.written != rows.proven:
                rows.commit()
        at = len(self.prompt) + len(self.generated)
        seat.tokens[at : at + len(self._new)] = self._new
        seat.logprobs[at : at + len(self._new)] = self._new_logprobs
        self.generated += self._new
        self.logprobs += self._new_logprobs
        self._new, self._new_logprobs = [], []
        first_new = blocks = seat.state.blocks
        finish = self.end or ended
        if finish and self.written < len(self.prompt) + len(self.generated) - 1:
            del self.generated[blocks * size :], self.logprobs[blocks * size :]
        while len(self.generated) >= (blocks + 1) * size:
            self._seal(blocks, size)
            blocks += 1
        rest = len(self.generated) - blocks * size
        if finish and (rest or blocks == first_new):
            self._seal(blocks, rest)
            blocks += 1
        seat.commit(
            msgspec.structs.replace(
                seat.state,
                generated=len(self.generated),
                positions=self.written,
                base=seat.window_rows.base,
                blocks=blocks,
                finish=finish,
            )
        )
        return [self._block(number) for number in range(first_new, blocks)]

    def blocks(self, known_tokens: int) -> list[Block]:
        """Return the committed blocks from token index `known_tokens` on."""
        firsts: list[int] = self.seat.blocks["first"][: self.seat.state.blocks].tolist()
        return [self._block(number) for number, first in enumerate(firsts) if first >= known_tokens]

    def _match_again(self) -> StopMatcher | None:
        """Return a matcher that has read the committed text; None when there is nothing to match."""
        if not self.sampling.stop:
            return None
        matcher = StopMatcher(self.sampling.stop)
        for token in self.generated:
            matcher.feed(self._rules.text([token]))
        return matcher

    def _seal(self, number: int, count: int) -> None:
        """Write the record of a block of `count` tokens: everything in it is proven."""
        first = number * self._rules.block_tokens
        tokens = self.generated[first : first + count]
        kv_digest = self._kv_digest(first, count)
        self._chain = chain_next(self._chain, number, first, tokens, kv_digest)
        record = self.seat.blocks[number]
        record["first"], record["count"] = first, count
        record["kv"] = np.frombuffer(kv_digest, np.uint8)
        record["chain"] = np.frombuffer(self._chain, np.uint8)

    def _kv_digest(self, first: int, count: int) -> bytes:
        """Return the digest of the rows that led to a block of tokens, 8 bytes."""
        # The row of a block's last token is written when the next block feeds it.
        stop = len(self.prompt) + first + count - 1 if first + count else 0
        start = len(self.prompt) + first - 1 if first else 0
        seat = self.seat
        return xxhash.xxh3_64_digest(
            seat.global_rows.digest(start, stop) + seat.window_rows.digest(start, stop)
        )

    def _check_rebuilt(self) -> None:
        """Compare rows computed anew with the certificates, in the epoch that brings them abreast."""
        known = len(self.prompt) + len(self.generated) - 1
        if not self.generated or self.seat.global_rows.proven >= known or self.written < known:
            return
        for record in self.seat.blocks[: self.seat.state.blocks]:
            first, count = int(record["first"]), int(record["count"])
            if record["kv"].tobytes() != self._kv_digest(first, count):
                raise Diverged(f"rows of {self.job}, token {first} on, computed anew are not those certified")

    def _block(self, number: int) -> Block:
        state, record = self.seat.state, self.seat.blocks[number]
        first, count = int(record["first"]), int(record["count"])
        tokens = self.generated[first : first + count]
        return Block(
            job=state.job,
            first=first,
            tokens=tokens,
            text=self._rules.text(tokens),
            certificate=Certificate(
                image_id=self._rules.image_id,
                epoch=number,
                kv_digest=record["kv"].tobytes(),
                chain=record["chain"].tobytes(),
            ),
            prompt_tokens=self.prompt if number == 0 else None,
            finish=state.finish if number == state.blocks - 1 else None,
            logprobs=self.logprobs[first : first + count] if state.sampling.logprobs else None,
        )


def unstarted_block(spec: JobSpec, rules: Rules, finish: str) -> Block:
    """Return the last block of a job that ended before it had a seat: no tokens, and their certificate."""
    nothing = xxhash.xxh3_64_digest(b"")
    kv_digest = xxhash.xxh3_64_digest(nothing * 2)
    chain = chain_next(chain_start(rules.image_id, spec.job, spec.prompt), 0, 0, [], kv_digest)
    return Block(
        job=spec.job,
        first=0,
        tokens=[],
        text=b"",
        certificate=Certificate(image_id=rules.image_id, epoch=0, kv_digest=kv_digest, chain=chain),
        prompt_tokens=list(spec.prompt),
        finish=finish,
        logprobs=[] if spec.sampling.logprobs else None,
    )
