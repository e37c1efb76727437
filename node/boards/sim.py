"""A board without a power meter: its draw follows the worker's real CPU time.

    power = idle + watts per core * (CPU seconds of the worker / seconds of physical time)

over the time between two readings. CPU seconds are those of all the worker's threads, from
`/proc/PID/stat` (utime + stime, in clock ticks of 10 ms): over half a second the reading moves in steps
of 2 % of one core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from node.boards.base import BoardReading, BoardSettings, Offer, refuse_power_mode
from node.boards.cpu import Clocks, processor
from node.boards.sysfs import Sysfs
from node.power.operating_point import OperatingPoint

MIN_INTERVAL_S: Final = 0.1
"""Readings closer together repeat the last one: a tick more or less would be 10 % of a core."""
_STATE, _UTIME, _STIME, _START_TIME = 0, 11, 12, 19
"""Fields of /proc/PID/stat counted from the state, which follows the name in brackets."""


class SimBoard:
    """Board whose draw is computed from the worker's CPU time.

    Parameters
    ----------
    settings
        Idle draw, watts per core, cores.
    clock
        Physical time, s, monotonic.
    proc
        Where procfs is mounted.
    """

    measures = False

    def __init__(
        self,
        settings: BoardSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        proc: Path = Path("/proc"),
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._proc = proc
        self._clocks = Clocks(Sysfs())
        self._tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
        self._pid: int | None = None
        self._last: tuple[float, int, float] | None = None
        self._reading = BoardReading(power_w=settings.idle_w, board_c=None)

    @property
    def name(self) -> str:
        """`sim`."""
        return "sim"

    @property
    def identity(self) -> str:
        """The settings its draw is computed from: with others its watts are others."""
        s = self._settings
        return f"{processor(Sysfs())}, taken as {s.idle_w:g} W and {s.core_w:g} W a core"

    def power_mode(self) -> None:
        """Return None: it has none."""

    def range_w(self) -> tuple[float, float]:
        """Return the draw when idle, and with every core busy, W."""
        return self._settings.range_w()

    def draw_w(self, cpu_share: float) -> float:
        """Return the draw, as configured, at a CPU time of the worker by physical time, W."""
        return self._settings.draw_w(cpu_share)

    def set_worker(self, pid: int | None) -> None:
        """Follow another process from now on; None when no worker runs."""
        if pid != self._pid:
            self._pid = pid
            self._last = None

    def operate(self, point: OperatingPoint) -> None:
        """Do nothing: the worker's own pacing is all there is.

        Raises
        ------
        PenumbraError
            The point names a power mode.
        """
        refuse_power_mode(self.name, point)

    def probe(self) -> list[Offer]:
        """Return what it offers."""
        detail = f"{self.identity}; follows the worker's CPU time in {self._proc}"
        return [Offer(what="draw", state="ok", detail=detail)]

    def read(self) -> BoardReading:
        """Return the mean draw since the last reading.

        Idle when there is no worker, when it is gone, and at its first reading. A process that took over
        the number of a dead worker is not mistaken for it: its start time differs.
        """
        now = self._clock()
        if self._last is not None and now - self._last[0] < MIN_INTERVAL_S:
            return self._reading
        s = self._settings
        sample = self._sample()
        busy = 0.0
        if sample is not None:
            start, cpu_s = sample
            if self._last is not None and self._last[1] == start:
                busy = (cpu_s - self._last[2]) / (now - self._last[0])
            self._last = (now, start, cpu_s)
        else:
            self._last = None
        # A tick counted late can show more CPU time than there was.
        busy = min(max(busy, 0.0), float(s.cores))
        self._reading = BoardReading(power_w=s.draw_w(busy), board_c=None, clock_ghz=self._clocks.mean_ghz())
        return self._reading

    def _sample(self) -> tuple[int, float] | None:
        """Return the worker's start time in ticks and its CPU seconds; None when it does not run."""
        if self._pid is None:
            return None
        try:
            text = (self._proc / str(self._pid) / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = text[text.rindex(")") + 2 :].split()
        if fields[_STATE] in {"Z", "X"}:
            return None
        ticks = int(fields[_UTIME]) + int(fields[_STIME])
        return int(fields[_START_TIME]), ticks * self._tick_s
