"""The solar array as the flight side models it, and what flight teaches about it."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

Array = NDArray[np.float64]

FULL_SOC: Final = 0.985
"""Above this state of charge the battery may take less than the array could give."""
SUNLIT: Final = 0.999
LEAST_W: Final = 0.1
"""A power no array has in sunlight, W (assumed): a share of it says nothing."""
LEAST_INCIDENCE: Final = 0.3
"""Below this share of the mean incidence small errors of attitude count for much: nothing is learnt."""


class ArraySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[planner.array]` table. Every default is assumed.

    The power unit tells the array's power in full sunlight (`bus/eps.array_sun_w`), at the temperature
    `hot_c` that it settles at there. Out of an eclipse an array is cold, and gives more.
    """

    hot_c: Annotated[float, Meta(ge=-150, le=200)] = 60.0
    cold_c: Annotated[float, Meta(ge=-200, le=200)] = -70.0
    lag_s: Annotated[float, Meta(gt=0, le=10_000)] = 400.0
    temperature_coefficient_per_k: Annotated[float, Meta(ge=-0.02, le=0)] = -0.0025
    """Change of power by its value at 28 degC."""
    mount: Literal["sun_tracking", "single_axis", "zenith"] = "single_axis"
    """How it is carried. Incidence changes within an orbit only where it looks away from Earth (`zenith`):
    the other mounts give all along what the power unit tells for full sunlight."""
    learn_s: Annotated[float, Meta(gt=0, le=1e6)] = 300.0
    """Mission time over which the measured share of the expected power is averaged."""
    gain_low: Annotated[float, Meta(gt=0, le=1)] = 0.3
    gain_high: Annotated[float, Meta(ge=1, le=2)] = 1.1
    """Bounds of what is learnt."""


class ArrayModel:
    """Expected power by sunlight and temperature.

    Parameters
    ----------
    settings
        Its parameters.
    """

    def __init__(self, settings: ArraySettings | None = None) -> None:
        self.settings = settings or ArraySettings()
        s = self.settings
        self._at_hot = self._warm(s.hot_c)
        self._array_c = s.hot_c
        self._t_s: float | None = None
        self._step = (0.0, 0.0)
        self.gain = 1.0
        """Measured power by expected power; what an array has lost since it was described."""

    def observe(
        self,
        t_s: float,
        *,
        sunlit: float,
        array_w: float,
        array_sun_w: float,
        soc: float,
        taking_all: bool,
        incidence: float = 1.0,
    ) -> None:
        """Follow the array's temperature, and learn from its power.

        Parameters
        ----------
        t_s
            Mission time, s.
        sunlit
            Share of the Sun's disc that is seen, 0 to 1.
        array_w, array_sun_w
            Measured, and told for full sunlight, W.
        soc
            State of charge, 0 to 1.
        taking_all
            False when the battery is at its charging limit: then the array may give less than it could.
        incidence
            Cosine of the Sun's incidence by its mean over the sunlit part of an orbit.
        """
        s = self.settings
        dt_s = 0.0 if self._t_s is None else t_s - self._t_s
        self._t_s = t_s
        if not 0.0 <= dt_s < 10 * s.lag_s:
            return
        self._array_c = self._next_c(self._array_c, sunlit, dt_s)
        expected_w = array_sun_w * sunlit * incidence * self._warm(self._array_c) / self._at_hot
        if (
            sunlit < SUNLIT
            or incidence < LEAST_INCIDENCE
            or expected_w < LEAST_W
            or not math.isfinite(array_w)
        ):
            return
        measured = array_w / expected_w
        held_back = soc > FULL_SOC or not taking_all
        if held_back and measured < self.gain:
            return
        weight = 1.0 - math.exp(-dt_s / s.learn_s)
        self.gain = min(max(self.gain + weight * (measured - self.gain), s.gain_low), s.gain_high)

    def expect_w(
        self, dt_s: Array, sunlit: Array, array_sun_w: float, incidence: Array | None = None
    ) -> Array:
        """Return the power expected in each segment from now on, W, what was learnt included.

        Parameters
        ----------
        dt_s, sunlit, incidence
            Length, share of the Sun's disc, and incidence by its mean of each segment, shape (segments,).
        array_sun_w
            Told for full sunlight, W.
        """
        temperature = self._array_c
        factor = np.empty(len(dt_s))
        for k, (step_s, light) in enumerate(zip(dt_s.tolist(), sunlit.tolist(), strict=True)):
            middle = self._next_c(temperature, light, step_s / 2)
            factor[k] = self._warm(middle) / self._at_hot
            temperature = self._next_c(temperature, light, step_s)
        share = 1.0 if incidence is None else incidence
        return np.asarray(array_sun_w * self.gain * sunlit * share * factor)

    def _warm(self, array_c: float) -> float:
        return max(0.0, 1.0 + self.settings.temperature_coefficient_per_k * (array_c - 28.0))

    def _next_c(self, now_c: float, sunlit: float, dt_s: float) -> float:
        s = self.settings
        settles_c = s.cold_c + (s.hot_c - s.cold_c) * sunlit
        if self._step[0] != dt_s:
            self._step = (dt_s, 1.0 - math.exp(-dt_s / s.lag_s))
        return now_c + (settles_c - now_c) * self._step[1]
