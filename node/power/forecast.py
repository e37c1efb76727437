"""When the next eclipse comes, cheap enough to ask twice a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from node.power.ephemeris import NS_PER_DAY, NS_PER_S, Array, Ephemeris, PropagationError
from telemetry.errors import PenumbraError

ORBITS_AHEAD: Final = 5
ORBITS_NEEDED: Final = 3.2
"""Orbits of passes there are at any moment: a plan reaches three orbits ahead."""
EDGE_ERROR_S: Final = 2.0
"""Error of an edge with elements of their epoch (estimated: 1 km along track, the Sun's direction)."""
EDGE_ERROR_S_DAY: Final = 0.4
EDGE_ERROR_S_DAY2: Final = 0.08
"""What a day of age adds, and its square (assumed: 3 km a day, and drag that is not foreseen)."""
WORST_EDGE_S: Final = 60.0
"""Edges that may be further off than this are no forecast any more: 24 days of age."""
SAMPLES_PER_ORBIT: Final = 600
"""A sample each 9 s of a low orbit: brackets the edges; grazing passes are looked at again, finer."""
BISECTIONS: Final = 14
"""Halvings of a bracket: 9 s / 2**14 is 0.6 ms."""

Times = NDArray[np.int64]


class UmbraPass(msgspec.Struct, frozen=True, kw_only=True):
    """One passage through the Earth's umbra, all UTC, ns."""

    penumbra_entry_ns: int
    entry_ns: int
    exit_ns: int
    penumbra_exit_ns: int

    @property
    def duration_s(self) -> float:
        """Time in umbra, s."""
        return (self.exit_ns - self.entry_ns) / NS_PER_S


class EclipseForecast:
    """Sunlight and umbra passes along one orbit.

    Passes are found for five orbits ahead and kept until less than three are left, so most calls cost a
    look-up.
    """

    def __init__(self, ephemeris: Ephemeris) -> None:
        self._ephemeris = ephemeris
        self._passes: list[UmbraPass] = []
        self._covered: tuple[int, int] | None = None

    @classmethod
    def from_tle(cls, line1: str, line2: str) -> EclipseForecast:
        """Return the forecast for a TLE.

        Raises
        ------
        PenumbraError
            The TLE is malformed or its checksum is wrong; names the line.
        """
        return cls(Ephemeris(line1, line2))

    @classmethod
    def from_omm(cls, fields: Mapping[str, object]) -> EclipseForecast:
        """Return the forecast for an Orbit Mean-elements Message.

        Raises
        ------
        PenumbraError
            A field is missing or bad; names it.
        """
        return cls(Ephemeris.from_omm(fields))

    def prove(self) -> None:
        """Ask for the Sun at the elements' own epoch and a revolution later.

        Raises
        ------
        PenumbraError
            There is no position: elements that do not hold for a revolution are none.
        """
        epoch_ns = self._ephemeris.epoch_ns
        try:
            for t_ns in (epoch_ns, epoch_ns + round(self.period_s * NS_PER_S)):
                self.sunlit(t_ns)
        except PropagationError as error:
            raise PenumbraError(f"elements without a position at their own epoch: {error}") from None

    def beta_deg(self, t_ns: int) -> float:
        """Return the angle of the Sun above the plane of the orbit, deg.

        Raises
        ------
        PropagationError
            SGP4 has no position at that time.
        """
        return float(self._ephemeris.beta_deg(t_ns))

    def zenith_incidence(self, t_ns: Times) -> Array:
        """Return the incidence on an array that looks away from Earth, by its mean over the sunlit orbit.

        Parameters
        ----------
        t_ns
            Mission times, UTC, shape (n,).

        Raises
        ------
        PropagationError
            SGP4 has no position in that time.
        """
        orbit = t_ns[0] + np.linspace(0, self.period_s * NS_PER_S, 181).astype(np.int64)[:-1]
        lit = self._ephemeris.sunlit_fraction(orbit) > 0.5
        mean = float(np.maximum(0.0, self._ephemeris.zenith_cosine(orbit)[lit]).mean())
        return np.maximum(0.0, self._ephemeris.zenith_cosine(t_ns)) / max(mean, 1e-6)

    def between(self, begin_ns: int, end_ns: int) -> list[UmbraPass]:
        """Return the whole umbra passes of a stretch of time, of days if need be.

        Raises
        ------
        PropagationError
            SGP4 has no position in that time.
        """
        return self._find(begin_ns, end_ns)

    @property
    def period_s(self) -> float:
        """Period of the orbit, s."""
        return self._ephemeris.period_s

    def tle_age_days(self, t_ns: int) -> float:
        """Return how far `t_ns` lies from the TLE's epoch, days, never negative.

        SGP4 drifts by kilometres a day in a low orbit: about 1 km at epoch, useful for two weeks.
        """
        return abs(t_ns - self._ephemeris.epoch_ns) / NS_PER_DAY

    def sunlit(self, t_ns: int) -> float:
        """Return the visible share of the Sun's disc at `t_ns`, 0 to 1.

        Raises
        ------
        PropagationError
            SGP4 has no position at that time.
        """
        return float(self._ephemeris.sunlit_fraction(t_ns))

    def edge_margin_s(self, t_ns: int) -> float:
        """Return the error to reckon with of a forecast edge, s; it grows with the age of the elements."""
        days = self.tle_age_days(t_ns)
        return EDGE_ERROR_S + EDGE_ERROR_S_DAY * days + EDGE_ERROR_S_DAY2 * days * days

    def is_usable(self, t_ns: int) -> bool:
        """Tell whether the elements are young enough for a forecast."""
        return self.edge_margin_s(t_ns) <= WORST_EDGE_S

    def next_umbra(self, t_ns: int) -> UmbraPass | None:
        """Return the umbra pass under way at `t_ns`, else the next one.

        Returns
        -------
        UmbraPass or None
            None when the orbit meets no umbra within about three orbits.

        Raises
        ------
        PropagationError
            SGP4 has no position in the time looked at.
        """
        return next(iter(self.passes(t_ns)), None)

    def passes(self, t_ns: int) -> tuple[UmbraPass, ...]:
        """Return the umbra pass under way at `t_ns` and those after it, three orbits ahead at least.

        Raises
        ------
        PropagationError
            SGP4 has no position in the time looked at.
        """
        period_ns = round(self.period_s * NS_PER_S)
        covered = self._covered
        if covered is None or not covered[0] <= t_ns <= covered[1]:
            # One orbit back: a pass under way needs its beginning too.
            begin, end = t_ns - period_ns, t_ns + ORBITS_AHEAD * period_ns
            self._passes = self._find(begin, end)
            # Half an orbit back is still good: mission time may be set back a little by the bus.
            self._covered = (t_ns - period_ns // 2, end - round(ORBITS_NEEDED * period_ns))
        return tuple(p for p in self._passes if p.exit_ns > t_ns)

    def _find(self, begin_ns: int, end_ns: int) -> list[UmbraPass]:
        step = round(self.period_s * NS_PER_S / SAMPLES_PER_ORBIT)
        times = np.arange(begin_ns, end_ns + step, step, dtype=np.int64)
        times = self._refine_grazing(times)
        umbra = self._crossings(times, self._umbra_margin)
        penumbra = self._crossings(times, self._penumbra_margin)
        passes = []
        for entry, leave in umbra:
            around = next((p for p in penumbra if p[0] <= entry and leave <= p[1]), None)
            if around is not None:
                passes.append(
                    UmbraPass(
                        penumbra_entry_ns=around[0], entry_ns=entry, exit_ns=leave, penumbra_exit_ns=around[1]
                    )
                )
        return passes

    def _refine_grazing(self, times: Times) -> Times:
        """Add samples where the Sun comes close to the Earth's limb between two samples and turns back."""
        margin = self._umbra_margin(times)
        low = (
            np.flatnonzero((margin[1:-1] > 0) & (margin[1:-1] <= margin[:-2]) & (margin[1:-1] <= margin[2:]))
            + 1
        )
        extra = [np.linspace(times[i - 1], times[i + 1], 42, dtype=np.int64)[1:-1] for i in low]
        return np.unique(np.concatenate([times, *extra]))

    def _umbra_margin(self, times: Times) -> Array:
        """Angle by which the Sun's far limb stands clear of the Earth's disc, rad; below 0 in umbra."""
        sun, earth, separation = self._ephemeris.shadow(times)
        return separation - (earth - sun)

    def _penumbra_margin(self, times: Times) -> Array:
        sun, earth, separation = self._ephemeris.shadow(times)
        return separation - (earth + sun)

    @staticmethod
    def _crossings(times: Times, margin: Callable[[Times], Array]) -> list[tuple[int, int]]:
        """Return (entry, exit) pairs of a margin going below and above 0, whole ones only."""
        below = margin(times) < 0
        edges = np.flatnonzero(below[1:] != below[:-1])
        if edges.size == 0:
            return []
        falling = below[edges + 1]
        low, high = times[edges], times[edges + 1]
        for _ in range(BISECTIONS):
            middle = low + (high - low) // 2
            before = (margin(middle) < 0) != falling
            low, high = np.where(before, middle, low), np.where(before, high, middle)
        moments = [int(t) for t in high]
        first = 0 if falling[0] else 1
        return list(zip(moments[first::2], moments[first + 1 :: 2], strict=False))
