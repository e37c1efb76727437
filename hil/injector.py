"""The injector: lets the flight's bit flips land in the worker's live memory, from outside, on time.

It also keeps the watch that tells afterwards what a flip could have touched: every state of the seats of the
KV arena (one a committed epoch), and when workers die.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from hil.faults import Commit, Fault, Strike, Target, epochs_between
from hil.memory import NotThere, WorkerMemory
from hil.processes import WORKER_MODULE, all_processes, read_process
from node.config import NodeConfig
from telemetry.errors import PenumbraError

TICK_S = 0.05
"""Interval of the watch, s: several looks at the arena in an epoch."""
FIND_S = 0.5
"""Interval of looking for a new worker, s."""


class Injector:
    """Strikes the worker as the fault list says.

    Parameters
    ----------
    memory
        The worker's memory.
    faults
        In order of time.
    worker_pid
        Tells the worker's pid, None while there is none; asked every `FIND_S` at most.
    computing
        Names the worker that has loaded and proven its memory, e.g. by boot and generation; None while there
        is none. Memory is protected from then on: before, ONNX Runtime refuses what was struck.
    elapsed_s
        Mission time since the start of the flight, s.
    on_strike
        Called with each strike.

    Attributes
    ----------
    strikes, commits, worker_deaths
        What happened, see `hil.faults`.
    injecting
        Set False to end the injection; the watch goes on.
    """

    def __init__(
        self,
        memory: WorkerMemory,
        faults: Sequence[Fault],
        *,
        worker_pid: Callable[[], int | None],
        computing: Callable[[], Hashable | None],
        elapsed_s: Callable[[], float],
        on_strike: Callable[[Strike], None] = lambda strike: None,
    ) -> None:
        self.strikes: list[Strike] = []
        self.commits: list[Commit] = []
        self.worker_deaths: dict[int, int] = {}
        self.injecting = True
        self._memory = memory
        self._coming = deque(faults)
        self._due: list[tuple[Fault, float]] = []
        self._worker_pid = worker_pid
        self._computing = computing
        self._elapsed_s = elapsed_s
        self._on_strike = on_strike
        self._pid: int | None = None
        self._name: Hashable | None = None
        self._name_before: Hashable | None = None
        self._next_find_s = 0.0
        self._seats: dict[int, Commit] = {}

    @property
    def waiting(self) -> int:
        """Faults that are due but have found nothing to strike yet."""
        return len(self._due)

    @property
    def not_injected(self) -> int:
        """Faults of the list that have not landed."""
        return len(self._due) + len(self._coming)

    @property
    def idle(self) -> bool:
        """True while no job is being decoded."""
        return not any(
            commit.job and commit.finish is None and not commit.parked for commit in self._seats.values()
        )

    def epochs_since(self, start_ns: int) -> int:
        """Return how many epochs have been committed since a time, CLOCK_REALTIME ns."""
        return epochs_between(self.commits, start_ns, time.time_ns())

    async def run(self) -> None:
        """Watch and strike until cancelled.

        Raises
        ------
        PenumbraError
            The worker's memory may not be written.
        """
        while True:
            self.step(time.monotonic())
            await asyncio.sleep(TICK_S)

    def step(self, now_s: float) -> None:
        """Do one tick: look at arena and worker, then let what is due land. `now_s` is monotonic, s."""
        self._watch(now_s)
        while self._coming and self._coming[0].at_s <= self._elapsed_s():
            self._due.append((self._coming.popleft(), now_s))
        if self._pid is None or self._name is None or not self.injecting:
            return
        still_due = []
        for fault, due_s in self._due:
            try:
                strike = self._memory.strike(self._pid, fault, now_s - due_s)
            except NotThere:
                still_due.append((fault, due_s))
            else:
                self.strikes.append(strike)
                self._on_strike(strike)
        self._due = still_due

    def _watch(self, now_s: float) -> None:
        if self._pid is not None and read_process(self._pid) is None:
            self.worker_deaths[self._pid] = time.time_ns()
            self._pid = None
            # What tells of the worker may be old: the dead one's name proves nothing about the next.
            self._name_before = self._name or self._name_before
            self._name = None
        if self._pid is None and now_s >= self._next_find_s:
            self._next_find_s = now_s + FIND_S
            self._pid = self._worker_pid()
        if self._pid is not None and self._name is None:
            name = self._computing()
            self._name = name if name != self._name_before else None
        for commit in self._memory.arena.commits():
            known = self._seats.get(commit.seat)
            if known is None or commit.serial != known.serial:
                self._seats[commit.seat] = commit
                self.commits.append(commit)


def find_worker_of(arena: Path) -> int | None:
    """Return the pid of the worker that was started with this arena, None if there is none."""
    for process in all_processes():
        try:
            with open(f"/proc/{process.pid}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
        except OSError:
            continue
        if WORKER_MODULE in arguments and os.fsencode(arena) in arguments:
            return process.pid
    return None


def inject_once(config_path: Path, target: Target, seed: int | None = None) -> Strike:
    """Flip one random bit in the worker of a running node.

    Parameters
    ----------
    config_path
        The configuration the node was started with.
    target
        Memory to strike.
    seed
        Chooses the bit; None for a fresh choice.

    Raises
    ------
    PenumbraError
        The configuration cannot be read, no such node runs, there is nothing to strike, or we may not.
    """
    config = NodeConfig.load(config_path)
    pid = find_worker_of(config.arena_path)
    if pid is None:
        raise PenumbraError(
            f"no worker of node {config.node.name!r} ({config_path}) is running",
            "start it with `penumbra node CONFIG` and wait until it is ready",
        )
    where = random.Random(seed).random()  # noqa: S311 - a fault, not a secret
    fault = Fault(index=0, at_s=0.0, target=target, where=where)
    try:
        return WorkerMemory(config.image_dir, config.arena_path).strike(pid, fault)
    except NotThere as reason:
        raise PenumbraError(
            f"nothing to strike in {target.value}: {reason}", "kv needs a job that is being decoded"
        ) from None
