"""How long the event loop keeps its callers waiting, measured by a thread of its own.

A task of the loop cannot tell that the loop is blocked: it is blocked with it. This thread posts a callback
to the loop, and another only once that one has run. While it waits, the wait itself is the lag, so a blocked
loop is seen while it is blocked. The thread also beats: what must not happen while the loop is blocked
(feeding a watchdog, see `node.watchdog`) is done from `on_beat`, in this thread.

Time in which the thread itself was held up (a stopped process, a paused machine) counts as at most `stall_s`
a beat, as in `fdir.health`: the loop is not to blame for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("penumbra.loop_lag")

PERIOD_S = 0.1
"""Time between two beats, s (assumed: a tenth of the smallest limit set on the lag)."""
STALL_S = 0.5
"""Most that the time between two beats counts for, s (assumed: that of `fdir.health.PingLimits`)."""
JOIN_TIMEOUT_S = 2.0
"""How long `stop` waits for the thread, s (assumed: many periods)."""


class LoopLag:
    """The thread and what it measures. All methods may be called from any thread.

    Parameters
    ----------
    loop
        The loop to watch.
    on_beat
        Called in the thread once a period with (lag now, monotonic time), both s. What it raises is logged
        and counted in `beat_errors`; the thread goes on.
    period_s, stall_s
        Time between two beats, and most that it counts for, s.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_beat: Callable[[float, float], None] | None = None,
        *,
        period_s: float = PERIOD_S,
        stall_s: float = STALL_S,
    ) -> None:
        if not 0 < period_s <= stall_s:
            raise ValueError(f"0 < period_s <= stall_s is required, got {period_s} and {stall_s}")
        self._loop = loop
        self._on_beat = on_beat
        self._period_s = period_s
        self._stall_s = stall_s
        self._thread = threading.Thread(target=self._run, name="loop-lag", daemon=True)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._posted_s = 0.0
        self._ran_s: float | None = None
        self._waited_s = 0.0
        self._lag_s = 0.0
        self._max_s = 0.0
        self._beat_s: float | None = None
        self.beat_errors = 0

    @property
    def lag_s(self) -> float:
        """How long the callback under way has waited, or else how long the last one did, s."""
        with self._lock:
            return self._lag_s

    @property
    def beat_age_s(self) -> float | None:
        """Time since the last beat of the thread, s; None before the first. It must be watched too."""
        with self._lock:
            return None if self._beat_s is None else time.monotonic() - self._beat_s

    def is_alive(self, max_age_s: float = 10 * PERIOD_S) -> bool:
        """Return whether the thread runs and has beaten within `max_age_s`."""
        age_s = self.beat_age_s
        return self._thread.is_alive() and age_s is not None and age_s <= max_age_s

    def take_max_s(self) -> float:
        """Return the largest lag since the last call, s, and begin anew with the lag now.

        This is what to sample: `lag_s`, read from a task of the loop, is read when a block is already over.
        """
        with self._lock:
            largest, self._max_s = self._max_s, self._lag_s
            return largest

    def start(self) -> None:
        """Start the thread. Once only."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it. Does nothing if it was never started."""
        self._stop.set()
        if self._thread.ident is None or self._thread is threading.current_thread():
            return
        self._thread.join(JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("the loop-lag thread is still busy %.1f s after it was stopped", JOIN_TIMEOUT_S)

    def _ran(self) -> None:
        with self._lock:
            self._ran_s = time.monotonic()

    def _run(self) -> None:
        if not self._post():
            return
        last_s = self._posted_s
        while not self._stop.wait(self._period_s):
            now_s = time.monotonic()
            watched_s = min(now_s - last_s, self._stall_s)
            last_s = now_s
            with self._lock:
                answered = self._ran_s is not None
                self._waited_s += watched_s
                self._lag_s = self._waited_s
                if self._ran_s is not None:
                    self._lag_s = min(self._ran_s - self._posted_s, self._waited_s)
                self._max_s = max(self._max_s, self._lag_s)
                self._beat_s = now_s
                lag_s = self._lag_s
            if answered and not self._post():
                return
            self._beat(lag_s, now_s)

    def _beat(self, lag_s: float, now_s: float) -> None:
        if self._on_beat is None:
            return
        try:
            self._on_beat(lag_s, now_s)
        except Exception:
            self.beat_errors += 1
            log.exception("what the loop-lag thread does each beat failed")

    def _post(self) -> bool:
        """Post the next callback; return False when the loop is closed, and there is nothing to watch."""
        with self._lock:
            self._ran_s = None
            self._waited_s = 0.0
            self._posted_s = time.monotonic()
        try:
            self._loop.call_soon_threadsafe(self._ran)
        except RuntimeError:
            log.warning("the event loop closed before its lag thread was stopped")
            return False
        return True
