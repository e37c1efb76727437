"""What belongs to this run of the tests: another may run beside it, from another clone.

A process of this run carries a mark in its environment. An arena on shared memory belongs to another run
while a process without that mark has it open, or has the mark of `hil.shared_memory` beside it open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hil.processes import all_processes
from hil.shared_memory import MARK

SHARED = Path("/dev/shm")  # noqa: S108 - tmpfs on purpose
PATTERN = "penumbra-*"
SETTLE_S = 10.0
"""How long a process that is about to end, of whichever run, may keep what it has (assumed)."""
RUN = f"PENUMBRA_TEST_RUN={os.getpid()}"
os.environ.update([RUN.split("=")])


def is_own(pid: int) -> bool:
    """Tell whether a process is of this run; False when it is gone."""
    with suppress(OSError):
        return pid == os.getpid() or RUN.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def own_processes() -> set[int]:
    """Pids of this run's processes, wherever their parents went."""
    return {process.pid for process in all_processes() if is_own(process.pid)}


def held_by_others(shared: Path = SHARED) -> set[str]:
    """Names of the arenas that processes of other runs have open."""
    prefix = f"{shared}/"
    paths = (path for process in all_processes() if not is_own(process.pid) for path in _open(process.pid))
    inside = {path.removeprefix(prefix).split("/")[0] for path in paths if path.startswith(prefix)}
    return {name.removesuffix(MARK) for name in inside}


def _open(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield os.readlink(descriptor)
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            yield line[line.find("/") :] if "/" in line else ""


def arenas(shared: Path = SHARED) -> set[str]:
    """Names of all that is there, whoever's it is."""
    return {path.name for path in shared.glob(PATTERN)}


def left_since(before: set[str], shared: Path = SHARED, settle_s: float = SETTLE_S) -> list[str]:
    """Return what this run left on shared memory: there now, not before, and no other run's."""
    ends_s = time.monotonic() + settle_s
    while left := arenas(shared) - before:
        others = held_by_others(shared)
        left = {name for name in left & arenas(shared) if name.removesuffix(MARK) not in others}
        if not left or time.monotonic() > ends_s:
            break
        time.sleep(0.05)
    return sorted(left)
