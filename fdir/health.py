"""Keyed health pings with warn and fatal limits (semantics of the F Prime `Svc.Health` component).

The patient must echo the key on the thread that does its work, so an answer proves that the work itself
is alive. One ping is outstanding at a time; a wrong key is as bad as none at all. After a fatal finding
the monitor is passive until it is armed again: one fault, one action.

Silence is counted in *watched* time: a gap between two ticks counts as at most `PingLimits.stall_s`.
When the supervisor itself was held up (a stopped process, a paused machine), the patient's answer is
waiting unread, and must not be called late for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

_KEY_MODULUS = 1 << 31


class PingState(StrEnum):
    """State of a monitor."""

    PASSIVE = "passive"
    ARMED = "armed"
    WARNED = "warned"


@dataclass(frozen=True)
class PingLimits:
    """When to ping, when to worry, when to act; all in seconds of the monotonic clock.

    Raises
    ------
    ValueError
        Unless ``0 < period_s <= warn_s < fatal_s`` and ``0 < stall_s < fatal_s``.
    """

    period_s: float = 0.5
    warn_s: float = 1.0
    fatal_s: float = 2.5
    stall_s: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.period_s <= self.warn_s < self.fatal_s:
            raise ValueError(f"0 < period_s <= warn_s < fatal_s is required, got {self}")
        if not 0 < self.stall_s < self.fatal_s:
            raise ValueError(f"0 < stall_s < fatal_s is required, got {self}")


@dataclass(frozen=True)
class Arm:
    """Event: the patient is up; begin to ping it."""


@dataclass(frozen=True)
class Disarm:
    """Event: the patient is gone, or stopped on purpose."""


@dataclass(frozen=True)
class Tick:
    """Event: time has passed. Several a second, much finer than the limits."""


@dataclass(frozen=True)
class Pong:
    """Event: the patient answered with this key."""

    key: int


PingEvent = Arm | Disarm | Tick | Pong


@dataclass(frozen=True)
class SendPing:
    """Action: send this key to the patient."""

    key: int


@dataclass(frozen=True)
class PingLate:
    """Action: report that the warn limit is passed (once a ping)."""

    key: int
    silent_s: float


@dataclass(frozen=True)
class PingRecovered:
    """Action: report that a late answer came after all."""

    key: int
    silent_s: float


@dataclass(frozen=True)
class PingFatal:
    """Action: the patient is lost; recover it. The monitor is passive from here on."""

    reason: str
    silent_s: float


PingAction = SendPing | PingLate | PingRecovered | PingFatal


class PingMonitor:
    """Watch one patient by keyed pings.

    Parameters
    ----------
    limits
        Period, warn and fatal limits, s.
    """

    def __init__(self, limits: PingLimits) -> None:
        self.limits = limits
        self.state = PingState.PASSIVE
        self._key = 0
        self._outstanding = False
        self._silent_s = 0.0
        self._since_sent_s = 0.0
        self._last_s = 0.0

    @property
    def in_limits(self) -> bool:
        """True while the patient is watched and no limit is passed: what a watchdog may be fed on."""
        return self.state is PingState.ARMED

    @property
    def silent_s(self) -> float:
        """Watched time the outstanding ping has waited for its answer, s; 0 when none is outstanding."""
        return self._silent_s if self._outstanding else 0.0

    def handle(self, event: PingEvent, now_s: float) -> list[PingAction]:
        """Take one event at `now_s` (monotonic, s); return what to do, in order."""
        match event:
            case Arm():
                self.state = PingState.ARMED
                self._last_s = now_s
                return [self._send()]
            case Disarm():
                self.state = PingState.PASSIVE
                self._outstanding = False
                return []
            case Tick():
                return self._tick(now_s)
            case Pong(key):
                return self._pong(key)

    def _send(self) -> SendPing:
        self._key = (self._key + 1) % _KEY_MODULUS
        self._outstanding = True
        self._silent_s = self._since_sent_s = 0.0
        return SendPing(self._key)

    def _tick(self, now_s: float) -> list[PingAction]:
        if self.state is PingState.PASSIVE:
            return []
        watched_s = min(max(0.0, now_s - self._last_s), self.limits.stall_s)
        self._last_s = now_s
        self._since_sent_s += watched_s
        if not self._outstanding:
            return [self._send()] if self._since_sent_s >= self.limits.period_s else []
        self._silent_s += watched_s
        if self._silent_s >= self.limits.fatal_s:
            return [self._fatal(f"no answer to ping {self._key} for {self._silent_s:.2f} s")]
        if self._silent_s >= self.limits.warn_s and self.state is PingState.ARMED:
            self.state = PingState.WARNED
            return [PingLate(self._key, self._silent_s)]
        return []

    def _pong(self, key: int) -> list[PingAction]:
        if self.state is PingState.PASSIVE:
            return []
        if not self._outstanding or key != self._key:
            expected = f"{self._key} was expected" if self._outstanding else "none was expected"
            return [self._fatal(f"answer with wrong key {key}, {expected}")]
        self._outstanding = False
        if self.state is PingState.WARNED:
            self.state = PingState.ARMED
            return [PingRecovered(key, self._silent_s)]
        return []

    def _fatal(self, reason: str) -> PingFatal:
        self.state = PingState.PASSIVE
        self._outstanding = False
        return PingFatal(reason, self._silent_s)
