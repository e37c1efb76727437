"""The governor: the duty that holds the payload computer's draw at its ceiling.

The ceiling (`node.power.ceiling`) is decided in mission time. The duty loop works in physical time: it
turns the ceiling into the share of time the worker may compute, and corrects it by the measured draw, for the
watts a duty costs are known only roughly. On an accelerated bench the two clocks differ, and
`PowerInputs.rate` says by how much.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from node.power.ceiling import GovernorSettings, Limits, PowerInputs, Reason

HARD: Final = frozenset({Reason.COMMAND, Reason.THERMAL})
"""Limits that no second may exceed; the others are of energy, and hold on the mean."""
JUMP_SHARE: Final = 0.05
"""A change of the ceiling by this share of the board's range is a jump."""


class Setpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The governor's decision."""

    ceiling_w: float
    """Watts held, between the draw at `min_duty` and the board's most."""
    duty: float
    """Share of time the worker may compute, `min_duty` to 1."""
    reason: Reason
    """What binds."""
    eclipse: bool
    """Forecast umbra, or a dark array."""
    allowed_w: float
    """Watts the binding limit gives before service's minimum: below `ceiling_w` when it is not enough."""
    target_soc: float | None
    """State of charge wanted at the next umbra entry; None in eclipse or when unknown."""


class Governor:
    """Ceiling and duty loop. No clock, no I/O.

    Parameters
    ----------
    settings
        Tuning.
    """

    def __init__(self, settings: GovernorSettings | None = None) -> None:
        self.settings = settings or GovernorSettings()
        self._limits = Limits(self.settings)
        self._integral = 0.0
        self._duty: float | None = None
        self._last_s: float | None = None
        self._ceiling_w = 0.0
        self._correct_from_s = -math.inf

    def handle(self, inputs: PowerInputs, now_s: float) -> Setpoint:
        """Decide ceiling and duty.

        Parameters
        ----------
        inputs
            State at this moment.
        now_s
            Physical time, monotonic, s.

        Returns
        -------
        Setpoint
            To be carried out until the next call; once or twice a second is meant.
        """
        decided = self._limits.handle(inputs)
        aim_w = decided.ceiling_w
        if decided.reason in HARD:
            span_w = max(inputs.max_w - inputs.idle_w, 1e-9)
            aim_w = max(
                aim_w - self.settings.hard_margin * span_w, inputs.idle_w + self.settings.min_duty * span_w
            )
        duty = self._hold(inputs, aim_w, now_s, at_once=decided.reason is Reason.FLOOR)
        return Setpoint(
            ceiling_w=decided.ceiling_w,
            duty=duty,
            reason=decided.reason,
            eclipse=decided.eclipse,
            allowed_w=decided.allowed_w,
            target_soc=decided.target_soc,
        )

    def _hold(self, inputs: PowerInputs, ceiling_w: float, now_s: float, *, at_once: bool) -> float:
        """Return the duty that brings the measured draw to the ceiling."""
        s = self.settings
        span_w = max(inputs.max_w - inputs.idle_w, 1e-9)
        model = (ceiling_w - inputs.idle_w) / span_w
        dt_s = 0.0 if self._last_s is None else min(max(now_s - self._last_s, 0.0), s.settle_s)
        self._last_s = now_s
        if abs(ceiling_w - self._ceiling_w) > JUMP_SHARE * span_w:
            self._correct_from_s = now_s + s.response_s
        self._ceiling_w = ceiling_w
        if at_once:
            self._integral = 0.0
            self._duty = s.min_duty
            return s.min_duty
        if inputs.load_w is None:
            self._integral = (
                0.0  # of a draw that is unknown nothing is known to correct: the model alone paces
            )
        elif math.isfinite(inputs.load_w) and now_s >= self._correct_from_s:
            error = (ceiling_w - inputs.load_w) / span_w
            duty = self._duty if self._duty is not None else model
            # Anti-windup: not further the way the duty cannot go, nor up for want of work.
            if not (error > 0 and (duty >= 1.0 or not inputs.busy)) and not (
                error < 0 and duty <= s.min_duty
            ):
                step = self._integral + s.integral_gain_per_s * error * dt_s
                self._integral = min(max(step, -s.integral_limit), s.integral_limit)
        wanted = min(max(model + self._integral, s.min_duty), 1.0)
        if self._duty is not None:
            lowest = self._duty - s.duty_fall_per_s * dt_s
            highest = self._duty + s.duty_rise_per_s * dt_s
            wanted = min(max(wanted, lowest), highest)
        self._duty = wanted
        return wanted
