"""The other end of `node.image_process`: the process that does the work, and answers."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from typing import Any, Final

import msgspec

from telemetry.errors import PenumbraError

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(1)


def answer(work: Callable[[], Any], parent: int | None) -> int:
    """Do the work, write what came of it to stdout, and return the exit code."""
    if parent is not None:
        die_with_parent(parent)
    # Libraries may print; stdout is for the outcome.
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        told, code = msgspec.json.encode(work()), 0
    except PenumbraError as error:
        told, code = msgspec.json.encode({"what": error.what, "mend": error.mend}), 2
    with os.fdopen(out, "wb") as file:
        file.write(told)
    return code
