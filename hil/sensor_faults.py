"""Redundant sensors of the emulated power unit, each with its own small error, and faults to give them."""

from __future__ import annotations

import random
from enum import StrEnum
from typing import Final

from telemetry.bus import SENSOR_RANGES, SENSOR_SETS, BusEps, EpsSensors

NOISE: Final = 0.001
"""Error of a sensor, standard deviation as a share of the value (assumed: common shunt monitors)."""
CHANNELS: Final = tuple(SENSOR_RANGES)


class SensorFault(StrEnum):
    """How a sensor fails."""

    STUCK = "stuck"
    """It gives the value it had."""
    SPIKE = "spike"
    """Every other value jumps to the end of its range."""
    OFFSET = "offset"
    """A fifth of the range is added."""
    MISSING = "missing"
    """It gives no value any more: null, which a node takes as it takes NaN."""
    STALE = "stale"
    """Value and time stamp of its whole set stand still."""


class SensorBench:
    """Sensors of a power unit.

    Parameters
    ----------
    seed
        Of their errors.
    sets
        1 to `SENSOR_SETS`; the first is the main one, whose values cannot be missing.

    Raises
    ------
    ValueError
        Another number of sets, or in `fail`: no such set, channel or fault of it.
    """

    def __init__(self, seed: int, sets: int = SENSOR_SETS) -> None:
        if not 1 <= sets <= SENSOR_SETS:
            raise ValueError(f"sets {sets}: 1 to {SENSOR_SETS} allowed")
        self.sets = sets
        self._rng = random.Random(seed)  # noqa: S311 - errors of sensors
        self._faults: dict[tuple[int, str], SensorFault] = {}
        self._held: dict[tuple[int, str], float] = {}
        self._stamp_ns: dict[int, int] = {}
        self._reading = 0

    def fail(self, sensor_set: int, channel: str, fault: SensorFault | None) -> None:
        """Let a sensor fail from now on; None: it is sound again."""
        if not 0 <= sensor_set < self.sets or channel not in CHANNELS:
            allowed = f"0 to {self.sets - 1}, {', '.join(CHANNELS)}"
            raise ValueError(f"set {sensor_set}, {channel}: {allowed} allowed")
        if sensor_set == 0 and fault in {SensorFault.MISSING, SensorFault.STALE}:
            raise ValueError(f"{fault.value} of set 0: the main set always gives values of the moment")
        if fault is None:
            self._faults.pop((sensor_set, channel), None)
            self._held.pop((sensor_set, channel), None)
            self._stamp_ns.pop(sensor_set, None)
        else:
            self._faults[sensor_set, channel] = fault

    def read(self, truth: BusEps) -> BusEps:
        """Return the message as the sensors give it."""
        self._reading += 1
        sets = [{c: self._value(n, c, getattr(truth, c)) for c in CHANNELS} for n in range(self.sets)]
        fields = {name: getattr(truth, name) for name in truth.__struct_fields__}
        redundant = [
            EpsSensors(**values, t_ns=self._stamp(number, truth.t_ns))
            for number, values in enumerate(sets)
            if number
        ]
        return BusEps(**{**fields, **sets[0], "redundant": redundant})

    def _value(self, number: int, channel: str, truth: float) -> float | None:
        low, high = SENSOR_RANGES[channel]
        value = min(max(truth * (1 + self._rng.gauss(0, NOISE)), low), high)
        key = (number, channel)
        match self._faults.get(key):
            case SensorFault.STUCK | SensorFault.STALE:
                return self._held.setdefault(key, value)
            case SensorFault.SPIKE:
                return high if self._reading % 2 else value
            case SensorFault.OFFSET:
                return min(value + (high - low) / 5, high)
            case SensorFault.MISSING:
                return None
            case None:
                return value

    def _stamp(self, number: int, t_ns: int) -> int:
        stale = any(n == number and fault is SensorFault.STALE for (n, _), fault in self._faults.items())
        return self._stamp_ns.setdefault(number, t_ns) if stale else t_ns
