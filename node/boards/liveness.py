"""Whether a sensor is alive: a file that can be read may hold a value that nobody updates.

A sensor that stands still is unknown, and a finding (row `board.sensor` of the FDIR table).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

APART_C: Final = 5.0
"""Change of one temperature in which every other one of the same chip moves too, degC (assumed: their
resolution is 1 degC or finer)."""


class Liveness:
    """Which values have not changed for too long.

    Parameters
    ----------
    patience_s
        Longest time for which a live value may stay the same, s.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._moved: dict[str, tuple[object, float]] = {}

    def stands_still(self, name: str, value: object, now_s: float) -> bool:
        """Take a value at a physical time, s; return whether it has not changed for longer than allowed."""
        last = self._moved.get(name)
        if last is None or last[0] != value:
            self._moved[name] = value, now_s
            return False
        return now_s - last[1] > self._patience_s


class Companions:
    """Which temperatures stand still while others move.

    Temperature may be constant for long; that one of several is constant while another changes by
    `APART_C` means that it is no measurement.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._seen: dict[str, dict[str, tuple[float, float]]] = {}
        """Lowest and highest value of the others since a name changed last."""

    def still(self, values_c: Mapping[str, float]) -> set[str]:
        """Take the temperatures of now, degC by name; return the names that stand still."""
        found = set()
        for name, value_c in values_c.items():
            if self._last.get(name) != value_c:
                self._last[name] = value_c
                self._seen[name] = {}
            seen = self._seen[name]
            for other, other_c in values_c.items():
                low, high = seen.get(other, (other_c, other_c))
                seen[other] = min(low, other_c), max(high, other_c)
            if any(high - low >= APART_C for low, high in seen.values()):
                found.add(name)
        return found
