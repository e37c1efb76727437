"""Where the satellite and the Sun are, and how much of the Sun's disc the satellite sees.

SGP4 from mean elements, an analytic Sun, and a conical shadow of the oblate Earth. All vectorised.

Frames: SGP4 gives TEME (true equator, mean equinox of date); the Sun comes in the mean equator and
equinox of date. The two differ by nutation only, at most 17 arcseconds or 0.07 s of a low orbit, which
is neglected. A J2000 Sun in its place is 0.37 deg off in 2026: 6 s of a low orbit's motion
(reference/fsw.md section 5 measured 12 s on its orbit).

Accuracy: Sun direction 0.01 deg (Meeus, Astronomical Algorithms, chapter 25), which is 0.15 s at a low
orbit's rate. Neglected: refraction and absorption in the atmosphere, light time across the orbit (40 us),
the change of the solar disc's shape under the scaling below (1 part in 300 of 0.27 deg).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sgp4.api import WGS72, Satrec

from node.power.elements import NS_PER_DAY, NS_PER_S, Elements
from telemetry.errors import PenumbraError

Array = NDArray[np.float64]

EARTH_RADIUS_KM: Final = 6378.137
"""Equatorial radius, WGS 84."""
EARTH_FLATTENING: Final = 1.0 / 298.257223563
"""WGS 84."""
SUN_RADIUS_KM: Final = 695_700.0
"""Nominal solar radius, IAU 2015 resolution B3."""
ASTRONOMICAL_UNIT_KM: Final = 149_597_870.7
MINUTES_PER_DAY: Final = 1_440.0
SGP4_ORIGIN_DAYS: Final = 7_306.0
"""From SGP4's origin, 1949-12-31 00:00 UTC, to 1970-01-01."""
UNIX_EPOCH_JD: Final = 2_440_587.5
J2000_UNIX_S: Final = 946_728_000.0
"""2000-01-01 12:00 as seconds since 1970."""
TT_MINUS_UTC_S: Final = 69.184
"""Since 2017. A leap second more or less moves the Sun by 0.04 arcseconds."""
TRIAL_REVOLUTIONS: Final = (-1, 5)
"""What a forecast reaches over, from the epoch: SGP4 has to give a position all along, or it is none."""
TRIAL_POINTS: Final = 361


class PropagationError(ArithmeticError):
    """SGP4 cannot give a position: the satellite has decayed, or the time is far from the epoch."""


def sun_of_date_km(t_ns: ArrayLike) -> Array:
    """Return the apparent geocentric Sun, mean equator and equinox of date.

    Parameters
    ----------
    t_ns
        UTC, ns since 1970; any shape.

    Returns
    -------
    Array
        km, the shape of `t_ns` with 3 added.

    Notes
    -----
    Meeus chapter 25, low accuracy: 0.01 deg in longitude between 1950 and 2050. Annual aberration is
    included, for the shadow lies along the light that reaches the moving Earth; nutation is not.
    """
    t = (np.asarray(t_ns, dtype=np.int64) / NS_PER_S + TT_MINUS_UTC_S - J2000_UNIX_S) / (86_400.0 * 36_525.0)
    mean_longitude = np.radians(280.46646 + t * (36_000.76983 + t * 0.0003032))
    mean_anomaly = np.radians(357.52911 + t * (35_999.05029 - t * 0.0001537))
    centre = np.radians(
        (1.914602 - t * (0.004817 + 0.000014 * t)) * np.sin(mean_anomaly)
        + (0.019993 - 0.000101 * t) * np.sin(2 * mean_anomaly)
        + 0.000289 * np.sin(3 * mean_anomaly)
    )
    aberration = math.radians(20.4898 / 3600.0)
    longitude = mean_longitude + centre - aberration
    eccentricity = 0.016708634 - t * (0.000042037 + 0.0000001267 * t)
    distance = (1.000001018 * (1 - eccentricity**2)) / (1 + eccentricity * np.cos(mean_anomaly + centre))
    obliquity = np.radians(23.43929111 - 0.013004167 * t)
    direction = np.stack(
        [np.cos(longitude), np.cos(obliquity) * np.sin(longitude), np.sin(obliquity) * np.sin(longitude)],
        axis=-1,
    )
    return np.asarray(direction * (distance * ASTRONOMICAL_UNIT_KM)[..., np.newaxis], dtype=np.float64)


