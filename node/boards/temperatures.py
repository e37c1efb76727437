"""Temperatures of die and board, from thermal zones (Jetson) and hwmon (x86)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from node.boards.sysfs import Sysfs

OFFLINE_MILLI_C: Final = -256_000
"""What a gated zone reads as: the zone is absent, never cold."""
LOWEST_C, HIGHEST_C = -60.0, 150.0
"""Outside of these a reading is no temperature of a chip."""
FIXED: Final = ("PMIC",)
"""Zones that always read the same."""
JUNCTION: Final = "tj"
PACKAGE_LABELS: Final = {"coretemp": "Package id", "k10temp": "Tctl", "zenpower": "Tdie"}
"""Sensors of processors, and the label of the whole. `acpitz` is never the processor."""


class ThermalZones:
    """Zones of the kernel's thermal framework.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs

    def read(self) -> dict[str, float]:
        """Return the temperature of each zone that has one now, degC, by its type without `-thermal`."""
        found = {}
        for path in self._sysfs.glob("/sys/class/thermal/thermal_zone*"):
            kind = self._sysfs.text(path / "type")
            milli_c = self._sysfs.number(path / "temp")
            if kind is None or milli_c is None or milli_c <= OFFLINE_MILLI_C:
                continue
            name = kind.lower().removesuffix("-thermal").removesuffix("-therm")
            if LOWEST_C <= milli_c / 1000 <= HIGHEST_C and name.upper() not in FIXED:
                found[name] = milli_c / 1000
        return found

    def die_c(self) -> float | None:
        """Return the junction temperature: its own zone, else the hottest of the others."""
        zones = self.read()
        return zones.get(JUNCTION, max(zones.values(), default=None))


class PackageTemperature:
    """The processor's own sensor.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self.path: Path | None = None
        """File of the temperature; None when there is none."""
        self.discover()

    def discover(self) -> None:
        """Look for the sensor: its hwmon number is not stable."""
        self.path = None
        for path in self._sysfs.glob("/sys/class/hwmon/hwmon*"):
            wanted = PACKAGE_LABELS.get(self._sysfs.text(path / "name") or "")
            if wanted is None:
                continue
            for label in self._sysfs.glob(f"{path.relative_to(self._sysfs.root)}/temp*_label"):
                if (self._sysfs.text(label) or "").startswith(wanted):
                    self.path = label.with_name(label.name.replace("_label", "_input"))
                    return

    def die_c(self) -> float | None:
        """Return the temperature, degC; a sensor that has vanished is looked for again."""
        if self.path is None or self._sysfs.number(self.path) is None:
            self.discover()
        milli_c = None if self.path is None else self._sysfs.number(self.path)
        if milli_c is None or not LOWEST_C <= milli_c / 1000 <= HIGHEST_C:
            return None
        return milli_c / 1000
