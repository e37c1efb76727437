"""Keyed health pings with warn and fatal limits (semantics of the F Prime `Svc.Health` component).

The patient must echo the key on the thread that does its work, so an answer proves that the work itself
is alive. One ping is outstanding at a time; a wrong key is as bad as none at all. After a fatal finding
the monitor is passive until it is armed again: one fault, one action.

Silence is counted in *watched* time: a gap between two ticks counts as at most `PingLimits.stall_s`.
When the supervisor itself was held up (a stopped process, a paused machine), the patient's answer is
waiting unread, and must not be called late for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

OVERTAKEN_MAX = 16
"""Keys given up on that a `HealthBoard` remembers of one patient (assumed: a queue of pings is shorter)."""
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

    @property
    def outstanding_key(self) -> int | None:
        """Key whose answer is awaited; None when none is."""
        return self._key if self._outstanding else None

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


@dataclass(frozen=True)
class ForPatient:
    """Event or action of one patient of a `HealthBoard`.

    As an event it carries `Arm`, `Disarm` or `Pong`, as an action any `PingAction`.
    """

    name: str
    what: PingEvent | PingAction


@dataclass(frozen=True)
class SetEnabled:
    """Event: watch this patient, or leave it out of the account."""

    name: str
    enabled: bool


@dataclass(frozen=True)
class SetLimits:
    """Event: from now on these limits apply to this patient; a ping under way is judged by them too."""

    name: str
    limits: PingLimits


BoardEvent = ForPatient | Tick | SetEnabled | SetLimits


@dataclass
class _Patient:
    monitor: PingMonitor
    enabled: bool = True
    armed: bool | None = None
    """None before it is armed for the first time; False once disarmed on purpose."""
    overtaken: set[int] = field(default_factory=set)
    """Keys given up on whose answer may still come: it is late, not wrong."""


class HealthBoard:
    """Watch many patients by keyed pings: what a watchdog is fed on.

    A patient counts as out of limits until it is armed for the first time, when its answer is late, and from
    a fatal finding until it is armed again. One that was disarmed on purpose, or is not enabled, does not
    count.

    Parameters
    ----------
    patients
        Limits by name. The set of patients is fixed.
    """

    def __init__(self, patients: Mapping[str, PingLimits]) -> None:
        self._patients = {name: _Patient(PingMonitor(limits)) for name, limits in patients.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._patients

    @property
    def names(self) -> tuple[str, ...]:
        """All patients, enabled or not."""
        return tuple(self._patients)

    @property
    def in_limits(self) -> bool:
        """True while no enabled patient is out of limits."""
        return not self.out_of_limits

    @property
    def out_of_limits(self) -> tuple[str, ...]:
        """Enabled patients that are late, lost, or were never armed."""
        return tuple(
            name
            for name, patient in self._patients.items()
            if patient.enabled and patient.armed is not False and not patient.monitor.in_limits
        )

    def is_enabled(self, name: str) -> bool:
        """Return whether this patient is watched. Raises ValueError for an unknown name."""
        return self._patient(name).enabled

    def limits(self, name: str) -> PingLimits:
        """Return the limits of this patient. Raises ValueError for an unknown name."""
        return self._patient(name).monitor.limits

    def silent_s(self, name: str) -> float:
        """Return how long the ping under way has waited, s; 0 for none. ValueError for an unknown name."""
        return self._patient(name).monitor.silent_s

    def handle(self, event: BoardEvent, now_s: float) -> list[ForPatient]:
        """Take one event at `now_s` (monotonic, s); return what to do, in order.

        Raises
        ------
        ValueError
            A patient of that name is not on the board.
        """
        match event:
            case Tick():
                return [
                    action
                    for name, patient in self._patients.items()
                    if patient.enabled
                    for action in self._pass_on(name, patient, event, now_s)
                ]
            case ForPatient(name, Arm() | Disarm() | Pong() as what):
                return self._one(name, what, now_s)
            case SetEnabled(name, enabled):
                return self._enable(name, enabled, now_s)
            case SetLimits(name, limits):
                self._patient(name).monitor.limits = limits
                return []
            case _:
                raise ValueError(f"{event} is not an event of one patient: Arm, Disarm or Pong")

    def _one(self, name: str, what: Arm | Disarm | Pong, now_s: float) -> list[ForPatient]:
        patient = self._patient(name)
        if isinstance(what, Pong) and what.key in patient.overtaken:
            patient.overtaken.discard(what.key)
            return []
        if not isinstance(what, Pong):
            patient.armed = isinstance(what, Arm)
        return self._pass_on(name, patient, what, now_s) if patient.enabled else []

    def _enable(self, name: str, enabled: bool, now_s: float) -> list[ForPatient]:
        """Leave a patient out, or take it in again: with a new ping, if it is to be armed at all."""
        patient = self._patient(name)
        if patient.enabled == enabled:
            return []
        patient.enabled = enabled
        return self._pass_on(name, patient, Arm() if enabled and patient.armed else Disarm(), now_s)

    @staticmethod
    def _pass_on(name: str, patient: _Patient, event: PingEvent, now_s: float) -> list[ForPatient]:
        """Hand an event to the monitor; remember the key it gives up on, for its answer may still come."""
        awaited = patient.monitor.outstanding_key
        actions = patient.monitor.handle(event, now_s)
        answered = isinstance(event, Pong) and event.key == awaited
        if awaited is not None and not answered and patient.monitor.outstanding_key != awaited:
            patient.overtaken.add(awaited)
            if len(patient.overtaken) > OVERTAKEN_MAX:
                patient.overtaken.discard(min(patient.overtaken))
        return [ForPatient(name, action) for action in actions]

    def _patient(self, name: str) -> _Patient:
        try:
            return self._patients[name]
        except KeyError:
            raise ValueError(f"no patient {name!r}, there are: {', '.join(self._patients)}") from None
