"""The whole simulated spacecraft: time and load in, the state of the bus out.

Pure: no clock, no I/O, no randomness. Geometry is computed once for the flight on a grid of one second;
energy and heat are integrated on the same grid whatever the caller's step, so an accelerated bench gets
the results of a slow one. The load given to a step holds for all the time since the step before.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

import msgspec
import numpy as np

from hil.plant.contact import ContactWindow, contact_windows
from hil.plant.eps import EnergyAccount, EpsState, PowerSystem
from hil.plant.orbit import Array, Geometry, geodetic
from hil.plant.path import UmbraEvent, flight_path
from hil.plant.thermal import HeatModel, ThermalState
from hil.scenario import Mount, Scenario
from telemetry.bus import BusContact, BusEps, BusMessage, BusOrbit, BusThermal, BusTime, ContactSpan

__all__ = ["TAIL_S", "Plant", "PlantState", "UmbraEvent"]

NS_PER_S: Final = 1_000_000_000
ASTRONOMICAL_UNIT_KM: Final = 149_597_870.7
WINDOWS_AHEAD: Final = 16
"""Windows that are announced: a day of passes over a few stations."""
TAIL_S: Final = 1800
"""Time beyond the flight's end the plant still knows: the bench's shutdown, and windows to announce."""


class PlantState(msgspec.Struct, frozen=True, kw_only=True):
    """The spacecraft at one moment of mission time."""

    t_ns: int
    sunlit: float
    """Visible share of the Sun's disc, 0 to 1."""
    umbra: bool
    latitude_deg: float
    longitude_deg: float
    altitude_km: float
    payload_w: float
    platform_w: float
    eps: EpsState
    thermal: ThermalState
    in_contact: bool
    station: str
    """Station in contact, the one that sees it highest in its pass; empty without contact."""
    next_contact: ContactWindow | None
    """First window to begin after this moment."""
    windows: tuple[ContactWindow, ...]
    """Windows under way and ahead."""
    windows_until_ns: int
    """UTC up to which those are all."""
    array_sun_w: float
    battery_wh: float
    soc_floor: float

    def messages(self, rate: float = 1.0) -> dict[str, BusMessage]:
        """Return what the bus says now, by channel: time, eps, thermal, contact.

        Parameters
        ----------
        rate
            Mission seconds a physical second.
        """
        following = self.next_contact
        return {
            "time": BusTime(t_ns=self.t_ns, rate=rate),
            "eps": BusEps(
                t_ns=self.t_ns,
                battery_soc=self.eps.battery_soc,
                battery_v=self.eps.battery_v,
                battery_a=self.eps.battery_a,
                battery_wh=self.battery_wh,
                array_w=self.eps.array_w,
                array_sun_w=self.array_sun_w,
                platform_w=self.platform_w,
                soc_floor=self.soc_floor,
            ),
            "thermal": BusThermal(
                t_ns=self.t_ns, board_c=self.thermal.board_c, radiator_c=self.thermal.radiator_c
            ),
            "contact": BusContact(
                t_ns=self.t_ns,
                in_contact=self.in_contact,
                station=self.station,
                next_start_ns=following.start_ns if following else None,
                next_end_ns=following.end_ns if following else None,
                windows=[ContactSpan(start_ns=w.start_ns, end_ns=w.end_ns) for w in self.windows],
                known_until_ns=self.windows_until_ns,
            ),
        }


