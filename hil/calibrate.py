"""`penumbra calibrate`: tokens/s and CPU share of each operating point, through a real worker process.

One worker is started with all threads, and led from point to point by `Pace`, as the node leads it: that no
session is loaded twice is part of what is shown. Tokens count when the worker has proven and committed them.

Watts belong to the board. A board that computes its draw from CPU time (`sim`) would only give its own
settings back, so the figure stays null there. What the draw follows (load, clock, temperature) is fitted all
the same, from readings taken as the node takes them: the latch-up detector needs it, scatter included.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from fdir.latchup import DrawSample
from hil.bench.machine import describe_machine, load_average
from hil.current_fit import fit_current
from hil.shared_memory import scratch
from node.boards import BoardSettings, open_board
from node.inference import protocol
from node.inference.manifest import image_id, load_manifest
from node.power import operating_point as power_side
from node.power.cpu_share import CpuShare, process_cpu_s
from node.worker_process import WorkerProcess
from telemetry.errors import PenumbraError
from telemetry.figures import Calibration, OperatingPoint

BATCHES: Final = (1, 2, 4, 8)
POSITIONS: Final = 2048
"""Room of a job, if the model has as much. A text that ends is followed by another."""
PROMPT_ROOM: Final = 64
"""More than the tokens of any of `PROMPTS`."""
PROMPTS: Final = (
    "The first satellites were simple machines, and",
    "A letter from the harbour master said that",
    "On the second day of the voyage the wind",
    "Most bridges are built to carry far more than",
    "In the kitchen of the old hotel there was",
    "The council decided on Monday to",
    "Bees find their way home by",
    "Under the ice of the lake lives a fish that",
)
IDLE_S: Final = 3.0
"""Longest time the draw is read without work before the first point, s."""
DRAW_PERIOD_S: Final = 0.25
"""Interval of the draw readings: that of the node's power loop."""
_READY_S: Final = 120.0
_REPLY_S: Final = 60.0
_STOP_S: Final = 5.0
_LOOK_S: Final = 0.2


M = TypeVar("M", bound=protocol.Message)


@dataclass(frozen=True)
class Point:
    """What is asked of the worker."""

    threads: int
    batch: int
    duty: float
    power_mode: str | None = None


@dataclass(frozen=True)
class _Mark:
    """Tokens committed and CPU time used at one moment."""

    at_s: float
    tokens: int
    cpu_s: float


def points(
    threads: int, batches: Sequence[int] = BATCHES, modes: Sequence[str | None] = (None,)
) -> list[Point]:
    """Return the operating points: every thread count with every batch size, then one at half duty.

    Those of each power mode come together, in the order of the modes; half duty is looked at in the last.

    Parameters
    ----------
    threads
        Most threads, 1 or more.
    batches
        Batch sizes, the smallest first.
    modes
        Power modes, by name; None: the one in force.
    """
    full = [
        Point(number, batch, 1.0, mode)
        for mode in modes
        for number in range(1, threads + 1)
        for batch in batches
    ]
    return [*full, Point(threads, batches[0], 0.5, modes[-1])]


def calibrate(
    image: Path,
    *,
    board: BoardSettings,
    threads: int,
    seconds: float,
    batches: Sequence[int] | None = None,
    power_modes: Sequence[str] = (),
    checked: bool = False,
    progress: Callable[[Point], None] = lambda point: None,
) -> Calibration:
    """Measure every operating point.

    Parameters
    ----------
    image
        Directory of the image slot.
    board
        Which board, and how its driver is set.
    threads
        Most threads.
    seconds
        Physical time each point is measured for, at least, s.
    batches
        Batch sizes, the smallest first; `BATCHES` if not given.
    power_modes
        Power modes to measure in, by name; the one in force if not given. That is put back at the end.
    checked
        With compute checks.
    progress
        Called before each point.

    Raises
    ------
    PenumbraError
        The board has no meter or no such power mode, or the worker failed: how its log ends is told.
    """
    batches = BATCHES if batches is None else batches
    settings = msgspec.structs.replace(board, cores=threads)
    driver = open_board(settings)
    load_before = load_average()
    with scratch("calibrate") as folder:
        session = WorkerSession(
            image,
            folder,
            threads=threads,
            seats=max(batches),
            positions=min(POSITIONS, load_manifest(image).shape.context),
            checked=checked,
            board=settings,
        )
        modes = power_modes or (driver.power_mode(),)
        measured = asyncio.run(session.run(points(threads, batches, modes), seconds, progress))
    half = measured[-1]
    whole = next(
        p
        for p in measured
        if (p.threads, p.batch, p.duty, p.power_mode) == (threads, batches[0], 1.0, half.power_mode)
    )
    return Calibration(
        machine=describe_machine(threads, peers=False, load_before=load_before),
        board=driver.name,
        identity=driver.identity,
        board_measures=driver.measures,
        idle_w=session.idle_w,
        image_id=image_id(load_manifest(image)),
        checked=checked,
        points=measured,
        duty_half_share=half.tokens_s / whole.tokens_s,
        reloads=session.loads - 1,
        current=fit_current(session.draw, DRAW_PERIOD_S),
    )


