"""The governor: how many watts the payload computer may draw now, and the duty that holds it there.

Two loops, both in one pure class:

* The **energy plan** works in mission time. It balances array, platform, battery and payload over one
  orbit, asks for less in eclipse than in sunlight, and yields a ceiling in watts.
* The **duty loop** works in physical time. It turns the ceiling into the share of time the worker may
  compute, and corrects it by the measured draw, for the watts a duty costs are known only roughly.

On an accelerated bench the two clocks differ, and `PowerInputs.rate` says by how much. Service never
stops: the duty never goes below `min_duty`. SAFE mode, which does stop it, is not the governor's business.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from node.power.forecast import UmbraPass
from telemetry.bus import BusEps

SECONDS_PER_HOUR: Final = 3600.0
NS_PER_S: Final = 1_000_000_000
DARK_SHARE: Final = 0.02
"""An array below this share of its full power is dark, whatever the forecast says. A full battery also
lowers the array, but never under the platform's draw."""
JUMP_SHARE: Final = 0.05
"""A change of the ceiling by this share of the board's range is a jump."""

Unit = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]


class Reason(StrEnum):
    """What binds the ceiling (`telemetry.packets.PowerPlan.reason`)."""

    BOARD = "board"
    ARRAY = "array"
    BATTERY = "battery"
    THERMAL = "thermal"
    COMMAND = "command"
    FLOOR = "floor"
    UNKNOWN_BUS = "unknown_bus"


class GovernorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tuning of the governor. Every default is assumed, none measured on a spacecraft."""

    min_duty: Annotated[float, Meta(ge=0.01, le=1)] = 0.05
    """Duty that service never goes below."""
    eclipse_share: Annotated[float, Meta(gt=0, le=1)] = 0.75
    """Payload watts in eclipse as a share of those in sunlight, where the battery could give more: a
    shallow discharge ages the battery less."""
    target_soc: Annotated[float, Meta(gt=0, le=1)] = 0.97
    """Most the battery is charged to at the payload's expense by umbra entry."""
    soc_margin: Unit = 0.03
    """State of charge above the floor that the plan leaves untouched."""
    floor_guard: Unit = 0.01
    """This close to the floor the duty is `min_duty`, at once; let go again at twice the distance."""
    array_derating: Annotated[float, Meta(gt=0, le=1)] = 0.97
    """Share of the array's full power the plan counts on."""
    charge_efficiency: Annotated[float, Meta(gt=0, le=1)] = 0.93
    discharge_efficiency: Annotated[float, Meta(gt=0, le=1)] = 0.93
    settle_s: Positive = 3.0
    """Physical time the duty loop needs: no plan spends its energy over less than this."""
    unforeseen_eclipse_s: Positive = 2200.0
    """Length assumed for darkness no forecast tells of (low orbit, Sun in its plane: 36 min)."""
    stale_after_s: Positive = 5.0
    """Age of the last `bus/eps` after which it is unknown, physical time."""
    stale_after_mission_s: Positive = 600.0
    """The same in mission time, for an accelerated bench."""
    unknown_bus_share: Unit = 0.15
    """Share of the board's range allowed while the bus is unknown."""
    warm_c: float = 70.0
    """Board temperature from which the ceiling goes down."""
    hot_c: float = 85.0
    """Board temperature at which only `min_duty` is left."""
    integral_gain_per_s: Positive = 0.4
    """Duty change a second for an error of the whole board range."""
    integral_limit: Unit = 0.6
    """Most the loop may add to or take from the duty the model gives."""
    response_s: Positive = 1.0
    """Physical time the measured draw takes to follow a jump of the ceiling: no correction meanwhile."""
    duty_rise_per_s: Positive = 0.5
    duty_fall_per_s: Positive = 2.0

    def __post_init__(self) -> None:
        if self.hot_c <= self.warm_c:
            raise ValueError(f"hot_c {self.hot_c:g} must be above warm_c {self.warm_c:g}")
        if self.floor_guard > self.soc_margin:
            raise ValueError(
                f"floor_guard {self.floor_guard:g} must not be above soc_margin {self.soc_margin:g}"
            )


class PowerInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the governor knows at one moment."""

    t_ns: int
    """Mission time, UTC."""
    rate: float = 1.0
    """Mission seconds a physical second."""
    eps: BusEps | None
    """Last message of the power unit, None if there was none yet."""
    eps_age_s: float = 0.0
    """Physical time since it came, s."""
    umbra: UmbraPass | None
    """Pass under way or next; None when none comes within an orbit, or there is no forecast."""
    period_s: float | None
    """Period of the orbit; None when there is no forecast."""
    load_w: float | None
    """Measured draw of the board; None or NaN when it cannot be read."""
    board_c: float | None = None
    cap_w: float | None = None
    """Commanded cap."""
    idle_w: float
    """Draw of the board at duty 0."""
    max_w: float
    """Draw of the board at duty 1."""
    busy: bool = True
    """The worker has work: only then does a draw below the ceiling call for more duty."""


class Setpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The governor's decision."""

    ceiling_w: float
    """Watts held, between the draw at `min_duty` and the board's most."""
    duty: float
    """Share of time the worker may compute, `min_duty` to 1."""
    reason: Reason
    """What binds."""
    eclipse: bool
    """The plan is that of eclipse: forecast umbra, or a dark array."""
    allowed_w: float
    """Watts the binding limit gives before service's minimum: below `ceiling_w` when it is not enough."""
    target_soc: float | None
    """State of charge wanted at the next umbra entry; None in eclipse or when unknown."""


