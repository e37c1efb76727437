"""Verified decoding: no token leaves before the memory it came from is proven (design section 5).

An epoch decodes some provisional tokens, then proves

1. every weight page it read (and a slice of the rest, in turn) against the image's digests, and
2. every KV row, old and new, against the digests taken as each was written.

Clean: the tokens are committed to the arena. Dirty: pages and rows are repaired in place, the KV cache is
cut back to the last committed row, and the epoch is decoded again, half as long each time. Decoding is
deterministic, so the text is that of a run in which nothing was struck.

An epoch ends after `epoch_s` at the latest, so that a strike is found soon however slowly the worker is
paced. Tokens leave in blocks of `block_tokens` by index, each with a certificate: where blocks end does not
depend on how long epochs took, so a job that has to start again makes the same blocks (ADR 0005).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from fdir.rows import BadRow, RowIntegrity, Words
from node.inference.arena import ArenaState, KvArena
from node.inference.decoder import Decoder, greedy
from node.inference.protocol import Block, Strike
from telemetry.certificate import chain_next, chain_start
from telemetry.packets import Certificate


class BeyondRepair(Exception):
    """Memory cannot be made whole here: the recovery ladder has to take the next step."""


@dataclass(frozen=True, slots=True)
class Mended:
    """One bad weight page and what became of it."""

    page: int
    role: str
    method: str
    """`parity`, `golden`, or `none` when the page is still bad."""


class Weights(Protocol):
    """Protected weight memory."""

    def check(self, tokens: Collection[int]) -> list[Mended]:
        """Prove all pages an epoch over `tokens` read; repair bad ones in place and return them."""


@dataclass(slots=True)
class Counters:
    """What the decoder did since it was made."""

    tokens_committed: int = 0
    tokens_discarded: int = 0
    epochs_clean: int = 0
    epochs_dirty: int = 0
    scan_ms: float = 0.0
    step_ms: float = 0.0


class VerifiedDecoder:
    """Decode one sequence at a time, in epochs that are proven before they count.

    Parameters
    ----------
    decoder, arena, weights
        The model, its KV arena, and its protected weights.
    image_id
        Identity of the image, for the certificates.
    block_tokens
        Tokens of a block, and of an epoch at most; 1 or more.
    epoch_s
        Longest epoch, s of physical time, pauses included; a run of the model under way is finished.
    retries
        How often a dirty epoch is decoded again before `BeyondRepair`.
    eos
        Token that ends a text.
    text
        Turns token ids into the UTF-8 bytes they add to the text.
    report
        Takes a `Strike` for every damage found.
    between
        Called after every run of the model with the time it took, s: the worker answers pings and paces here.
    """

    def __init__(
        self,
        decoder: Decoder,
        arena: KvArena,
        weights: Weights,
        *,
        image_id: str,
        block_tokens: int,
        epoch_s: float,
        retries: int,
        eos: int,
        text: Callable[[Sequence[int]], bytes],
        report: Callable[[Strike], None],
        between: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.counters = Counters()
        self._decoder = decoder
        self._arena = arena
        self._weights = weights
        self._rows = RowIntegrity(arena.kv.view(np.uint32), arena.digests, arena.parity)
        self._image_id = image_id
        self._block_tokens = block_tokens
        self._epoch_s = epoch_s
        self._retries = retries
        self._eos = eos
        self._text = text
        self._report = report
        self._between = between
        self._prompt: list[int] = []
        self._generated: list[int] = []
        self._chain = b""

    @property
    def job(self) -> str:
        """The job in the arena, empty when there is none."""
        return self._arena.state.job

    @property
    def finish(self) -> str | None:
        """How the job ended, None while it goes on."""
        return self._arena.state.finish

    @property
    def generated(self) -> int:
        """Tokens committed so far."""
        return len(self._generated)

    def begin(self, job: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Put a new job in the arena.

        Raises
        ------
        ValueError
            Prompt empty, or prompt and text together do not fit the arena.
        """
        room = self._decoder.positions
        if not prompt or len(prompt) + max_tokens > room:
            raise ValueError(
                f"prompt of {len(prompt)} tokens and {max_tokens} new ones; the arena holds {room} positions"
            )
        self._rows.reset()
        self._arena.tokens[: len(prompt)] = prompt
        self._arena.commit(ArenaState(job=job, prompt_tokens=len(prompt), max_tokens=max_tokens))
        self._prompt, self._generated = list(prompt), []
        self._chain = chain_start(self._image_id, job, prompt)

    def resume(self) -> bool:
        """Take over the job another worker left in the arena.

        Returns
        -------
        bool
            True when its tokens, certificates and KV rows are proven (rows repaired or computed anew where
            needed). False when there is no job or its record is damaged: the arena is empty then.
        """
        state = self._arena.state
        if not state.job:
            return False
        tokens: list[int] = self._arena.tokens[: state.prompt_tokens + state.generated].tolist()
        self._prompt, self._generated = tokens[: state.prompt_tokens], tokens[state.prompt_tokens :]
        self._chain = chain_start(self._image_id, state.job, self._prompt)
        for block in self.blocks(0):
            c = block.certificate
            self._chain = chain_next(self._chain, c.epoch, block.first, block.tokens, c.kv_digest)
            if self._chain != c.chain:
                self._arena.clear()
                return False
        bad = self._rows.attach(state.positions)
        self._report_rows(bad)
        if not all(row.repaired for row in bad):
            self._recompute()
        return True

    def blocks(self, known_tokens: int) -> list[Block]:
        """Return the committed blocks of the job from token index `known_tokens` on."""
        state, records = self._arena.state, self._arena.blocks[: self._arena.state.blocks]
        return [
            self._block(epoch) for epoch in range(state.blocks) if records[epoch]["first"] >= known_tokens
        ]

    def run_epoch(self, cancelled: Callable[[], bool] = lambda: False) -> Block | None:
        """Decode and prove the next epoch of the job.

        Returns
        -------
        Block or None
            The block the epoch completed, None when it ended inside one.

        Raises
        ------
        BeyondRepair
            Still dirty after all retries, or damaged memory that nothing here can restore.
        """
        for attempt in range(1 + self._retries):
            new, steps_s = self._decode(self._epoch_s / 2**attempt)
            draft = self._rows.draft_parity()
            if self._prove(self._fed(new)):
                self.counters.step_ms = steps_s / len(new) * 1e3
                return self._commit(new, draft, cancelled())
            self.counters.tokens_discarded += len(new)
            self.counters.epochs_dirty += 1
        raise BeyondRepair(f"epoch still dirty after {self._retries} retries")

    def check_idle(self) -> None:
        """Prove the weights while no job runs, so that damage does not wait for the next one."""
        self._check_weights(())

    def _decode(self, longest_s: float) -> tuple[list[int], float]:
        """Decode to the end of the block, the text, or the time; return tokens and time without pauses, s."""
        state, done = self._arena.state, len(self._generated)
        limit = min(self._block_tokens - done % self._block_tokens, state.max_tokens - done)
        begun = started = time.perf_counter()
        paused_s = 0.0

        def written(start: int, stop: int) -> None:
            nonlocal started, paused_s
            self._rows.record(start, stop)
            ended = time.perf_counter()
            self._between(ended - started)
            started = time.perf_counter()
            paused_s += started - ended

        if done:
            new = [self._step(self._generated[-1], written)]
        else:
            new = [greedy(self._decoder.prefill(self._prompt, written))]
        while len(new) < limit and new[-1] != self._eos and started - begun < longest_s:
            new.append(self._step(new[-1], written))
        return new, time.perf_counter() - begun - paused_s

    def _step(self, token: int, written: Callable[[int, int], None]) -> int:
        position = self._rows.written
        chosen = greedy(self._decoder.step(token, position))
        written(position, position + 1)
        return chosen

    def _fed(self, new: list[int]) -> set[int]:
        """Return the ids whose embedding rows the epoch read."""
        return {*(self._generated[-1:] or self._prompt), *new[:-1]}

    def _prove(self, fed: Collection[int]) -> bool:
        """Prove weights and rows; repair what is not whole. True when nothing had to be repaired."""
        started = time.perf_counter()
        weights_clean = self._check_weights(fed)
        rows_clean = self._rows.prove()
        self.counters.scan_ms = (time.perf_counter() - started) * 1e3
        if weights_clean and rows_clean:
            return True
        bad = self._rows.rewind()
        self._report_rows(bad)
        if not all(row.repaired for row in bad):
            self._recompute()
        return False

    def _check_weights(self, fed: Collection[int]) -> bool:
        detected_ns = time.time_ns()
        mended = self._weights.check(fed)
        for page in mended:
            whole = page.method != "none"
            self._report(
                Strike(
                    region="weights", page=page.page, role=page.role, method=page.method,
                    detected_ns=detected_ns, recovered_ns=time.time_ns() if whole else None,
                )
            )  # fmt: skip
        if any(page.method == "none" for page in mended):
            raise BeyondRepair("a weight page could not be restored from parity nor from the image file")
        return not mended

    def _report_rows(self, bad: Sequence[BadRow]) -> None:
        now_ns = time.time_ns()
        for row in bad:
            self._report(
                Strike(
                    region="kv", page=row.plane * self._decoder.positions + row.position,
                    role="k" if (row.plane // self._arena.shape.kv_heads) % 2 == 0 else "v",
                    method=row.method if row.repaired else "recompute",
                    detected_ns=now_ns, recovered_ns=now_ns if row.repaired else None,
                    evidence={"plane": row.plane, "position": row.position},
                )
            )  # fmt: skip

    def _recompute(self) -> None:
        """Make all committed rows anew, each on the path that first made it (measured.md, last section)."""
        self._rows.reset()
        if not self._generated:
            return
        chosen = [greedy(self._decoder.prefill(self._prompt, self._recomputed))]
        chosen += [self._step(token, self._recomputed) for token in self._generated[:-1]]
        draft = self._rows.draft_parity()
        if not self._check_weights({*self._prompt, *self._generated}) or not self._rows.prove():
            raise BeyondRepair("memory was struck again while the KV cache was computed anew")
        if chosen != self._generated:
            raise BeyondRepair("the KV cache computed anew gives another text than the committed one")
        self._rows.commit(draft)

    def _recomputed(self, start: int, stop: int) -> None:
        self._rows.record(start, stop)
        self._between(0.0)

    def _commit(self, new: list[int], draft: Words, cancelled: bool) -> Block | None:
        state, arena = self._arena.state, self._arena
        at = len(self._prompt) + len(self._generated)
        arena.tokens[at : at + len(new)] = new
        self._generated += new
        self._rows.commit(draft)
        finish = None
        if new[-1] == self._eos:
            finish = "eos"
        elif len(self._generated) >= state.max_tokens:
            finish = "length"
        elif cancelled:
            finish = "cancelled"
        first = state.blocks * self._block_tokens
        whole = finish is not None or len(self._generated) - first == self._block_tokens
        if whole:
            self._seal(state.blocks, first)
        arena.commit(
            msgspec.structs.replace(
                state,
                generated=len(self._generated),
                positions=self._rows.proven,
                blocks=state.blocks + whole,
                finish=finish,
            )
        )
        self.counters.tokens_committed += len(new)
        self.counters.epochs_clean += 1
        return self._block(state.blocks) if whole else None

    def _seal(self, epoch: int, first: int) -> None:
        """Write the record of the block that begins at token `first`: everything in it is proven."""
        tokens = self._generated[first:]
        # The row of a block's last token is written when the next block feeds it.
        rows_from = len(self._prompt) + first - 1 if first else 0
        kv_digest = self._rows.digest(rows_from, self._rows.proven)
        self._chain = chain_next(self._chain, epoch, first, tokens, kv_digest)
        record = self._arena.blocks[epoch]
        record["first"], record["count"] = first, len(tokens)
        record["kv"] = np.frombuffer(kv_digest, np.uint8)
        record["chain"] = np.frombuffer(self._chain, np.uint8)

    def _block(self, epoch: int) -> Block:
        state, record = self._arena.state, self._arena.blocks[epoch]
        first, count = int(record["first"]), int(record["count"])
        tokens = self._generated[first : first + count]
        return Block(
            job=state.job,
            first=first,
            tokens=tokens,
            text=self._text(tokens),
            certificate=Certificate(
                image_id=self._image_id,
                epoch=epoch,
                kv_digest=record["kv"].tobytes(),
                chain=record["chain"].tobytes(),
            ),
            prompt_tokens=self._prompt if epoch == 0 else None,
            finish=state.finish if epoch == state.blocks - 1 else None,
        )
