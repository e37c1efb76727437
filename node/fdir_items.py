"""The values of the monitored items (`fdir.items`), taken from the components that have them.

None stands for a value that cannot be had now: the monitor of that item then says ERROR, or is not evaluated
where its row names a condition.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from fdir.recovery import WorkerState
from node.bus_view import BusView
from node.clock import MissionClock
from node.health_service import HealthService
from node.power_service import PowerService
from node.scrubber import Scrubber
from node.worker_service import WorkerService
from telemetry.authenticator import Authenticator
from telemetry.bus import BusEps

Value = float | int | bool | None
EPS_FRESH_S = 2.5
"""Age up to which values of the power system are a sample of now, s (assumed: they come each second)."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class ItemSources:
    """What the items are taken from."""

    worker: WorkerService
    power: PowerService
    view: BusView
    clock: MissionClock
    health: HealthService
    scrubber: Scrubber
    authenticator: Authenticator
    store: Callable[[], tuple[int, float] | None]
    """Returns the jobs queued and how full the spool is, 0 to 1, as of the last housekeeping."""
    residual_w: Callable[[], float | None]
    """Returns the draw that load and clocks do not explain, W; None without a model of it."""


def resident_bytes(pid: int | None) -> int | None:
    """Return the resident memory of a process, bytes; None when there is no such process."""
    if pid is None:
        return None
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


def open_files() -> int | None:
    """Return the open descriptors of this process; None when /proc does not tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def sample(sources: ItemSources) -> dict[str, Value]:
    """Return the value of every item now. Call it once a period: it takes the largest lag since the last."""
    now_s = time.monotonic()
    s = sources
    # What is old is not known: a sample of it would say that the bus is alive.
    eps, store = _fresh(s.view, now_s), s.store()
    security = s.authenticator.report()
    return {
        # What others are valid by comes first: without a worker its memory is not asked for.
        "worker.running": s.worker.state is WorkerState.RUNNING,
        "worker.rss_bytes": resident_bytes(s.worker.pid),
        "worker.ping_silent_s": s.worker.ping_silent_s,
        "node.rss_bytes": resident_bytes(os.getpid()),
        "node.loop_lag_s": s.health.take_lag_s(),
        "node.open_files": open_files(),
        "jobs.queued": None if store is None else store[0],
        "spool.fill": None if store is None else store[1],
        "battery.soc": None if eps is None else eps.battery_soc,
        "battery.v": None if eps is None else eps.battery_v,
        "eps.age_s": None if s.view.eps is None else s.view.eps_age_s(now_s),
        "board.c": s.power.board_c(now_s),
        "board.power_w": s.power.reading.power_w,
        "board.power_residual_w": s.residual_w(),
        "clock.locked": s.clock.locked,
        "commands.rejected": sum(security.rejected.values()),
        "scrub.pass_age_s": s.scrubber.status().pass_age_s,
        "sensor.rejected": s.view.rejections,
    }


def _fresh(view: BusView, now_s: float) -> BusEps | None:
    return view.eps if view.eps_age_s(now_s) <= EPS_FRESH_S else None
