"""Who has which seat of the arena: beginning, taking up, making room, moving to the first seats."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from node.inference.arena import ArenaFull, KvArena, Seat
from node.inference.decoder import PREFILL_CHUNK
from node.inference.seating import Holder, Role, common_prefix, exchanges, first_to_go
from node.inference.sequence import JobSpec, Rules, SequenceState


class Places:
    """The sequences of an arena.

    Parameters
    ----------
    arena
        The arena.
    rules
        What all sequences have in common.
    active, waiting
        Jobs that are active, and those of them that have not been given a seat since: looked at, not changed.
    """

    def __init__(
        self, arena: KvArena, rules: Rules, active: Collection[str], waiting: Collection[str]
    ) -> None:
        self._arena = arena
        self._rules = rules
        self._active = active
        self._waiting = waiting
        self._sequences: dict[str, SequenceState] = {}
        """Every job in a seat, in order of last use."""

    def __len__(self) -> int:
        return len(self._arena.seats)

    def get(self, job: str) -> SequenceState | None:
        """Return the sequence of a job, None when it has no seat."""
        return self._sequences.get(job)

    def resume(self) -> list[SequenceState]:
        """Take over the jobs another worker left, but for their rows; those whose record is damaged go."""
        for seat in self._arena.seats:
            if not seat.state.job:
                continue
            sequence = SequenceState.resume(seat, self._rules)
            if sequence is None:
                seat.clear()
                self._arena.release(seat.index)
            else:
                self._sequences[sequence.job] = sequence
        return list(self._sequences.values())

    def used(self, job: str) -> None:
        """Note that a job was used last."""
        if sequence := self._sequences.pop(job, None):
            self._sequences[job] = sequence

    def drop(self, job: str) -> None:
        """Forget a job, and free its seat."""
        sequence = self._sequences.pop(job, None)
        if sequence is not None:
            sequence.seat.clear()
            self._arena.release(sequence.seat.index)

    def begin(self, spec: JobSpec) -> int | None:
        """Put a new job in a seat, with the rows of its prompt that another sequence has.

        Returns
        -------
        int or None
            How many positions it shares; None when there is no seat, or no memory, for it.
        """
        source, shared = max(self._sources(spec), key=lambda found: found[1], default=(None, 0))
        seat = self._free_seat(source)
        if seat is None or not self._reserve(seat, len(spec.prompt) + spec.max_tokens, source):
            return None
        if source is not None and not self._arena.copy_prefix(source.seat.index, seat.index, shared):
            shared = 0  # struck: whoever proves the source will mend it
        self._sequences[spec.job] = SequenceState.begin(seat, self._rules, spec)
        return shared

    def take_up(self, sequence: SequenceState) -> bool:
        """Get the memory for the rest of a job; False when there is none."""
        return self._reserve(sequence.seat, len(sequence.prompt) + sequence.seat.state.max_tokens)

    def worth_waiting(self, spec: JobSpec, running: Collection[SequenceState]) -> bool:
        """Tell whether a prompt being read will soon have more rows to share than any has now."""
        now = max((shared for _, shared in self._sources(spec)), default=0)
        return any(
            sequence.prefilling and common_prefix(spec.prompt, sequence.prompt) > now for sequence in running
        )

    def arrange(self, running: Sequence[SequenceState]) -> tuple[list[SequenceState], list[SequenceState]]:
        """Move running sequences to the first seats.

        Returns
        -------
        Those that step, by seat from 0 on, and those that read their prompt, in the order given; the first
        of these has the seat after the others.

        Raises
        ------
        ArenaFull
            There is no memory to exchange two seats in, and nobody can go.
        """
        reading = [sequence for sequence in running if sequence.prefilling]
        stepping = [sequence for sequence in running if not sequence.prefilling]
        roles = {sequence.seat.index: Role.STEP for sequence in stepping}
        if reading:
            roles[reading[0].seat.index] = Role.NEXT
        for one, other in exchanges([roles.get(index, Role.OTHER) for index in range(len(self))]):
            self._exchange(one, other)
        return sorted(stepping, key=lambda sequence: sequence.seat.index), reading

    def _exchange(self, one: int, other: int) -> None:
        while True:
            try:
                self._arena.swap(one, other)
            except ArenaFull:
                if not self._evict():
                    raise
            else:
                break
        seats = self._arena.seats
        for sequence in self._sequences.values():
            if sequence.seat.index in {one, other}:
                sequence.seat = seats[one + other - sequence.seat.index]

    def _sources(self, spec: JobSpec) -> list[tuple[SequenceState, int]]:
        """Return the sequences with rows to share, and of how many positions."""
        found = []
        for sequence in self._sequences.values():
            most = sequence.seat.state.prefill_rows // PREFILL_CHUNK * PREFILL_CHUNK
            shared = min(common_prefix(spec.prompt, sequence.prompt), most)
            if shared and sequence.seat.can_share(shared):
                found.append((sequence, shared))
        return found

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

    def _evict(self, spare: SequenceState | None = None, keep: Seat | None = None) -> bool:
        """Free the seat of the job that is missed least; False when there is none."""
        holders = [
            Holder(job, sequence.finish is not None, job in self._active, used)
            for used, (job, sequence) in enumerate(self._sequences.items())
            if (job not in self._active or job in self._waiting)
            and sequence is not spare
            and sequence.seat is not keep
        ]
        job = first_to_go(holders)
        if job is None:
            return False
        self.drop(job)
        return True
