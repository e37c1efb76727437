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

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from node.inference.arena import KvArena
from node.inference.decoder import PREFILL_CHUNK, BatchDecoder
from node.inference.epoch import Epoch, Unequal
from node.inference.guard import ComputeGuard, ComputeTrip, output_gain
from node.inference.head import HeadFault
from node.inference.model import Model
from node.inference.places import Places
from node.inference.proof import BeyondRepair, Proof, Weights
from node.inference.protocol import Block, Strike
from node.inference.seating import epoch_seconds
from node.inference.sequence import Diverged, JobSpec, Rules, SequenceState, unstarted_block


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
    proof_ns: int = 0
    """When the last proof began, CLOCK_REALTIME, ns."""
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

    epoch_s: float = 2.0
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
        self._head = model.head
        self._room = arena.shape.positions
        self._rules = rules
        self._policy = policy
        self._between = between
        self._proof = Proof(weights, report, executor)
        self._active: list[str] = []
        """Active jobs in order of admission."""
        self._waiting: dict[str, JobSpec] = {}
        """Active jobs that are not seated yet, in order of admission."""
        self._places = Places(arena, rules, self._active, self._waiting)
        self._leaving: dict[str, str | None] = {}
        """Jobs to end, and how; None: to park."""
        self._call = False
        """Somebody may join or leave: end the epoch."""
        self.check_idle()
        self._decoder = BatchDecoder(model, arena, ComputeGuard(output_gain(model), model.check_limits))

    # Jobs.

    @property
    def seats(self) -> int:
        """Jobs the arena holds."""
        return len(self._places)

    @property
    def active(self) -> list[str]:
        """Active jobs in order of admission."""
        return list(self._active)

    def sequence(self, job: str) -> SequenceState | None:
        """Return a job that has a seat, None when it has none."""
        return self._places.get(job)

    def resume(self) -> list[SequenceState]:
        """Take over the jobs another worker left in the arena; none is active before `admit`.

        Tokens and certificates are proven, and rows repaired, or to be computed anew when the job goes on.
        Jobs whose record is damaged are gone.
        """
        resumed = self._places.resume()
        for sequence in resumed:
            self._proof.mend(sequence, sequence.seat.attach())
        return resumed

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
        if not spec.prompt or len(spec.prompt) + spec.max_tokens > self._room:
            raise ValueError(
                f"prompt of {len(spec.prompt)} tokens and {spec.max_tokens} new ones; "
                f"the arena holds {self._room} positions"
            )
        self._leaving.pop(spec.job, None)
        sequence = self._places.get(spec.job)
        if spec.job not in self._active:
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
        self._proof.forget(job)
        self._places.drop(job)

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
        self._proof.of_weights()
        self.counters.scan_ms = self._proof.took_s * 1e3
        self.counters.proof_ns = self._proof.began_ns

    def _running(self) -> list[SequenceState]:
        """Return the sequences that decode: the first of the seated ones."""
        seated = [self._places.get(job) for job in self._active if job not in self._waiting]
        return [sequence for sequence in seated if sequence is not None][: self.batch]

    def _decode(self, running: list[SequenceState], held: bool, progress: Progress) -> None:
        policy = self._policy
        passes = 2 if self.redundant else 1
        for attempt in range(1 + policy.retries):
            for sequence in running:
                self._slide(sequence)
            stepping, reading = self._places.arrange(running)
            epoch = Epoch(self._decoder, self._head, stepping, reading, self._between, keep=passes == 2)
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
                if passes == 2:
                    epoch.repeat()
            except (ComputeTrip, HeadFault, Unequal) as error:
                fault = error
            whole = self._proof.of_epoch(epoch, running)
            self.counters.scan_ms = self._proof.took_s * 1e3
            self.counters.proof_ns = self._proof.began_ns
            if whole and fault is None:
                self._commit(epoch, running, progress)
                return
            self.counters.epochs_dirty += 1
            self.counters.tokens_discarded += sum(sequence.new_tokens for sequence in running)
            for sequence in running:
                sequence.drop()
                self._proof.rewind(sequence)
            self.counters.trips += fault is not None
            if fault is not None and self._proof.account_for(fault) and isinstance(fault, ComputeTrip):
                self._decoder.guard.excuse(fault)
        raise BeyondRepair(f"epoch still dirty after {policy.retries} retries")

    def _slide(self, sequence: SequenceState) -> None:
        """Make room in the window of a sequence for the epoch."""
        rows = sequence.seat.window_rows
        if rows.free < PREFILL_CHUNK and rows.base + rows.room < self._room:
            self._proof.mend(sequence, {"window": sequence.seat.slide()})

    def _commit(self, epoch: Epoch, running: Sequence[SequenceState], progress: Progress) -> None:
        counters, committed = self.counters, 0
        for sequence in running:
            committed += sequence.new_tokens
            finish = self._leaving.get(sequence.job)
            try:
                progress.blocks += sequence.commit(finish)
            except Diverged as error:
                raise BeyondRepair(str(error)) from error
            self._proof.regained(sequence)
            if sequence.finish is not None:
                self._proof.forget(sequence.job)
                self._retire(sequence.job)
        counters.tokens_committed += committed
        counters.prefill_tokens += epoch.prefilled
        counters.epochs_clean += 1
        counters.tokens_s = committed / (epoch.computed_s + counters.scan_ms / 1e3)
        if epoch.steps:
            counters.step_ms = epoch.steps_s / epoch.steps * 1e3

    # Joining and leaving.

    def _seat(self, progress: Progress) -> bool:
        """Seat waiting jobs in their order; tell whether one is held back to share a prefix."""
        held = False
        for job, spec in list(self._waiting.items()):
            if self._active.index(job) >= self.batch:
                break
            sequence = self._places.get(job)
            if sequence is None and self._places.worth_waiting(spec, self._running()):
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
        """Let a job go on whose rows nobody has proven since it was parked."""
        if not self._places.take_up(sequence):
            return False
        if not self._proof.of_rows(sequence):
            self._proof.rewind(sequence)
        sequence.set_parked(False)
        return True

    def _begin(self, spec: JobSpec) -> bool:
        shared = self._places.begin(spec)
        self.counters.shared_tokens += shared or 0
        return shared is not None

    def _let_go(self, progress: Progress) -> None:
        """Let the jobs leave that were told to; the state of all sequences is committed."""
        for job, finish in list(self._leaving.items()):
            waiting, sequence = self._waiting.pop(job, None), self._places.get(job)
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
        self._places.used(job)