class Plant:
    """The spacecraft of a scenario. Plants of one orbit share its geometry, which takes a second to compute.

    Parameters
    ----------
    scenario
        Checked scenario.

    Raises
    ------
    ValueError
        The orbit decays within the flight.
    """

    def __init__(self, scenario: Scenario) -> None:
        craft = scenario.spacecraft
        self._start_ns, self._end_ns = scenario.start_ns, scenario.end_ns
        line1, line2 = scenario.tle()
        self.orbit = BusOrbit(line1=line1, line2=line2)
        """Elements to publish on `bus/orbit`."""
        seconds = math.ceil((self._end_ns - self._start_ns) / NS_PER_S) + TAIL_S
        path = flight_path(line1, line2, self._start_ns, seconds)
        self._events = path.events
        distance = np.linalg.norm(path.geometry.sun, axis=1)
        cosine, zenith = _incidence(path.geometry, craft.array.mount)
        # Plain lists: reading single numbers from them is several times faster than from arrays.
        self._sunlit: list[float] = path.sunlit.tolist()
        self._irradiance: list[float] = (path.sunlit * (ASTRONOMICAL_UNIT_KM / distance) ** 2).tolist()
        self._cosine: list[float] = cosine.tolist()
        self._zenith: list[float] = zenith.tolist()
        self._position = path.geometry.satellite
        self._windows = contact_windows(scenario.stations, path.t_ns, path.geometry.satellite)
        self._starts = [w.start_ns for w in self._windows]
        self._last_ns = self._start_ns + (len(self._sunlit) - 1) * NS_PER_S
        self._eps = PowerSystem(craft.array, craft.battery, craft.platform_w)
        self._heat = HeatModel(craft.thermal)
        self._platform_w = craft.platform_w
        self._battery_wh, self._soc_floor = craft.battery.capacity_wh, craft.battery.soc_floor
        lit = path.sunlit > 0.5
        mean_cosine = float(np.maximum(0.0, cosine[lit]).mean()) if np.any(lit) else 0.0
        self._array_sun_w = self._eps.full_sun_w(mean_cosine, craft.array.hot_c)
        self._t_ns = self._start_ns
        self.state = self._look(0.0)

    @property
    def contact_windows(self) -> tuple[ContactWindow, ...]:
        """Every window from the start to half an hour after the end, by start; they may overlap."""
        return self._windows

    @property
    def energy(self) -> EnergyAccount:
        """Account of every joule since the start."""
        return self._eps.account

    def umbra_events(self) -> tuple[UmbraEvent, ...]:
        """Return the true eclipses from the start to half an hour after the end, whole ones only."""
        return self._events

    def step(self, t_ns: int, load_w: float) -> PlantState:
        """Advance to `t_ns` with the payload drawing `load_w` since the step before.

        Parameters
        ----------
        t_ns
            UTC ns, not before the last step and at most half an hour after the flight's end.
        load_w
            Draw of the payload computer, W, finite and not negative.

        Raises
        ------
        ValueError
            Time or load out of range.
        """
        if not (math.isfinite(load_w) and load_w >= 0):
            raise ValueError(f"load {load_w} W: finite and not negative is allowed")
        last_ns = self._last_ns
        if not self._t_ns <= t_ns <= last_ns:
            raise ValueError(f"t_ns {t_ns}: {self._t_ns} to {last_ns} is allowed")
        while self._t_ns < t_ns:
            index, into_ns = divmod(self._t_ns - self._start_ns, NS_PER_S)
            until_ns = min(t_ns, self._t_ns - into_ns + NS_PER_S)
            dt_s = (until_ns - self._t_ns) / NS_PER_S
            share = into_ns / NS_PER_S + dt_s / 2
            irradiance = _between(self._irradiance, index, share)
            self._eps.advance(
                dt_s,
                irradiance=irradiance,
                cos_incidence=_between(self._cosine, index, share),
                payload_w=load_w,
            )
            self._heat.advance(
                dt_s,
                irradiance=irradiance,
                sun_above_earth=_between(self._zenith, index, share),
                payload_w=load_w,
            )
            self._t_ns = until_ns
        self.state = self._look(load_w)
        return self.state

    def _look(self, load_w: float) -> PlantState:
        t_ns = self._t_ns
        index, into_ns = divmod(t_ns - self._start_ns, NS_PER_S)
        share = into_ns / NS_PER_S
        following = min(index + 1, len(self._sunlit) - 1)
        position = self._position[index] * (1 - share) + self._position[following] * share
        latitude, longitude, height = geodetic(position[np.newaxis])
        current = [w for w in self._windows if w.start_ns <= t_ns < w.end_ns]
        nxt = bisect_right(self._starts, t_ns)
        ahead = self._windows[nxt : nxt + WINDOWS_AHEAD]
        return PlantState(
            t_ns=t_ns,
            sunlit=self._sunlit[index] * (1 - share) + self._sunlit[following] * share,
            umbra=any(e.entry_ns <= t_ns < e.exit_ns for e in self._events),
            latitude_deg=float(latitude[0]),
            longitude_deg=float(longitude[0]),
            altitude_km=float(height[0]),
            payload_w=load_w,
            platform_w=self._platform_w,
            eps=self._eps.state,
            thermal=self._heat.state,
            in_contact=bool(current),
            station=max(current, key=lambda w: w.max_elevation_deg).station if current else "",
            next_contact=self._windows[nxt] if nxt < len(self._windows) else None,
            windows=(*current, *ahead),
            windows_until_ns=ahead[-1].end_ns if len(ahead) == WINDOWS_AHEAD else self._last_ns,
            array_sun_w=self._array_sun_w,
            battery_wh=self._battery_wh,
            soc_floor=self._soc_floor,
        )


def _between(values: list[float], index: int, share: float) -> float:
    return values[index] * (1 - share) + values[index + 1] * share


def _incidence(geometry: Geometry, mount: Mount) -> tuple[Array, Array]:
    """Return the cosines of the Sun's incidence on the array, and of its zenith angle, shape (n,)."""
    sun = geometry.sun / np.linalg.norm(geometry.sun, axis=1, keepdims=True)
    up = geometry.satellite / np.linalg.norm(geometry.satellite, axis=1, keepdims=True)
    zenith = np.sum(sun * up, axis=1)
    if mount is Mount.SUN_TRACKING:
        return np.ones(len(sun)), zenith
    if mount is Mount.SINGLE_AXIS:
        across = np.sum(sun * geometry.normal, axis=1)
        return np.sqrt(np.maximum(0.0, 1.0 - across * across)), zenith
    return zenith, zenith