class WorkerSession:
    """One worker kept at work, and what it says."""

    def __init__(
        self,
        image: Path,
        folder: Path,
        *,
        threads: int,
        seats: int,
        positions: int,
        checked: bool,
        board: BoardSettings | None = None,
    ) -> None:
        self.loads = 0
        self.idle_w: float | None = None
        """Mean draw before the first point, W; None unless the board measures it."""
        self.draw: list[DrawSample] = []
        """Load and draw over all points."""
        self.board = board or BoardSettings(cores=threads)
        self._board = open_board(self.board)
        self._drawn: list[float] = []
        """Readings of a meter since the last point began, W."""
        self._warmth: list[float] = []
        """Temperatures since then, degC."""
        self._messages: asyncio.Queue[tuple[float, protocol.FromWorker]] = asyncio.Queue()
        self._arrived_s = 0.0
        """When the message last taken from the queue arrived, monotonic, s."""
        self._log = folder / "worker.log"
        self._faults: list[str] = []
        self._positions = positions
        self._number = 0
        self._running: set[str] = set()
        self._refill = False
        """Whether a text that ends is followed by another."""
        argv = [
            sys.executable, "-m", "node.inference.worker",
            "--socket", str(folder / "socket"), "--generation", "1", "--image", str(image),
            "--arena", str(folder / "arena"), "--threads", str(threads),
            "--seats", str(seats), "--batch", str(seats), "--positions", str(positions),
            *(["--checked"] if checked else []),
        ]  # fmt: skip
        self._worker = WorkerProcess(
            argv,
            socket_path=folder / "socket",
            log_path=self._log,
            generation=1,
            on_message=self._take,
            on_fault=lambda monitor, reason: self._faults.append(f"{monitor}: {reason}"),
        )

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        pid = self._worker.pid
        if pid is None:
            raise self.failed("it does not run")
        return pid

    async def run(
        self, wanted: Sequence[Point], seconds: float, progress: Callable[[Point], None]
    ) -> list[OperatingPoint]:
        """Lead the worker through all points."""
        found: list[OperatingPoint] = []

        async def body(living: asyncio.Task[object]) -> None:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch_draw(), name="hil.calibrate.draw")
                # What the board draws without work belongs to the fit.
                await asyncio.sleep(min(seconds, IDLE_S))
                self.idle_w = self._mean_draw_w()
                before = self._board.power_mode()
                try:
                    for point in wanted:
                        progress(point)
                        await self._enter(point.power_mode)
                        found.append(await self._measure(living, point, seconds))
                finally:
                    await self._enter(before)
                watching.cancel()

        await self.live(body)
        return found

    async def _enter(self, power_mode: str | None) -> None:
        """Put a power mode in force; None leaves the one that is."""
        if power_mode is not None:
            whole = power_side.OperatingPoint(
                threads=self.board.cores, batch=1, duty=1.0, power_mode=power_mode
            )
            await asyncio.to_thread(self._board.operate, whole)

    async def live(self, body: Callable[[asyncio.Task[object]], Coroutine[object, object, None]]) -> None:
        """Start the worker, run `body` when it is ready, and stop it in order.

        Raises
        ------
        PenumbraError
            The worker failed.
        """
        failure: PenumbraError | None = None
        async with asyncio.TaskGroup() as group:
            living = group.create_task(self._worker.run(), name="hil.calibrate.worker")
            try:
                await self.until(living, protocol.Ready, _READY_S)
                await body(living)
                self._refill = False
                await self._worker.stop(_STOP_S)
            except* PenumbraError as errors:
                # Within a group of the body it comes wrapped.
                failure = _first(errors)
            finally:
                self._worker.kill()
        if failure is not None:
            raise failure

    def send(self, message: protocol.Message) -> None:
        """Send to the worker."""
        self._worker.send(message)

    def keep_busy(self, jobs: int) -> None:
        """Start jobs, each followed by another when it ends."""
        self._refill = True
        for _ in range(jobs):
            self._start()

    def forget(self) -> None:
        """Drop the messages that came; raises as `until` when one says that the worker failed."""
        while not self._messages.empty():
            _, message = self._messages.get_nowait()
            if isinstance(message, protocol.Fatal | protocol.JobError):
                raise self.failed(message.reason)
        if self._faults:
            raise self.failed(self._faults[0])

    async def _watch_draw(self) -> None:
        """Read load and draw together, as the node's power loop does."""
        share = CpuShare()
        self._board.set_worker(self.pid)
        while True:
            reading, used = self._board.read(), share.sample(self.pid)
            if reading.power_w is not None and self._board.measures:
                self._drawn.append(reading.power_w)
            if reading.board_c is not None:
                self._warmth.append(reading.board_c)
            if used is not None and reading.power_w is not None:
                self.draw.append(DrawSample(reading.power_w, used, reading.clock_ghz, reading.board_c))
            await asyncio.sleep(DRAW_PERIOD_S)

    def _mean_draw_w(self) -> float | None:
        """Return the mean of the meter's readings since the list was begun, W; None without a meter."""
        return sum(self._drawn) / len(self._drawn) if self._drawn else None

    def _take(self, message: protocol.FromWorker) -> None:
        if isinstance(message, protocol.Ready):
            self.loads += 1
        elif isinstance(message, protocol.Block) and message.finish is not None:
            self._running.discard(message.job)
            if self._refill:
                self._start()
        self._messages.put_nowait((time.monotonic(), message))

    async def _measure(self, living: asyncio.Task[object], point: Point, seconds: float) -> OperatingPoint:
        self._worker.send(protocol.Pace(duty=point.duty, threads=point.threads, batch=point.batch))
        self.keep_busy(point.batch)
        seen: set[str] = set()
        while len(seen) < point.batch:
            seen.add((await self.until(living, protocol.Block, _REPLY_S)).job)
        somewhere = await self._mark(living, 0)
        first = last = await self._mark(living, somewhere.tokens)
        self._drawn.clear()
        self._warmth.clear()
        while last.at_s - first.at_s < seconds:
            last = await self._mark(living, last.tokens)
        self._refill = False
        for job in sorted(self._running):
            self._worker.send(protocol.Cancel(job=job))
        while self._running:
            await self.until(living, protocol.Block, _REPLY_S)
        taken_s = last.at_s - first.at_s
        return OperatingPoint(
            threads=point.threads,
            batch=point.batch,
            duty=point.duty,
            tokens_s=(last.tokens - first.tokens) / taken_s,
            cpu_share=(last.cpu_s - first.cpu_s) / taken_s,
            power_w=self._mean_draw_w(),
            seconds=taken_s,
            power_mode=point.power_mode,
            board_c=sum(self._warmth) / len(self._warmth) if self._warmth else None,
        )

    def _start(self) -> None:
        self._number += 1
        job = f"calibrate-{self._number}"
        self._running.add(job)
        prompt = PROMPTS[self._number % len(PROMPTS)]
        room = self._positions - PROMPT_ROOM
        self._worker.send(protocol.Start(job=job, prompt=prompt, max_tokens=room))

    async def _mark(self, living: asyncio.Task[object], more_than: int) -> _Mark:
        """Wait for the end of an epoch: a status that tells of more tokens."""
        while True:
            status = await self.until(living, protocol.Status, _REPLY_S)
            if status.tokens_committed > more_than:
                return _Mark(self._arrived_s, status.tokens_committed, self._cpu_s())

    async def until(self, living: asyncio.Task[object], kind: type[M], timeout_s: float) -> M:
        """Return the next message of a kind; others are passed over.

        Raises
        ------
        PenumbraError
            The worker gave up, refused a job, ended, broke the protocol, or said nothing for too long.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self._faults:
                raise self.failed(self._faults[0])
            if living.done() and self._messages.empty():
                raise self.failed("it ended")
            try:
                async with asyncio.timeout(_LOOK_S):
                    self._arrived_s, message = await self._messages.get()
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise self.failed(f"no {kind.__name__} within {timeout_s:.0f} s") from None
                continue
            if isinstance(message, protocol.Fatal | protocol.JobError):
                raise self.failed(message.reason)
            if isinstance(message, kind):
                return message

    def failed(self, why: str) -> PenumbraError:
        """Return the error that says why the worker failed, with the end of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        last = f"; its last words: {lines[-1]}" if lines else ""
        return PenumbraError(f"the worker failed while its operating points were measured: {why}{last}")

    def _cpu_s(self) -> float:
        used_s = process_cpu_s(self.pid)
        if used_s is None:
            raise self.failed("it ended")
        return used_s


def _first(errors: BaseExceptionGroup[PenumbraError]) -> PenumbraError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, PenumbraError) else PenumbraError(str(error))
