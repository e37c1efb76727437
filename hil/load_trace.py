"""Load traces: CPU time of a real worker over time, recorded fine enough to stand for a board's load.

`python -m hil.load_trace PATH --seconds 480` records one. A worker decodes real text while it is led through
operating points as a governor leads it; every `QUIET_EVERY_S` it is paced down for `QUIET_FOR_S`, which is
the pause the latch-up detector asks for. Nothing in a trace is invented: it holds the nanoseconds the kernel
charged the worker's threads with.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from hil.bench.machine import describe_machine, load_average
from hil.calibrate import WorkerSession
from hil.shared_memory import scratch
from node.inference import protocol
from node.inference.manifest import default_images_dir, image_id, load_manifest
from node.inference.slots import active_image
from node.power.cpu_share import process_cpu_s
from telemetry.errors import PenumbraError
from telemetry.figures import Machine

RATE_HZ: Final = 50
QUIET_EVERY_S: Final = 120.0
"""Less than the 150 s after which the detector asks for quiet: a trace cannot answer its wishes."""
QUIET_FOR_S: Final = 5.0
QUIET_DUTY: Final = 0.01
STAY_S: Final = (4.0, 25.0)
"""Shortest and longest time at an operating point."""
DUTIES: Final = (0.2, 0.4, 0.6, 0.8, 1.0, 1.0)
BATCHES: Final = (1, 2, 4)
POSITIONS: Final = 1024
_PACKAGED: Final = ("load_trace_gemma.npz",)
SCALE_S: Final = 1e-6
"""CPU time is kept in whole microseconds."""

Floats = npt.NDArray[np.float64]


class TraceHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a trace was recorded."""

    command: str
    rate_hz: int
    seconds: float
    image_id: str
    threads: int
    seed: int
    machine: Machine
    late_ms_max: float
    """Longest time between two readings of the CPU clock beyond the interval, ms: between them the CPU time
    is spread evenly."""


@dataclass(frozen=True)
class LoadTrace:
    """A trace: CPU share over time."""

    name: str
    head: TraceHead
    share: Floats
    """CPU seconds a second in each interval of 1 / `rate_hz`, 1 = one core, shape (n,)."""


def packaged_traces() -> list[LoadTrace]:
    """Return the traces recorded for the trials of the latch-up detector."""
    folder = resources.files("hil")
    found = []
    for name in _PACKAGED:
        with resources.as_file(folder / name) as path:
            found.append(load_trace(path))
    return found


def load_trace(path: Path) -> LoadTrace:
    """Read a trace.

    Raises
    ------
    PenumbraError
        The file cannot be read or is no trace.
    """
    again = "record it with: python -m hil.load_trace PATH"
    try:
        with np.load(path, allow_pickle=False) as content:
            head = msgspec.json.decode(content["head"].tobytes(), type=TraceHead)
            share: Floats = content["cpu_us"].astype(np.float64) * SCALE_S * head.rate_hz
    except (OSError, KeyError, ValueError, msgspec.DecodeError) as error:
        raise PenumbraError(f"{path}: no load trace: {error}", again) from None
    if share.ndim != 1 or len(share) < head.rate_hz:
        raise PenumbraError(f"{path}: shape {share.shape}: one second or more is allowed", again)
    return LoadTrace(path.stem, head, share)


def save_trace(path: Path, head: TraceHead, share: Floats) -> None:
    """Write a trace; CPU time is rounded to whole microseconds."""
    cpu_us = np.rint(share / head.rate_hz / SCALE_S).astype(np.uint32)
    encoded = np.frombuffer(msgspec.json.encode(head), dtype=np.uint8)
    np.savez_compressed(path, head=encoded, cpu_us=cpu_us)


def resample(times_s: Sequence[float], cpu_s: Sequence[float], rate_hz: int) -> Floats:
    """Return the CPU share in even intervals from readings at uneven times, shape (n,)."""
    times, used = np.asarray(times_s), np.asarray(cpu_s)
    count = int((times[-1] - times[0]) * rate_hz)
    grid = times[0] + np.arange(count + 1) / rate_hz
    share: Floats = np.diff(np.interp(grid, times, used)) * rate_hz
    return share


