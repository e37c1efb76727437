"""Clocks of the cores, and the share of them a control group may use."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from node.boards.sysfs import Sysfs, Trouble

PERIOD_US: Final = 100_000
"""Period of a control group's quota: the kernel's default."""
LEAST_US: Final = 1_000
"""Least quota the kernel takes."""


def processor(sysfs: Sysfs) -> str:
    """Return the model of the processor and the number of its threads."""
    text = sysfs.text(sysfs.path("/proc/cpuinfo")) or ""
    models = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{models[0]}, {len(models)} threads" if models else "processor of unknown model"


class Clocks:
    """cpufreq of all cores that are online.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs

    def cores(self) -> list[Path]:
        """Return the directories of cores that are online and have clocks to tell."""
        found = []
        for path in self._sysfs.glob("/sys/devices/system/cpu/cpu[0-9]*"):
            online = path / "online"
            if online.exists() and self._sysfs.number(online) == 0:
                continue
            if (path / "cpufreq").is_dir():
                found.append(path / "cpufreq")
        return found

    def mean_ghz(self) -> float | None:
        """Return the mean clock, GHz; None where the kernel does not tell."""
        clocks = [self._sysfs.number(path / "scaling_cur_freq") for path in self.cores()]
        known = [khz for khz in clocks if khz is not None and khz > 0]
        return sum(known) / len(known) / 1e6 if known else None

    def most_khz(self) -> int | None:
        """Return the highest clock any core may have now, kHz."""
        limits = [self._sysfs.number(path / "scaling_max_freq") for path in self.cores()]
        return max((khz for khz in limits if khz is not None), default=None)


class CpuQuota:
    """`cpu.max` of a control group, version 2.

    Parameters
    ----------
    sysfs
        Where the files are.
    group
        Directory of the group, absolute.
    """

    def __init__(self, sysfs: Sysfs, group: str) -> None:
        self._sysfs = sysfs
        self.path = sysfs.path(group) / "cpu.max"

    def cores(self) -> float | None:
        """Return the cores the group may use, infinite without a limit; None when that cannot be read."""
        text = self._sysfs.text(self.path)
        fields = [] if text is None else text.split()
        try:
            quota, period = fields
            return float("inf") if quota == "max" else int(quota) / int(period)
        except (ValueError, ZeroDivisionError):
            return None

    def set(self, cores: float) -> Trouble | None:
        """Limit the group, and read the limit back; return what was wrong, None when it holds."""
        quota = "max" if cores == float("inf") else str(max(LEAST_US, round(cores * PERIOD_US)))
        trouble = self._sysfs.write(self.path, f"{quota} {PERIOD_US}")
        if trouble is not None:
            return trouble
        held = self.cores()
        wanted = float("inf") if quota == "max" else int(quota) / PERIOD_US
        if held is None or (abs(held - wanted) > 1e-9 and held != wanted):
            return Trouble(self.path, f"read back {held} cores after {wanted:g} were written")
        return None
