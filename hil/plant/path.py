"""The flight path: positions, sunlight and eclipses on a grid of one second, computed once a flight."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from hil.plant.orbit import Array, Geometry, TrueOrbit
from hil.plant.shadow import edges, sunlit_fraction

NS_PER_S: Final = 1_000_000_000


class UmbraEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One true eclipse, UTC ns."""

    penumbra_entry_ns: int
    entry_ns: int
    exit_ns: int
    penumbra_exit_ns: int


class FlightPath:
    """Geometry of a flight. Shared between plants of one orbit: nobody writes to it.

    Attributes
    ----------
    t_ns
        Grid of UTC times, a second apart, shape (n,).
    geometry
        Positions there, ITRS, km.
    sunlit
        Visible share of the Sun's disc there, 0 to 1, shape (n,).
    events
        Whole eclipses that end after the first grid time.
    """

    def __init__(
        self, t_ns: NDArray[np.int64], geometry: Geometry, sunlit: Array, events: tuple[UmbraEvent, ...]
    ) -> None:
        self.t_ns = t_ns
        self.geometry = geometry
        self.sunlit = sunlit
        self.events = events
        for array in (t_ns, geometry.satellite, geometry.sun, geometry.normal, sunlit):
            array.flags.writeable = False


@lru_cache(maxsize=4)
def flight_path(line1: str, line2: str, start_ns: int, seconds: int) -> FlightPath:
    """Return the path of a TLE from `start_ns` on, `seconds` long.

    Raises
    ------
    ValueError
        The orbit decays within that time.
    """
    true = TrueOrbit(line1, line2)
    # Half a revolution before the start: an eclipse under way then has its beginning in the grid.
    lead = round(true.period_s / 2)
    grid = start_ns + np.arange(-lead, seconds + 1, dtype=np.int64) * NS_PER_S
    geometry = true.geometry(grid)
    sunlit = sunlit_fraction(geometry)
    events = pair_events(edges(true, grid, 0.0, sunlit), edges(true, grid, 1.0, sunlit))
    return FlightPath(
        grid[lead:].copy(),
        Geometry(geometry.satellite[lead:].copy(), geometry.sun[lead:].copy(), geometry.normal[lead:].copy()),
        sunlit[lead:].copy(),
        tuple(e for e in events if e.penumbra_exit_ns > start_ns),
    )


def pair_events(umbra: list[tuple[int, bool]], penumbra: list[tuple[int, bool]]) -> tuple[UmbraEvent, ...]:
    """Return whole eclipses from edges of umbra and penumbra, each (time, begins), in order of time."""
    events = []
    for (entry, begins), (leave, _) in pairwise(umbra):
        if not begins:
            continue
        before = [t for t, starts in penumbra if starts and t <= entry]
        after = [t for t, starts in penumbra if not starts and t >= leave]
        if before and after:
            events.append(
                UmbraEvent(
                    penumbra_entry_ns=before[-1], entry_ns=entry, exit_ns=leave, penumbra_exit_ns=after[0]
                )
            )
    return tuple(events)
