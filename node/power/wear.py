"""What cycling costs the battery: rainflow cycles of the state of charge, held against a table of life.

Each cycle of depth D uses 1 / life(D) of the battery (Palmgren and Miner); half cycles count half. Life
between two depths of the table is taken on a line in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import rainflow

from node.power.battery import BatterySettings

NOISE: Final = 0.004
"""Reversals of the state of charge under this are its sensor's noise (assumed)."""
MAX_TURNS: Final = 4096
"""Turning points kept; more are folded into the account as they stand."""


class WearMeter:
    """Counts cycles as the state of charge comes in.

    Parameters
    ----------
    settings
        Table of life.
    """

    def __init__(self, settings: BatterySettings | None = None) -> None:
        s = settings or BatterySettings()
        self._depth = np.log(np.asarray(s.life_depth))
        self._cycles = np.log(np.asarray(s.life_cycles))
        self._turns: list[float] = []
        self._folded = (0.0, 0.0, 0.0)

    def take(self, soc: float) -> None:
        """Take a state of charge, 0 to 1; what is not finite is passed over."""
        if not math.isfinite(soc):
            return
        turns = self._turns
        if not turns:
            turns.append(soc)
        elif len(turns) == 1:
            if abs(soc - turns[0]) >= NOISE:
                turns.append(soc)
        elif (soc - turns[-1]) * (turns[-1] - turns[-2]) >= 0:
            turns[-1] = soc
        elif abs(soc - turns[-1]) >= NOISE:
            turns.append(soc)
            if len(turns) > MAX_TURNS:
                self._folded = self._account()
                self._turns = turns[-2:]

    def life(self, depth: float) -> float:
        """Return the cycles to the end of life at a depth of discharge above 0."""
        return float(np.exp(_extend(math.log(depth), self._depth, self._cycles)))

    @property
    def cycles(self) -> float:
        """Cycles so far, half ones as halves."""
        return self._account()[0]

    @property
    def deepest(self) -> float:
        """Depth of the deepest cycle, 0 to 1."""
        return self._account()[1]

    @property
    def wear(self) -> float:
        """Share of the battery's life used by cycling, 1 at its end."""
        return self._account()[2]

    def _account(self) -> tuple[float, float, float]:
        number, deepest, wear = self._folded
        for depth, _mean, count, _start, _end in rainflow.extract_cycles(self._turns):
            if depth < NOISE:
                continue
            number += count
            deepest = max(deepest, depth)
            wear += count / self.life(depth)
        return number, deepest, wear


def wear_of(soc: Sequence[float], settings: BatterySettings | None = None) -> WearMeter:
    """Return the account of a whole history of states of charge."""
    meter = WearMeter(settings)
    for each in soc:
        meter.take(each)
    return meter


def _extend(x: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """Interpolate, and go on along the first and last piece outside."""
    if len(xs) == 1:
        return float(ys[0])
    index = min(max(int(np.searchsorted(xs, x)) - 1, 0), len(xs) - 2)
    return float(ys[index] + (x - xs[index]) * (ys[index + 1] - ys[index]) / (xs[index + 1] - xs[index]))
