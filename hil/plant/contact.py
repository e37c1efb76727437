"""When ground stations see the satellite."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from hil.plant.orbit import Array, station_position
from hil.scenario import Station

NS_PER_S: Final = 1_000_000_000


class ContactWindow(msgspec.Struct, frozen=True, kw_only=True):
    """One pass of the satellite over a station, above its elevation limit."""

    station: str
    start_ns: int
    end_ns: int
    max_elevation_deg: float

    @property
    def duration_s(self) -> float:
        """Length, mission s."""
        return (self.end_ns - self.start_ns) / NS_PER_S


def elevation_deg(station: Station, satellite_km: Array) -> Array:
    """Return the satellite's elevation over the station's horizon, deg, without refraction.

    Parameters
    ----------
    station
        The place.
    satellite_km
        ITRS positions, shape (n, 3).
    """
    position, up = station_position(station.latitude_deg, station.longitude_deg, station.altitude_m)
    line_of_sight = satellite_km - position
    sine = line_of_sight @ up / np.linalg.norm(line_of_sight, axis=1)
    return np.asarray(np.degrees(np.arcsin(sine)), dtype=np.float64)


def contact_windows(
    stations: list[Station], t_ns: NDArray[np.int64], satellite_km: Array
) -> tuple[ContactWindow, ...]:
    """Return every window of every station within the grid, in order of their start.

    Parameters
    ----------
    stations
        The ground segment.
    t_ns
        Grid of UTC times, ascending, about a second apart, shape (n,).
    satellite_km
        ITRS positions at them, shape (n, 3).

    Notes
    -----
    Edges are interpolated between two grid points: good to a millisecond. A window under way at the
    grid's ends is cut there.
    """
    windows = []
    for station in stations:
        above = elevation_deg(station, satellite_km) - station.min_elevation_deg
        visible = above >= 0
        change = np.diff(visible.astype(np.int8))
        starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
        begin = [_cross(t_ns, above, int(i)) for i in starts]
        finish = [_cross(t_ns, above, int(i)) for i in ends]
        if visible[0]:
            begin.insert(0, int(t_ns[0]))
        if visible[-1]:
            finish.append(int(t_ns[-1]))
        for start, end in zip(begin, finish, strict=True):
            inside = (t_ns >= start) & (t_ns <= end)
            if not np.any(inside):
                continue
            top = float(above[inside].max()) + station.min_elevation_deg
            windows.append(
                ContactWindow(station=station.name, start_ns=start, end_ns=end, max_elevation_deg=top)
            )
    return tuple(sorted(windows, key=lambda w: (w.start_ns, w.station)))


def _cross(t_ns: NDArray[np.int64], above: Array, index: int) -> int:
    """Return when `above` passes 0 between grid points `index` and `index + 1`."""
    left, right = above[index], above[index + 1]
    return int(t_ns[index]) + round(float(left / (left - right)) * int(t_ns[index + 1] - t_ns[index]))