def shadow_angles(
    satellite_km: Array, sun_km: Array, flattening: float = EARTH_FLATTENING
) -> tuple[Array, Array, Array]:
    """Return the angular radii of the Sun and Earth, and their separation, seen from the satellite.

    The oblate Earth becomes a sphere when space is stretched along its axis by 1 / (1 - f); straight
    rays stay straight, so what is hidden before is hidden after.

    Parameters
    ----------
    satellite_km, sun_km
        Geocentric, equator of date, shape (..., 3).
    flattening
        0 for a spherical Earth of equatorial radius.

    Returns
    -------
    tuple of Array
        Radius of the Sun, radius of the Earth, separation of their centres, rad, shape (...).
    """
    stretch = np.array([1.0, 1.0, 1.0 / (1.0 - flattening)])
    satellite = satellite_km * stretch
    to_sun = sun_km * stretch - satellite
    height = np.sqrt(np.sum(satellite * satellite, axis=-1))
    distance = np.sqrt(np.sum(to_sun * to_sun, axis=-1))
    sun_radius = np.arcsin(SUN_RADIUS_KM / distance)
    earth_radius = np.arcsin(np.minimum(1.0, EARTH_RADIUS_KM / height))
    cosine = -np.sum(satellite * to_sun, axis=-1) / (height * distance)
    return sun_radius, earth_radius, np.arccos(np.clip(cosine, -1.0, 1.0))


def disc_visible(sun_radius: Array, earth_radius: Array, separation: Array) -> Array:
    """Return the share of the Sun's disc not covered by the Earth's, 0 to 1.

    Montenbruck and Gill, Satellite Orbits, section 3.4.2. Angles in rad, any one shape.
    """
    a, b, c = np.broadcast_arrays(sun_radius, earth_radius, separation)
    visible = np.where(c >= a + b, 1.0, 0.0)
    # An Earth smaller than the Sun is an annular eclipse, beyond 1.4 million km: not our orbits.
    partial = (c < a + b) & (c > b - a)
    if np.any(partial):
        pa, pb, pc = a[partial], b[partial], c[partial]
        x = (pc * pc + pa * pa - pb * pb) / (2 * pc)
        y = np.sqrt(np.maximum(0.0, pa * pa - x * x))
        covered = (
            pa * pa * np.arccos(np.clip(x / pa, -1.0, 1.0))
            + pb * pb * np.arccos(np.clip((pc - x) / pb, -1.0, 1.0))
            - pc * y
        )
        visible = visible.copy()
        visible[partial] = np.clip(1.0 - covered / (np.pi * pa * pa), 0.0, 1.0)
    return np.asarray(visible, dtype=np.float64)


