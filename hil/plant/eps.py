"""The electrical power system: array, battery, bus, and an account of every joule."""

from __future__ import annotations

import bisect
import math
from typing import Final

import msgspec

from hil.scenario import Array, Battery

SOLAR_CONSTANT_W_M2: Final = 1361.0
REFERENCE_C: Final = 28.0
"""Temperature solar cells are rated at."""
NOMINAL_CELL_V: Final = 3.6
FULL_CELL_V: Final = 4.2
SECONDS_PER_HOUR: Final = 3600.0
OCV_SOC: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
OCV_CELL_V: Final = (3.00, 3.45, 3.55, 3.62, 3.67, 3.73, 3.81, 3.90, 3.99, 4.08, 4.18)
"""Open-circuit voltage of a cell against state of charge (assumed: the usual shape of an NMC cell)."""


def open_circuit_v(soc: float, cells: int) -> float:
    """Return the open-circuit voltage of `cells` in series, V, linear between the table's points."""
    index = min(max(bisect.bisect_right(OCV_SOC, soc) - 1, 0), len(OCV_SOC) - 2)
    share = (soc - OCV_SOC[index]) / (OCV_SOC[index + 1] - OCV_SOC[index])
    return cells * (OCV_CELL_V[index] + share * (OCV_CELL_V[index + 1] - OCV_CELL_V[index]))


class EpsState(msgspec.Struct, frozen=True, kw_only=True):
    """The power system at one moment."""

    battery_soc: float
    battery_v: float
    """At the terminals."""
    battery_a: float
    """Positive when charging."""
    array_w: float
    """Delivered to the bus."""
    array_available_w: float
    """What it could deliver; more than `array_w` when the battery takes no more."""
    array_c: float
    load_w: float
    """Platform and payload."""
    below_floor_s: float
    """Mission time spent with the state of charge under its floor."""


class EnergyAccount(msgspec.Struct, kw_only=True):
    """Energies since the start, J. array = load - unserved + stored + lost, to rounding."""

    array_j: float = 0.0
    load_j: float = 0.0
    unserved_j: float = 0.0
    """Load an empty battery could not feed."""
    stored_j: float = 0.0
    """Chemical: charge times open-circuit voltage; negative after discharge."""
    resistance_j: float = 0.0
    conversion_j: float = 0.0
    coulombic_j: float = 0.0

    def imbalance_j(self) -> float:
        """Return what the account does not explain, J."""
        lost = self.resistance_j + self.conversion_j + self.coulombic_j
        return self.array_j - (self.load_j - self.unserved_j) - self.stored_j - lost