def record(image: Path, *, threads: int, seconds: float, seed: int, command: str) -> tuple[TraceHead, Floats]:
    """Run a worker and record its CPU time.

    Parameters
    ----------
    image
        Directory of the image slot.
    threads
        Of the worker.
    seconds
        Length of the trace, s.
    seed
        Of the order of operating points.
    command
        Kept in the head.

    Raises
    ------
    PenumbraError
        The worker failed.
    """
    load_before = load_average()
    with scratch("trace") as folder:
        session = _Recording(
            image,
            folder,
            threads=threads,
            seats=max(BATCHES),
            positions=min(POSITIONS, load_manifest(image).shape.context),
            checked=False,
        )
        asyncio.run(session.record(seconds, random.Random(seed), threads))  # noqa: S311
    times = np.asarray(session.times_s)
    head = TraceHead(
        command=command,
        rate_hz=RATE_HZ,
        seconds=seconds,
        image_id=image_id(load_manifest(image)),
        threads=threads,
        seed=seed,
        machine=describe_machine(threads, peers=False, load_before=load_before),
        late_ms_max=float(np.diff(times).max() - 1 / RATE_HZ) * 1e3,
    )
    return head, resample(session.times_s, session.cpu_s, RATE_HZ)


class _Recording(WorkerSession):
    """A worker whose CPU time is read `RATE_HZ` times a second."""

    def __init__(
        self, image: Path, folder: Path, *, threads: int, seats: int, positions: int, checked: bool
    ) -> None:
        super().__init__(image, folder, threads=threads, seats=seats, positions=positions, checked=checked)
        self.times_s: list[float] = []
        self.cpu_s: list[float] = []

    async def record(self, seconds: float, rng: random.Random, threads: int) -> None:
        async def body(living: asyncio.Task[object]) -> None:
            self.keep_busy(max(BATCHES))
            await self.until(living, protocol.Block, 60.0)
            async with asyncio.TaskGroup() as group:
                leading = group.create_task(self._lead(rng, threads), name="hil.load_trace.lead")
                await self._read(living, seconds)
                leading.cancel()

        await self.live(body)

    async def _lead(self, rng: random.Random, threads: int) -> None:
        """Change the operating point as a governor may, with pauses."""
        quiet_s = time.monotonic() + QUIET_EVERY_S / 4
        while True:
            pace = protocol.Pace(
                duty=rng.choice(DUTIES), batch=rng.choice(BATCHES), threads=rng.randint(1, threads)
            )
            self.send(pace)
            until_s = min(time.monotonic() + rng.uniform(*STAY_S), quiet_s)
            await asyncio.sleep(max(0.0, until_s - time.monotonic()))
            if time.monotonic() >= quiet_s:
                quiet_s += QUIET_EVERY_S
                self.send(protocol.Pace(duty=QUIET_DUTY))
                await asyncio.sleep(QUIET_FOR_S)

    async def _read(self, living: asyncio.Task[object], seconds: float) -> None:
        begin_s = next_s = time.monotonic()
        while next_s - begin_s <= seconds + 1 / RATE_HZ:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            cpu_s = process_cpu_s(self.pid)
            now_s = time.monotonic()
            if cpu_s is None or living.done():
                raise self.failed("it ended")
            self.times_s.append(now_s)
            self.cpu_s.append(cpu_s)
            self.forget()
            next_s = max(next_s + 1 / RATE_HZ, now_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record a trace into a file."""
    parser = argparse.ArgumentParser(prog="python -m hil.load_trace", description=__doc__)
    parser.add_argument("path", type=Path, help="file to write (.npz)")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--images", type=Path, default=None)
    given = parser.parse_args(arguments)
    command = f"python -m hil.load_trace {given.path.name} --seconds {given.seconds:g} --seed {given.seed}"
    image = active_image(given.images if given.images is not None else default_images_dir())
    head, share = record(
        image, threads=given.threads, seconds=given.seconds, seed=given.seed, command=command
    )
    save_trace(given.path, head, share)
    print(
        f"{given.path}: {len(share)} intervals of {1000 / head.rate_hz:g} ms, mean {share.mean():.2f} cores"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
