"""The life of the inference worker: restarts with back-off, and bounded; what follows is the ladder's.

Level 2 (restart the worker) until `RestartPolicy.limit` restarts lie inside the last
`RestartPolicy.window_s` seconds; the next fault is told as exhausted, which the FDIR table answers with
level 3 (another image). The times of the restarts are
persisted *before* each restart and given back at the next node start, so a node that dies together
with its worker cannot restart it for ever (cFS HS keeps its reset count the same way). The clock is
CLOCK_MONOTONIC: it runs on over a restart of the node, and begins anew with the host; a stored time
that lies in the future is therefore taken as now, the cautious reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class WorkerState(StrEnum):
    """Where the worker is in its life."""

    STOPPED = "stopped"
    """Not wanted: safe mode, its image is being mended, or the node is stopping."""
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    """Not wanted any more, but not yet gone."""
    KILLING = "killing"
    """Found faulty and killed, but not yet gone."""
    BACKOFF = "backoff"
    """Gone; to be started again when the back-off is over."""
    LOST = "lost"
    """Gone, and nothing is decided about it yet: a state that only `node.worker_service` tells."""
    GIVEN_UP = "given_up"
    """Restarts exhausted; `Rearm` leads out, and `Unwant`, after which the next fault gives up again."""


@dataclass(frozen=True)
class RestartPolicy:
    """Bounds of the ladder.

    Raises
    ------
    ValueError
        `limit` under 1, or a time that is not positive.
    """

    limit: int = 5
    """Restarts allowed inside the window."""
    window_s: float = 60.0
    backoff_s: float = 0.25
    """Wait before the second restart in a window; doubles with each one. The first does not wait."""
    backoff_max_s: float = 10.0
    start_timeout_s: float = 20.0
    """Time a worker has from its start to `Ready`."""

    def __post_init__(self) -> None:
        times = (self.window_s, self.backoff_s, self.backoff_max_s, self.start_timeout_s)
        if self.limit < 1 or min(times) <= 0:
            raise ValueError(f"limit >= 1 and positive times are required, got {self}")

    def delay_s(self, restarts: int) -> float:
        """Return the wait before restart number `restarts` (from 1) of a window, s."""
        if restarts <= 1:
            return 0.0
        return float(min(self.backoff_max_s, self.backoff_s * 2.0 ** min(restarts - 2, 60)))


@dataclass(frozen=True)
class Want:
    """Event: inference is allowed; have a worker."""


@dataclass(frozen=True)
class Unwant:
    """Event: no worker is to run (safe mode, shutdown)."""


@dataclass(frozen=True)
class Rearm:
    """Event: the ground takes the node out of safe mode; forget past restarts and try again."""


@dataclass(frozen=True)
class Ready:
    """Event: the worker has loaded, and its memory is proven."""


@dataclass(frozen=True)
class Fault:
    """Event: a worker that still runs was found faulty (silence, wrong key, fatal)."""

    monitor: str
    """Which monitor found it, e.g. `worker.ping`."""
    reason: str


@dataclass(frozen=True)
class Exited:
    """Event: the process is gone and reaped."""

    reason: str
    """How it ended, as a sentence."""


@dataclass(frozen=True)
class Tick:
    """Event: time has passed."""


RecoveryEvent = Want | Unwant | Rearm | Ready | Fault | Exited | Tick


@dataclass(frozen=True)
class PersistRestarts:
    """Action: store these restart times before going on (may be empty)."""

    times_s: tuple[float, ...]


@dataclass(frozen=True)
class StartWorker:
    """Action: start a new generation of the worker."""


@dataclass(frozen=True)
class StopWorker:
    """Action: ask the worker to end, kill it if it does not."""


@dataclass(frozen=True)
class KillWorker:
    """Action: kill the worker at once."""


@dataclass(frozen=True)
class ReportFault:
    """Action: report the fault and that a restart is under way (level 2)."""

    monitor: str
    reason: str
    restarts: int
    """Restarts inside the window, this one included."""
    delay_s: float


@dataclass(frozen=True)
class ReportRestarted:
    """Action: report that the worker is whole again after the fault reported last."""


@dataclass(frozen=True)
class StartLate:
    """Action: report that the worker has not become ready in time; once for each start."""

    reason: str


@dataclass(frozen=True)
class Exhausted:
    """Action: report that restarts are exhausted."""

    monitor: str
    reason: str


RecoveryAction = (
    PersistRestarts
    | StartWorker
    | StopWorker
    | KillWorker
    | ReportFault
    | ReportRestarted
    | StartLate
    | Exhausted
)

_ALIVE = (WorkerState.STARTING, WorkerState.RUNNING)


class WorkerRecovery:
    """Decide when the worker is started, killed, restarted, and when to give up.

    Parameters
    ----------
    policy
        Bounds of the ladder.
    restarts_s
        Times of past restarts as persisted, CLOCK_MONOTONIC, s; any order.
    now_s
        CLOCK_MONOTONIC now, s.
    """

    def __init__(self, policy: RestartPolicy, restarts_s: Sequence[float], now_s: float) -> None:
        self.policy = policy
        self.state = WorkerState.STOPPED
        self._restarts_s = sorted(min(t, now_s) for t in restarts_s)
        self._wanted = False
        self._fault: Fault | None = None
        self._start_at_s = 0.0
        """When the worker was started, or is to be started again."""
        self._recovering = False
        self._late_told = False

    @property
    def is_at_rest(self) -> bool:
        """True when there is no worker, and none is to come."""
        return self.state is WorkerState.STOPPED and not self._wanted

    def restarts_in_window(self, now_s: float) -> int:
        """Return how many restarts lie inside the window that ends now."""
        return sum(1 for t in self._restarts_s if now_s - t < self.policy.window_s)

    def handle(self, event: RecoveryEvent, now_s: float) -> list[RecoveryAction]:
        """Take one event at `now_s` (CLOCK_MONOTONIC, s); return what to do, in order."""
        match event:
            case Want():
                actions = self._want(now_s)
            case Unwant():
                actions = self._unwant()
            case Rearm():
                actions = self._rearm(now_s)
            case Ready():
                actions = self._ready()
            case Fault():
                actions = self._found_faulty(event)
            case Exited(reason):
                actions = self._exited(reason, now_s)
            case Tick():
                actions = self._tick(now_s)
        return actions

    def _want(self, now_s: float) -> list[RecoveryAction]:
        self._wanted = True
        return self._start(now_s) if self.state is WorkerState.STOPPED else []

    def _tick(self, now_s: float) -> list[RecoveryAction]:
        if self.state is WorkerState.BACKOFF and now_s >= self._start_at_s:
            return self._start(now_s)
        limit_s = self.policy.start_timeout_s
        is_late = self.state is WorkerState.STARTING and now_s - self._start_at_s >= limit_s
        if is_late and not self._late_told:
            self._late_told = True
            return [StartLate(f"not ready {limit_s:g} s after its start")]
        return []

    def _start(self, now_s: float) -> list[RecoveryAction]:
        self.state = WorkerState.STARTING
        self._start_at_s = now_s
        self._late_told = False
        return [StartWorker()]

    def _unwant(self) -> list[RecoveryAction]:
        self._wanted = False
        self._recovering = False
        if self.state in _ALIVE:
            self.state = WorkerState.STOPPING
            return [StopWorker()]
        if self.state in (WorkerState.BACKOFF, WorkerState.GIVEN_UP):
            self.state = WorkerState.STOPPED
        elif self.state is WorkerState.KILLING:
            # It is being killed already; that it is not wanted any more changes only what follows.
            self.state = WorkerState.STOPPING
        return []

    def _rearm(self, now_s: float) -> list[RecoveryAction]:
        self._restarts_s = []
        actions: list[RecoveryAction] = [PersistRestarts(())]
        if self.state is WorkerState.GIVEN_UP:
            self.state = WorkerState.STOPPED
            self._recovering = False
            if self._wanted:
                actions += self._start(now_s)
        return actions

    def _ready(self) -> list[RecoveryAction]:
        if self.state is not WorkerState.STARTING:
            return []
        self.state = WorkerState.RUNNING
        if not self._recovering:
            return []
        self._recovering = False
        return [ReportRestarted()]

    def _found_faulty(self, fault: Fault) -> list[RecoveryAction]:
        if self.state not in _ALIVE:
            return []
        self.state = WorkerState.KILLING
        self._fault = fault
        return [KillWorker()]

    def _exited(self, reason: str, now_s: float) -> list[RecoveryAction]:
        if self.state is WorkerState.STOPPING:
            self.state = WorkerState.STOPPED
            self._fault = None
            return self._start(now_s) if self._wanted else []
        if self.state not in (*_ALIVE, WorkerState.KILLING):
            return []
        fault = self._fault or Fault("worker.exit", reason)
        self._fault = None
        self._restarts_s = [t for t in self._restarts_s if now_s - t < self.policy.window_s]
        if len(self._restarts_s) >= self.policy.limit:
            self.state = WorkerState.GIVEN_UP
            self._recovering = False
            return [Exhausted(fault.monitor, fault.reason)]
        self._restarts_s.append(now_s)
        count = len(self._restarts_s)
        delay_s = self.policy.delay_s(count)
        self.state = WorkerState.BACKOFF
        self._start_at_s = now_s + delay_s
        self._recovering = True
        actions: list[RecoveryAction] = [
            PersistRestarts(tuple(self._restarts_s)),
            ReportFault(fault.monitor, fault.reason, count, delay_s),
        ]
        return actions + (self._start(now_s) if delay_s == 0 else [])
