"""One real worker under fire: started as the node starts it, fed with jobs, struck through its memory.

The worker is the flight's own process (`node.inference.worker`) behind the flight's own `WorkerProcess`; what
stands in for the supervisor here only keeps the batch full and listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from fdir.pages import Span, live_mappings
from hil.campaign.strata import BY_ROW, Strata, Stratum
from hil.campaign.strikes import Epoch, JobRows, Landed, StrikeRecord, Trial, Watch
from hil.campaign.texts import Text
from hil.memory import ArenaView, NotThere, ProcessMemory, RowSites
from node.inference import protocol
from node.inference.arena_layout import ArenaShape, Bank, SeatState
from node.inference.manifest import WEIGHTS, load_manifest
from node.worker_process import WorkerProcess

OPEN_ROWS: Final = 0.25
"""Share of the strikes on KV rows that are aimed at the epoch under way."""
AHEAD: Final = 3
"""Strikes on tables by row are aimed at so many positions from the next one on, in the epoch under way."""
READY_S: Final = 120.0
STOP_S: Final = 5.0


@dataclass(frozen=True)
class WorkerSettings:
    """How the worker is run."""

    threads: int = 2
    batch: int = 8
    seats: int = 10
    positions: int = 1280
    epoch_s: float = 0.25
    """Longest epoch, s: shorter than in flight, for more proofs an hour."""


@dataclass
class Tokens:
    """Tokens the worker released, compared with the reference."""

    released: int = 0
    wrong: int = 0
    jobs: int = 0
    """Jobs that ended."""
    wrong_ends: int = 0
    """Jobs that ended before or after their reference did."""


class StruckWorker:
    """One generation of the worker.

    Parameters
    ----------
    image
        Directory of the image slot.
    folder
        For its socket, log and arena; on shared memory.
    generation
        Names the worker and its jobs.
    settings
        How it is run.
    texts
        Jobs, with their references; they are run over and over.
    strata
        Of the image.
    on_settled
        Takes strikes whose fate is known.

    Attributes
    ----------
    watch
        Strikes under way.
    tokens
        What was released.
    clean, dirty, unsure
        Epochs committed, attempts that had to be decoded again, epochs heard of too late to judge by.
    name
        Names this worker among all of the campaign.
    failure
        Why the worker ended unordered; empty while it did not.
    """

    def __init__(
        self,
        *,
        image: Path,
        folder: Path,
        generation: int,
        settings: WorkerSettings,
        texts: Sequence[Text],
        strata: Strata,
        on_settled: Callable[[list[StrikeRecord]], None],
    ) -> None:
        self.watch = Watch(strata, self._token_at, self._byte_now)
        self.tokens = Tokens()
        self.clean = self.dirty = self.unsure = 0
        self.failure = ""
        self.name = f"{generation}-{time.time_ns()}"
        self.computing = asyncio.Event()
        """Set when the first epoch is committed."""
        self._generation = generation
        self._settings = settings
        self._texts = list(texts)
        self._strata = strata
        self._on_settled = on_settled
        self._weights = image.resolve() / WEIGHTS
        self._page_size = load_manifest(image).page_size
        self._arena = ArenaView(folder / "arena")
        self._jobs: dict[str, Text] = {}
        self._number = 0
        self._rows: dict[str, JobRows] = {}
        self._prefilled = self._committed = 0
        self._epoch_ended = asyncio.Event()
        self._memory: ProcessMemory | None = None
        self._spans: dict[Path, list[Span]] = {}
        self._process = WorkerProcess(
            [
                sys.executable, "-m", "node.inference.worker",
                "--socket", str(folder / "socket"), "--generation", str(generation), "--image", str(image),
                "--arena", str(folder / "arena"), "--threads", str(settings.threads),
                "--seats", str(settings.seats), "--batch", str(settings.batch),
                "--positions", str(settings.positions), "--epoch-seconds", str(settings.epoch_s),
            ],
            socket_path=folder / "socket",
            log_path=folder / "worker.log",
            generation=generation,
            on_message=self._take,
            on_fault=self._on_fault,
        )  # fmt: skip

    async def run(self) -> None:
        """Run the worker until it is stopped, or ends; what was not settled is settled then."""
        try:
            ended = await self._process.run()
            self.failure = self.failure or ("" if ended.returncode == 0 else ended.reason)
        finally:
            self._settle(self.watch.on_end())
            self._epoch_ended.set()
            self.computing.set()
            if self._memory is not None:
                self._memory.close()
                self._memory = None

    async def stop(self) -> None:
        """Stop the worker in order."""
        await self._process.stop(STOP_S)

    async def epoch(self, timeout_s: float) -> bool:
        """Wait for the end of the epoch under way; False when there was none in time."""
        self._epoch_ended.clear()
        try:
            await asyncio.wait_for(self._epoch_ended.wait(), timeout_s)
        except TimeoutError:
            return False
        return not self.failure

    # Strikes.

    def strike(self, trial: Trial) -> bool:
        """Let a strike land; False when there is nothing to strike now, or another strike is too near.

        Raises
        ------
        PenumbraError
            We may not write the worker's memory.
        """
        try:
            landed = self._land_kv(trial) if trial.stratum is Stratum.KV else self._land_weights(trial)
        except NotThere:
            return False
        if landed is None:
            return False
        self.watch.land(landed)
        return True

    def take_back(self, strike: Landed) -> None:
        """Undo a strike that no epoch used, unless what lay there has been written anew since."""
        with contextlib.suppress(NotThere):
            memory = self._open_memory()
            if memory.read(strike.address) == strike.after:
                memory.flip(strike.address, strike.bit)
        self._settle([self.watch.withdraw(strike)])

    def _land_weights(self, trial: Trial) -> Landed | None:
        row = self._row_ahead(trial) if trial.stratum in BY_ROW else 0
        site = self._strata.locate(trial.stratum, trial.where, row)
        if not self.watch.is_free(trial.stratum, site.page):
            return None
        address = self._address(self._weights, site.offset)
        t_ns = time.time_ns()
        before, after = self._open_memory().flip(address, site.bit)
        return Landed(
            trial=trial, t_ns=t_ns, page=site.page, role=site.tensor.role, tensor=site.tensor.name,
            byte=site.offset % self._page_size, bit=site.bit, before=before, after=after, address=address,
        )  # fmt: skip

    def _row_ahead(self, trial: Trial) -> int:
        """Choose a token, or position, that is fed in the epoch under way or soon after."""
        found = [(job, rows) for job, rows in sorted(self._rows.items()) if rows.active and job in self._jobs]
        if not found:
            raise NotThere("no job under way")
        at = trial.pick * len(found)
        job, rows = found[int(at)]
        position = rows.positions + int(at % 1 * AHEAD)
        return position if trial.stratum is Stratum.ROPE else self._token_at(job, position)

    def _land_kv(self, trial: Trial) -> Landed | None:
        found = self._arena.read()
        if found is None:
            raise NotThere("no KV arena yet")
        shape, states = found
        site = RowSites(shape, states).locate(trial.where)
        state, position, row, open_row = states[site.seat], site.position, site.row, False
        if trial.kind < OPEN_ROWS:
            # The first row of the epoch under way, if it is written: where it lands in the plane is kept.
            base = state.base if site.bank == "window" else 0
            if self._is_written(shape, site.seat, site.bank, state.positions, state.positions - base):
                position, row, open_row = state.positions, state.positions - base, True
        if not self.watch.is_free(trial.stratum, position, site.job):
            return None
        offset = shape.row_offset(site.bank, site.plane, site.seat, row) + site.byte
        address = self._address(self._arena.path, offset)
        t_ns = time.time_ns()
        before, after = self._open_memory().flip(address, site.bit)
        if self._moved(site.seat, state):
            return None  # it may have landed in what the rows left
        layer_kv, head = divmod(site.plane, shape.kv_heads)
        layer = shape.layers_of(site.bank)[layer_kv // 2]
        name = f"{'v' if layer_kv % 2 else 'k'} of layer {layer}, head {head}"
        return Landed(
            trial=trial, t_ns=t_ns, page=position, role=site.bank, tensor=name, byte=site.byte, bit=site.bit,
            before=before, after=after, address=address, job=site.job, open_row=open_row,
            base=state.base if site.bank == "window" else 0, place=(site.seat, site.plane),
        )  # fmt: skip

    def _is_written(self, shape: ArenaShape, seat: int, bank: Bank, position: int, row: int) -> bool:
        """Tell whether the digest of a row of the epoch under way has been taken."""
        if not 0 <= row < shape.rooms[bank] or position >= shape.positions:
            return False
        with self._arena.path.open("rb", buffering=0) as file:
            file.seek(shape.offsets()[f"digests.{bank}.{seat}"] + 8 * position)
            stored = int.from_bytes(file.read(8), "little")
            digest = xxhash.xxh3_64()
            for plane in range(shape.planes_of(bank)):
                file.seek(shape.row_offset(bank, plane, seat, row))
                digest.update(file.read(shape.head_dim * 4))
        return digest.intdigest() == stored

    def _moved(self, seat: int, before: SeatState) -> bool:
        found = self._arena.read()
        now = found[1][seat] if found else SeatState()
        return (now.job, now.base) != (before.job, before.base)

    def _address(self, path: Path, offset: int) -> int:
        pid = self._open_memory().pid
        for known in (True, False):
            spans = self._spans.get(path, []) if known else live_mappings(path, pid)
            self._spans[path] = spans
            for span in spans:
                if span.file_offset <= offset < span.file_offset + span.length:
                    return span.address + offset - span.file_offset
        raise NotThere(f"{path.name} is not mapped at byte {offset} in process {pid}")

    def _open_memory(self) -> ProcessMemory:
        if self._memory is None:
            if self._process.pid is None:
                raise NotThere("the worker is gone")
            self._memory = ProcessMemory(self._process.pid)
        return self._memory

    # What the worker says.

    def _take(self, message: protocol.FromWorker) -> None:
        match message:
            case protocol.Ready():
                self._process.send(
                    protocol.Pace(duty=1.0, threads=self._settings.threads, batch=self._settings.batch)
                )
                for _ in range(self._settings.batch):
                    self._start()
            case protocol.Strike():
                self._settle(self.watch.on_report(message))
            case protocol.Block():
                self._compare(message)
            case protocol.Status():
                self._on_status(message)
            case protocol.Fatal(reason=reason):
                self.failure = reason
            case protocol.JobError(job=job, reason=reason):
                self._on_fault("job", f"{job}: {reason}")
            case _:
                pass

    def _on_status(self, status: protocol.Status) -> None:
        if status.epochs_clean == self.clean:
            return
        now_ns, found = time.time_ns(), self._arena.read()
        rows = {
            state.job: JobRows(
                state.positions, state.base, state.phase == "active", state.prompt_tokens, state.generated
            )
            for state in (found[1] if found else ())
            if state.job
        }
        prefilled, self._prefilled = status.prefill_tokens - self._prefilled, status.prefill_tokens
        committed, self._committed = status.tokens_committed - self._committed, status.tokens_committed
        dirty = status.epochs_dirty - self.dirty
        epoch = Epoch(now_ns, status.proof_ns, dirty, self._rows, rows, prefilled, committed)
        self.unsure += not epoch.is_sure
        self.clean, self.dirty, self._rows = status.epochs_clean, status.epochs_dirty, rows
        self._settle(self.watch.on_epoch(epoch))
        self._epoch_ended.set()
        self.computing.set()

    def _compare(self, block: protocol.Block) -> None:
        text = self._jobs.get(block.job)
        if text is None:
            self._on_fault("job", f"a block of {block.job}, which was not started")
            return
        expected = text.tokens[block.first : block.first + len(block.tokens)]
        self.tokens.released += len(block.tokens)
        self.tokens.wrong += sum(one != other for one, other in zip(block.tokens, expected, strict=False))
        self.tokens.wrong += max(0, len(block.tokens) - len(expected))
        if block.finish is not None:
            self.tokens.jobs += 1
            self.tokens.wrong_ends += block.first + len(block.tokens) != len(text.tokens)
            self._start()

    def _start(self) -> None:
        text = self._texts[self._number % len(self._texts)]
        job = f"{text.name}-{self._generation}-{self._number}"
        self._number += 1
        self._jobs[job] = text
        self._process.send(
            protocol.Start(job=job, prompt=text.prompt, max_tokens=text.max_tokens, sampling=text.sampling)
        )

    def _token_at(self, job: str, position: int) -> int:
        text = self._jobs.get(job)
        if text is None:
            return 0
        known = [*text.prompt_tokens, *text.tokens]
        return known[min(position, len(known) - 1)]

    def _byte_now(self, strike: Landed) -> int | None:
        """Return the byte that was struck, where the arena says its row lies now."""
        found = self._arena.read()
        seat, plane = strike.place
        if found is None or found[1][seat].job != strike.job:
            return None
        shape, states = found
        bank: Bank = "window" if strike.role == "window" else "global"
        row = strike.page - (states[seat].base if bank == "window" else 0)
        if not 0 <= row < shape.rooms[bank]:
            return None
        try:
            address = self._address(self._arena.path, shape.row_offset(bank, plane, seat, row) + strike.byte)
            return self._open_memory().read(address)
        except NotThere:
            return None

    def _on_fault(self, monitor: str, reason: str) -> None:
        self.failure = self.failure or f"{monitor}: {reason}"
        self._process.kill()

    def _settle(self, records: list[StrikeRecord]) -> None:
        if records:
            self._on_settled(records)
