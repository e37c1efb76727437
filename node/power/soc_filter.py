"""State of charge from several witnesses: counted from current, corrected by its sensor and by voltage.

A Kalman filter of one state. Counting current drifts but hardly jitters; the sensor jitters but does not
drift; the voltage, with the drop over the resistance taken off, tells where the curve is steep enough. A part
of each error is the same at every reading and does not average out: the answer never claims less than that.
"""

from __future__ import annotations

import math
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from node.power.battery import NOMINAL_CELL_V, BatteryModel, capacity_j

LOST_AFTER: Final = 8
"""Readings in a row too far away after which the sensor is believed rather than the count."""
FAR: Final = 4.0
"""Errors that make a reading one of those."""


class FilterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[planner.soc]` table. Every default is assumed."""

    current_error: Annotated[float, Meta(ge=0, le=1)] = 0.03
    """Error of what is counted, as a share of it."""
    constant_share: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Part of the sensor's error that is the same at every reading."""
    cell_v_error: Annotated[float, Meta(gt=0, le=1)] = 0.04
    """Error of a cell's voltage and of the curve it is held against, V."""


class SocFilter:
    """Follow the state of charge.

    Parameters
    ----------
    battery
        Voltage curve, resistance and charging efficiency.
    settings
        Errors.
    """

    def __init__(self, battery: BatteryModel, settings: FilterSettings | None = None) -> None:
        self._battery = battery
        self._settings = settings or FilterSettings()
        self.soc: float | None = None
        """State of charge, None before the first reading."""
        self.sigma = 1.0
        """Its error."""
        self._variance = 1.0
        self._t_s = 0.0
        self._amps = 0.0
        self._far = 0

    def handle(
        self, t_s: float, *, soc: float, sigma: float, battery_v: float, battery_a: float, battery_wh: float
    ) -> float:
        """Take a reading; return the state of charge.

        Parameters
        ----------
        t_s
            Mission time, s.
        soc, sigma
            What the sensor tells, and its error, 0 to 1.
        battery_v, battery_a
            At the terminals; positive when charging.
        battery_wh
            Capacity.
        """
        s, b = self._settings, self._battery.settings
        sensor = max(sigma, 1e-4) ** 2
        dt_s = t_s - self._t_s
        if self.soc is None or dt_s < 0:
            held, self._variance = soc, sensor
        else:
            amps = (self._amps + battery_a) / 2
            # Conversion loses power before the terminals, where the current is measured.
            kept = min(1.0, b.charge_efficiency / b.discharge_efficiency) if amps > 0 else 1.0
            capacity_as = capacity_j(battery_wh) / (NOMINAL_CELL_V * b.cells_in_series)
            counted = amps * kept * dt_s / capacity_as
            held = self.soc + counted
            self._variance += (s.current_error * abs(counted)) ** 2 + (1e-6 * dt_s) ** 2
            held = self._correct(held, soc, sensor)
            told = self._battery.soc_by_voltage(battery_v, battery_a)
            if told is not None and self._far == 0:
                by_voltage, slope = told
                error = s.cell_v_error * b.cells_in_series / slope
                # Curve and sensor are off the same way all along: each reading adds little.
                held = self._correct(held, by_voltage, (10.0 * error) ** 2)
        self._t_s, self._amps = t_s, battery_a
        self.soc = min(max(held, 0.0), 1.0)
        self.sigma = max(math.sqrt(self._variance), s.constant_share * sigma)
        return self.soc

    def _correct(self, held: float, told: float, variance: float) -> float:
        """Return the state of charge after a witness has told one, with its variance."""
        off = told - held
        if off * off > FAR * FAR * (self._variance + variance):
            self._far += 1
            if self._far < LOST_AFTER:
                return held
            self._variance, self._far = variance, 0
            return told
        self._far = 0
        weight = self._variance / (self._variance + variance)
        self._variance *= 1.0 - weight
        return held + weight * off
