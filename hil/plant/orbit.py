"""Where satellite and Sun truly are: Skyfield and JPL's DE421.

Independent of the flight's ephemeris but for SGP4 itself, which turns the same TLE into positions there
and here: what the bench tests is the flight's Sun, its frames and its shadow, not the orbit
determination that made the TLE.

Data: DE421 from the package `skyfield-data` (1900 to 2053) and Skyfield's built-in table of leap seconds
and Earth rotation. Nothing is downloaded. Beyond the table's end Skyfield extrapolates UT1 - UTC; a
tenth of a second of it would move the ground track by 46 m. `skyfield-data` also holds IERS data with
an expiry date of its own: they are not used here, so its warning does not concern this file.
"""

from __future__ import annotations

import atexit
import datetime as dt
from functools import cache
from importlib import resources
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from skyfield.api import EarthSatellite, load, load_file, wgs84
from skyfield.framelib import itrs

Array = NDArray[np.float64]

NS_PER_S: Final = 1_000_000_000
SUN_NODE_S: Final = 300
"""The Sun is computed this often and interpolated: 5e-10 rad of error."""
CHUNK: Final = 5_000
"""Times handled at once: nutation takes 1365 terms for each."""


@cache
def _sky() -> tuple[Any, Any]:
    """Return Skyfield's timescale and the DE421 kernel, from installed files only."""
    data = resources.files("skyfield_data") / "data" / "de421.bsp"
    kernel = load_file(str(data))
    atexit.register(kernel.close)
    return load.timescale(builtin=True), kernel


def _times(t_ns: NDArray[np.int64]) -> Any:
    timescale, _ = _sky()
    first = int(t_ns[0])
    day = dt.datetime.fromtimestamp(first // NS_PER_S, tz=dt.UTC)
    rest = first % NS_PER_S / NS_PER_S
    seconds = day.second + rest + (t_ns - first) / NS_PER_S
    return timescale.utc(day.year, day.month, day.day, day.hour, day.minute, seconds)


class Geometry:
    """Positions at many times, km, each of shape (n, 3), Earth-fixed (ITRS) unless named otherwise."""

    def __init__(self, satellite: Array, sun: Array, normal: Array) -> None:
        self.satellite = satellite
        self.sun = sun
        """Apparent: light time and aberration are in it, as the shadow has them."""
        self.normal = normal
        """Unit vector of the orbit's angular momentum, in the same axes at the same instants."""


class TrueOrbit:
    """The satellite of one TLE.

    Parameters
    ----------
    line1, line2
        A TLE already checked.
    """

    def __init__(self, line1: str, line2: str) -> None:
        timescale, kernel = _sky()
        self._satellite = EarthSatellite(line1, line2, ts=timescale)
        self._earth, self._sun = kernel["earth"], kernel["sun"]
        self.period_s = float(2 * np.pi / self._satellite.model.no_kozai * 60.0)

    def geometry(self, t_ns: NDArray[np.int64]) -> Geometry:
        """Return positions at UTC times `t_ns`, ascending, shape (n,).

        Raises
        ------
        ValueError
            SGP4 has no position at one of the times.
        """
        parts = [self._chunk(t_ns[i : i + CHUNK]) for i in range(0, len(t_ns), CHUNK)]
        satellite, sun, normal = (np.concatenate([p[k] for p in parts]) for k in range(3))
        if not np.all(np.isfinite(satellite)):
            raise ValueError("SGP4 gives no position within the flight: the orbit decays")
        return Geometry(satellite, sun, normal)

    def _chunk(self, t_ns: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        t = _times(t_ns)
        at = self._satellite.at(t)
        rotation = itrs.rotation_at(t)
        momentum = np.cross(at.position.km, at.velocity.km_per_s, axis=0)
        normal = momentum / np.linalg.norm(momentum, axis=0)
        fixed = [
            np.einsum("ijn,jn->in", rotation, v).T for v in (at.position.km, self._sun_gcrs(t_ns), normal)
        ]
        return fixed[0], fixed[1], fixed[2]

    def _sun_gcrs(self, t_ns: NDArray[np.int64]) -> Array:
        step = SUN_NODE_S * NS_PER_S
        nodes = np.arange(t_ns[0] // step, t_ns[-1] // step + 2, dtype=np.int64) * step
        at_nodes = self._earth.at(_times(nodes)).observe(self._sun).apparent().position.km
        x = (t_ns - nodes[0]) / NS_PER_S
        node_x = (nodes - nodes[0]) / NS_PER_S
        return np.stack([np.interp(x, node_x, axis) for axis in at_nodes])


def station_position(latitude_deg: float, longitude_deg: float, altitude_m: float) -> tuple[Array, Array]:
    """Return a ground station's ITRS position, km, and the unit vector of its zenith (WGS 84)."""
    place = wgs84.latlon(latitude_deg, longitude_deg, elevation_m=altitude_m)
    latitude, longitude = np.radians([latitude_deg, longitude_deg])
    up = np.array(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    )
    return np.asarray(place.itrs_xyz.km, dtype=np.float64), up


def geodetic(position_km: Array) -> tuple[Array, Array, Array]:
    """Return latitude, longitude (deg, WGS 84) and height (km) of ITRS positions, shape (n, 3).

    Bowring's formula, exact to a millimetre in low orbits.
    """
    a, f = 6378.137, 1 / 298.257223563
    b = a * (1 - f)
    e2, ep2 = f * (2 - f), (a * a - b * b) / (b * b)
    x, y, z = position_km.T
    p = np.hypot(x, y)
    theta = np.arctan2(z * a, p * b)
    latitude = np.arctan2(z + ep2 * b * np.sin(theta) ** 3, p - e2 * a * np.cos(theta) ** 3)
    prime = a / np.sqrt(1 - e2 * np.sin(latitude) ** 2)
    # This form stays exact at the poles, where p / cos(latitude) does not.
    height = p * np.cos(latitude) + z * np.sin(latitude) - a * a / prime
    return np.degrees(latitude), np.degrees(np.arctan2(y, x)), height
