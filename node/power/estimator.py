"""Bridge the state of charge while no sensor of it can be believed.

Pure. Energy is counted from the last good reading on, by the battery's own current and voltage, else by the
balance of array, platform and payload. The error grows with every second, and after a stated time, or error,
there is no estimate any more: then the governor falls back as for a silent bus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from node.power.battery import capacity_j


class EstimatorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tuning; every default is assumed. Times are mission time."""

    max_bridge_s: Annotated[float, Meta(gt=0)] = 2400.0
    """Longest time without a good reading: a little over an eclipse in low orbit (35 min)."""
    max_sigma: Annotated[float, Meta(gt=0, le=1)] = 0.05
    """Error of the state of charge at which the estimate is given up, 0 to 1."""
    sensor_sigma: Annotated[float, Meta(ge=0, le=1)] = 0.005
    """Error of a good reading."""
    current_error: Annotated[float, Meta(ge=0, le=1)] = 0.03
    """Error of the power counted from the battery's current, as a share of it."""
    balance_error: Annotated[float, Meta(ge=0, le=1)] = 0.10
    """Error of the power counted from the balance, as a share of what flows."""
    efficiency: Annotated[float, Meta(gt=0, le=1)] = 0.95
    """Of charging by what the balance leaves over, and of discharging by what it lacks."""


@dataclass(frozen=True)
class EnergyReading:
    """Event: what is known of the power system at a moment. None: not known."""

    t_s: float
    """Mission time, s; from any epoch."""
    soc: float | None
    """State of charge by its sensors, 0 to 1."""
    battery_v: float | None
    battery_a: float | None
    """Positive when charging, A."""
    array_w: float | None
    platform_w: float
    load_w: float | None
    """Draw of the payload computer, W."""
    battery_wh: float


@dataclass(frozen=True)
class SocEstimate:
    """State of charge to plan with."""

    soc: float
    sigma: float
    """Error, 0 to 1."""
    bridged_s: float
    """Mission time since the last good reading, s; 0: it is one."""


class SocEstimator:
    """Count energy between good readings of the state of charge.

    Parameters
    ----------
    settings
        Tuning.
    """

    def __init__(self, settings: EstimatorSettings | None = None) -> None:
        self.settings = settings or EstimatorSettings()
        self.estimate: SocEstimate | None = None
        """The last answer."""
        self._t_s: float | None = None
        self._net: tuple[float, float] | None = None
        """Power into the battery and its error at the last reading, W."""

    def handle(self, reading: EnergyReading) -> SocEstimate | None:
        """Take a reading; return what to plan with, None when nothing is known well enough.

        A step back of mission time ends a bridge, for the time counted would be wrong.
        """
        s, last, self._t_s = self.settings, self._t_s, reading.t_s
        before, self._net = self._net, self._flow(reading)
        if reading.soc is not None and math.isfinite(reading.soc):
            self.estimate = SocEstimate(reading.soc, s.sensor_sigma, 0.0)
            return self.estimate
        held = self.estimate
        net = self._net if before is None else before if self._net is None else _mean(before, self._net)
        if held is None or last is None or net is None or reading.t_s < last:
            self.estimate = None
            return None
        dt_s = reading.t_s - last
        capacity_ws = capacity_j(reading.battery_wh)
        soc = held.soc + net[0] * dt_s / capacity_ws
        # An error of the power is the same way all along: it adds up, where noise would average out.
        sigma = held.sigma + net[1] * dt_s / capacity_ws
        bridged_s = held.bridged_s + dt_s
        if bridged_s > s.max_bridge_s or sigma > s.max_sigma:
            self.estimate = None
        else:
            self.estimate = SocEstimate(min(max(soc, 0.0), 1.0), sigma, bridged_s)
        return self.estimate

    def _flow(self, reading: EnergyReading) -> tuple[float, float] | None:
        """Return the power into the battery and its error, W; None when nothing tells."""
        s = self.settings
        if reading.battery_v is not None and reading.battery_a is not None:
            net_w = reading.battery_v * reading.battery_a
            return net_w, s.current_error * abs(net_w)
        if reading.array_w is None or reading.load_w is None:
            return None
        net_w = reading.array_w - reading.platform_w - reading.load_w
        error_w = s.balance_error * (reading.array_w + reading.platform_w + reading.load_w)
        return (net_w * s.efficiency if net_w > 0 else net_w / s.efficiency), error_w


def _mean(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2
