"""Mission clock: UTC steered by the bus, free-running and flagged without it.

Mission time may run faster than physical time (an accelerated bench) and is right only as far as the
bus is. Small errors are slewed, so that stamps stay in order. A large error, or another rate, is not
believed from one sample (ADR 0021): mission time goes on as it was, and what cannot be undone waits,
until a second sample agrees with the first (then mission time steps) or with the clock (then the first
was wrong). What concerns the physical process uses the monotonic clock instead (design section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from telemetry.bus import EARLIEST_NS, LATEST_NS, BusTime

STEP_S = 0.5
"""Error above which the clock steps, s of physical time (assumed: far over the jitter of the bus)."""
SLEW_S = 1.0
"""Physical time in which a smaller error is worked off, s; over `STEP_S`, or time would run backwards."""
SILENT_S = 3.0
"""Silence of the bus after which the clock counts as free-running, s of physical time (assumed)."""
CONFIRM_AFTER_S = 0.1
"""Physical time between two samples that confirm each other, at least, s (assumed: under the period of any
bus; what a gateway had kept and sends in one burst confirms nothing)."""
HOLD_S = 10.0
"""Longest time that what cannot be undone waits for a second sample, s of physical time (assumed: 20 periods
of the bus, and a third of what a scheduled command may be late)."""
_NS = 1_000_000_000


@dataclass(frozen=True)
class Tick:
    """Event: time has passed."""


@dataclass(frozen=True)
class ClockLocked:
    """Action: report that the bus steers the clock (again)."""

    error_s: float
    """What the clock was off by, bus minus clock, s of mission time."""


@dataclass(frozen=True)
class ClockStepped:
    """Action: report that mission time jumped, or goes on at another rate."""

    error_s: float
    """Size of the jump, s of mission time, positive forward; a small one is slewed."""


@dataclass(frozen=True)
class StepHeld:
    """Action: report that a sample is far off and waits for a second one."""

    error_s: float
    """Size of the jump, s of mission time, positive forward; 0 where the sample differs in rate only."""
    rate: float


@dataclass(frozen=True)
class StepRejected:
    """Action: report that a held step was not made, and mission time goes on as it was."""

    error_s: float
    """As it was held."""
    agreed: bool
    """Whether the bus agrees with the clock again; if not, no two samples agreed within `HOLD_S`."""


@dataclass(frozen=True)
class ClockLost:
    """Action: report that the bus gives no time that can be used, and the clock runs free."""

    silent_s: float


ClockAction = ClockLocked | ClockStepped | StepHeld | StepRejected | ClockLost


@dataclass(frozen=True)
class _Sample:
    """A time of the bus, and when it came."""

    message: BusTime
    mono_ns: int

    def confirms(self, before: _Sample) -> bool:
        """Tell whether the sample `before` and this one are of the same clock, which runs."""
        rate = self.message.rate
        advance_ns = self.message.t_ns - before.message.t_ns
        error_ns = advance_ns - (self.mono_ns - before.mono_ns) * rate
        return rate == before.message.rate and advance_ns > 0 and _is_small(round(error_ns), rate)


class MissionClock:
    """Mission time as a function of the monotonic clock.

    Parameters
    ----------
    t_ns
        Mission time to begin with (the host's idea of UTC), ns.
    mono_ns
        Monotonic clock at that moment, ns.
    """

    def __init__(self, t_ns: int, mono_ns: int) -> None:
        self.rate = 1.0
        """Mission seconds a second of physical time."""
        self.locked = False
        """True while the bus steers the clock."""
        self.known = False
        """True once the bus has given the time: until then it is the host's idea of it."""
        self.holding = False
        """True while a step waits to be confirmed: nothing that cannot be undone may be done by the clock."""
        self._base_t_ns = t_ns
        self._base_mono_ns = mono_ns
        self._slew_ns = 0
        self._heard_mono_ns: int | None = None
        self._candidate: _Sample | None = None
        """The last sample that disagrees with the clock, None when the last one agreed."""
        self._held: tuple[int, float] | None = None
        """When the bus began to disagree, on the monotonic clock, and by how much, s of mission time."""

    def now_ns(self, mono_ns: int) -> int:
        """Return mission time at `mono_ns` of the monotonic clock, UTC, ns."""
        elapsed_ns = mono_ns - self._base_mono_ns
        slewed = min(max(elapsed_ns / (SLEW_S * _NS), 0.0), 1.0)
        return self._base_t_ns + round(elapsed_ns * self.rate) + round(self._slew_ns * slewed)

    def handle(self, event: BusTime | Tick, mono_ns: int) -> list[ClockAction]:
        """Take one event at `mono_ns`; return what to report.

        Raises
        ------
        ValueError
            The bus names a time outside `EARLIEST_NS` to `LATEST_NS`; the clock is left as it was.
        """
        if isinstance(event, BusTime):
            return self._steer(event, mono_ns)
        return self._tick(mono_ns)

    def _tick(self, mono_ns: int) -> list[ClockAction]:
        actions: list[ClockAction] = []
        if self.holding and self._held is not None and mono_ns - self._held[0] >= HOLD_S * _NS:
            # The sample stays a candidate: a bus that is slow may still confirm it.
            self.holding = False
            actions.append(StepRejected(self._held[1], agreed=False))
        silent_s = (mono_ns - (self._heard_mono_ns or 0)) / _NS
        if self.locked and silent_s >= SILENT_S:
            self.locked = False
            actions.append(ClockLost(silent_s))
        return actions

    def _steer(self, message: BusTime, mono_ns: int) -> list[ClockAction]:
        if not EARLIEST_NS <= message.t_ns <= LATEST_NS:
            raise ValueError(f"mission time {message.t_ns} ns is outside the years 2000 to 2100")
        error_ns = message.t_ns - self.now_ns(mono_ns)
        if message.rate == self.rate and _is_small(error_ns, message.rate):
            return self._agree(message, error_ns, mono_ns)
        before, sample = self._candidate, _Sample(message, mono_ns)
        if before is not None and mono_ns - before.mono_ns < CONFIRM_AFTER_S * _NS:
            return []
        if before is not None and sample.confirms(before):
            return self._confirm(message, error_ns, mono_ns)
        self._candidate = sample
        if self._held is not None or not self.known:
            return []
        self._held, self.holding = (mono_ns, error_ns / _NS), True
        return [StepHeld(error_ns / _NS, message.rate)]

    def _agree(self, message: BusTime, error_ns: int, mono_ns: int) -> list[ClockAction]:
        """Follow a sample that is near."""
        actions: list[ClockAction] = []
        if self.holding and self._held is not None:
            actions.append(StepRejected(self._held[1], agreed=True))
        if not self.locked:
            actions.append(ClockLocked(error_ns / _NS))
        self._follow(message, self.now_ns(mono_ns), error_ns, mono_ns)
        return actions

    def _confirm(self, message: BusTime, error_ns: int, mono_ns: int) -> list[ClockAction]:
        """Go over to a sample that confirms the one before it."""
        actions: list[ClockAction] = []
        if self.known:
            actions.append(ClockStepped(error_ns / _NS))
        if not self.locked:
            actions.append(ClockLocked(error_ns / _NS))
        if _is_small(error_ns, message.rate):
            self._follow(message, self.now_ns(mono_ns), error_ns, mono_ns)
        else:
            self._follow(message, message.t_ns, 0, mono_ns)
        return actions

    def _follow(self, message: BusTime, base_t_ns: int, slew_ns: int, mono_ns: int) -> None:
        self._base_t_ns, self._slew_ns, self._base_mono_ns = base_t_ns, slew_ns, mono_ns
        self.rate = message.rate
        self.locked = self.known = True
        self._heard_mono_ns = mono_ns
        self._candidate = self._held = None
        self.holding = False


def _is_small(error_ns: int, rate: float) -> bool:
    return abs(error_ns) <= STEP_S * _NS * rate
