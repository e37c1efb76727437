"""The process tree as `/proc` shows it: how the bench finds the worker without asking the flight code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WORKER_MODULE = b"node.inference.worker"


@dataclass(frozen=True)
class Process:
    """One process. `pid` and `start_ticks` together name it for good: a pid alone is used again."""

    pid: int
    parent: int
    session: int
    state: str
    """One letter: R running, S sleeping, T stopped, Z zombie."""
    cpu_ticks: int
    """User and system time, in clock ticks."""
    start_ticks: int
    """Start after boot, in clock ticks."""


def parse_stat(line: str) -> Process:
    """Read one line of `/proc/PID/stat`. The name may hold spaces and brackets: fields follow the last one.

    Raises
    ------
    ValueError
        The line is not a stat line.
    """
    head, bracket, tail = line.rpartition(")")
    fields = tail.split()
    if not bracket or len(fields) < 20:
        raise ValueError(f"not a line of /proc/PID/stat: {line[:60]!r}")
    return Process(
        pid=int(head.split(" ", 1)[0]),
        parent=int(fields[1]),
        session=int(fields[3]),
        state=fields[0],
        cpu_ticks=int(fields[11]) + int(fields[12]),
        start_ticks=int(fields[19]),
    )


def read_process(pid: int) -> Process | None:
    """Return the process, or None if there is none (zombies count as none: they run no more)."""
    try:
        process = parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None
    return None if process.state == "Z" else process


def all_processes() -> list[Process]:
    """Return every process now alive."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [process for pid in pids if (process := read_process(pid)) is not None]


def descendants(root: int, processes: Iterable[Process]) -> list[Process]:
    """Return the children of `root`, their children, and so on; `root` itself is not among them."""
    children: dict[int, list[Process]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    todo = [root]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child.pid)
    return found


def find_worker(node_pid: int) -> int | None:
    """Return the pid of the inference worker below a node, None while there is none."""
    for process in descendants(node_pid, all_processes()):
        try:
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        except OSError:
            continue
        if WORKER_MODULE in command.split(b"\0"):
            return process.pid
    return None


def same(process: Process) -> bool:
    """Return True while this very process is alive."""
    now = read_process(process.pid)
    return now is not None and now.start_ticks == process.start_ticks
