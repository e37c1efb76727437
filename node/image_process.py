"""Work on model images, done in a process of its own: the supervisor must not load the inference stack.

The process writes one JSON object to stdout: what it did, or ``{"what": ..., "mend": ...}`` with exit code 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from telemetry.errors import PenumbraError

_POLL_S: Final = 0.05
"""How often the process, the time and `cancel` are looked at, s."""
_LOG_BYTES: Final = 2000
"""What is kept of what a process said that failed, bytes."""

T = TypeVar("T")


class _Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    what: str
    mend: str


def run_image_process(
    what: str,
    module: str,
    arguments: Sequence[str],
    answer: type[T],
    *,
    timeout_s: float,
    cancel: threading.Event | None,
) -> T:
    """Run a module and return its answer; blocks, so call it in a thread.

    Parameters
    ----------
    what
        What it does, for messages.
    module, arguments
        Run as ``python -m module --parent PID arguments``.
    answer
        Type of its answer.
    timeout_s
        Time it may take, s; then it is killed.
    cancel
        Set it from another thread to give up: the process is killed.

    Raises
    ------
    PenumbraError
        It failed and says why, was cancelled, or took too long.
    """
    command = [sys.executable, "-m", module, "--parent", str(os.getpid()), *arguments]
    deadline_s = time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log)
        except OSError as error:
            raise PenumbraError(f"{what} cannot be started: {error.strerror}") from error
        try:
            while process.poll() is None:
                if cancel is not None and cancel.wait(_POLL_S):
                    raise PenumbraError(f"{what} was cancelled")
                if cancel is None:
                    time.sleep(_POLL_S)
                if time.monotonic() > deadline_s:
                    raise PenumbraError(
                        f"{what} took more than {timeout_s:g} s and was killed",
                        "give it more time, or verify the slots: `penumbra model verify`",
                    )
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        out.seek(0)
        told = out.read()
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
        said = log.read().decode("utf-8", "replace")
    try:
        if process.returncode == 0:
            return msgspec.json.decode(told, type=answer)
        failure = msgspec.json.decode(told, type=_Failure)
    except msgspec.DecodeError:
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        raise PenumbraError(f"{what} ended with code {process.returncode}: {last[0]}") from None
    raise PenumbraError(failure.what, failure.mend)
