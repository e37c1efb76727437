"""Energy of processor packages by RAPL, through the kernel's powercap files.

Only zones named `package-N` count: `psys`, `core`, `uncore` and `dram` hold parts of the same energy, or
more than it. A counter wraps at `max_energy_range_uj`; one that goes backwards by more than that could be (a
driver reloaded) begins anew, and the interval has no power.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.boards.sysfs import Sysfs

ZONES: Final = "/sys/class/powercap/intel-rapl:*"
MIN_INTERVAL_S: Final = 0.05
"""Readings closer together repeat the last one: the counter moves about every millisecond."""
MOST_W: Final = 2_000.0
"""No package draws more: a wrap that would mean it is a reset."""


@dataclass
class _Zone:
    path: Path
    range_uj: int | None
    last_uj: int | None = None


class Rapl:
    """Draw of all packages together.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._zones: list[_Zone] = []
        self._last_s: float | None = None
        self.power_w: float | None = None
        """Mean draw over the last interval, W; None while it is unknown."""
        self.discover()

    def discover(self) -> None:
        """Look for the packages."""
        found = []
        for path in self._sysfs.glob(ZONES):
            name = self._sysfs.text(path / "name")
            if path.name.count(":") == 1 and name is not None and name.startswith("package"):
                found.append(_Zone(path, self._sysfs.number(path / "max_energy_range_uj")))
        self._zones = found
        self._last_s = None

    @property
    def packages(self) -> list[Path]:
        """Directories of the packages."""
        return [zone.path for zone in self._zones]

    def limit_w(self, path: Path) -> float | None:
        """Return the long-term power limit of a package, W; None where it has none that can be read."""
        limit_uw = self._sysfs.number(path / "constraint_0_power_limit_uw")
        return None if limit_uw is None or limit_uw <= 0 else limit_uw / 1e6

    def read(self, now_s: float) -> float | None:
        """Return the mean draw since the last reading, W; None when it is not known.

        Parameters
        ----------
        now_s
            Physical time, monotonic, s.
        """
        if self._last_s is not None and now_s - self._last_s < MIN_INTERVAL_S:
            return self.power_w
        dt_s = None if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        total_uj, known = 0, bool(self._zones)
        for zone in self._zones:
            used = self._used_uj(zone, dt_s)
            if used is None:
                known = False
            else:
                total_uj += used
        self.power_w = total_uj / 1e6 / dt_s if known and dt_s is not None else None
        return self.power_w

    def _used_uj(self, zone: _Zone, dt_s: float | None) -> int | None:
        now_uj = self._sysfs.number(zone.path / "energy_uj")
        last_uj, zone.last_uj = zone.last_uj, now_uj
        if now_uj is None or last_uj is None or dt_s is None:
            return None
        used = now_uj - last_uj
        if used < 0:
            if zone.range_uj is None:
                return None
            used += zone.range_uj
        return used if 0 <= used <= MOST_W * dt_s * 1e6 else None
