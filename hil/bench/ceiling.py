"""`penumbra bench ceiling`: steps of a commanded cap on a real worker, and how well the governor holds it.

The governor of the node leads a real worker as in flight: a quarter of a second apart it reads the board,
decides, and paces. Beside it the CPU time of the worker is read ten times a second, and turned into the draw
of the `sim` board; what counts is the mean over one second.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from hil.bench.machine import describe_machine, load_average
from hil.bench.stats import spread
from hil.calibrate import POSITIONS, WorkerSession
from hil.shared_memory import scratch
from node.boards import BoardSettings, open_board
from node.inference import protocol
from node.inference.manifest import image_id, load_manifest
from node.power.ceiling import GovernorSettings, PowerInputs
from node.power.cpu_share import process_cpu_s
from node.power.governor import Governor
from node.power_service import PERIOD_S
from telemetry.bus import BusEps
from telemetry.figures import CeilingBench

READ_S: Final = 0.1
OVER_S: Final = 1.0
"""Time the draw is averaged over."""
SETTLED_S: Final = 2.0
"""Time after a step from which on the cap is to be held."""
STEP_S: Final = 8.0
SHARES: Final = (0.25, 0.9)
"""Range of the caps, as a share of the span from idle to the most."""
BATCH: Final = 8
RICH: Final = BusEps(
    t_ns=0, battery_soc=1.0, battery_v=8.4, battery_a=0.0, battery_wh=1e4, array_w=1e3, array_sun_w=1e3,
    platform_w=0.0, soc_floor=0.0,
)  # fmt: skip
"""A spacecraft whose power never binds: only the cap does."""


def bench_ceiling(
    image: Path,
    *,
    threads: int,
    steps: int,
    seed: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> CeilingBench:
    """Measure how a cap is held.

    Parameters
    ----------
    image
        Directory of the image slot.
    threads
        Of the worker.
    steps
        Caps in a row, each for `STEP_S`.
    seed
        Of the caps.
    progress
        Told what is done now.

    Raises
    ------
    PenumbraError
        The worker failed.
    """
    load_before = load_average()
    board = BoardSettings(cores=threads)
    with scratch("ceiling") as folder:
        session = _Held(
            image,
            folder,
            threads=threads,
            seats=BATCH,
            positions=min(POSITIONS, load_manifest(image).shape.context),
            checked=False,
            board=board,
        )
        asyncio.run(session.hold(_caps(steps, board, seed), progress))
    held = _judge(session.caps, session.read, board)
    return CeilingBench(
        machine=describe_machine(threads, peers=False, load_before=load_before),
        image_id=image_id(load_manifest(image)),
        steps=steps,
        samples=held.samples,
        over_share=held.over / max(held.samples, 1),
        excess_w=float(np.quantile(held.excess_w, 0.99)),
        unused_share=spread(held.unused),
        settled_s=spread(held.settled_s) if held.settled_s else None,
    )


@dataclass
class _Judged:
    """How the caps were held: of the one-second means from `SETTLED_S` after a step on."""

    samples: int = 0
    over: int = 0
    """Means above the cap."""
    excess_w: list[float] = field(default_factory=list)
    unused: list[float] = field(default_factory=list)
    """How far below the cap each was, as a share of it."""
    settled_s: list[float] = field(default_factory=list)
    """Time from each step down to the last mean above the new cap."""


def _caps(steps: int, board: BoardSettings, seed: int) -> list[float]:
    rng = random.Random(seed)  # noqa: S311
    span_w = board.core_w * board.cores
    return [board.idle_w + span_w * rng.uniform(*SHARES) for _ in range(steps)]


class _Held(WorkerSession):
    """A worker under the governor, whose CPU time is read beside."""

    caps: list[tuple[float, float]]
    """When each cap was set, monotonic, s, and the cap, W."""
    read: list[tuple[float, float]]
    """CPU time of the worker, s, by monotonic time."""

    async def hold(self, caps: Sequence[float], progress: Callable[[str], None]) -> None:
        self.caps, self.read = [], []

        async def body(living: asyncio.Task[object]) -> None:
            self.keep_busy(BATCH)
            await self.until(living, protocol.Block, 60.0)
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read_cpu(), name="hil.ceiling.read")
                governing = group.create_task(self._govern(), name="hil.ceiling.govern")
                for number, cap_w in enumerate(caps):
                    progress(f"cap {number + 1} of {len(caps)}: {cap_w:.2f} W")
                    self.caps.append((time.monotonic(), cap_w))
                    await asyncio.sleep(STEP_S)
                    self.forget()
                reading.cancel()
                governing.cancel()

        await self.live(body)

    async def _govern(self) -> None:
        """Do what the node's power loop does, on a spacecraft where only the cap binds."""
        governor = Governor(GovernorSettings())
        board = open_board(self.board)
        board.set_worker(self.pid)
        idle_w, max_w = board.range_w()
        while True:
            now_s = time.monotonic()
            setpoint = governor.handle(
                PowerInputs(
                    t_ns=0,
                    eps=RICH,
                    umbra=None,
                    period_s=None,
                    load_w=board.read().power_w,
                    cap_w=self.caps[-1][1] if self.caps else None,
                    idle_w=idle_w,
                    max_w=max_w,
                ),
                now_s,
            )
            self.send(protocol.Pace(duty=setpoint.duty, threads=self.board.cores, batch=BATCH))
            await asyncio.sleep(PERIOD_S)

    async def _read_cpu(self) -> None:
        while True:
            used_s = process_cpu_s(self.pid)
            if used_s is not None:
                self.read.append((time.monotonic(), used_s))
            await asyncio.sleep(READ_S)


def _judge(
    caps: Sequence[tuple[float, float]], read: Sequence[tuple[float, float]], board: BoardSettings
) -> _Judged:
    """Return how the caps were held.

    Parameters
    ----------
    caps
        When each was set, s, and the cap, W.
    read
        Time, s, and CPU time of the worker until then, s.
    board
        What the draw follows from.
    """
    at, used = np.asarray(read).T
    ends = at[at >= at[0] + OVER_S]
    share = (np.interp(ends, at, used) - np.interp(ends - OVER_S, at, used)) / OVER_S
    means_w = board.idle_w + board.core_w * share
    found = _Judged()
    until = [since_s for since_s, _ in caps[1:]] + [float(ends[-1])]
    before_w = 0.0
    for (since_s, cap_w), until_s in zip(caps, until, strict=True):
        mine = (ends >= since_s) & (ends < until_s)
        steady_w = means_w[mine & (ends >= since_s + SETTLED_S)]
        found.samples += len(steady_w)
        found.over += int(np.sum(steady_w > cap_w))
        found.excess_w += np.maximum(0.0, steady_w - cap_w).tolist()
        found.unused += (1.0 - steady_w / cap_w).tolist()
        if cap_w < before_w:
            # A mean that goes over long after the step is not of the step: it counts as held badly above.
            late = ends[mine & (means_w > cap_w) & (ends < since_s + 2 * SETTLED_S)]
            found.settled_s.append(float(late[-1] - since_s) if late.size else 0.0)
        before_w = cap_w
    return found
