"""A verified batch over a small model: jobs, strikes, and engines that come and go as workers do."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from fdir.pages import PAGE_SIZE
from hil.reference import PlainDecoder, full_arena
from node.inference.arena import Bank, KvArena
from node.inference.decoder import arena_shape
from node.inference.manifest import image_id
from node.inference.model import Model, open_model
from node.inference.protocol import Block, Strike
from node.inference.sequence import JobSpec, Rules
from node.inference.verified import Policy, Progress, VerifiedBatch
from node.inference.weights import ProtectedWeights
from telemetry.certificate import check_chain
from telemetry.packets import Result
from telemetry.sampling import Sampling

BLOCK = 8
STOPS = ("a", "th", "zz")


class Bench:
    """One image, one arena; engines come and go as workers do."""

    def __init__(
        self,
        image: Path,
        folder: Path,
        *,
        positions: int = 256,
        seats: int = 6,
        checked: bool = False,
        retries: int = 6,
        epoch_s: float = 60.0,
        budget: float = 1e-6,
        threads: int = 1,
        copy: bool = True,
    ) -> None:
        self.folder = folder
        if copy:  # weights can be watched only while one model of the process maps them
            image = Path(shutil.copytree(image, folder / "image"))
        self.model: Model = open_model(image, threads, checked=checked)
        self.weights = ProtectedWeights(image, self.model.manifest, threads, checked=checked)
        self.shape = arena_shape(self.model, positions, seats)
        self.retries, self.epoch_s, self.budget = retries, epoch_s, budget
        self.rules = Rules(image_id(self.model.manifest), BLOCK, -1, lambda ids: b"".join(map(letter, ids)))
        self.strikes: list[Strike] = []
        self.runs = 0
        self.on_run: Callable[[int], None] = lambda run: None
        self.arena = self.open_arena()

    def open_arena(self) -> KvArena:
        return KvArena(self.folder / "arena", self.shape)

    def engine(self, *, weights: object | None = None, model: Model | None = None) -> VerifiedBatch:
        """Return an engine as a new worker would make it."""
        engine = VerifiedBatch(
            model or self.model,
            self.arena,
            self.weights if weights is None else weights,  # type: ignore[arg-type]
            self.rules,
            Policy(epoch_s=self.epoch_s, budget=self.budget, retries=self.retries),
            report=self.strikes.append,
            between=self._between,
        )
        engine.resume()
        return engine

    def successor(self) -> VerifiedBatch:
        """Return the engine of the worker after a killed one, on the arena that one left."""
        self.arena.close()
        self.arena = self.open_arena()
        return self.engine()

    def _between(self, seconds: float) -> None:
        self.runs += 1
        self.on_run(self.runs)

    def plain(self, specs: Iterable[JobSpec]) -> dict[str, list[int]]:
        """Return the fault-free text of each job: one at a time, no window, nothing recorded or proven."""
        texts = {}
        with full_arena(self.model, self.shape.positions) as arena:
            decoder = PlainDecoder(self.model, arena)
            decoder._text = self.rules.text
            for spec in specs:
                texts[spec.job] = decoder.decode(spec.prompt, spec.max_tokens, spec.sampling, self.rules.eos)
        return texts

    def flip_weight(self, rng: random.Random, role: str | None = None, bit: int | None = None) -> int:
        """Flip a bit of a weight that every step reads; return its page."""
        memory = self.weights._memory
        tensors = [t for t in memory.tensors if t.read and not t.rows and role in {None, t.role}]
        tensor = rng.choice(tensors)
        offset = tensor.offset + rng.randrange(tensor.length)
        view = memory.page_view(offset // PAGE_SIZE)
        view[offset % PAGE_SIZE] ^= 1 << (rng.randrange(8) if bit is None else bit)
        return offset // PAGE_SIZE

    def flip_row(
        self, seat: int, bank: Bank, plane: int, position: int, *, word: int = 3, bit: int = 30
    ) -> None:
        """Flip a bit of a row that is there."""
        base = self.arena.seats[seat].banks[bank].base
        layer_kv, head = divmod(plane, self.shape.kv_heads)
        rows = self.arena.kv[bank].view(np.uint32)
        rows[layer_kv, seat, head, position - base, word] ^= np.uint32(1 << bit)

    def flip_any_row(self, rng: random.Random) -> bool:
        """Flip a bit of a random written row of a random seat; False when there is none."""
        seats = [seat for seat in self.arena.seats if seat.global_rows.written]
        if not seats:
            return False
        seat = rng.choice(seats)
        bank = rng.choice([name for name in ("global", "window") if seat.banks[name].planes])
        rows = seat.banks[bank]
        self.flip_row(
            seat.index, bank, rng.randrange(rows.planes), rng.randrange(rows.base, rows.written),
            word=rng.randrange(self.shape.head_dim), bit=rng.randrange(32),
        )  # fmt: skip
        return True


def letter(token: int) -> bytes:
    """Return text of a token: short words over a small alphabet, so that stop strings do occur."""
    return b"abcdefghijklmnopqrstuvwxyz"[token % 26 :][:1] + (b"th" if token % 7 == 0 else b"")


def mixed_jobs(count: int, seed: int, *, longest: int = 110) -> list[JobSpec]:
    """Return jobs of all lengths and samplings; some share the head of their prompt."""
    rng = random.Random(seed)
    shared = [2, *(rng.randrange(4, 350) for _ in range(80))]
    jobs = []
    for number in range(count):
        own = [rng.randrange(4, 350) for _ in range(rng.randint(1, longest - 85))]
        prompt = shared + own if number % 3 == 0 else [2, *own]
        sampling = Sampling(
            temperature=rng.choice((0.0, 0.7, 1.3)),
            top_k=rng.choice((1, 8, 64, 300)),
            top_p=rng.choice((1.0, 0.8)),
            repetition_penalty=rng.choice((1.0, 1.3)),
            seed=rng.randrange(2**40),
            stop=() if rng.random() < 0.7 else STOPS,
            logprobs=rng.random() < 0.3,
        )
        jobs.append(JobSpec(f"job-{number}", prompt, rng.randint(1, 60), sampling))
    return jobs


def finish(
    engine: VerifiedBatch, on_epoch: Callable[[Progress], None] = lambda progress: None
) -> list[Block]:
    """Run epochs until no job is active; return all blocks."""
    blocks: list[Block] = []
    while engine.active:
        progress = engine.run_epoch()
        assert progress.refused == []
        blocks += progress.blocks
        on_epoch(progress)
    return blocks


def texts(blocks: Sequence[Block]) -> dict[str, list[int]]:
    """Return the tokens of each job; checks that blocks came in order and only once."""
    found: dict[str, list[int]] = {}
    for block in blocks:
        tokens = found.setdefault(block.job, [])
        assert block.first == len(tokens), block
        tokens += block.tokens
    return found


def proven(image: str, blocks: Sequence[Block]) -> dict[str, int]:
    """Return how many tokens of each job their certificates prove."""
    by_job: dict[str, list[Result]] = {}
    for block in blocks:
        fields = msgspec.structs.asdict(block)
        known = {name: fields[name] for name in Result.__struct_fields__ if name in fields}
        by_job.setdefault(block.job, []).append(Result(**known))
    return {job: check_chain(image, job, results) for job, results in by_job.items()}
