"""A PC or server: package energy by RAPL, its own temperature, clocks, ECC counters, a control group."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from node.boards.base import BoardReading, BoardSettings, Offer, State
from node.boards.cpu import Clocks, CpuQuota, processor
from node.boards.edac import Edac
from node.boards.rapl import Rapl
from node.boards.sysfs import Sysfs, Trouble
from node.boards.temperatures import PackageTemperature
from node.power.operating_point import OperatingPoint
from telemetry.errors import PenumbraError

_log = logging.getLogger(__name__)

RAPL_MEND: Final = (
    "as root: chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj (lost at a reboot: use a udev rule), or"
    " give the node CAP_DAC_READ_SEARCH; the files are root's own since the PLATYPUS fix"
)


class X86Board:
    """Driver.

    Parameters
    ----------
    settings
        The `[board]` table.
    clock
        Physical time, s, monotonic.
    """

    def __init__(self, settings: BoardSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._sysfs = Sysfs(Path(settings.sysfs_root))
        self._rapl = Rapl(self._sysfs)
        self._die = PackageTemperature(self._sysfs)
        self._clocks = Clocks(self._sysfs)
        self._edac = Edac(self._sysfs)
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

    @property
    def measures(self) -> bool:
        """Its draw comes from a meter."""
        return True

    def require_meter(self) -> None:
        """Refuse to fly without a meter.

        Raises
        ------
        PenumbraError
            No package tells its energy.
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

    def range_w(self) -> tuple[float, float]:
        """Return the draw when idle, and with every core busy, as configured, W."""
        s = self._settings
        return s.idle_w, s.idle_w + s.core_w * s.cores

    def draw_w(self, cpu_share: float) -> float:
        """Return the draw, as configured, at a CPU time of the worker by physical time, W."""
        return self._settings.idle_w + self._settings.core_w * cpu_share

    def set_worker(self, pid: int | None) -> None:
        """Do nothing: the meter sees the package, whoever computes."""

    def operate(self, point: OperatingPoint) -> None:
        """Hold the worker's control group at its threads: a worker that runs wild gets no more."""
        if self._quota is None or point.threads == self._held_cores:
            return
        trouble = self._quota.set(point.threads)
        if trouble is None:
            self._held_cores = point.threads
        else:
            _log.warning("%s: %s", trouble.path, trouble.why)

    def read(self) -> BoardReading:
        """Return the mean draw since the last reading, and the temperature of the package."""
        package_w = self._rapl.read(self._clock())
        ecc = self._edac.read()
        return BoardReading(
            power_w=None if package_w is None else package_w + self._settings.other_w,
            board_c=self._die.die_c(),
            ecc_corrected=ecc.corrected,
            ecc_uncorrected=ecc.uncorrected,
        )

    def probe(self) -> list[Offer]:
        """Return what this machine offers."""
        return [*self._probe_rapl(), self._probe_die(), self._probe_clocks(), *self._probe_rest()]

    def _probe_rapl(self) -> list[Offer]:
        if not self._rapl.packages:
            mend = "modprobe intel_rapl_msr (AMD too, from Linux 5.8); a virtual machine has none"
            return [Offer(what="package energy", state="missing", detail="/sys/class/powercap", mend=mend)]
        found = []
        for path in self._rapl.packages:
            energy = path / "energy_uj"
            if self._sysfs.number(energy) is None:
                found.append(_offer("package energy", self._sysfs.troubles[energy], RAPL_MEND))
                continue
            limit_w = self._rapl.limit_w(path)
            limit = "no limit that can be read" if limit_w is None else f"long-term limit {limit_w:g} W"
            found.append(Offer(what="package energy", state="ok", detail=f"{path.name}, {limit}"))
        return found

    def _probe_die(self) -> Offer:
        die_c = self._die.die_c()
        if die_c is None:
            mend = "modprobe coretemp (Intel) or k10temp (AMD)"
            return Offer(what="die temperature", state="missing", detail="/sys/class/hwmon", mend=mend)
        return Offer(what="die temperature", state="ok", detail=f"{die_c:.1f} degC")

    def _probe_clocks(self) -> Offer:
        ghz = self._clocks.mean_ghz()
        if ghz is None:
            detail = "/sys/devices/system/cpu/cpu*/cpufreq"
            return Offer(what="clocks", state="missing", detail=detail, mend="none in most virtual machines")
        return Offer(what="clocks", state="ok", detail=f"{len(self._clocks.cores())} cores, {ghz:.2f} GHz")

    def _probe_rest(self) -> list[Offer]:
        found = [probe_ecc(self._edac)]
        if self._quota is None:
            detail = "[board] cgroup is empty"
            mend = "name a delegated group (systemd: Delegate=cpu) to hold the worker at its threads"
            return [*found, Offer(what="cpu.max", state="missing", detail=detail, mend=mend)]
        cores = self._quota.cores()
        trouble = self._sysfs.troubles.get(self._quota.path)
        if cores is None:
            trouble = trouble or Trouble(self._quota.path, "garbage")
            return [*found, _offer("cpu.max", trouble, "delegate the group (systemd: Delegate=cpu)")]
        return [*found, Offer(what="cpu.max", state="ok", detail=f"{self._quota.path}: {cores:g} cores")]


def probe_ecc(edac: Edac) -> Offer:
    """Return what is known of memory errors."""
    counts = edac.read()
    if counts.corrected is None and counts.uncorrected is None:
        mend = "load the EDAC driver of the memory controller; memory without ECC has none: unknown, not 0"
        return Offer(what="ECC counters", state="missing", detail="/sys/devices/system/edac/mc", mend=mend)
    detail = f"corrected {counts.corrected}, uncorrected {counts.uncorrected} since now"
    return Offer(what="ECC counters", state="ok", detail=detail)


def _offer(what: str, trouble: Trouble, mend: str) -> Offer:
    state: State = "denied" if trouble.denied else "missing" if trouble.why == "missing" else "bad"
    return Offer(what=what, state=state, detail=f"{trouble.path}: {trouble.why}", mend=mend)
