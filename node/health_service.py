"""Health of the node itself: pings to its tasks, the lag of its loop, and the watchdog that is fed on both.

`fdir.health` and `node.feed_gate` decide. The feeding is done in the lag thread: a blocked loop cannot feed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence

from fdir.health import (
    Arm,
    BoardEvent,
    ForPatient,
    HealthBoard,
    PingFatal,
    PingLate,
    PingRecovered,
    Pong,
    SendPing,
    Tick,
)
from node.config import FdirSection
from node.feed_gate import FeedGate, FeedLimits, PingReport, RestartRequested, Stopping
from node.loop_lag import LoopLag
from node.pulse import Pulse
from node.recorder import Recorder
from node.watchdog import WatchdogConfig, WatchdogKeeper, WatchdogSet, limits_for, open_watchdog
from telemetry.packets import Severity

_log = logging.getLogger(__name__)

TICK_S = 0.1
"""How often the pings are looked at, s (assumed: a tenth of the shortest limit)."""


class HealthService:
    """Pings the tasks of the node, and keeps the watchdog.

    Parameters
    ----------
    settings
        Limits of pings and lag.
    watchdog
        The open watchdogs; owned from here on.
    pulses
        The tasks' ends of their pings.
    recorder
        For events.
    on_fatal
        Called with (task, reason) when a task is lost.
    """

    def __init__(
        self,
        settings: FdirSection,
        watchdog: WatchdogSet,
        pulses: Sequence[Pulse],
        recorder: Recorder,
        on_fatal: Callable[[str, str], None],
    ) -> None:
        self._pulses = {pulse.name: pulse for pulse in pulses}
        self._board = HealthBoard(dict.fromkeys(self._pulses, settings.ping_limits()))
        self._watchdog = watchdog
        self._recorder = recorder
        self._on_fatal = on_fatal
        self._limits = limits_for(watchdog, FeedLimits(lag_s=settings.lag_limit_s))
        self._keeper = WatchdogKeeper(watchdog, FeedGate(self._limits, time.monotonic()), self._on_change)
        self._loop = asyncio.get_running_loop()
        self._lag = LoopLag(self._loop, self._keeper.beat)
        for pulse in pulses:
            pulse.on_answer = self._answered

    @classmethod
    def open(
        cls,
        settings: FdirSection,
        config: WatchdogConfig,
        pulses: Sequence[Pulse],
        recorder: Recorder,
        on_fatal: Callable[[str, str], None],
    ) -> HealthService:
        """Open the watchdogs that the environment and the configuration name, and return the service.

        Raises
        ------
        PenumbraError
            One is named and cannot be used.
        """
        return cls(settings, open_watchdog(os.environ, config), pulses, recorder, on_fatal)

    @property
    def watchdog(self) -> str:
        """Kind of the watchdog: `device`, `systemd`, `parent`, several with `+`, or `none`."""
        return self._watchdog.kind

    @property
    def feeds(self) -> int:
        """Feeds so far."""
        return self._keeper.feeds

    def take_lag_s(self) -> float:
        """Return the longest lag of the loop since the last call, s."""
        return self._lag.take_max_s()

    async def run(self) -> None:
        """Watch until cancelled. The lag thread goes on: `close` ends it."""
        self._lag.start()
        now_s = time.monotonic()
        for name in self._pulses:
            self._handle(ForPatient(name, Arm()), now_s)
        try:
            self._watchdog.ready()
        except OSError as error:
            _log.error("%s", error)
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            self._handle(Tick(), now_s)
            self._keeper.tell(PingReport(self._board.out_of_limits), now_s)

    def request_restart(self, reason: str) -> None:
        """Feed no more: should the node's own exit fail, the watchdog sees to it."""
        self._keeper.tell(RestartRequested(reason), time.monotonic())

    def stopping(self) -> None:
        """Tell that an ordered stop has begun."""
        self._keeper.tell(Stopping(), time.monotonic())
        try:
            self._watchdog.stopping()
        except OSError as error:
            _log.error("%s", error)

    async def close(self, *, ordered: bool) -> None:
        """End the thread, and let go of the watchdogs; disarmed only after an ordered stop."""
        await asyncio.to_thread(self._lag.stop)
        try:
            self._watchdog.close(ordered)
        except OSError as error:
            _log.error("%s", error)

    def _answered(self, name: str, key: int) -> None:
        self._handle(ForPatient(name, Pong(key)), time.monotonic())

    def _handle(self, event: BoardEvent, now_s: float) -> None:
        for action in self._board.handle(event, now_s):
            match action:
                case ForPatient(name, SendPing(key)):
                    self._pulses[name].ask(key)
                case ForPatient(name, PingLate(_, silent_s)):
                    text = f"task {name} has not answered for {silent_s:.2f} s"
                    self._recorder.event(Severity.LOW, "task.ping_late", text, {"task": name})
                case ForPatient(name, PingRecovered(_, silent_s)):
                    text = f"task {name} answered after {silent_s:.2f} s"
                    self._recorder.event(Severity.INFO, "task.ping_recovered", text, {"task": name})
                case ForPatient(name, PingFatal(reason, _)):
                    self._on_fatal(name, reason)

    def _on_change(self, reasons: tuple[str, ...]) -> None:
        """Take a change of the feeding, in the lag thread: hand it to the loop, which may be blocked."""
        _log.warning("watchdog %s", f"not fed: {'; '.join(reasons)}" if reasons else "fed again")
        try:
            self._loop.call_soon_threadsafe(self._tell_change, reasons)
        except RuntimeError:
            _log.debug("the event loop is closed already")

    def _tell_change(self, reasons: tuple[str, ...]) -> None:
        if reasons:
            text = f"watchdog not fed: {'; '.join(reasons)}"
            self._recorder.event(Severity.MEDIUM, "watchdog.withheld", text, {"kind": self.watchdog})
        else:
            self._recorder.event(Severity.INFO, "watchdog.fed", "watchdog fed again", {"kind": self.watchdog})