class PowerSystem:
    """Array and battery, advanced in steps of about a second.

    Parameters
    ----------
    array, battery
        As in the scenario.
    platform_w
        Constant draw beside the payload.
    """

    def __init__(self, array: Array, battery: Battery, platform_w: float) -> None:
        self._array = array
        self._battery = battery
        self._platform_w = platform_w
        self._capacity_ah = battery.capacity_wh / (NOMINAL_CELL_V * battery.cells_in_series)
        self._soc = battery.soc_start
        self._array_c = array.hot_c
        self._below_floor_s = 0.0
        self.account = EnergyAccount()
        self.state = EpsState(
            battery_soc=self._soc,
            battery_v=open_circuit_v(self._soc, battery.cells_in_series),
            battery_a=0.0,
            array_w=0.0,
            array_available_w=0.0,
            array_c=self._array_c,
            load_w=platform_w,
            below_floor_s=0.0,
        )

    def full_sun_w(self, cos_incidence: float, temperature_c: float) -> float:
        """Return what the array gives the bus in full sunlight at 1 au, W."""
        a = self._array
        warm = max(0.0, 1.0 + a.temperature_coefficient_per_k * (temperature_c - REFERENCE_C))
        cells_w = SOLAR_CONSTANT_W_M2 * a.area_m2 * a.packing * a.efficiency * (1.0 - a.degradation) * warm
        return cells_w * a.conversion * max(0.0, cos_incidence)

    def advance(self, dt_s: float, *, irradiance: float, cos_incidence: float, payload_w: float) -> EpsState:
        """Advance by `dt_s`.

        Parameters
        ----------
        dt_s
            Mission time, s, above 0 and about 10 at most.
        irradiance
            Sunlight as a share of the solar constant: visible disc times distance effect.
        cos_incidence
            Of the Sun on the array; below 0 is its back.
        payload_w
            Draw of the payload computer.
        """
        a, b, account = self._array, self._battery, self.account
        settles_c = a.cold_c + (a.hot_c - a.cold_c) * min(irradiance, 1.0)
        self._array_c += (settles_c - self._array_c) * (1.0 - math.exp(-dt_s / a.lag_s))
        available_w = irradiance * self.full_sun_w(cos_incidence, self._array_c)
        load_w = self._platform_w + payload_w
        ocv = open_circuit_v(self._soc, b.cells_in_series)
        if available_w >= load_w:
            amps, array_w = self._charge(dt_s, ocv, available_w - load_w, load_w)
        else:
            amps, array_w = self._discharge(dt_s, ocv, load_w - available_w), available_w
        account.array_j += array_w * dt_s
        account.load_j += load_w * dt_s
        account.resistance_j += amps * amps * b.resistance_ohm * dt_s
        stored_a = amps * b.coulombic_efficiency if amps > 0 else amps
        account.coulombic_j += ocv * (amps - stored_a) * dt_s
        account.stored_j += ocv * stored_a * dt_s
        soc = self._soc + stored_a * dt_s / SECONDS_PER_HOUR / self._capacity_ah
        self._soc = min(max(soc, 0.0), 1.0)
        if self._soc < b.soc_floor:
            self._below_floor_s += dt_s
        self.state = EpsState(
            battery_soc=self._soc,
            battery_v=ocv + amps * b.resistance_ohm,
            battery_a=amps,
            array_w=array_w,
            array_available_w=available_w,
            array_c=self._array_c,
            load_w=load_w,
            below_floor_s=self._below_floor_s,
        )
        return self.state

    def _charge(self, dt_s: float, ocv: float, surplus_w: float, load_w: float) -> tuple[float, float]:
        """Return charging current, A, and what the array then delivers, W."""
        b = self._battery
        r = b.resistance_ohm
        power_w = surplus_w * b.charge_conversion
        amps = (math.sqrt(ocv * ocv + 4.0 * r * power_w) - ocv) / (2.0 * r)
        room_ah = (1.0 - self._soc) * self._capacity_ah / b.coulombic_efficiency
        amps = min(
            amps,
            b.max_charge_c_rate * self._capacity_ah,
            max(0.0, (FULL_CELL_V * b.cells_in_series - ocv) / r),
            room_ah * SECONDS_PER_HOUR / dt_s,
        )
        terminal_w = amps * (ocv + amps * r)
        bus_w = terminal_w / b.charge_conversion
        self.account.conversion_j += (bus_w - terminal_w) * dt_s
        return amps, load_w + bus_w

    def _discharge(self, dt_s: float, ocv: float, deficit_w: float) -> float:
        """Return the (negative) discharging current, A; what it cannot feed is accounted as unserved."""
        b = self._battery
        r = b.resistance_ohm
        power_w = deficit_w / b.discharge_conversion
        # The most a source with resistance can give is at half its voltage.
        inner = max(0.0, ocv * ocv - 4.0 * r * power_w)
        amps = (ocv - math.sqrt(inner)) / (2.0 * r)
        amps = min(amps, self._soc * self._capacity_ah * SECONDS_PER_HOUR / dt_s)
        terminal_w = amps * (ocv - amps * r)
        bus_w = terminal_w * b.discharge_conversion
        self.account.conversion_j += (terminal_w - bus_w) * dt_s
        self.account.unserved_j += max(0.0, deficit_w - bus_w) * dt_s
        return -amps
