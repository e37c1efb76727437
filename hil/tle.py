"""TLE lines from plain orbital elements."""

from __future__ import annotations

import math
from typing import Final

from sgp4.api import WGS72, Satrec
from sgp4.exporter import export_tle

MU_KM3_S2: Final = 398_600.8
"""WGS 72, as SGP4 uses."""
EARTH_RADIUS_KM: Final = 6378.135
"""WGS 72, equatorial."""
CATALOGUE_NUMBER: Final = 99_001
"""In the range left for objects not in the catalogue."""
_DAYS_1949_TO_1970: Final = 7_306.0
"""From SGP4's origin, 1949-12-31 00:00 UTC, to 1970-01-01."""


def mean_motion_rad_min(altitude_km: float) -> float:
    """Return the mean motion, rad/min, for a mean semi-major axis that far above the equator."""
    return math.sqrt(MU_KM3_S2 / (EARTH_RADIUS_KM + altitude_km) ** 3) * 60.0


def altitude_km(mean_motion_rev_day: float) -> float:
    """Return the mean semi-major axis less the equatorial radius, km."""
    n = mean_motion_rev_day * 2 * math.pi / 86_400.0
    return float((MU_KM3_S2 / n**2) ** (1.0 / 3.0)) - EARTH_RADIUS_KM


def tle_from_elements(
    *,
    epoch_ns: int,
    altitude_km: float,
    eccentricity: float,
    inclination_deg: float,
    raan_deg: float,
    arg_perigee_deg: float,
    mean_anomaly_deg: float,
    bstar: float,
) -> tuple[str, str]:
    """Return the two lines of a TLE.

    Parameters
    ----------
    epoch_ns
        UTC, ns since 1970; the TLE keeps it to 0.86 ms.
    altitude_km
        Mean semi-major axis less 6378.135 km.
    eccentricity, inclination_deg, raan_deg, arg_perigee_deg, mean_anomaly_deg
        Mean elements as SGP4 understands them (TEME of date).
    bstar
        Drag, 1 / Earth radii.
    """
    satellite = Satrec()
    satellite.sgp4init(
        WGS72,
        "i",
        CATALOGUE_NUMBER,
        epoch_ns / 86_400e9 + _DAYS_1949_TO_1970,
        bstar,
        0.0,
        0.0,
        eccentricity,
        math.radians(arg_perigee_deg),
        math.radians(inclination_deg),
        math.radians(mean_anomaly_deg),
        mean_motion_rad_min(altitude_km),
        math.radians(raan_deg),
    )
    line1, line2 = export_tle(satellite)
    return line1, line2
