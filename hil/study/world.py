"""The world of a study: what the Sun gives along an orbit, what is asked of the payload, and what is told.

The truth is the bench's own: Skyfield's ephemeris for the Sun and shadow, the plant's array and battery. What
the governors are told of it carries errors, drawn once for each cell from its seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hil.plant.orbit import TrueOrbit
from hil.plant.path import pair_events
from hil.plant.shadow import edges, sunlit_fraction
from hil.tle import tle_from_elements
from node.power.forecast import UmbraPass

Array = NDArray[np.float64]

NS_PER_S: Final = 1_000_000_000
STEP_S: Final = 10
"""Step of the simulation, s."""
ASTRONOMICAL_UNIT_KM: Final = 149_597_870.7
ALTITUDE_KM: Final = 420.0
INCLINATION_DEG: Final = 51.64
EPOCH_NS: Final = 1_780_308_000 * NS_PER_S
"""2026-06-01 10:00 UTC."""
SUN_DECLINATION_DEG: Final = 22.0
SUN_RIGHT_ASCENSION_DEG: Final = 68.6
"""Of that day, to place the orbit; what the beta angle then is, is computed."""


@dataclass(frozen=True)
class Sky:
    """What the Sun gives at each step, shape (steps,)."""

    beta_deg: float
    """Mean angle between the Sun and the plane of the orbit over the time."""
    period_s: float
    irradiance: Array
    """Visible disc times distance effect, as a share of the solar constant."""
    cosine: Array
    """Of the Sun's incidence on an array that turns about one axis."""
    zenith: Array
    """Cosine of the Sun's zenith angle below the satellite."""
    passes: tuple[UmbraPass, ...]
    """True umbra passes."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.irradiance)


@lru_cache(maxsize=16)
def sky(beta_deg: float, orbits: int) -> Sky:
    """Return the Sun along a circular orbit of about a beta angle, some orbits long.

    Raises
    ------
    ValueError
        No node of this inclination gives that beta angle on that day.
    """
    line1, line2 = tle_from_elements(
        epoch_ns=EPOCH_NS,
        altitude_km=ALTITUDE_KM,
        eccentricity=0.0005,
        inclination_deg=INCLINATION_DEG,
        raan_deg=_node_deg(beta_deg),
        arg_perigee_deg=0.0,
        mean_anomaly_deg=0.0,
        bstar=0.0,
    )
    true = TrueOrbit(line1, line2)
    steps = math.ceil(orbits * true.period_s / STEP_S)
    # Before and after as well: passes must be whole, and planners look three orbits ahead.
    lead, ahead = (math.ceil(n * true.period_s / STEP_S) for n in (0.6, 3.5))
    grid = EPOCH_NS + np.arange(-lead, steps + ahead, dtype=np.int64) * (STEP_S * NS_PER_S)
    inside = slice(lead, lead + steps)
    geometry = true.geometry(grid)
    lit = sunlit_fraction(geometry)
    events = pair_events(edges(true, grid, 0.0, lit), edges(true, grid, 1.0, lit))
    sun = geometry.sun / np.linalg.norm(geometry.sun, axis=1, keepdims=True)
    up = geometry.satellite / np.linalg.norm(geometry.satellite, axis=1, keepdims=True)
    across = np.sum(sun * geometry.normal, axis=1)
    distance = np.linalg.norm(geometry.sun, axis=1)
    return Sky(
        beta_deg=float(np.degrees(np.arcsin(across)).mean()),
        period_s=true.period_s,
        irradiance=(lit * (ASTRONOMICAL_UNIT_KM / distance) ** 2)[inside],
        cosine=np.sqrt(np.maximum(0.0, 1.0 - across**2))[inside],
        zenith=np.sum(sun * up, axis=1)[inside],
        passes=tuple(
            UmbraPass(
                penumbra_entry_ns=e.penumbra_entry_ns,
                entry_ns=e.entry_ns,
                exit_ns=e.exit_ns,
                penumbra_exit_ns=e.penumbra_exit_ns,
            )
            for e in events
            if e.exit_ns > EPOCH_NS
        ),
    )


def _node_deg(beta_deg: float) -> float:
    """Return the right ascension of the node that gives a beta angle at the epoch.

    sin(beta) = cos(dec) sin(inc) sin(node - ra) + sin(dec) cos(inc)
    """
    inclination, declination = math.radians(INCLINATION_DEG), math.radians(SUN_DECLINATION_DEG)
    sine = (math.sin(math.radians(beta_deg)) - math.sin(declination) * math.cos(inclination)) / (
        math.cos(declination) * math.sin(inclination)
    )
    if not -1.0 <= sine <= 1.0:
        raise ValueError(f"beta {beta_deg:g} deg cannot be had at an inclination of {INCLINATION_DEG:g} deg")
    return (SUN_RIGHT_ASCENSION_DEG + math.degrees(math.asin(sine))) % 360.0


@dataclass(frozen=True)
class Order:
    """Tokens asked for together."""

    arrives: int
    """Step from which on they are known."""
    tokens: float
    value: float
    due: int | None
    """Step at whose start they are worth nothing any more."""


URGENT: Final = (4.0, 0.08)
STANDARD: Final = (2.0, 0.25)
"""Value of a token, and share of the highest rate over an orbit that is asked for on the mean."""
BACKGROUND_VALUE: Final = 1.0
"""Work without end: there is always something worth doing."""


def orders(sky_: Sky, most_tokens_s: float, rng: np.random.Generator) -> list[Order]:
    """Return what is asked for: once an orbit, at a contact, an urgent and a standard order.

    Parameters
    ----------
    sky_
        For how long.
    most_tokens_s
        Highest rate of the board.
    rng
        Sizes, times and deadlines come from it.
    """
    orbit = sky_.period_s / STEP_S
    placed = []
    at = 0.0
    while at < sky_.steps:
        contact = int(at + rng.uniform(0.0, 0.5) * orbit)
        for (value, share), orbits in ((URGENT, (0.4, 1.2)), (STANDARD, (1.5, 4.0))):
            tokens = share * most_tokens_s * sky_.period_s * float(rng.lognormal(-0.125, 0.5))
            due = contact + int(rng.uniform(*orbits) * orbit)
            placed.append(Order(contact, tokens, value, due))
        at += orbit
    return [each for each in placed if each.arrives < sky_.steps]
