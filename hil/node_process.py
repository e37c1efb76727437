"""The node as a process, and the part of the spacecraft that restarts it: the watchdog of the bus.

What it starts is a session of its own; everything in it, and everything descended from it, is ended with it,
as a service manager ends a control group. Nothing else is ever signalled. When the bench dies before it can
do that, the kernel does (`hil.tether`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hil.processes import Process, all_processes, descendants, find_worker, same
from hil.tether import tied
from telemetry.errors import PenumbraError

STOP_BOUND_S = 15.0
"""Time the node has to end in order after SIGTERM before it is killed, s."""
ORPHAN_GRACE_S = 3.0
"""Time the rest of a dead node's processes have to end by themselves, s."""
KILL_BOUND_S = 2.0
"""Time a killed process has to disappear, s."""
FAMILY_POLL_S = 1.0
"""Interval at which the processes below the node are noted, s."""
QUICK_LIFE_S = 5.0
"""A node that lives shorter than this did not come up, s."""
MAX_QUICK_LIVES = 4
"""So many quick lives in a row end the flight: it will not come up."""
EXIT_USER_ERROR = PenumbraError.exit_code
"""The node's exit code for a configuration that must be mended first: a restart would not help."""


@dataclass
class Life:
    """One run of the node process."""

    pid: int
    started_s: float
    """Host monotonic clock, s."""
    ended_s: float | None = None
    how: str = ""
    """`exit code 0`, `killed by SIGKILL`; empty while it runs."""
    orphans_killed: int = 0
    """Processes it left behind that did not end by themselves."""


def describe_exit(code: int) -> str:
    """Say in words how a process ended, from its return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


async def until(done: Callable[[], bool], bound_s: float) -> bool:
    """Wait, at most `bound_s`, for a condition that nothing announces; return whether it came true."""
    deadline = time.monotonic() + bound_s
    while not (met := done()):
        if time.monotonic() >= deadline:
            break
        await asyncio.sleep(0.02)
    return met


def log_tail(path: Path, lines: int = 12) -> str:
    """Return the last lines of a log, for an error message."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"(log {path} cannot be read: {error})"
    return "\n".join(text.splitlines()[-lines:])


