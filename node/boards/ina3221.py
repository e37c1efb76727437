"""Power rails of a Jetson by its INA3221 monitors.

A monitor tells voltage (mV) and current (mA) of up to three labelled channels; power is their product, for
there is no power file. Which rail stands for the whole module depends on the module:

* where a rail is called `VDD_IN` (Orin Nano, Orin NX, Xavier NX), or `POM_5V_IN` (older ones), it is the
  total: the others are parts of it;
* AGX Orin has no such rail: its total is the sum of `VDD_GPU_SOC`, `VDD_CPU_CV` and `VIN_SYS_5V0`. That
  `VDDQ_VDD2_1V8AO` is fed from `VIN_SYS_5V0`, and would count twice, is assumed.

Channels named `NC` are not connected. Channel 7 of the driver is a sum of shunt voltages: never a rail.

A module that runs draws something: one whose rails have no voltage, or that draws nothing in all, has a meter
that does not measure. So has one whose rails do not change at all for a minute. Its draw is unknown, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.boards.liveness import Liveness
from node.boards.sysfs import Sysfs

CHANNELS: Final = (1, 2, 3)
TOTALS: Final = (("VDD_IN",), ("POM_5V_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
"""Rails whose sum is the whole module, the first set that is there."""
UNUSED: Final = "NC"
STILL_S: Final = 60.0
"""Time after which rails that have not changed at all are taken as dead, s (assumed: an idle module moves by
several steps of 8 mA within seconds)."""


@dataclass(frozen=True)
class Rail:
    """One channel."""

    label: str
    volts: Path
    amps: Path


class Ina3221:
    """The rails of all monitors.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._liveness = Liveness(STILL_S)
        self.still: tuple[str, ...] = ()
        """Rails of the module's draw that do not measure, as of the last reading."""
        self.rails: list[Rail] = []
        self.discover()

    def discover(self) -> None:
        """Look for the monitors: their hwmon number changes from boot to boot."""
        found: list[Rail] = []
        for path in self._sysfs.glob("/sys/class/hwmon/hwmon*"):
            if self._sysfs.text(path / "name") != "ina3221":
                continue
            for n in CHANNELS:
                label = self._sysfs.text(path / f"in{n}_label")
                enabled = not (path / f"in{n}_enable").exists() or self._sysfs.number(path / f"in{n}_enable")
                if label and label != UNUSED and enabled != 0:
                    found.append(Rail(label, path / f"in{n}_input", path / f"curr{n}_input"))
        if not found:
            found = self._iio()
        self.rails = found

    def total_rails(self) -> list[Rail]:
        """Return the rails whose sum is the module's draw; none where no rule knows them."""
        by_label = {rail.label: rail for rail in self.rails}
        for names in TOTALS:
            if all(name in by_label for name in names):
                return [by_label[name] for name in names]
        return []

    def read(self, now_s: float) -> float | None:
        """Return the draw of the module, W; None when any of its rails cannot be read, or does not measure.

        Parameters
        ----------
        now_s
            Physical time, monotonic, s.

        Notes
        -----
        Monitors that have vanished are looked for again: a driver that was reloaded has another number.
        """
        total = self._sum_w()
        if total is None and self.rails:
            self.discover()
            total = self._sum_w()
        self.still = () if total is None else self._still(total, now_s)
        return None if self.still else total

    def _still(self, total_w: float, now_s: float) -> tuple[str, ...]:
        rails = self.total_rails()
        every = tuple(self._sysfs.text(path) for rail in self.rails for path in (rail.volts, rail.amps))
        if total_w > 0 and not self._liveness.stands_still("rails", every, now_s):
            rails = [rail for rail in rails if (self._sysfs.number(rail.volts) or 0) <= 0]
        return tuple(f"rail {rail.label}" for rail in rails)

    def power_w(self, rail: Rail) -> float | None:
        """Return the draw of a rail, W."""
        milli_v, milli_a = self._sysfs.number(rail.volts), self._sysfs.number(rail.amps)
        return None if milli_v is None or milli_a is None else milli_v * milli_a / 1e6

    def _sum_w(self) -> float | None:
        rails = self.total_rails()
        powers = [self.power_w(rail) for rail in rails]
        known = [power for power in powers if power is not None]
        return sum(known) if rails and len(known) == len(rails) else None

    def _iio(self) -> list[Rail]:
        """Return the rails of JetPack 4, whose driver is of another kind."""
        found = []
        for path in self._sysfs.glob("/sys/bus/i2c/drivers/ina3221x/*/iio:device*"):
            for n in range(3):
                label = self._sysfs.text(path / f"rail_name_{n}")
                if label and label != UNUSED:
                    found.append(Rail(label, path / f"in_voltage{n}_input", path / f"in_current{n}_input"))
        return found
