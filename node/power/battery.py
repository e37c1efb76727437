"""The battery as the flight side models it: energy of a state of charge, losses, voltage, wear."""

from __future__ import annotations

import math
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from telemetry.bus import LEAST_WH

NOMINAL_CELL_V: Final = 3.6
"""Voltage a capacity in Wh is stated at."""
SECONDS_PER_HOUR: Final = 3600.0
FLAT_V: Final = 0.03
"""Rise of a cell's voltage over a tenth of its charge under which the voltage tells nothing of it."""

Share = Annotated[float, Meta(gt=0, le=1)]
CellVolts = Annotated[float, Meta(ge=0.5, le=5)]
Depths = Annotated[tuple[Share, ...], Meta(min_length=1, max_length=32)]
Cycles = Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1, max_length=32)]


class BatterySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[planner.battery]` table. Every default is assumed; set them from the cells' own data."""

    cells_in_series: Annotated[int, Meta(ge=1, le=1000)] = 2
    resistance_ohm: Annotated[float, Meta(ge=0, le=10)] = 0.10
    """Of the whole pack."""
    charge_efficiency: Share = 0.955
    """Of what goes in at the bus, without resistance: conversion and coulombic loss."""
    discharge_efficiency: Share = 0.96
    """Of what the cells give, without resistance."""
    max_charge_c_rate: Annotated[float, Meta(gt=0, le=20)] = 0.5
    """Most charging current by capacity, 1/h."""
    open_circuit_cell_v: Annotated[tuple[CellVolts, ...], Meta(min_length=11, max_length=11)] = (
        3.00, 3.45, 3.55, 3.62, 3.67, 3.73, 3.81, 3.90, 3.99, 4.08, 4.18,
    )  # fmt: skip
    """At states of charge 0, 0.1, ... 1 (the usual shape of an NMC cell)."""
    life_depth: Depths = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    """Depths of discharge, rising."""
    life_cycles: Cycles = (
        90_000.0, 40_000.0, 25_000.0, 16_000.0, 6_000.0, 2_500.0, 1_200.0,
    )  # fmt: skip
    """Cycles to the end of life at these depths. No source was found for such a table: assumed."""

    def __post_init__(self) -> None:
        if any(b < a for a, b in zip(self.open_circuit_cell_v, self.open_circuit_cell_v[1:], strict=False)):
            raise ValueError("open_circuit_cell_v must not fall with the state of charge")
        if len(self.life_depth) != len(self.life_cycles):
            raise ValueError(
                f"life_cycles has {len(self.life_cycles)} values, life_depth {len(self.life_depth)}: as many"
                " are needed"
            )
        if any(b <= a for a, b in zip(self.life_depth, self.life_depth[1:], strict=False)):
            raise ValueError(f"life_depth {list(self.life_depth)} must rise")


def capacity_j(battery_wh: float) -> float:
    """Return a capacity in J that may be divided by: never less than that of `LEAST_WH`, and never NaN."""
    return max(LEAST_WH, battery_wh) * SECONDS_PER_HOUR


class BatteryModel:
    """Energy, voltage and losses of one battery.

    Parameters
    ----------
    settings
        Its parameters.
    """

    def __init__(self, settings: BatterySettings | None = None) -> None:
        self.settings = settings or BatterySettings()
        volts = np.asarray(self.settings.open_circuit_cell_v)
        self._soc = np.linspace(0.0, 1.0, len(volts))
        self._volts = volts
        steps = (volts[1:] + volts[:-1]) / 2 / NOMINAL_CELL_V * np.diff(self._soc)
        self._energy = np.concatenate([[0.0], np.cumsum(steps)])

    def energy_j(self, soc: float, capacity_wh: float) -> float:
        """Return the energy between empty and a state of charge, J, of a nominal capacity, Wh."""
        share = float(np.interp(soc, self._soc, self._energy))
        return share * capacity_j(capacity_wh)

    def soc(self, energy_j: float, capacity_wh: float) -> float:
        """Return the state of charge that holds an energy, J."""
        return float(np.interp(energy_j / capacity_j(capacity_wh), self._energy, self._soc))

    def open_circuit_v(self, soc: float) -> float:
        """Return the voltage of the pack at rest, V."""
        return self.settings.cells_in_series * float(np.interp(soc, self._soc, self._volts))

    def efficiencies(self, soc: float, power_w: float) -> tuple[float, float]:
        """Return charging and discharging efficiency at the bus, resistance included, at a mean power, W."""
        s = self.settings
        volts = self.open_circuit_v(soc)
        lost = min(abs(power_w) * s.resistance_ohm / (volts * volts), 0.5)
        return s.charge_efficiency / (1.0 + lost), s.discharge_efficiency * (1.0 - lost)

    def charge_w(self, soc: float, capacity_wh: float) -> float:
        """Return the most the battery takes, W at the bus, by its charging current."""
        s = self.settings
        amps = s.max_charge_c_rate * capacity_wh / (NOMINAL_CELL_V * s.cells_in_series)
        return amps * (self.open_circuit_v(soc) + amps * s.resistance_ohm) / s.charge_efficiency

    def soc_by_voltage(self, battery_v: float, battery_a: float) -> tuple[float, float] | None:
        """Return the state of charge that voltage and current tell, and how many V one unit of it is.

        Parameters
        ----------
        battery_v
            At the terminals.
        battery_a
            Positive when charging.

        Returns
        -------
        tuple or None
            None where the curve is too flat to tell, and outside of it.
        """
        s = self.settings
        cell_v = (battery_v - battery_a * s.resistance_ohm) / s.cells_in_series
        if not (math.isfinite(cell_v) and self._volts[0] <= cell_v <= self._volts[-1]):
            return None
        index = min(max(int(np.searchsorted(self._volts, cell_v, side="right")) - 1, 0), len(self._volts) - 2)
        rise = float(self._volts[index + 1] - self._volts[index])
        if rise < FLAT_V:
            return None
        width = float(self._soc[index + 1] - self._soc[index])
        soc = float(self._soc[index]) + width * (cell_v - float(self._volts[index])) / rise
        return soc, s.cells_in_series * rise / width
