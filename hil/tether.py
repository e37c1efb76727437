"""Ties a process to the bench: it is killed when the bench ends, however that ends.

    python -I tether.py PARENT PROGRAM ARGUMENTS...

becomes PROGRAM, with the kernel asked to kill it when PARENT, who must have started this, is no more. What
the node starts in turn is tied to the node in the same way.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

EXIT_ORPHAN = 9
"""Exit code of a process whose parent ended before it was tied."""
_EXIT_NO_PROGRAM = 127
_PR_SET_PDEATHSIG = 1


def tied(command: Sequence[str]) -> list[str]:
    """Return the command line that runs a command tied to this process.

    Start it from the main thread: the kernel takes the end of the thread that started it for the end.
    """
    return [sys.executable, "-I", __file__, str(os.getpid()), *command]


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends; end at once if that has ended already.

    Raises
    ------
    SystemExit
        The parent is another one by now.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(EXIT_ORPHAN)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    try:
        os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell on purpose
    except OSError as error:
        sys.stderr.write(f"{sys.argv[2]}: {error.strerror}\n")
        sys.exit(_EXIT_NO_PROGRAM)
