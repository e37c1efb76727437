"""Energy of processor packages by RAPL, through the kernel's powercap files.

Only zones named `package-N` count: `psys`, `core`, `uncore` and `dram` hold parts of the same energy, or
more than it. A counter wraps at `max_energy_range_uj`; one that goes backwards by more than that could be (a
driver reloaded) begins anew, and the interval has no power.

A package that runs uses energy, so a counter that does not move does not count (virtual machines and some
firmware have such). Its power is that of its last move for `STILL_S`, then unknown, and never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.boards.liveness import Liveness
from node.boards.sysfs import Sysfs

ZONES: Final = "/sys/class/powercap/intel-rapl:*"
MIN_INTERVAL_S: Final = 0.05
"""Readings closer together repeat the last one: the counter moves about every millisecond."""
STILL_S: Final = 1.0
"""Time after which a counter that has not moved is taken as dead, s (assumed: it moves every millisecond)."""
MOST_W: Final = 2_000.0
"""No package draws more: a wrap that would mean it is a reset."""


@dataclass
class _Zone:
    path: Path
    range_uj: int | None
    moved: tuple[float, int] | None = None
    """When the counter was first seen at its value, s, and that value, uJ."""
    power_w: float | None = None
    still: bool = False


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
        self._liveness = Liveness(STILL_S)
        self.power_w: float | None = None
        """Mean draw over the last interval in which the counters moved, W; None while it is unknown."""
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

    @property
    def still(self) -> tuple[str, ...]:
        """Packages whose counters stand still, as of the last reading."""
        return tuple(zone.path.name for zone in self._zones if zone.still)

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
        self._last_s = now_s
        for zone in self._zones:
            self._take(zone, self._sysfs.number(zone.path / "energy_uj"), now_s)
        powers = [zone.power_w for zone in self._zones]
        known = [power_w for power_w in powers if power_w is not None]
        self.power_w = sum(known) if known and len(known) == len(powers) else None
        return self.power_w

    def _take(self, zone: _Zone, now_uj: int | None, now_s: float) -> None:
        was_still, zone.still = zone.still, self._liveness.stands_still(zone.path.name, now_uj, now_s)
        if now_uj is None:
            zone.moved, zone.power_w, zone.still = None, None, False
        elif zone.moved is None or zone.moved[1] != now_uj:
            # An interval in which a counter did not count has no power.
            zone.power_w = (
                None if zone.moved is None or was_still else _power_w(zone, zone.moved, now_uj, now_s)
            )
            zone.moved = now_s, now_uj
        elif zone.still:
            zone.power_w = None


def _power_w(zone: _Zone, moved: tuple[float, int], now_uj: int, now_s: float) -> float | None:
    """Return the mean draw since the counter moved last, W; None when it has begun anew."""
    at_s, last_uj = moved
    used_uj, dt_s = now_uj - last_uj, now_s - at_s
    if used_uj < 0:
        used_uj += zone.range_uj or 0
    return used_uj / 1e6 / dt_s if 0 <= used_uj <= MOST_W * dt_s * 1e6 else None
