"""Eclipses by the array alone, for when no orbital elements can be trusted.

Pure. Darkness begins and ends as the array's current says; two beginnings give the period, and the last
darkness its length. Both change by seconds from orbit to orbit, so what is told is good for a few orbits.
"""

from __future__ import annotations

from typing import Final

from node.power.array import LEAST_W
from node.power.forecast import UmbraPass

DARK_SHARE: Final = 0.02
LIT_SHARE: Final = 0.10
"""Shares of the array's full power under which it is dark, and above which it is lit again."""
SHORTEST_ORBIT_NS: Final = 5_000 * 1_000_000_000
LONGEST_ORBIT_NS: Final = 12_000 * 1_000_000_000
"""Periods of low orbits, with room: another interval is no orbit (a missed eclipse, a tumble)."""
SHORTEST_DARK_NS: Final = 20 * 1_000_000_000
"""A shorter darkness is a dropout."""
EDGE_MARGIN_S: Final = 30.0
"""Error of the next edge (assumed: change from orbit to orbit, and what the array's tilt adds)."""
PASSES: Final = 4


class SensedEclipses:
    """Follows the array's power."""

    def __init__(self) -> None:
        self._dark: bool | None = None
        self._began_ns: int | None = None
        self._entries: list[int] = []
        self._length_ns: int | None = None

    @property
    def dark(self) -> bool | None:
        """Whether the array is dark now; None before the first reading."""
        return self._dark

    @property
    def period_s(self) -> float | None:
        """Period by the last two entries, s; None until there are two."""
        period_ns = self._period_ns()
        return None if period_ns is None else period_ns / 1e9

    def handle(self, t_ns: int, array_w: float, array_sun_w: float) -> None:
        """Take a reading of the array at mission time `t_ns`."""
        if array_sun_w < LEAST_W:
            return
        share = array_w / array_sun_w
        before = self._dark
        if share < DARK_SHARE:
            self._dark = True
        elif share > LIT_SHARE or before is None:
            self._dark = False
        if self._dark and before is False:
            self._began_ns = t_ns
        elif before and self._dark is False and self._began_ns is not None:
            if t_ns - self._began_ns >= SHORTEST_DARK_NS:
                self._entries = [*self._entries[-1:], self._began_ns]
                self._length_ns = t_ns - self._began_ns
            self._began_ns = None

    def passes(self, t_ns: int) -> tuple[UmbraPass, ...]:
        """Return the darkness under way and those expected next; none until a whole orbit was seen."""
        period_ns, length_ns = self._period_ns(), self._length_ns
        if period_ns is None or length_ns is None:
            return ()
        found: list[UmbraPass] = []
        entry = self._entries[-1] if self._began_ns is None else self._began_ns
        # Mission time may have jumped by years: what lies between is not walked through.
        entry += max(0, t_ns - length_ns - entry) // period_ns * period_ns
        while len(found) < PASSES:
            leave = entry + length_ns
            if leave > t_ns:
                found.append(
                    UmbraPass(penumbra_entry_ns=entry, entry_ns=entry, exit_ns=leave, penumbra_exit_ns=leave)
                )
            entry += period_ns
        return tuple(found)

    def _period_ns(self) -> int | None:
        if len(self._entries) < 2:
            return None
        period_ns = self._entries[-1] - self._entries[-2]
        return period_ns if SHORTEST_ORBIT_NS <= period_ns <= LONGEST_ORBIT_NS else None
