"""When the watchdog may be fed. Pure: `node.watchdog` carries it out.

It is fed only while every ping is in limits, the event loop keeps its lag in limits, and nothing has asked
for a restart of the node. The account of the pings comes from the loop and must be fresh: a loop that runs
but no longer looks at its patients is not healthy. Two times are excused, both bounded: the start, before
the first account, and an ordered stop, in which the patients are taken down one by one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FeedLimits:
    """Limits on what the watchdog is fed on; all in seconds of the monotonic clock.

    Raises
    ------
    ValueError
        A value that is not above 0, or ``period_s >= report_s``.
    """

    period_s: float = 1.0
    """Time between two feeds (assumed)."""
    lag_s: float = 2.0
    """Longest lag of the event loop (assumed)."""
    report_s: float = 3.0
    """Oldest account of the pings that still counts (assumed)."""
    start_s: float = 60.0
    """Time allowed until the first account of the pings (assumed: a start with a database to be rebuilt)."""
    stop_s: float = 30.0
    """Time allowed for an ordered stop (assumed: above the sum of its stages)."""

    def __post_init__(self) -> None:
        for name in ("period_s", "lag_s", "report_s", "start_s", "stop_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.period_s >= self.report_s:
            raise ValueError(f"period_s must be below report_s, got {self}")


@dataclass(frozen=True)
class PingReport:
    """Event, several a second from the loop: the patients that are out of limits now, see `HealthBoard`."""

    out_of_limits: tuple[str, ...]


@dataclass(frozen=True)
class LagBeat:
    """Event, several a second from the lag thread: the lag of the loop now, s."""

    lag_s: float


@dataclass(frozen=True)
class RestartRequested:
    """Event: the node is to be restarted; should its own exit fail, the watchdog is to see to it."""

    reason: str


@dataclass(frozen=True)
class Stopping:
    """Event: an ordered stop has begun."""


GateEvent = PingReport | LagBeat | RestartRequested | Stopping


@dataclass(frozen=True)
class Feed:
    """Action: feed the watchdog."""


@dataclass(frozen=True)
class Withheld:
    """Action: report that the watchdog is no longer fed, and why. Once, until the reasons change."""

    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Resumed:
    """Action: report that the watchdog is fed again."""


GateAction = Feed | Withheld | Resumed


class FeedGate:
    """Decide, beat by beat, whether the watchdog is fed.

    Parameters
    ----------
    limits
        What counts as healthy.
    now_s
        Start of the node, monotonic, s.

    Attributes
    ----------
    withheld
        Why it is not fed now, of `lag restart stop start report pings`; empty while it is.
    feeds
        Feeds so far.
    """

    def __init__(self, limits: FeedLimits, now_s: float) -> None:
        self.limits = limits
        self.withheld: tuple[str, ...] = ()
        self.feeds = 0
        self._began_s = now_s
        self._report: PingReport | None = None
        self._report_s = 0.0
        self._restart: str | None = None
        self._stopping_s: float | None = None
        self._fed_s: float | None = None

    def handle(self, event: GateEvent, now_s: float) -> list[GateAction]:
        """Take one event at `now_s` (monotonic, s); return what to do, in order. Only a beat feeds."""
        match event:
            case PingReport():
                self._report, self._report_s = event, now_s
            case RestartRequested(reason):
                self._restart = self._restart or reason
            case Stopping():
                self._stopping_s = now_s if self._stopping_s is None else self._stopping_s
            case LagBeat(lag_s):
                return self._beat(lag_s, now_s)
        return []

    def _beat(self, lag_s: float, now_s: float) -> list[GateAction]:
        found = self._reasons(lag_s, now_s)
        actions: list[GateAction] = []
        kinds = tuple(found)
        if kinds != self.withheld:
            self.withheld = kinds
            actions.append(Withheld(tuple(found.values())) if kinds else Resumed())
        if not kinds and (self._fed_s is None or now_s - self._fed_s >= self.limits.period_s):
            self._fed_s = now_s
            self.feeds += 1
            actions.append(Feed())
        return actions

    def _reasons(self, lag_s: float, now_s: float) -> dict[str, str]:
        """Return why it must not be fed, by kind; empty when it may."""
        limits = self.limits
        reasons: dict[str, str] = {}
        # Written so that a lag that is no number counts as over the limit.
        if not lag_s <= limits.lag_s:
            reasons["lag"] = f"the event loop lags by {lag_s:.2f} s, {limits.lag_s} s allowed"
        if self._restart is not None:
            reasons["restart"] = f"a restart was asked for: {self._restart}"
        if self._stopping_s is not None:
            if now_s - self._stopping_s > limits.stop_s:
                reasons["stop"] = f"the ordered stop takes longer than {limits.stop_s} s"
            return reasons
        if self._report is None:
            if now_s - self._began_s > limits.start_s:
                reasons["start"] = f"no account of the pings within {limits.start_s} s of the start"
            return reasons
        if now_s - self._report_s > limits.report_s:
            reasons["report"] = (
                f"no account of the pings for {now_s - self._report_s:.1f} s, {limits.report_s} s allowed"
            )
        if self._report.out_of_limits:
            reasons["pings"] = f"out of limits: {', '.join(self._report.out_of_limits)}"
        return reasons
