"""One cell of a sweep: a spacecraft, and how well its governor is told of it."""

from __future__ import annotations

from typing import Final

import msgspec

from hil.scenario import Array, Battery, Thermal
from node.power.curve import PowerCurve, Setting
from node.power.operating_point import OperatingPoint

PLATFORM_W: Final = 4.0
IDLE_W: Final = 4.0
CORE_W: Final = 4.0
"""Draw of the rest, of an idle board, and of each busy core (assumed: those of the default scenario)."""
SOC_FLOOR: Final = 0.70
SOC_START: Final = 0.90
MIN_DUTY: Final = 0.05
REFERENCE_ARRAY: Final = Array(area_m2=0.1, efficiency=0.29)
"""Its area is scaled to the cell's ratio."""
RADIATOR: Final = Thermal(radiator_area_m2=0.06)
MEASURED: Final = (
    (1, 1, 35.1, 1.00), (1, 2, 53.8, 1.00), (1, 4, 70.4, 1.00), (1, 8, 81.2, 1.00),
    (2, 1, 64.8, 1.86), (2, 2, 90.7, 1.88), (2, 4, 142.4, 1.90), (2, 8, 165.4, 1.91),
)  # fmt: skip
"""Threads, batch, tokens/s, busy cores: measured, docs/results/calibrate.md. Watts follow from the cores."""


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """How far what the governor is told lies from the truth: standard deviations."""

    name: str
    edge_s: float
    """Of the forecast of eclipses, s: one shift for a whole run."""
    array: float
    """Of the array's power in full sunlight, as a share: one for a whole run."""
    soc: float
    """Of the state of charge: half of it one for a run, and noise of as much at each reading."""
    cell_v: float = 0.01
    """Of a cell's voltage, V: one for a run, and noise of as much at each reading."""
    amps: float = 0.01
    """Of the battery's current, as a share: one for a run."""
    array_noise: float = 0.02
    """Noise of the array's power at each reading, as a share."""


GOOD: Final = Errors(name="good", edge_s=2.0, array=0.02, soc=0.005)
POOR: Final = Errors(name="poor", edge_s=20.0, array=0.06, soc=0.005)
NOISY: Final = Errors(name="noisy", edge_s=2.0, array=0.02, soc=0.015, array_noise=0.06)
BOTH: Final = Errors(name="poor and noisy", edge_s=20.0, array=0.06, soc=0.015, array_noise=0.06)
NONE: Final = Errors(name="none", edge_s=0.0, array=0.0, soc=0.0, cell_v=0.0, amps=0.0, array_noise=0.0)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What is varied."""

    beta_deg: float
    ratio: float
    """Mean power of the array over an orbit by platform and payload at their most."""
    battery_wh: float
    errors: Errors
    array_loss: float = 0.0
    """Share of the array that is lost, unannounced, after a third of the run."""
    seed: int = 1


def battery(cell: Cell) -> Battery:
    """Return the battery of a cell."""
    return Battery(capacity_wh=cell.battery_wh, soc_start=SOC_START, soc_floor=SOC_FLOOR)


def measured_curve() -> PowerCurve:
    """Return tokens/s by watts of the board that was measured."""
    return PowerCurve(
        IDLE_W,
        [
            Setting(OperatingPoint(threads=threads, batch=batch, duty=1.0), IDLE_W + CORE_W * cores, rate)
            for threads, batch, rate, cores in MEASURED
        ],
    )


def least_w(curve: PowerCurve) -> float:
    """Return the draw of bare service, W."""
    return curve.idle_w + MIN_DUTY * (curve.most_w - curve.idle_w)
