"""Verified decoding of a batch: no token leaves before the memory it came from is proven (design section 5).

An epoch decodes some provisional tokens of every running sequence, then proves

1. every weight page it read (and a slice of the rest, in turn) against the image's digests, and
2. every KV row of those sequences, old and new, against the digests taken as each was written,

and heeds the checks on what was computed (`node.inference.guard`, `HeadFault`, and, when told to, computing
the epoch twice). Clean: the tokens are committed to the arena. Dirty: pages and rows are repaired in place,
every sequence is cut back to its last committed row, and the epoch is decoded again, half as long each time.
Decoding is deterministic, so the text is that of a run in which nothing was struck.

One proof serves all sequences; an epoch lasts as long as the overhead budget asks, and at most `epoch_s`, so
that a strike is found soon however slowly the worker is paced. Tokens leave in blocks of `block_tokens` by
index, each with a certificate: where blocks end depends neither on how long epochs took nor on who else was
in the batch, so a job that has to start again makes the same blocks (ADR 0005).

Jobs join and leave between epochs. Those that run hold the first seats of the arena; a parked job keeps its
seat and a finished one leaves its rows for others to share, until the seat is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fdir.rows import BadRow
from node.inference.arena import ArenaFull, Bank, KvArena, Seat
from node.inference.decoder import PREFILL_CHUNK, BatchDecoder
from node.inference.epoch import Epoch, Unequal
from node.inference.guard import ComputeGuard, ComputeTrip, output_gain
from node.inference.head import HeadFault
from node.inference.model import Model
from node.inference.protocol import Block, Strike
from node.inference.seating import Holder, Role, common_prefix, epoch_seconds, exchanges, first_to_go
from node.inference.sequence import Diverged, JobSpec, Rules, SequenceState, unstarted_block


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

    def check(
        self,
        tokens: Collection[int],
        rows: Iterable[npt.NDArray[np.int64]] = (),
        positions: Collection[int] = (),
    ) -> list[Mended]:
        """Prove all pages an epoch read; repair bad ones in place and return them.

        It fed `tokens` at `positions`, and its head read `rows` of the table.
        """


@dataclass(slots=True)
class Counters:
    """What the batch did since it was made, and how long the last epoch took."""

    tokens_committed: int = 0
    tokens_discarded: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    """Prompt tokens whose rows were taken from another sequence."""
    epochs_clean: int = 0
    epochs_dirty: int = 0
    trips: int = 0
    """Epochs that a check on the computing made dirty."""
    scan_ms: float = 0.0
    step_ms: float = 0.0
    tokens_s: float = 0.0


@dataclass(slots=True)
class Progress:
    """What an epoch brought."""

    blocks: list[Block] = field(default_factory=list)
    parked: list[str] = field(default_factory=list)
    """Jobs that are no longer active, and keep their seat while they can."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Jobs that there is no memory for, and why; they are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How epochs are cut.

    Parameters
    ----------
    epoch_s
        Longest epoch, s of physical time, pauses included; a run of the model under way is finished.
    budget
        Share of the computing time that proofs may take, above 0.
    retries
        How often a dirty epoch is decoded again before `BeyondRepair`.
    """

    epoch_s: float = 1.0
    budget: float = 0.01
    retries: int = 6


class VerifiedBatch:
    """Decode the jobs of an arena together, in epochs that are proven before they count.

    Parameters
    ----------
    model, arena, weights
        The model, its KV arena, and its protected weights.
    rules
        What all sequences have in common.
    policy
        How epochs are cut.
    report
        Takes a `Strike` for every damage found.
    between
        Called after every run of the model with the time it took, s: the worker answers pings and paces here.
        It may call `admit`, `park` and `cancel`.
    executor
        Has a thread that proves rows beside this one; None: this one proves all.

    Attributes
    ----------
    batch
        Most jobs that decode together; later ones wait.
    redundant
        Whether every epoch is computed twice and compared.
    epoch_factor
        Shortens epochs where strikes are expected: above 0, to 1.
    """

    def __init__(
        self,
        model: Model,
        arena: KvArena,
        weights: Weights,
        rules: Rules,
        policy: Policy,
        *,
        report: Callable[[Strike], None],
        between: Callable[[float], None] = lambda seconds: None,
        executor: Executor | None = None,
    ) -> None:
        self.counters = Counters()
        self.batch = len(arena.seats)
        self.redundant = False
        self.epoch_factor = 1.0
        self._model = model
        self._arena = arena
        self._weights = weights
        self._rules = rules
        self._policy = policy
        self._report = report
        self._between = between
        self._executor = executor
        self._sequences: dict[str, SequenceState] = {}
        """Every job in a seat, in order of last use."""
        self._waiting: dict[str, JobSpec] = {}
        """Active jobs without a seat, in order of admission."""
        self._active: list[str] = []
        """Active jobs in order of admission."""
        self._leaving: dict[str, str | None] = {}
        """Jobs to end, and how; None: to park."""
        self._call = False
        """Somebody may join or leave: end the epoch."""
        self._whole = True
        """Whether the last proof found all memory whole."""
        self.check_idle()
        self._decoder = BatchDecoder(model, arena, ComputeGuard(output_gain(model), model.check_limits))

    # Jobs.

    @property
    def seats(self) -> int:
        """Jobs the arena holds."""
        return len(self._arena.seats)

    @property
    def active(self) -> list[str]:
        """Active jobs in order of admission."""
        return list(self._active)

    def sequence(self, job: str) -> SequenceState | None:
        """Return a job that has a seat, None when it has none."""
        return self._sequences.get(job)

    def resume(self) -> list[SequenceState]:
        """Take over the jobs another worker left in the arena; none is active before `admit`.

        Tokens and certificates are proven, and rows repaired, or to be computed anew when the job goes on.
        Jobs whose record is damaged are gone.
        """
        for seat in self._arena.seats:
            if not seat.state.job:
                continue
            sequence = SequenceState.resume(seat, self._rules)
            if sequence is None:
                seat.clear()
                self._arena.release(seat.index)
                continue
            bad = seat.attach()
            self._mend_rows(sequence, {name: rows for name, rows in bad.items() if rows})
            self._sequences[sequence.job] = sequence
        return list(self._sequences.values())

    def admit(self, spec: JobSpec, known_tokens: int = 0) -> list[Block]:
        """Make a job active, from where the arena has it, else from its prompt.

        Returns
        -------
        list of Block
            Its committed blocks from token index `known_tokens` on.

        Raises
        ------
        ValueError
            The prompt is empty, or prompt and text together do not fit the arena.
        """
        room = self._arena.shape.positions
        if not spec.prompt or len(spec.prompt) + spec.max_tokens > room:
            raise ValueError(
                f"prompt of {len(spec.prompt)} tokens and {spec.max_tokens} new ones; "
                f"the arena holds {room} positions"
            )
        self._leaving.pop(spec.job, None)
        if spec.job in self._active:
            sequence = self._sequences.get(spec.job)
            return sequence.blocks(known_tokens) if sequence else []
        sequence = self._sequences.get(spec.job)
        if sequence is not None and not sequence.is_of(spec):
            self.drop(spec.job)
            sequence = None
        if sequence is None or sequence.finish is None:
            self._active.append(spec.job)
            self._waiting[spec.job] = spec
            self._call = self._call or len(self._active) <= self.batch
        return sequence.blocks(known_tokens) if sequence else []

    def park(self, job: str) -> None:
        """Let an active job rest from the end of the epoch on."""
        if job in self._active:
            self._leaving[job] = None
            self._call = True

    def cancel(self, job: str, finish: str = "cancelled") -> None:
        """End an active job at the end of the epoch; forget one that is not active."""
        if job in self._active:
            self._leaving[job] = finish
            self._call = True
        else:
            self.drop(job)

    def drop(self, job: str) -> None:
        """Forget a job that is not active, and free its seat."""
        sequence = self._sequences.pop(job, None)
        if sequence is not None:
            sequence.seat.clear()
            self._arena.release(sequence.seat.index)

    # Epochs.

    def run_epoch(self) -> Progress:
        """Let jobs join and leave, decode and prove an epoch of those that run, and let jobs leave again.

        Raises
        ------
        BeyondRepair
            Still dirty after all retries, or damaged memory that nothing here can restore.
        """
        progress = Progress()
        self._call = False
        self._let_go(progress)
        held = self._seat(progress)
        running = self._running()
        if running:
            self._decode(running, held, progress)
            self._let_go(progress)
        return progress

    def check_idle(self) -> None:
        """Prove the weights while no job runs, so that damage does not wait for the next one."""
        started = time.perf_counter()
        self._check_weights(())
        self.counters.scan_ms = (time.perf_counter() - started) * 1e3

    def _running(self) -> list[SequenceState]:
        seated = [self._sequences[job] for job in self._active if job not in self._waiting]
        return seated[: self.batch]

    def _decode(self, running: list[SequenceState], held: bool, progress: Progress) -> None:
        policy = self._policy
        passes = 2 if self.redundant else 1
        for attempt in range(1 + policy.retries):
            for sequence in running:
                self._slide(sequence)
            stepping, reading = self._arrange(running)
            epoch = Epoch(
                self._decoder, self._model.head, stepping, reading, self._between, keep=self.redundant
            )
            scale = self.epoch_factor / 2**attempt
            enough_s = epoch_seconds(self.counters.scan_ms / 1e3, policy.budget, policy.epoch_s, scale)

            def leave(reading: Sequence[SequenceState] = tuple(reading)) -> bool:
                if self._call:
                    return True
                if held:  # somebody waits for rows of a prompt that is being read
                    return not any(sequence.prefilling for sequence in reading)
                return bool(self._waiting) and any(sequence.end for sequence in running)

            fault: Exception | None = None
            try:
                epoch.run(enough_s / passes, policy.epoch_s * scale / passes, leave)
                if self.redundant:
                    epoch.repeat()
            except (ComputeTrip, HeadFault, Unequal) as error:
                fault = error
            if self._prove(epoch, running) and fault is None:
                self._commit(epoch, running, progress)
                return
            self.counters.epochs_dirty += 1
            self.counters.tokens_discarded += sum(sequence.new_tokens for sequence in running)
            for sequence in running:
                sequence.drop()
                self._rewind(sequence)
            if fault is not None:
                self._tripped(fault)
        raise BeyondRepair(f"epoch still dirty after {policy.retries} retries")

    def _prove(self, epoch: Epoch, running: Sequence[SequenceState]) -> bool:
        """Prove weights and rows; repair pages. True when all was whole."""
        started = time.perf_counter()
        self._whole = self._check_weights(epoch.fed, epoch.head_rows, epoch.positions)
        for sequence in running:
            for rows in sequence.seat.banks.values():
                self._whole = rows.prove(self._executor) and self._whole
        self.counters.scan_ms = (time.perf_counter() - started) * 1e3
        return self._whole

    def _commit(self, epoch: Epoch, running: Sequence[SequenceState], progress: Progress) -> None:
        counters, committed = self.counters, 0
        for sequence in running:
            committed += sequence.new_tokens
            finish = self._leaving.get(sequence.job)
            try:
                progress.blocks += sequence.commit(finish)
            except Diverged as error:
                raise BeyondRepair(str(error)) from error
            if sequence.finish is not None:
                self._retire(sequence.job)
        counters.tokens_committed += committed
        counters.prefill_tokens += epoch.prefilled
        counters.epochs_clean += 1
        counters.tokens_s = committed / (epoch.computed_s + counters.scan_ms / 1e3)
        if epoch.steps:
            counters.step_ms = epoch.steps_s / epoch.steps * 1e3

    def _tripped(self, fault: Exception) -> None:
        """Tell what a check on the computing found, unless struck memory accounts for it."""
        self.counters.trips += 1
        if not self._whole:
            return
        now_ns = time.time_ns()
        evidence: dict[str, str | int | float | bool | None] = {"reason": str(fault)}
        page, role = 0, "logits"
        if isinstance(fault, ComputeTrip):
            first = fault.findings[0]
            page, role = first.number, first.check
            evidence |= {"position": first.position, "value": first.value, "limit": first.limit}
            evidence["findings"] = len(fault.findings)
            self._decoder.guard.excuse(fault)
        elif isinstance(fault, Unequal):
            role, evidence["position"] = "redundancy", fault.position
        self._report(
            Strike(
                region="compute", page=page, role=role, method="redo", detected_ns=now_ns,
                recovered_ns=now_ns, evidence=evidence,
            )
        )  # fmt: skip

    # Seats.

    def _let_go(self, progress: Progress) -> None:
        """Let the jobs leave that were told to; the state of all sequences is committed."""
        for job, finish in list(self._leaving.items()):
            waiting, sequence = self._waiting.pop(job, None), self._sequences.get(job)
            if finish is None:
                if sequence is not None:
                    sequence.set_parked(True)
                progress.parked.append(job)
            elif sequence is not None:
                progress.blocks += sequence.commit(finish)
            elif waiting is not None:
                progress.blocks.append(unstarted_block(waiting, self._rules, finish))
            self._retire(job)

    def _retire(self, job: str) -> None:
        self._active.remove(job)
        self._leaving.pop(job, None)
        if sequence := self._sequences.pop(job, None):
            self._sequences[job] = sequence  # the latest use

    def _seat(self, progress: Progress) -> bool:
        """Give seats to waiting jobs, in their order; tell whether one is held back to share a prefix."""
        held = False
        for job, spec in list(self._waiting.items()):
            if self._active.index(job) >= self.batch:
                break
            sequence = self._sequences.get(job)
            if sequence is None and self._worth_waiting(spec):
                held = True
            elif self._take_up(sequence) if sequence else self._begin(spec):
                del self._waiting[job]
            elif len(self._waiting) == len(self._active):
                # Nobody runs who could make room.
                del self._waiting[job]
                self._active.remove(job)
                self.drop(job)
                progress.refused.append((job, "there is not enough shared memory for it"))
        return held

    def _take_up(self, sequence: SequenceState) -> bool:
        """Prove the rows of a job that goes on; False when there is no memory for the rest of it."""
        if not self._reserve(sequence.seat, len(sequence.prompt) + sequence.seat.state.max_tokens):
            return False
        if not all(rows.prove(self._executor) for rows in sequence.seat.banks.values()):
            self._rewind(sequence)
        sequence.set_parked(False)
        return True

    def _worth_waiting(self, spec: JobSpec) -> bool:
        """Tell whether a prompt being read will soon have more rows to share than any has now."""
        now = max((shared for _, shared in self._sources(spec)), default=0)
        return any(
            sequence.prefilling and common_prefix(spec.prompt, sequence.prompt) > now
            for sequence in self._running()
        )

    def _sources(self, spec: JobSpec) -> list[tuple[SequenceState, int]]:
        """Return the sequences with rows to share, and of how many positions."""
        found = []
        for sequence in self._sequences.values():
            most = sequence.seat.state.prefill_rows // PREFILL_CHUNK * PREFILL_CHUNK
            shared = min(common_prefix(spec.prompt, sequence.prompt), most)
            if shared and sequence.seat.can_share(shared):
                found.append((sequence, shared))
        return found

    def _begin(self, spec: JobSpec) -> bool:
        """Put a new job in a free seat; False when there is none, or no memory."""
        source, shared = max(self._sources(spec), key=lambda found: found[1], default=(None, 0))
        seat = self._free_seat(source)
        if seat is None or not self._reserve(seat, len(spec.prompt) + spec.max_tokens, source):
            return False
        if source is not None and self._arena.copy_prefix(source.seat.index, seat.index, shared):
            self.counters.shared_tokens += shared
        self._sequences[spec.job] = SequenceState.begin(seat, self._rules, spec)
        return True

    def _free_seat(self, spare: SequenceState | None) -> Seat | None:
        """Return the first free seat, or one whose job can go; None when all are active."""
        while True:
            for seat in self._arena.seats:
                if not seat.state.job:
                    return seat
            if not self._evict(spare):
                return None

    def _reserve(self, seat: Seat, positions: int, spare: SequenceState | None = None) -> bool:
        """Get the memory for a job's rows, for which others may have to go."""
        while True:
            try:
                self._arena.reserve(seat.index, positions)
            except ArenaFull:
                if not self._evict(spare, seat):
                    return False
            else:
                return True

    def _evict(self, spare: SequenceState | None, keep: Seat | None = None) -> bool:
        """Free the seat of the job that is missed least; False when there is none."""
        holders = [
            Holder(job, sequence.finish is not None, used)
            for used, (job, sequence) in enumerate(self._sequences.items())
            if job not in self._active and sequence is not spare and sequence.seat is not keep
        ]
        job = first_to_go(holders)
        if job is None:
            return False
        self.drop(job)
        return True

    def _arrange(self, running: Sequence[SequenceState]) -> tuple[list[SequenceState], list[SequenceState]]:
        """Move the running sequences to the first seats; return those that step and those that read."""
        reading = [sequence for sequence in running if sequence.prefilling]
        stepping = [sequence for sequence in running if not sequence.prefilling]
        by_seat = {sequence.seat.index: sequence for sequence in self._sequences.values()}
        roles = {sequence.seat.index: Role.STEP for sequence in stepping}
        if reading:
            roles[reading[0].seat.index] = Role.NEXT
        seats = self._arena.seats
        for one, other in exchanges([roles.get(index, Role.OTHER) for index in range(len(seats))]):
            self._arena.swap(one, other)
            for at, sequence in ((other, by_seat.pop(one, None)), (one, by_seat.pop(other, None))):
                if sequence is not None:
                    sequence.seat = seats[at]
                    by_seat[at] = sequence
        return sorted(stepping, key=lambda sequence: sequence.seat.index), reading

    # Memory.

    def _slide(self, sequence: SequenceState) -> None:
        """Make room in the window of a sequence for the epoch."""
        rows, shape = sequence.seat.window_rows, self._arena.shape
        if rows.free < PREFILL_CHUNK and rows.base + rows.room < shape.positions:
            self._mend_rows(sequence, {"window": sequence.seat.slide()})

    def _rewind(self, sequence: SequenceState) -> None:
        """Cut a sequence back to its last committed row, and repair what is not whole."""
        bad = {name: rows.rewind() for name, rows in sequence.seat.banks.items()}
        self._mend_rows(sequence, bad)

    def _mend_rows(self, sequence: SequenceState, bad: Mapping[Bank, list[BadRow]]) -> None:
        """Report bad rows; where one could not be repaired, have all rows of the sequence computed anew."""
        now_ns = time.time_ns()
        for bank, rows in bad.items():
            for row in rows:
                self._report(
                    Strike(
                        region="kv", page=row.position, role=bank,
                        method=row.method if row.repaired else "recompute",
                        detected_ns=now_ns, recovered_ns=now_ns if row.repaired else None,
                        evidence={
                            "job": sequence.job, "seat": sequence.seat.index, "position": row.position,
                            "planes": ",".join(map(str, row.planes)),
                        },
                    )
                )  # fmt: skip
        if not all(row.repaired for rows in bad.values() for row in rows):
            sequence.lose_rows()

    def _check_weights(
        self,
        tokens: Collection[int],
        rows: Iterable[npt.NDArray[np.int64]] = (),
        positions: Collection[int] = (),
    ) -> bool:
        """Prove the weights and repair what is bad; True when nothing was."""
        detected_ns = time.time_ns()
        mended = self._weights.check(tokens, rows, positions)
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
