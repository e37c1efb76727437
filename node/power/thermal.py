"""Heat as the flight side models it: a die on a board on a radiator, and where it will be.

The board follows the draw with the lag of its mass; what lies behind it (radiator, Sun, Earth) is not
modelled but observed, as the temperature the board would settle at without any draw. The die sits above the
board by a fixed resistance, with a lag of its own of seconds.
"""

from __future__ import annotations

import math
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from node.power.lp import Array, Heat

SLACK_C: Final = 1e-3
"""Room left where no draw can be lower."""


class ThermalSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[planner.thermal]` table. Every default is assumed."""

    board_heat_capacity_j_k: Annotated[float, Meta(gt=0, le=1e6)] = 450.0
    conductance_w_k: Annotated[float, Meta(gt=0, le=1e4)] = 0.8
    """From the board to what cools it."""
    die_k_w: Annotated[float, Meta(ge=0, le=100)] = 1.0
    """Die above board for each watt of draw."""
    die_lag_s: Annotated[float, Meta(gt=0, le=1000)] = 8.0
    sink_lag_s: Annotated[float, Meta(gt=0, le=1e5)] = 300.0
    """Mission time over which what cools the board is averaged."""
    ahead_s: Annotated[float, Meta(ge=0, le=3600)] = 60.0
    """How far ahead the die is predicted, mission time."""


class HeatObserver:
    """Where board and die are, and where a draw takes them.

    Parameters
    ----------
    settings
        Its parameters.
    """

    def __init__(self, settings: ThermalSettings | None = None) -> None:
        self.settings = settings or ThermalSettings()
        self.board_c: float | None = None
        self.sink_c: float | None = None
        """Temperature the board settles at without draw; None until it was observed twice."""
        self._t_s = 0.0

    def observe(self, t_s: float, board_c: float | None, power_w: float) -> None:
        """Take a reading at mission time `t_s`, s; None, or what is not finite, says nothing."""
        if board_c is None or not (math.isfinite(board_c) and math.isfinite(power_w)):
            return
        s = self.settings
        before, dt_s = self.board_c, t_s - self._t_s
        if before is not None and dt_s <= 0:
            return
        self.board_c, self._t_s = board_c, t_s
        if before is None:
            return
        keep = math.exp(-dt_s * s.conductance_w_k / s.board_heat_capacity_j_k)
        if keep > 1 - 1e-6:
            return
        settles_c = (board_c - keep * before) / (1.0 - keep)
        sink_c = settles_c - power_w / s.conductance_w_k
        if self.sink_c is None:
            # A first difference of two readings is all noise: begin at rest, and let the average work.
            self.sink_c = board_c - power_w / s.conductance_w_k
        weight = 1.0 - math.exp(-dt_s / s.sink_lag_s)
        self.sink_c += weight * (sink_c - self.sink_c)

    def predict_c(self, power_w: float, after_s: float) -> float | None:
        """Return the die after `after_s` of a draw, degC; None while nothing is known of the board."""
        s = self.settings
        if self.board_c is None or self.sink_c is None:
            return None
        keep = math.exp(-after_s * s.conductance_w_k / s.board_heat_capacity_j_k)
        settles_c = self.sink_c + power_w / s.conductance_w_k
        board_c = settles_c + keep * (self.board_c - settles_c)
        return board_c + s.die_k_w * power_w * (1.0 - math.exp(-after_s / s.die_lag_s))

    def most_w(self, limit_c: float) -> float | None:
        """Return the draw that brings the die to a limit after `ahead_s`, W; None while nothing is known."""
        at_rest = self.predict_c(0.0, self.settings.ahead_s)
        with_one = self.predict_c(1.0, self.settings.ahead_s)
        if at_rest is None or with_one is None:
            return None
        return max(0.0, (limit_c - at_rest) / (with_one - at_rest))

    def heat(self, limit_c: float, dt_s: Array, *, least_w: float, most_w: float) -> Heat | None:
        """Return the node of a plan that keeps the die under a limit; None where no draw can reach it.

        Parameters
        ----------
        limit_c
            Of the die.
        dt_s
            Lengths of the plan's segments.
        least_w, most_w
            Draws the plan chooses between.
        """
        s = self.settings
        if self.board_c is None or self.sink_c is None:
            return None
        per_w = 1.0 / s.conductance_w_k + s.die_k_w
        if max(self.board_c, self.sink_c) + per_w * most_w < limit_c:
            return None
        settles_c = self.sink_c + least_w / s.conductance_w_k
        keep = np.exp(-np.cumsum(dt_s) * s.conductance_w_k / s.board_heat_capacity_j_k)
        # A board that is too hot already cools as fast as bare service lets it, and no faster.
        least_c = settles_c + (self.board_c - settles_c) * keep
        return Heat(
            start_c=self.board_c,
            # Told apart by the draw only: the limit of the board is that under the hottest die.
            limit_c=np.maximum(limit_c - s.die_k_w * most_w, least_c + SLACK_C),
            sink_c=self.sink_c,
            conductance_w_k=s.conductance_w_k,
            capacity_j_k=s.board_heat_capacity_j_k,
        )
