"""Seats that begin, grow, slide, change places, share prefixes and are taken over: every row stays that of
its job, and what is struck on the way is found and repaired."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from node.inference.arena import (
    ARENA_VERSION,
    BANKS,
    KV_PAGE,
    SHARED_MEMORY,
    ArenaShape,
    Bank,
    KvArena,
    Seat,
    SeatState,
)

SHAPE = ArenaShape(
    version=ARENA_VERSION, image_id="0123456789abcdef", layers=3, kv_heads=2, head_dim=16, positions=800,
    window=32, window_step=8, global_every=3, seats=3,
)  # fmt: skip
SEATS = st.integers(0, SHAPE.seats - 1)


@dataclass
class Job:
    """What the rows and tokens of a job are."""

    prompt: int
    rows: dict[Bank, npt.NDArray[np.float32]]
    tokens: list[int] = field(default_factory=list)


class Walk(RuleBasedStateMachine):
    """What the engine does with an arena, in any order."""

    @initialize(seed=st.integers(0, 99))
    def start(self, seed: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="penumbra-test-", dir=SHARED_MEMORY))
        self.arena = KvArena(self.folder / "arena", SHAPE)
        self.rng = np.random.default_rng(seed)
        self.jobs: dict[str, Job] = {}
        self.begun = 0
        self.struck: str | None = None

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.close()
            shutil.rmtree(self.folder)

    def job(self, seat: Seat) -> Job:
        return self.jobs[seat.state.job]

    @rule(at=SEATS, prompt=st.integers(1, 400))
    def begin(self, at: int, prompt: int) -> None:
        seat = self.arena.seats[at]
        if seat.state.phase != "free":
            return
        self.begun += 1
        self.arena.reserve(at, prompt)
        rows = {
            bank: self.rng.random((SHAPE.planes_of(bank), SHAPE.positions, 16), np.float32) for bank in BANKS
        }
        job = Job(prompt, rows, self.rng.integers(0, 999, prompt).tolist())
        self.jobs[f"job-{self.begun}"] = job
        seat.tokens[:prompt] = job.tokens
        seat.commit(SeatState(job=f"job-{self.begun}", prompt_tokens=prompt, max_tokens=400))

    @rule(at=SEATS, count=st.integers(1, 300), redo=st.booleans())
    def epoch(self, at: int, count: int, redo: bool) -> None:
        seat = self.arena.seats[at]
        if seat.state.phase != "active":
            return
        start = seat.global_rows.written
        count = min(count, *(rows.free for rows in seat.banks.values()))
        if start < seat.state.prompt_tokens:
            count = min(count, seat.state.prompt_tokens - start)
        self.arena.reserve(at, start + count)
        for bank, rows in seat.banks.items():
            new = self.job(seat).rows[bank][:, start : start + count]
            for plane in range(SHAPE.planes_of(bank)):
                layer_kv, head = divmod(plane, SHAPE.kv_heads)
                first = start - rows.base
                self.arena.kv[bank][layer_kv, at, head, first : first + count] = new[plane]
            if count:
                rows.record(start, start + count)
        clean = all(rows.prove() for rows in seat.banks.values())
        assert clean is (self.struck != seat.state.job)
        if redo or not clean:
            self.mend(seat, [row for rows in seat.banks.values() for row in rows.rewind()])
            return
        for rows in seat.banks.values():
            rows.commit()
        self.commit(seat)

    def commit(self, seat: Seat) -> None:
        job, positions = self.job(seat), seat.global_rows.proven
        generated = max(0, positions - job.prompt)
        new = self.rng.integers(0, 999, job.prompt + generated - len(job.tokens)).tolist()
        seat.tokens[len(job.tokens) : len(job.tokens) + len(new)] = new
        job.tokens += new
        seat.commit(msgspec.structs.replace(seat.state, positions=positions, generated=generated))

    def mend(self, seat: Seat, bad: list) -> None:  # type: ignore[type-arg]
        assert len(bad) == (self.struck == seat.state.job)
        assert all(row.repaired for row in bad)
        if bad:
            self.struck = None

    @precondition(lambda self: self.struck is None)
    @rule(at=SEATS, bank=st.sampled_from(BANKS), data=st.data())
    def strike(self, at: int, bank: Bank, data: st.DataObject) -> None:
        seat = self.arena.seats[at]
        rows = seat.banks[bank]
        if seat.state.phase == "free" or rows.proven == rows.base:
            return
        row = data.draw(st.integers(0, rows.proven - rows.base - 1))
        words = self.arena.kv[bank].view(np.uint32)
        layer_kv = data.draw(st.integers(0, words.shape[0] - 1))
        words[layer_kv, at, data.draw(st.integers(0, 1)), row, 7] ^= np.uint32(1 << 20)
        self.struck = seat.state.job

    @rule(at=SEATS)
    def slide(self, at: int) -> None:
        seat = self.arena.seats[at]
        if seat.state.phase != "active":
            return
        base = seat.window_rows.base
        bad = seat.slide()
        assert all(row.repaired for row in bad)
        if bad:
            self.struck = None
        elif self.struck == seat.state.job and seat.window_rows.base > base:
            # The strike may have left with the rows dropped: a proof can tell.
            if all(rows.prove() for rows in seat.banks.values()):
                self.struck = None
            for rows in seat.banks.values():
                bad += rows.rewind()
            self.mend(seat, bad)

    @rule(one=SEATS, other=SEATS)
    def swap(self, one: int, other: int) -> None:
        states = [self.arena.seats[at].state for at in (one, other)]
        self.arena.swap(one, other)
        after = [self.arena.seats[at].state.job for at in (other, one)]
        assert after == [state.job for state in states]

    @rule(src=SEATS, dst=SEATS, chunks=st.integers(1, 6))
    def share(self, src: int, dst: int, chunks: int) -> None:
        source, target, positions = self.arena.seats[src], self.arena.seats[dst], chunks * KV_PAGE
        if target.state.phase != "free" or not source.can_share(positions):
            return
        if not self.arena.copy_prefix(src, dst, positions):
            assert self.struck == source.state.job
            return
        self.begun += 1
        old = self.job(source)
        rows = {bank: old.rows[bank].copy() for bank in BANKS}
        for each in rows.values():
            each[:, positions:] = self.rng.random(each[:, positions:].shape, np.float32)
        self.jobs[f"job-{self.begun}"] = Job(positions, rows, old.tokens[:positions])
        target.tokens[:positions] = old.tokens[:positions]
        target.commit(
            SeatState(
                job=f"job-{self.begun}", prompt_tokens=positions, positions=positions,
                base=target.window_rows.base, max_tokens=400,
            )
        )  # fmt: skip

    @rule(at=SEATS, finish=st.sampled_from(["eos", None]))
    def end(self, at: int, finish: str | None) -> None:
        seat = self.arena.seats[at]
        if seat.state.phase == "active" and finish:
            seat.commit(msgspec.structs.replace(seat.state, finish=finish))
        elif seat.state.phase == "resident":
            self.struck = None if self.struck == seat.state.job else self.struck
            seat.clear()
            self.arena.release(at)

    @rule()
    def trim(self) -> None:
        self.arena.trim()

    @rule()
    def restart(self) -> None:
        self.arena.close()
        self.arena = KvArena(self.folder / "arena", SHAPE)
        for seat in self.arena.seats:
            if seat.state.job:
                self.mend(seat, [row for bad in seat.attach().values() for row in bad])

    @invariant()
    def seats_hold_their_jobs(self) -> None:
        for seat in self.arena.seats if hasattr(self, "arena") else ():
            if not seat.state.job:
                continue
            job = self.job(seat)
            assert seat.tokens[: len(job.tokens)].tolist() == job.tokens
            assert seat.held >= seat.reserved >= seat.state.positions
            if self.struck == seat.state.job:
                continue
            for bank, rows in seat.banks.items():
                count = rows.proven - rows.base
                held = self.arena.kv[bank][:, seat.index, :, :count].reshape(SHAPE.planes_of(bank), count, 16)
                np.testing.assert_array_equal(held, job.rows[bank][:, rows.base : rows.proven])


Walk.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestWalk = Walk.TestCase
