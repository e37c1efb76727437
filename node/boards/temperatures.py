"""Temperatures of die and board, from thermal zones (Jetson) and hwmon (x86).

The worst one counts, of all that measure. One that stands still while others move does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from node.boards.liveness import Companions
from node.boards.sysfs import Sysfs

OFFLINE_MILLI_C: Final = -256_000
"""What a gated zone reads as: the zone is absent, never cold."""
LOWEST_C, HIGHEST_C = -60.0, 150.0
"""Outside of these a reading is no temperature of a chip."""
NO_SENSORS: Final = frozenset({"pmic-die", "thermal-fan-est"})
"""Zones that measure nothing, by their `type` in lower case, as the device trees of Tegra call them: a dummy
that always reads 50 or 100 degC, and a mean of other zones that follows them late, for the fan."""
JUNCTION: Final = "tj"
PACKAGE_LABELS: Final[Mapping[str, tuple[str, ...]]] = {
    "coretemp": ("Package id",),
    "k10temp": ("Tdie", "Tctl"),
    "zenpower": ("Tdie", "Tctl"),
}
"""Drivers of processors' sensors, and the labels of the whole package, the best first: `Tctl` is `Tdie` with
an offset for the fan on some models. `acpitz` is never the processor."""


class ThermalZones:
    """Zones of the kernel's thermal framework.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._companions = Companions()
        self.still: tuple[str, ...] = ()
        """Zones that stand still while others move, as of the last reading."""

    def read(self) -> dict[str, float]:
        """Return the temperature of each zone that has one now, degC, by its type without `-thermal`."""
        found: dict[str, float] = {}
        for path in self._sysfs.glob("/sys/class/thermal/thermal_zone*"):
            kind = self._sysfs.text(path / "type")
            milli_c = self._sysfs.number(path / "temp")
            if kind is None or milli_c is None or milli_c <= OFFLINE_MILLI_C:
                continue
            name, zone_c = kind.lower().removesuffix("-thermal").removesuffix("-therm"), milli_c / 1000
            if LOWEST_C <= zone_c <= HIGHEST_C and kind.lower() not in NO_SENSORS:
                found[name] = max(zone_c, found.get(name, zone_c))
        return found

    def die_c(self) -> float | None:
        """Return the junction temperature: its own zone, else the hottest of the others."""
        zones = self.read()
        still = self._companions.still(zones)
        self.still = tuple(sorted(still))
        live = {name: zone_c for name, zone_c in zones.items() if name not in still}
        return live.get(JUNCTION, max(live.values(), default=None))


class PackageTemperature:
    """The sensors of the processor packages.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._companions = Companions()
        self.paths: list[Path] = []
        """Files of the temperatures; none when there is no sensor."""
        self.still: tuple[str, ...] = ()
        """Sensors that stand still while others move, as of the last reading."""
        self.discover()

    def discover(self) -> None:
        """Look for the sensors: their hwmon numbers are not stable."""
        self.paths = []
        for path in self._sysfs.glob("/sys/class/hwmon/hwmon*"):
            labels = PACKAGE_LABELS.get(self._sysfs.text(path / "name") or "")
            if labels is not None:
                self.paths += self._of_package(path, labels)

    def die_c(self) -> float | None:
        """Return the temperature of the hottest package, degC; sensors that have vanished are looked for."""
        found = self._read()
        if not found or len(found) < len(self.paths):
            self.discover()
            found = self._read()
        still = self._companions.still(found)
        self.still = tuple(sorted(still))
        return max((die_c for name, die_c in found.items() if name not in still), default=None)

    def _of_package(self, path: Path, labels: tuple[str, ...]) -> list[Path]:
        """Return the sensors of the best label there is, else (old kernels have none) all of them."""
        inputs = self._sysfs.glob(f"{path.relative_to(self._sysfs.root)}/temp*_input")
        named = {
            each: self._sysfs.text(each.with_name(each.name.replace("_input", "_label"))) for each in inputs
        }
        for label in labels:
            if best := [each for each, name in named.items() if (name or "").startswith(label)]:
                return best
        return inputs

    def _read(self) -> dict[str, float]:
        found = {}
        for path in self.paths:
            milli_c = self._sysfs.number(path)
            if milli_c is not None and LOWEST_C <= milli_c / 1000 <= HIGHEST_C:
                found[f"{path.parent.name} {path.name}"] = milli_c / 1000
        return found
