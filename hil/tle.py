"""TLE lines from plain orbital elements, and back."""

from __future__ import annotations

import math
from typing import Final

import msgspec
from sgp4.api import WGS72, Satrec
from sgp4.exporter import export_tle

from node.power.elements import EARTH_RADIUS_KM, MU_KM3_S2, TLE_MEND, Elements
from node.power.ephemeris import SGP4_ORIGIN_DAYS, Ephemeris
from telemetry.errors import PenumbraError

CATALOGUE_NUMBER: Final = 99_001
"""In the range left for objects not in the catalogue."""


def mean_motion_rad_min(altitude_km: float) -> float:
    """Return the mean motion, rad/min, for a mean semi-major axis that far above the equator."""
    return math.sqrt(MU_KM3_S2 / (EARTH_RADIUS_KM + altitude_km) ** 3) * 60.0


def elements_of_tle(line1: str, line2: str) -> Elements:
    """Return the elements of a TLE that node and plant, whose readers differ, both take.

    Raises
    ------
    PenumbraError
        One of them does not.
    """
    elements = Elements.from_tle(line1, line2)
    Ephemeris(elements)
    what = f"TLE {line1!r} / {line2!r}"
    try:
        read = Satrec.twoline2rv(line1, line2, WGS72)
    except ValueError as error:
        raise PenumbraError(f"{what}: {error}", TLE_MEND) from None
    angles_deg = map(math.degrees, (read.inclo, read.nodeo, read.argpo, read.mo))
    theirs = (read.no_kozai * 720.0 / math.pi, read.ecco, *angles_deg, read.bstar)
    _, *ours = msgspec.structs.astuple(elements)
    # The reader takes a garbled field for the end of its line, without a word.
    if not all(map(math.isclose, ours, theirs)):
        raise PenumbraError(f"{what}: a field is not in the form of a TLE; {theirs} are read", TLE_MEND)
    return elements


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
        epoch_ns / 86_400e9 + SGP4_ORIGIN_DAYS,
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