class NodeProcess:
    """Runs a node, restarts it when it dies, ends it in bounded time.

    Parameters
    ----------
    command
        Program and arguments.
    log_path
        Standard output and error of every life are appended there.
    on_event
        Called with `(name, text)` for the flight's event list.
    restart_delay_s
        Time between a death and the next start, s.

    Worst-case time of `stop`: `STOP_BOUND_S` + `ORPHAN_GRACE_S` + `KILL_BOUND_S`.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        *,
        on_event: Callable[[str, str], None] = lambda name, text: None,
        restart_delay_s: float = 0.5,
    ) -> None:
        self.lives: list[Life] = []
        self._command = list(command)
        self._log_path = log_path
        self._on_event = on_event
        self._restart_delay_s = restart_delay_s
        self._process: asyncio.subprocess.Process | None = None
        self._family: dict[int, Process] = {}
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id of the node, None while it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def stopping(self) -> bool:
        """True once `stop` was called."""
        return self._stopping

    @property
    def restarts(self) -> int:
        """Starts after the first."""
        return max(0, len(self.lives) - 1)

    @property
    def orphans_killed(self) -> int:
        """Processes that outlived their node and had to be killed."""
        return sum(life.orphans_killed for life in self.lives)

    def worker_pid(self) -> int | None:
        """Return the pid of the inference worker, None while there is none."""
        return find_worker(self.pid) if self.pid is not None else None

    async def run(self) -> None:
        """Start the node and keep it running until `stop` is called or this is cancelled.

        Raises
        ------
        PenumbraError
            The node refuses its configuration (exit code 2), or dies `MAX_QUICK_LIVES` times in a row
            right after its start.
        """
        quick = 0
        try:
            while not self._stopping:
                code = await self._one_life()
                if self.stopping:
                    return
                life = self.lives[-1]
                self._on_event("node.died", f"node {life.pid} ended: {life.how}")
                lived_s = (life.ended_s or life.started_s) - life.started_s
                quick = quick + 1 if lived_s < QUICK_LIFE_S else 0
                if code == EXIT_USER_ERROR or quick >= MAX_QUICK_LIVES:
                    raise PenumbraError(
                        f"the node does not come up ({life.how}); the end of {self._log_path}:\n"
                        + log_tail(self._log_path),
                        "mend what the log names and fly again",
                    )
                await asyncio.sleep(self._restart_delay_s)
        finally:
            await self._end_family(grace_s=0)

    async def stop(self, bound_s: float = STOP_BOUND_S) -> str:
        """Stop the node in order (SIGTERM), kill it after `bound_s`; return how it ended."""
        self._stopping = True
        process = self._process
        if process is None:
            return "never started"
        if process.returncode is None:
            self._watch_family()
            with suppress(ProcessLookupError):
                # A node that was stopped by a fault must run to hear the SIGTERM. This goes first: sending a
                # signal looks whether the process has ended, and would take its exit code from asyncio.
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), bound_s)
            except TimeoutError:
                self._on_event("node.overrun", f"node did not stop in {bound_s:g} s after SIGTERM: killed")
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        await self._end_family(ORPHAN_GRACE_S)
        return describe_exit(process.returncode if process.returncode is not None else 0)

    def kill_now(self) -> None:
        """Kill the node and what is below it, and wait for nothing: the bench itself is about to end."""
        self._watch_family()
        for pid in (self.pid, *(process.pid for process in self._family.values() if same(process))):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def kill_node(self) -> bool:
        """Fault: SIGKILL to the node alone. Return False if there is none."""
        return self._signal(self.pid, signal.SIGKILL)

    def kill_worker(self) -> bool:
        """Fault: SIGKILL to the inference worker. Return False if there is none."""
        return self._signal(self.worker_pid(), signal.SIGKILL)

    def stop_worker(self) -> bool:
        """Fault: SIGSTOP to the inference worker. Return False if there is none."""
        return self._signal(self.worker_pid(), signal.SIGSTOP)

    def _signal(self, pid: int | None, number: signal.Signals) -> bool:
        if pid is None:
            return False
        self._watch_family()
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    async def _one_life(self) -> int:
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *tied(self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        process = self._process
        life = Life(process.pid, time.monotonic())
        self.lives.append(life)
        self._family.clear()
        self._on_event("node.started", f"node started, pid {process.pid}")
        exited = asyncio.ensure_future(process.wait())
        try:
            while not exited.done():
                self._watch_family()
                await asyncio.wait([exited], timeout=FAMILY_POLL_S)
        except asyncio.CancelledError:
            self._watch_family()
            with suppress(ProcessLookupError):
                process.kill()
            await exited
            raise
        finally:
            life.ended_s = time.monotonic()
            life.how = describe_exit(process.returncode if process.returncode is not None else 0)
        await self._end_family(ORPHAN_GRACE_S)
        return exited.result()

    def _watch_family(self) -> None:
        """Remember the processes below the node: after its death nothing in `/proc` ties them to it."""
        pid = self.pid
        if pid is not None:
            for process in descendants(pid, all_processes()):
                self._family[process.pid] = process

    async def _end_family(self, grace_s: float) -> None:
        """Wait for what a dead node left behind to end, then kill it."""
        if not self.lives:
            return
        life = self.lives[-1]
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await until(lambda: not self._left_behind(life.pid), grace_s)
        left = self._left_behind(life.pid)
        for process in left:
            if same(process):
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                life.orphans_killed += 1
                self._on_event("node.orphan", f"process {process.pid} outlived node {life.pid}: killed")
        await until(lambda: not any(same(process) for process in left), KILL_BOUND_S)

    def _left_behind(self, node_pid: int) -> list[Process]:
        session = [p for p in all_processes() if p.session == node_pid and p.pid != node_pid]
        known = {p.pid: p for p in [*self._family.values(), *session]}
        return [process for process in known.values() if same(process)]
