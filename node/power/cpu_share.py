"""How much of the processor a process uses: what the latch-up detector holds the board's draw against."""

from __future__ import annotations

import time
from collections.abc import Callable


def process_cpu_s(pid: int) -> float | None:
    """Return the CPU seconds all threads of a process have used, to the nanosecond; None when it is gone.

    Linux names the CPU clock of any process by a number made of its pid (clock_getcpuclockid(3)), which is
    a million times finer than the ticks of `/proc/PID/stat`.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2) / 1e9
    except OSError:
        return None


class CpuShare:
    """Share of the processor that a process used since it was last asked.

    Parameters
    ----------
    clock
        Physical time, s, monotonic.
    cpu_s
        CPU seconds of a process by its pid.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[int], float | None] = process_cpu_s,
    ) -> None:
        self._clock = clock
        self._cpu_s = cpu_s
        self._last: tuple[int, float, float] | None = None

    def sample(self, pid: int | None) -> float | None:
        """Return the share since the last call, 1 = one core; 0 without a process.

        None at the first call of a process, and when its clock went back: another one took its number.
        """
        now_s = self._clock()
        used_s = None if pid is None else self._cpu_s(pid)
        if pid is None or used_s is None:
            self._last = None
            return 0.0
        last, self._last = self._last, (pid, now_s, used_s)
        if last is None or last[0] != pid or now_s <= last[1] or used_s < last[2]:
            return None
        return (used_s - last[2]) / (now_s - last[1])