class Ephemeris:
    """Satellite and Sun from one set of elements, by SGP4.

    Parameters
    ----------
    elements
        As a TLE or an Orbit Mean-elements Message gives them.
    flattening
        Of the Earth, for the shadow; 0 for a sphere.

    Raises
    ------
    PenumbraError
        SGP4 has no position somewhere in `TRIAL_REVOLUTIONS`.
    """

    def __init__(self, elements: Elements, *, flattening: float = EARTH_FLATTENING) -> None:
        self._flattening = flattening
        self.epoch_ns: int = elements.epoch_ns
        """Epoch of the elements, UTC."""
        self.period_s: float = 86_400.0 / elements.mean_motion_rev_day
        """Anomalistic period, s."""
        self._satellite = Satrec()
        self._satellite.sgp4init(
            WGS72,
            "i",
            0,
            elements.epoch_ns / NS_PER_DAY + SGP4_ORIGIN_DAYS,
            elements.bstar,
            0.0,
            0.0,
            elements.eccentricity,
            math.radians(elements.arg_perigee_deg),
            math.radians(elements.inclination_deg),
            math.radians(elements.mean_anomaly_deg),
            elements.mean_motion_rev_day * 2 * math.pi / MINUTES_PER_DAY,
            math.radians(elements.raan_deg),
        )
        reach_ns = np.linspace(*TRIAL_REVOLUTIONS, TRIAL_POINTS) * self.period_s * NS_PER_S
        try:
            self.satellite_teme_km(self.epoch_ns + reach_ns.astype(np.int64))
        except PropagationError as error:
            raise PenumbraError(
                f"elements with perigee {elements.perigee_km:.0f} km, eccentricity "
                f"{elements.eccentricity:g} and drag {elements.bstar:g} are no orbit SGP4 can propagate "
                f"over five revolutions ({error})",
                "take newer elements from their source",
            ) from None

    @classmethod
    def from_tle(cls, line1: str, line2: str, *, flattening: float = EARTH_FLATTENING) -> Ephemeris:
        """Return the ephemeris of a TLE; raises what `Elements.from_tle` does."""
        return cls(Elements.from_tle(line1, line2), flattening=flattening)

    @classmethod
    def from_omm(cls, fields: Mapping[str, object], *, flattening: float = EARTH_FLATTENING) -> Ephemeris:
        """Return the ephemeris of an Orbit Mean-elements Message; raises what `Elements.from_omm` does."""
        return cls(Elements.from_omm(fields), flattening=flattening)

    def satellite_teme_km(self, t_ns: ArrayLike) -> Array:
        """Return positions in TEME, km, the shape of `t_ns` with 3 added.

        Raises
        ------
        PropagationError
            SGP4 has no position for one of the times.
        """
        return self._state(t_ns)[0]

    def beta_deg(self, t_ns: ArrayLike) -> Array:
        """Return the angle of the Sun above the plane of the orbit, deg, -90 to 90, the shape of `t_ns`.

        Raises
        ------
        PropagationError
            SGP4 has no position for one of the times.
        """
        position, velocity = self._state(t_ns)
        normal = np.cross(position, velocity)
        sun = sun_of_date_km(t_ns)
        sine = np.sum(normal * sun, axis=-1) / (
            np.linalg.norm(normal, axis=-1) * np.linalg.norm(sun, axis=-1)
        )
        return np.asarray(np.degrees(np.arcsin(sine)), dtype=np.float64)

    def zenith_cosine(self, t_ns: ArrayLike) -> Array:
        """Return the cosine of the Sun's angle from straight up at the satellite, the shape of `t_ns`.

        Raises
        ------
        PropagationError
            SGP4 has no position for one of the times.
        """
        position, sun = self.satellite_teme_km(t_ns), sun_of_date_km(t_ns)
        along = np.sum(position * sun, axis=-1)
        return np.asarray(along / (np.linalg.norm(position, axis=-1) * np.linalg.norm(sun, axis=-1)))

    def _state(self, t_ns: ArrayLike) -> tuple[Array, Array]:
        """Return position, km, and velocity, km/s, in TEME."""
        t = np.asarray(t_ns, dtype=np.int64)
        day, rest = np.divmod(t.ravel(), NS_PER_DAY)
        error, position, velocity = self._satellite.sgp4_array(day + UNIX_EPOCH_JD, rest / NS_PER_DAY)
        bad = error.astype(bool) | ~np.all(np.isfinite(position), axis=-1)
        if np.any(bad):
            first = int(np.argmax(bad))
            raise PropagationError(f"SGP4 error {error[first]} at t_ns {t.ravel()[first]}")
        shape = (*t.shape, 3)
        return (
            np.asarray(position, dtype=np.float64).reshape(shape),
            np.asarray(velocity, dtype=np.float64).reshape(shape),
        )

    def shadow(self, t_ns: ArrayLike) -> tuple[Array, Array, Array]:
        """Return `shadow_angles` at UTC times `t_ns`: three arrays of its shape, rad."""
        return shadow_angles(self.satellite_teme_km(t_ns), sun_of_date_km(t_ns), self._flattening)

    def sunlit_fraction(self, t_ns: ArrayLike) -> Array:
        """Return the visible share of the Sun's disc, 0 (umbra) to 1, at UTC times `t_ns`."""
        return disc_visible(*self.shadow(t_ns))
