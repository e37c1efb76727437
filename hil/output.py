"""Standard output and error that cannot fail the command that writes to them.

What is printed shows what goes on; it is not what goes on. A reader that went away, a full disk, a terminal
that closed, letters the encoding does not have: the command goes on, and what cannot be shown is left out.
While it is only `a_view`, a reader that does not read holds nothing up either.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from telemetry.errors import PenumbraError

QUEUE_BYTES: Final = 1 << 20
"""What waits at most for a slow reader of a view, bytes; what comes then is left out (assumed)."""
DRAIN_S: Final = 5.0
"""Longest wait for a slow reader at the end of a view, s (assumed)."""


class Forgiving(io.RawIOBase):
    """An open file that takes everything, and writes what can be written.

    Parameters
    ----------
    descriptor
        Open for writing. It is not closed with this.

    Attributes
    ----------
    failure
        Why something was left out; None while nothing was. The first reason stays.
    """

    def __init__(self, descriptor: int) -> None:
        self.failure: OSError | None = None
        self._descriptor = descriptor
        self._waiting: deque[bytes] | None = None
        self._news = threading.Condition()

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: object, /) -> int:
        """Write, or queue, or leave out; return the length of the data in any case."""
        held = bytes(memoryview(data))  # type: ignore[arg-type]
        waiting = self._waiting
        if waiting is None:
            self._put(held)
            return len(held)
        with self._news:
            if sum(map(len, waiting)) + len(held) <= QUEUE_BYTES:
                waiting.append(held)
                self._news.notify_all()
            else:
                self._left_out(BlockingIOError(errno.EAGAIN, "the reader is too slow"))
        return len(held)

    @contextmanager
    def a_view(self) -> Iterator[None]:
        """Write from a thread: a reader that does not read holds up nothing but what it would be shown."""
        waiting = self._waiting = deque[bytes]()
        ending = threading.Event()
        # Nobody waits for it: a write to a terminal that was stopped ends with the process.
        threading.Thread(
            target=self._pump, args=(waiting, ending), name="hil.output.pump", daemon=True
        ).start()
        try:
            yield
        finally:
            deadline_s = time.monotonic() + DRAIN_S
            with self._news:
                ending.set()
                self._news.notify_all()
                while waiting and (rest_s := deadline_s - time.monotonic()) > 0:
                    self._news.wait(rest_s)
                if waiting:
                    self._left_out(BlockingIOError(errno.EAGAIN, "the reader is too slow"))
                else:
                    self._waiting = None

    def _pump(self, waiting: deque[bytes], ending: threading.Event) -> None:
        while True:
            with self._news:
                while not waiting:
                    if ending.is_set():
                        return
                    self._news.wait()
                data = waiting[0]
            self._put(data)
            with self._news:
                waiting.popleft()
                self._news.notify_all()

    def _put(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process made it so
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._left_out(error)
                return

    def _left_out(self, why: OSError) -> None:
        self.failure = self.failure or why


class Outputs:
    """Standard output and standard error while a command runs, both `Forgiving`.

    Parameters
    ----------
    out, error
        The two.
    """

    def __init__(self, out: Forgiving, error: Forgiving) -> None:
        self._out, self._error = out, error
        self._shows_only = False

    @classmethod
    def install(cls) -> Outputs:
        """Put them in the place of `sys.stdout` and `sys.stderr`."""
        _open_the_standard_ones()
        out, error = Forgiving(1), Forgiving(2)
        sys.stdout, sys.stderr = _text(out, sys.stdout), _text(error, sys.stderr)
        global _installed  # noqa: PLW0603 - there is one standard output
        _installed = cls(out, error)
        return _installed

    @contextmanager
    def a_view(self) -> Iterator[None]:
        """While what is printed is nothing but a view; see `Forgiving.a_view`."""
        self._shows_only = True
        with self._out.a_view(), self._error.a_view():
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()

    def check(self) -> None:
        """Refuse to call a command done whose result could not be printed.

        A closed pipe is no failure: whoever closed it has read enough.

        Raises
        ------
        PenumbraError
            Standard output took not all of it.
        """
        sys.stdout.flush()
        failure = self._out.failure
        if failure is not None and failure.errno != errno.EPIPE and not self._shows_only:
            raise PenumbraError(
                f"standard output: {failure.strerror}: not all was printed",
                "free its disk, or send it elsewhere",
            )


_installed: Outputs | None = None


@contextmanager
def a_view() -> Iterator[None]:
    """As `Outputs.a_view`; does nothing where none are installed."""
    if _installed is None:
        yield
    else:
        with _installed.a_view():
            yield


def _open_the_standard_ones() -> None:
    """Open what is closed of the three: else the next file that is opened becomes standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free


def _text(raw: Forgiving, like: TextIO | None) -> io.TextIOWrapper:
    encoding = like.encoding if like is not None else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="replace", line_buffering=True)
