"""Lumped heat: the board, coupled to a radiator that sees space, the Sun and the Earth."""

from __future__ import annotations

from typing import Final

import msgspec

from hil.scenario import Thermal

STEFAN_BOLTZMANN_W_M2_K4: Final = 5.670374419e-8
SOLAR_CONSTANT_W_M2: Final = 1361.0
ALBEDO: Final = 0.30
EARTH_INFRARED_W_M2: Final = 237.0
"""Albedo and infrared: the values of orbitherm 0.1.0 (reference/power.md)."""
ZERO_C_K: Final = 273.15
SPACE_K: Final = 2.7


class ThermalState(msgspec.Struct, frozen=True, kw_only=True):
    """Temperatures, degC."""

    board_c: float
    radiator_c: float


class HeatModel:
    """Board and radiator, advanced in steps of about a second (midpoint rule)."""

    def __init__(self, settings: Thermal) -> None:
        self._s = settings
        self._board_k = self._radiator_k = settings.start_c + ZERO_C_K

    @property
    def state(self) -> ThermalState:
        """Temperatures now."""
        return ThermalState(board_c=self._board_k - ZERO_C_K, radiator_c=self._radiator_k - ZERO_C_K)

    @property
    def board_c(self) -> float:
        """Temperature of the board now, degC."""
        return self._board_k - ZERO_C_K

    def advance(self, dt_s: float, *, irradiance: float, sun_above_earth: float, payload_w: float) -> None:
        """Advance by `dt_s`, s.

        Parameters
        ----------
        dt_s
            Mission time, s, above 0 and about 10 at most.
        irradiance
            Sunlight as a share of the solar constant.
        sun_above_earth
            Cosine of the Sun's zenith angle at the subsatellite point: albedo follows it while positive.
        payload_w
            Heat of the payload computer, W.
        """
        board, radiator = self._rates(self._board_k, self._radiator_k, irradiance, sun_above_earth, payload_w)
        half = dt_s / 2
        board, radiator = self._rates(
            self._board_k + board * half,
            self._radiator_k + radiator * half,
            irradiance,
            sun_above_earth,
            payload_w,
        )
        self._board_k += board * dt_s
        self._radiator_k += radiator * dt_s

    def _rates(
        self, board_k: float, radiator_k: float, irradiance: float, sun_above_earth: float, payload_w: float
    ) -> tuple[float, float]:
        """Return both temperatures' rates, K/s."""
        s = self._s
        coupled_w = s.conductance_w_k * (board_k - radiator_k)
        sun_w_m2 = s.absorptivity * SOLAR_CONSTANT_W_M2 * s.sun_view * irradiance
        albedo_w_m2 = s.absorptivity * ALBEDO * SOLAR_CONSTANT_W_M2 * s.earth_view * max(0.0, sun_above_earth)
        infrared_w_m2 = s.emissivity * EARTH_INFRARED_W_M2 * s.earth_view
        emitted_w_m2 = s.emissivity * STEFAN_BOLTZMANN_W_M2_K4 * (radiator_k**4 - SPACE_K**4)
        net_w = s.radiator_area_m2 * (sun_w_m2 + albedo_w_m2 + infrared_w_m2 - emitted_w_m2)
        return (payload_w - coupled_w) / s.board_heat_capacity_j_k, (
            coupled_w + net_w
        ) / s.radiator_heat_capacity_j_k
