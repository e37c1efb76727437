"""How much of the Sun the satellite truly sees: rays from points of the solar disc against the ellipsoid.

Each ray either meets the WGS 84 ellipsoid or passes it, by the sign of a discriminant; no angle between
discs, no scaled space, no formula for the overlap of circles. That is on purpose: the flight's forecast
uses those, and must be measured against something else. Atmosphere is neglected here as there: real
sunlight reddens and fades over some seconds around the geometric edge.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from hil.plant.orbit import CHUNK, Array, Geometry, TrueOrbit

SUN_RADIUS_KM: Final = 695_700.0
EQUATOR_KM: Final = 6378.137
POLE_KM: Final = 6356.752314245
DISC_POINTS: Final = 721
RIM_POINTS: Final = 180
"""Their chords leave 0.015 % of the Sun's radius: 1 ms of an orbit."""
BISECTIONS: Final = 11
"""Halvings of a bracket: 0.5 ms on a grid of one second."""

_SPIRAL = np.arange(DISC_POINTS)
_RADIUS = np.sqrt((_SPIRAL + 0.5) / DISC_POINTS)
_TURN = _SPIRAL * np.pi * (3.0 - np.sqrt(5.0))
_DISC = np.stack([_RADIUS * np.cos(_TURN), _RADIUS * np.sin(_TURN)])
"""Points of equal area in the unit disc, shape (2, DISC_POINTS)."""
_RIM_TURN = np.arange(RIM_POINTS) * 2 * np.pi / RIM_POINTS
_RIM = np.stack([np.cos(_RIM_TURN), np.sin(_RIM_TURN)])


def _hidden(satellite: Array, sun: Array, disc: Array) -> NDArray[np.bool_]:
    """Return which points of the solar disc the Earth hides, shape (n, points)."""
    to_sun = sun - satellite
    distance = np.linalg.norm(to_sun, axis=-1, keepdims=True)
    axis = to_sun / distance
    # Any vector not along the axis will do for a first perpendicular one.
    other = np.where(np.abs(axis[:, 2:3]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    u = np.cross(axis, other)
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    v = np.cross(axis, u)
    offset = u[:, None, :] * disc[0][:, None] + v[:, None, :] * disc[1][:, None]
    ray = axis[:, None, :] + offset * (SUN_RADIUS_KM / distance)[:, None, :]
    weight = np.array([EQUATOR_KM, EQUATOR_KM, POLE_KM]) ** -2.0
    along = np.einsum("nk,npk,k->np", satellite, ray, weight)
    square = np.einsum("npk,npk,k->np", ray, ray, weight)
    outside = np.einsum("nk,nk,k->n", satellite, satellite, weight) - 1.0
    return np.asarray((along < 0) & (along * along >= square * outside[:, None]))


def sunlit_fraction(geometry: Geometry) -> Array:
    """Return the visible share of the solar disc's area, 0 to 1, shape (n,)."""
    n = len(geometry.satellite)
    parts = [
        _fraction(geometry.satellite[i : i + CHUNK], geometry.sun[i : i + CHUNK]) for i in range(0, n, CHUNK)
    ]
    return np.concatenate(parts)


def _fraction(satellite: Array, sun: Array) -> Array:
    rim = _hidden(satellite, sun, _RIM)
    fraction = np.where(rim.all(axis=1), 0.0, 1.0)
    partial = np.flatnonzero(rim.any(axis=1) & ~rim.all(axis=1))
    if partial.size:
        disc = _hidden(satellite[partial], sun[partial], _DISC)
        fraction[partial] = 1.0 - disc.mean(axis=1)
    return fraction


def edges(orbit: TrueOrbit, t_ns: NDArray[np.int64], below: float, fraction: Array) -> list[tuple[int, bool]]:
    """Return when the Sun's disc begins or ceases to be covered so far, to 1/2048 of the grid's step.

    Parameters
    ----------
    orbit
        The satellite.
    t_ns
        Times of a grid, ascending, closer together than the events sought.
    below
        0 for the edges of the umbra (nothing visible), 1 for those of the penumbra (not all visible).
    fraction
        `sunlit_fraction` at `t_ns`.

    Returns
    -------
    list of (int, bool)
        UTC ns, and True where it begins.
    """

    def covered(share: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(share.all(axis=1) if below == 0 else share.any(axis=1))

    inside = fraction <= 0.0 if below == 0 else fraction < 1.0
    at = np.flatnonzero(inside[1:] != inside[:-1])
    if at.size == 0:
        return []
    begins = inside[at + 1]
    low, high = t_ns[at], t_ns[at + 1]
    for _ in range(BISECTIONS):
        middle = low + (high - low) // 2
        geometry = orbit.geometry(middle)
        before = covered(_hidden(geometry.satellite, geometry.sun, _RIM)) != begins
        low, high = np.where(before, middle, low), np.where(before, high, middle)
    return [(int(t), bool(b)) for t, b in zip(high, begins, strict=True)]
