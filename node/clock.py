"""Mission clock: UTC steered by the bus, free-running and flagged without it.

Mission time may run faster than physical time (an accelerated bench) and is right only as far as the
bus is. Small errors are slewed, so that stamps stay in order; large ones step, and are reported.
What concerns the physical process uses the monotonic clock instead (design section 4).
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
    """Action: report that mission time jumped."""

    error_s: float
    """Size of the jump, s of mission time, positive forward."""


@dataclass(frozen=True)
class ClockLost:
    """Action: report that the bus is silent and the clock runs free."""

    silent_s: float


ClockAction = ClockLocked | ClockStepped | ClockLost


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
        """True once the bus has told the time: until then it is the host's idea of it."""
        self._base_t_ns = t_ns
        self._base_mono_ns = mono_ns
        self._slew_ns = 0
        self._heard_mono_ns: int | None = None

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
        if not self.locked or self._heard_mono_ns is None:
            return []
        silent_s = (mono_ns - self._heard_mono_ns) / _NS
        if silent_s < SILENT_S:
            return []
        self.locked = False
        return [ClockLost(silent_s)]

    def _steer(self, message: BusTime, mono_ns: int) -> list[ClockAction]:
        if not EARLIEST_NS <= message.t_ns <= LATEST_NS:
            raise ValueError(f"mission time {message.t_ns} ns is outside the years 2000 to 2100")
        now_ns = self.now_ns(mono_ns)
        error_ns = message.t_ns - now_ns
        big = abs(error_ns) > STEP_S * _NS * message.rate
        actions: list[ClockAction] = []
        if not self.locked:
            actions.append(ClockLocked(error_ns / _NS))
        elif big:
            actions.append(ClockStepped(error_ns / _NS))
        self._base_t_ns = message.t_ns if big else now_ns
        self._slew_ns = 0 if big else error_ns
        self._base_mono_ns = mono_ns
        self.rate = message.rate
        self.locked = self.known = True
        self._heard_mono_ns = mono_ns
        return actions
