"""`penumbra node CONFIG --supervise`: a small parent that starts the node, and starts it anew when it must.

The node feeds it through a pipe (`node.watchdog.ParentWatchdog`). A node that stops feeding is killed; one
that dies, or asks for it by its exit code, is started again, after a wait that grows while lives are short.
An ordered stop and what the user has to mend end both. When the parent dies, the kernel asks the node to
stop.

`Supervision` decides; `main` carries out. It imports nothing of the node: what is to outlive it must be
small.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PARENT_FD_ENV: Final = "PENUMBRA_WATCHDOG_FD"
"""As in `node.watchdog`."""
EXIT_USER: Final = 2
EXIT_NEVER_UP: Final = 70
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Limits:
    """Bounds, s; all assumed.

    Raises
    ------
    ValueError
        One is not positive.
    """

    feed_s: float = 15.0
    """Longest time between two feeds."""
    start_s: float = 60.0
    """Longest time to the first feed."""
    stop_s: float = 20.0
    """Longest time of an ordered stop: more than the node allows itself."""
    quick_s: float = 30.0
    """A life shorter than this makes the wait before the next one longer."""
    wait_s: float = 0.5
    """First wait before a start."""
    longest_wait_s: float = 60.0

    def __post_init__(self) -> None:
        if not all(value > 0 for value in vars(self).values()):
            raise ValueError(f"times above 0 are allowed: {self}")


@dataclass(frozen=True)
class Fed:
    """Event: the node has fed."""


@dataclass(frozen=True)
class Exited:
    """Event: the node is gone; `code` as of `subprocess`, negative for a signal."""

    code: int


@dataclass(frozen=True)
class StopAsked:
    """Event: whoever runs this wants it to end."""


@dataclass(frozen=True)
class Tick:
    """Event: time has passed."""


Event = Fed | Exited | StopAsked | Tick


@dataclass(frozen=True)
class Start:
    """Action: start the node."""


@dataclass(frozen=True)
class Kill:
    """Action: SIGKILL to the node."""

    why: str


@dataclass(frozen=True)
class AskStop:
    """Action: SIGTERM to the node."""


@dataclass(frozen=True)
class Wait:
    """Action: say that the node is started again after this time, s."""

    for_s: float
    why: str


@dataclass(frozen=True)
class End:
    """Action: end with this code."""

    code: int


Action = Start | Kill | AskStop | Wait | End


class Supervision:
    """Decide when the node is started, killed, and given up. Pure.

    Parameters
    ----------
    limits
        Bounds.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.restarts = 0
        """Starts after the first."""
        self.running = False
        self._stopping = False
        self._killed = False
        self._armed = False
        self._started_s = 0.0
        self._deadline_s = math.inf
        """When the node is late, or, while it does not run, when it is started."""
        self._wait_s = self.limits.wait_s

    def begin(self, now_s: float) -> list[Action]:
        """Return the first action."""
        return self._start(now_s)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take an event at `now_s` (monotonic, s); return what to do, in order."""
        match event:
            case Fed() if self.running and not self._stopping:
                self._armed = True
                self._deadline_s = now_s + self.limits.feed_s
            case Exited(code):
                return self._exited(code, now_s)
            case StopAsked() if not self._stopping:
                self._stopping = True
                if not self.running:
                    return [End(0)]
                self._deadline_s = now_s + self.limits.stop_s
                return [AskStop()]
            case Tick() if now_s >= self._deadline_s:
                return self._late(now_s)
            case _:
                pass
        return []

    def next_s(self, now_s: float) -> float:
        """Return the time until the next `Tick` matters, s."""
        return max(0.0, self._deadline_s - now_s)

    def _start(self, now_s: float) -> list[Action]:
        self.running, self._killed, self._armed = True, False, False
        self._started_s = now_s
        self._deadline_s = now_s + self.limits.start_s
        return [Start()]

    def _late(self, now_s: float) -> list[Action]:
        if not self.running:
            self.restarts += 1
            return self._start(now_s)
        self._deadline_s = math.inf
        if self._killed:
            return []
        self._killed = True
        limits = self.limits
        if self._stopping:
            return [Kill(f"it did not stop within {limits.stop_s:g} s")]
        if self._armed:
            return [Kill(f"it has not fed for {limits.feed_s:g} s")]
        return [Kill(f"it did not feed within {limits.start_s:g} s of its start")]

    def _exited(self, code: int, now_s: float) -> list[Action]:
        self.running = False
        # 128 + number, as a shell tells a signal.
        if self._stopping or (code in {0, EXIT_USER} and not self._killed):
            return [End(code if code >= 0 else 128 - code)]
        if now_s - self._started_s >= self.limits.quick_s:
            self._wait_s = self.limits.wait_s
        wait_s = self._wait_s
        self._wait_s = min(2 * self._wait_s, self.limits.longest_wait_s)
        self._deadline_s = now_s + wait_s
        return [Wait(wait_s, f"exit code {code}" if code >= 0 else f"signal {-code}")]


def node_command(config: Path) -> list[str]:
    """Return the command line of the node."""
    return [sys.executable, "-m", "node", str(config)]


def main(command: Sequence[str], limits: Limits, say: Callable[[str], None] = lambda text: None) -> int:
    """Supervise until an ordered stop; return the exit code.

    Parameters
    ----------
    command
        Starts the node.
    limits
        Bounds.
    say
        Takes a line about each restart.
    """
    supervision = Supervision(limits)
    wake_out, wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    stop: list[int] = []
    before = [
        signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)
    ]
    before_child = signal.signal(signal.SIGCHLD, lambda *_: None)
    before_fd = signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
    life = _Life()
    try:
        actions = supervision.begin(time.monotonic())
        while True:
            for action in actions:
                match action:
                    case Start():
                        life = _Life.start(command)
                        say(f"node started, pid {life.pid}")
                    case Kill(why):
                        say(f"node {life.pid} is killed: {why}")
                        life.signal(signal.SIGKILL)
                    case AskStop():
                        life.signal(signal.SIGTERM)
                        # One that was stopped must run to hear it.
                        life.signal(signal.SIGCONT)
                    case Wait(for_s, why):
                        say(f"node ended ({why}); it is started again in {for_s:g} s")
                    case End(code):
                        return code
            wait_s = min(supervision.next_s(time.monotonic()), 1.0)
            fed = life.wait(wake_out, wait_s)
            now_s, actions = time.monotonic(), []
            if stop:
                stop.clear()
                actions += supervision.handle(StopAsked(), now_s)
            if fed:
                actions += supervision.handle(Fed(), now_s)
            ended = life.reap()
            if ended is not None:
                actions += supervision.handle(Exited(ended), now_s)
            actions += supervision.handle(Tick(), now_s)
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
        signal.signal(signal.SIGCHLD, before_child)
        life.close()
        os.close(wake_out)
        os.close(wake_in)


class _Life:
    """A node process and the pipe it feeds through."""

    def __init__(self, process: subprocess.Popen[bytes] | None = None, feeds: int = -1) -> None:
        self._process = process
        self._feeds = feeds

    @classmethod
    def start(cls, command: Sequence[str]) -> _Life:
        feeds, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            process = subprocess.Popen(
                command,
                pass_fds=(writing,),
                env={**os.environ, PARENT_FD_ENV: str(writing)},
                preexec_fn=_die_in_order_with_parent,  # noqa: PLW1509 - there are no threads here
            )
        finally:
            os.close(writing)
        return cls(process, feeds)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, wake: int, for_s: float) -> bool:
        """Wait for a feed, a signal, or the time; return whether there was a feed."""
        watched = [wake] if self._feeds < 0 else [wake, self._feeds]
        ready, _, _ = select.select(watched, [], [], for_s)
        if wake in ready:
            _drain(wake)
        if self._feeds not in ready:
            return False
        got = _drain(self._feeds)
        if not got:  # its writing end is closed: the node is gone, or going
            os.close(self._feeds)
            self._feeds = -1
        return bool(got)

    def reap(self) -> int | None:
        """Return the exit code, once."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            self._process = None
            self.close()
        return code

    def close(self) -> None:
        if self._feeds >= 0:
            os.close(self._feeds)
            self._feeds = -1


def _drain(descriptor: int) -> int:
    """Read what a pipe holds; return how much."""
    total = 0
    try:
        while data := os.read(descriptor, 4096):
            total += len(data)
    except BlockingIOError:
        pass
    return total


def _die_in_order_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
