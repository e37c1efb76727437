"""A PC or server: package energy by RAPL, its own temperature, clocks, ECC counters, a control group."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from node.boards.base import BoardReading, BoardSettings, Offer, State, refuse_power_mode
from node.boards.cpu import CpuQuota, processor
from node.boards.metered import MeteredBoard
from node.boards.rapl import Rapl
from node.boards.sysfs import Trouble
from node.boards.temperatures import PackageTemperature
from node.power.operating_point import OperatingPoint
from telemetry.errors import PenumbraError

_log = logging.getLogger(__name__)

RAPL_MEND: Final = (
    "as root: chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj (lost at a reboot: use a udev rule), or"
    " give the node CAP_DAC_READ_SEARCH; the files are root's own since the PLATYPUS fix"
)

COUNTING_S: Final = 1.2
"""Time in which every counter must be seen to count before a flight, s: longer than `rapl.STILL_S`."""
COUNTING_STEP_S: Final = 0.1


class X86Board(MeteredBoard):
    """Driver.

    Parameters
    ----------
    settings
        The `[board]` table.
    clock
        Physical time, s, monotonic.
    wait
        Waits so many seconds.
    """

    def __init__(
        self,
        settings: BoardSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(settings, clock)
        self._wait = wait
        self._rapl = Rapl(self._sysfs)
        self._die = PackageTemperature(self._sysfs)
        self._quota = CpuQuota(self._sysfs, settings.cgroup) if settings.cgroup else None
        self._held_cores: int | None = None

    @property
    def name(self) -> str:
        """`x86`."""
        return "x86"

    @property
    def identity(self) -> str:
        """Model of the processor and number of its threads."""
        return processor(self._sysfs)

    def power_mode(self) -> None:
        """Return None: it has none."""

    def require_meter(self) -> None:
        """Refuse to fly without a meter. Takes 0.1 s, and a second more where a counter stands still.

        Raises
        ------
        PenumbraError
            No package gives its energy, or the counter of one does not count.
        """
        if not self._rapl.packages:
            raise PenumbraError(
                "[board] kind 'x86': no RAPL package under /sys/class/powercap, so the draw is unknown",
                "load the module intel_rapl_msr, or use kind = 'sim' for a draw computed from CPU time",
            )
        unread = [path for path in self._rapl.packages if self._sysfs.number(path / "energy_uj") is None]
        if unread:
            trouble = self._sysfs.troubles[unread[0] / "energy_uj"]
            raise PenumbraError(
                f"[board] kind 'x86': {trouble.path}: {trouble.why}, so the draw is unknown", RAPL_MEND
            )
        if not self._counts():
            paths = [path for path in self._rapl.packages if path.name in self._rapl.still]
            files = ", ".join(str(path / "energy_uj") for path in paths or self._rapl.packages)
            raise PenumbraError(
                f"[board] kind 'x86': {files}: no count within {COUNTING_S:g} s, so the draw is unknown",
                "virtual machines and some firmware have counters that stand still: use kind = 'sim' for a"
                " draw computed from CPU time",
            )

    def _counts(self) -> bool:
        """Return whether every package's counter is seen to count."""
        until_s = self._clock() + COUNTING_S
        while self._rapl.read(self._clock()) is None:
            if self._clock() > until_s:
                return False
            self._wait(COUNTING_STEP_S)
        return True

    def operate(self, point: OperatingPoint) -> None:
        """Hold the worker's control group at its threads: a worker that runs wild gets no more.

        Raises
        ------
        PenumbraError
            The point names a power mode.
        """
        refuse_power_mode(self.name, point)
        if self._quota is None or point.threads == self._held_cores:
            return
        trouble = self._quota.set(point.threads)
        if trouble is None:
            self._held_cores = point.threads
        else:
            _log.warning("%s: %s", trouble.path, trouble.why)

    def read(self) -> BoardReading:
        """Return the mean draw since the last reading, and the temperature of the package."""
        metered_w, die_c = self._rapl.read(self._clock()), self._die.die_c()
        return self._reading(metered_w, die_c, (*self._rapl.still, *self._die.still))

    def probe(self) -> list[Offer]:
        """Return what this machine offers."""
        return [*self._probe_rapl(), self._probe_die(), *self._probe_common(), self._probe_quota()]

    def _probe_rapl(self) -> list[Offer]:
        if not self._rapl.packages:
            mend = "modprobe intel_rapl_msr (AMD too, from Linux 5.8); a virtual machine has none"
            return [Offer(what="package energy", state="missing", detail="/sys/class/powercap", mend=mend)]
        self._counts()
        found = []
        for path in self._rapl.packages:
            energy = path / "energy_uj"
            if self._sysfs.number(energy) is None:
                found.append(_offer("package energy", self._sysfs.troubles[energy], RAPL_MEND))
                continue
            limit_w = self._rapl.limit_w(path)
            limit = "no limit that can be read" if limit_w is None else f"long-term limit {limit_w:g} W"
            detail = f"{path.name}, {limit}"
            if path.name in self._rapl.still:
                detail, mend = f"{detail}; its counter stands still", "use kind = 'sim'"
                found.append(Offer(what="package energy", state="bad", detail=detail, mend=mend))
            else:
                found.append(Offer(what="package energy", state="ok", detail=detail))
        return found

    def _probe_die(self) -> Offer:
        die_c = self._die.die_c()
        if die_c is None:
            mend = "modprobe coretemp (Intel) or k10temp (AMD)"
            return Offer(what="die temperature", state="missing", detail="/sys/class/hwmon", mend=mend)
        return Offer(what="die temperature", state="ok", detail=f"{die_c:.1f} degC")

    def _probe_quota(self) -> Offer:
        if self._quota is None:
            detail = "[board] cgroup is empty"
            mend = "name a delegated group (systemd: Delegate=cpu) to hold the worker at its threads"
            return Offer(what="cpu.max", state="missing", detail=detail, mend=mend)
        cores = self._quota.cores()
        if cores is None:
            trouble = self._sysfs.troubles.get(self._quota.path) or Trouble(self._quota.path, "garbage")
            return _offer("cpu.max", trouble, "delegate the group (systemd: Delegate=cpu)")
        return Offer(what="cpu.max", state="ok", detail=f"{self._quota.path}: {cores:g} cores")


def _offer(what: str, trouble: Trouble, mend: str) -> Offer:
    state: State = "denied" if trouble.denied else "missing" if trouble.why == "missing" else "bad"
    return Offer(what=what, state=state, detail=f"{trouble.path}: {trouble.why}", mend=mend)