class Governor:
    """Energy plan and duty loop. No clock, no I/O.

    Parameters
    ----------
    settings
        Tuning.
    """

    def __init__(self, settings: GovernorSettings | None = None) -> None:
        self.settings = settings or GovernorSettings()
        self._integral = 0.0
        self._duty: float | None = None
        self._last_s: float | None = None
        self._ceiling_w = 0.0
        self._correct_from_s = -math.inf
        self._guarding = False

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
        s = self.settings
        span_w = max(inputs.max_w - inputs.idle_w, 1e-9)
        service_w = inputs.idle_w + s.min_duty * span_w
        limits: dict[Reason, float] = {Reason.BOARD: inputs.max_w}
        eclipse, target = False, None
        eps = inputs.eps
        if eps is None or self._stale(inputs):
            limits[Reason.UNKNOWN_BUS] = inputs.idle_w + s.unknown_bus_share * span_w
            eclipse = _in_umbra(inputs)
            self._guarding = False
        else:
            eclipse = _in_umbra(inputs) or eps.array_w < DARK_SHARE * eps.array_sun_w
            if eclipse:
                limits[Reason.BATTERY] = self._eclipse_w(inputs, eps, service_w)
            else:
                limits[Reason.ARRAY], target = self._sunlight_w(inputs, eps, service_w)
            if self._guard(eps):
                limits[Reason.FLOOR] = service_w
        if inputs.cap_w is not None:
            limits[Reason.COMMAND] = inputs.cap_w
        if inputs.board_c is not None and inputs.board_c > s.warm_c:
            share = max(0.0, (s.hot_c - inputs.board_c) / (s.hot_c - s.warm_c))
            limits[Reason.THERMAL] = service_w + share * (inputs.max_w - service_w)
        reason = Reason.FLOOR if Reason.FLOOR in limits else min(limits, key=lambda r: limits[r])
        allowed_w = limits[reason]
        ceiling_w = min(max(min(limits.values()), service_w), inputs.max_w)
        duty = self._hold(inputs, ceiling_w, now_s, at_once=reason is Reason.FLOOR)
        return Setpoint(
            ceiling_w=ceiling_w,
            duty=duty,
            reason=reason,
            eclipse=eclipse,
            allowed_w=allowed_w,
            target_soc=target,
        )

    def _stale(self, inputs: PowerInputs) -> bool:
        s = self.settings
        age = inputs.eps_age_s
        # Written so that a NaN age is stale.
        return not (age <= s.stale_after_s and age * inputs.rate <= s.stale_after_mission_s)

    def _guard(self, eps: BusEps) -> bool:
        guard = self.settings.floor_guard
        above = eps.battery_soc - eps.soc_floor
        self._guarding = above <= (2 * guard if self._guarding else guard)
        return self._guarding

    def _orbit_w(self, inputs: PowerInputs, eps: BusEps) -> tuple[float, float]:
        """Return payload watts in sunlight and in eclipse that the array sustains orbit after orbit.

        array * sun = (platform + p) * sun + (platform + share * p) * dark / (charging and discharging)
        """
        s = self.settings
        dark_s = inputs.umbra.duration_s if inputs.umbra is not None else 0.0
        sun_s = max((inputs.period_s or 0.0) - dark_s, 1.0)
        round_trip = s.charge_efficiency * s.discharge_efficiency
        array_w = s.array_derating * eps.array_sun_w
        surplus_j = (array_w - eps.platform_w) * sun_s - eps.platform_w * dark_s / round_trip
        sun_w = min(surplus_j / (sun_s + s.eclipse_share * dark_s / round_trip), inputs.max_w)
        return sun_w, s.eclipse_share * sun_w

    def _eclipse_w(self, inputs: PowerInputs, eps: BusEps, service_w: float) -> float:
        """Return the payload watts the battery gives to the end of this eclipse."""
        s = self.settings
        usable = max(0.0, eps.battery_soc - eps.soc_floor - s.soc_margin)
        usable_j = usable * eps.battery_wh * SECONDS_PER_HOUR * s.discharge_efficiency
        if inputs.umbra is not None and _in_umbra(inputs):
            left_s = (inputs.umbra.exit_ns - inputs.t_ns) / NS_PER_S
            _, sustained_w = self._orbit_w(inputs, eps)
        else:
            left_s, sustained_w = s.unforeseen_eclipse_s, s.eclipse_share * inputs.max_w
        left_s = max(left_s, s.settle_s * inputs.rate)
        return min(usable_j / left_s - eps.platform_w, max(sustained_w, service_w))

    def _sunlight_w(self, inputs: PowerInputs, eps: BusEps, service_w: float) -> tuple[float, float | None]:
        """Return the payload watts sunlight gives, and the state of charge wanted at umbra entry."""
        s = self.settings
        spare_w = s.array_derating * eps.array_sun_w - eps.platform_w
        to_go = s.target_soc
        left_s = inputs.period_s or s.unforeseen_eclipse_s
        if inputs.umbra is not None:
            _, dark_w = self._orbit_w(inputs, eps)
            capacity_j = eps.battery_wh * SECONDS_PER_HOUR * s.discharge_efficiency
            per_w = inputs.umbra.duration_s / capacity_j
            reserve = eps.soc_floor + s.soc_margin
            least = reserve + (eps.platform_w + service_w) * per_w
            wanted = reserve + (eps.platform_w + max(dark_w, service_w)) * per_w
            # Over the target only for what bare service takes; else the eclipse plan gives less.
            to_go = min(wanted, max(s.target_soc, min(least, 1.0)))
            left_s = (inputs.umbra.entry_ns - inputs.t_ns) / NS_PER_S
        left_s = max(left_s, s.settle_s * inputs.rate)
        missing_wh = max(0.0, to_go - eps.battery_soc) * eps.battery_wh / s.charge_efficiency
        return spare_w - missing_wh * SECONDS_PER_HOUR / left_s, to_go

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
        if inputs.load_w is not None and math.isfinite(inputs.load_w) and now_s >= self._correct_from_s:
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


def _in_umbra(inputs: PowerInputs) -> bool:
    umbra = inputs.umbra
    return umbra is not None and umbra.entry_ns <= inputs.t_ns < umbra.exit_ns
