"""How a flight ends by signal: the first of them asks for it, a later one ends it at once.

SIGINT, SIGTERM and SIGHUP mean the same. A terminal that closes sends SIGHUP more than once, a service
manager another signal right behind its first: what comes within `ECHO_S` of the first is part of it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ECHO_S = 0.5
"""So long after the first signal another one is part of it, s (assumed)."""
EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt() -> None:
    """End what is being done in the main thread, as Ctrl-C does."""
    raise KeyboardInterrupt


class Ending:
    """Takes the signals while it is `watching`.

    Attributes
    ----------
    asked
        True once there was a signal.
    at_once
        Called in the main thread, wherever it is, before a later signal ends the process.
    """

    def __init__(self) -> None:
        self.asked = False
        self.at_once: Callable[[], None] = lambda: None
        self._asked_s = 0.0
        self._ask: Callable[[], None] = interrupt

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals; until something else is set by `asking`, the first is a KeyboardInterrupt."""
        before = [(number, signal.getsignal(number)) for number in SIGNALS]
        for number, handler in before:
            # Whoever started this with `nohup` wants it to outlive the terminal.
            if (number, handler) != (signal.SIGHUP, signal.SIG_IGN):
                signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    @contextmanager
    def asking(self, ask: Callable[[], None]) -> Iterator[None]:
        """Have the first signal call `ask`, in the main thread; at once if it has been."""
        before, self._ask = self._ask, ask
        try:
            if self.asked:
                ask()
            yield
        finally:
            self._ask = before

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.asked:
            self.asked, self._asked_s = True, now_s
            self._ask()
        elif now_s - self._asked_s > ECHO_S:
            try:
                self.at_once()
            finally:
                os._exit(EXIT_INTERRUPTED)


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether an error is Ctrl-C, or what an extension that was being loaded made of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def end_as_by_ctrl_c() -> None:
    """Have SIGTERM and SIGHUP end this command as Ctrl-C does: in order, with what it made cleared away."""

    def on_signal(_number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:
            interrupt()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, on_signal)
