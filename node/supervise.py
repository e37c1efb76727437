"""`penumbra node CONFIG --supervise`: a small parent that starts the node, and starts it anew when it must.

The node feeds it through a pipe (`node.watchdog.ParentWatchdog`). A node that stops feeding is killed; one
that dies, or asks for it by its exit code, is started again, after a wait that grows while lives are short.
An ordered stop and what the user has to mend end both. When the parent dies, the kernel asks the node to
stop.

`node.supervision` decides; this carries out. It imports nothing else of the node: what is to outlive it must
be small.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from node.supervision import (
    AskStop,
    End,
    Exited,
    Fed,
    Kill,
    Limits,
    Start,
    StopAsked,
    Supervision,
    Tick,
    Wait,
)

PARENT_FD_ENV: Final = "PENUMBRA_WATCHDOG_FD"
"""As in `node.watchdog`."""
_PR_SET_PDEATHSIG: Final = 1


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
