"""When the parent of the node starts it, kills it, and gives it up. Pure; `node.supervise` carries out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

EXIT_USER: Final = 2
"""Exit code of a node that needs something mended by the user: a new start would not help."""


@dataclass(frozen=True)
class Limits:
    """Bounds, s; all assumed.

    Raises
    ------
    ValueError
        One is not positive.
    """

    feed_s: float = 15.0
    """Longest time between two feeds."""
    start_s: float = 60.0
    """Longest time to the first feed."""
    stop_s: float = 20.0
    """Longest time of an ordered stop: more than the node allows itself."""
    quick_s: float = 30.0
    """A life shorter than this makes the wait before the next one longer."""
    wait_s: float = 0.5
    """First wait before a start."""
    longest_wait_s: float = 60.0

    def __post_init__(self) -> None:
        if not all(value > 0 for value in vars(self).values()):
            raise ValueError(f"times above 0 are allowed: {self}")


@dataclass(frozen=True)
class Fed:
    """Event: the node has fed."""


@dataclass(frozen=True)
class Exited:
    """Event: the node is gone; `code` as of `subprocess`, negative for a signal."""

    code: int


@dataclass(frozen=True)
class StopAsked:
    """Event: whoever runs this wants it to end."""


@dataclass(frozen=True)
class Tick:
    """Event: time has passed."""


Event = Fed | Exited | StopAsked | Tick


@dataclass(frozen=True)
class Start:
    """Action: start the node."""


@dataclass(frozen=True)
class Kill:
    """Action: SIGKILL to the node."""

    why: str


@dataclass(frozen=True)
class AskStop:
    """Action: SIGTERM to the node."""


@dataclass(frozen=True)
class Wait:
    """Action: say that the node is started again after this time, s."""

    for_s: float
    why: str


@dataclass(frozen=True)
class End:
    """Action: end with this code."""

    code: int


Action = Start | Kill | AskStop | Wait | End


class Supervision:
    """Decide when the node is started, killed, and given up. Pure.

    Parameters
    ----------
    limits
        Bounds.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.restarts = 0
        """Starts after the first."""
        self.running = False
        self._stopping = False
        self._killed = False
        self._armed = False
        self._started_s = 0.0
        self._deadline_s = math.inf
        """When the node is late, or, while it does not run, when it is started."""
        self._wait_s = self.limits.wait_s

    def begin(self, now_s: float) -> list[Action]:
        """Return the first action."""
        return self._start(now_s)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take an event at `now_s` (monotonic, s); return what to do, in order."""
        match event:
            case Fed() if self.running and not self._stopping:
                self._armed = True
                self._deadline_s = now_s + self.limits.feed_s
            case Exited(code):
                return self._exited(code, now_s)
            case StopAsked() if not self._stopping:
                self._stopping = True
                if not self.running:
                    return [End(0)]
                self._deadline_s = now_s + self.limits.stop_s
                return [AskStop()]
            case Tick() if now_s >= self._deadline_s:
                return self._late(now_s)
            case _:
                pass
        return []

    def next_s(self, now_s: float) -> float:
        """Return the time until the next `Tick` matters, s."""
        return max(0.0, self._deadline_s - now_s)

    def _start(self, now_s: float) -> list[Action]:
        self.running, self._killed, self._armed = True, False, False
        self._started_s = now_s
        self._deadline_s = now_s + self.limits.start_s
        return [Start()]

    def _late(self, now_s: float) -> list[Action]:
        if not self.running:
            self.restarts += 1
            return self._start(now_s)
        self._deadline_s = math.inf
        if self._killed:
            return []
        self._killed = True
        limits = self.limits
        if self._stopping:
            return [Kill(f"it did not stop within {limits.stop_s:g} s")]
        if self._armed:
            return [Kill(f"it has not fed for {limits.feed_s:g} s")]
        return [Kill(f"it did not feed within {limits.start_s:g} s of its start")]

    def _exited(self, code: int, now_s: float) -> list[Action]:
        self.running = False
        # 128 + number, as a shell tells a signal.
        if self._stopping or (code in {0, EXIT_USER} and not self._killed):
            return [End(code if code >= 0 else 128 - code)]
        if now_s - self._started_s >= self.limits.quick_s:
            self._wait_s = self.limits.wait_s
        wait_s = self._wait_s
        self._wait_s = min(2 * self._wait_s, self.limits.longest_wait_s)
        self._deadline_s = now_s + wait_s
        return [Wait(wait_s, f"exit code {code}" if code >= 0 else f"signal {-code}")]
