"""How many watts the payload computer may draw now: the least of several limits, and which one it is.

The watts come from a plan (`node.power.planner`) where there is one, else from rules: they balance array,
platform, battery and payload over one orbit, and ask for less in eclipse than in sunlight. What protects the
battery's floor, the die and the bus does not rest on either: an eclipse never gets more than the battery can
give to its end, near the floor only least service is left, and a bus that is silent allows little.

Service never stops: no ceiling is below the draw of the least duty. SAFE mode, which does stop it, is not
this module's business.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from node.power.battery import capacity_j
from node.power.forecast import UmbraPass
from telemetry.bus import BusEps

NS_PER_S: Final = 1_000_000_000
DARK_SHARE: Final = 0.02
"""An array below this share of its full power is dark, whatever the forecast says. A full battery also
lowers the array, but never under the platform's draw."""

Unit = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]


class Reason(StrEnum):
    """What binds the ceiling (`telemetry.packets.PowerPlan.reason`)."""

    BOARD = "board"
    PLAN = "plan"
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
    floor_guard: Unit = 0.005
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
    hard_margin: Annotated[float, Meta(ge=0, le=0.5)] = 0.045
    """Share of the board's range that the draw is held below a commanded cap or a thermal limit: pacing
    works in steps of decoding, and the mean of a second varies (99 % within 0.036 on the `sim` board)."""
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
    """Board or predicted die, whichever is to be kept under `GovernorSettings.hot_c`, degC."""
    cap_w: float | None = None
    """Commanded cap."""
    planned_w: float | None = None
    """What the plan has for now; None: there is none, and the rules decide."""
    soc_sigma: float = 0.0
    """Error of the state of charge, 0 to 1."""
    idle_w: float
    """Draw of the board at duty 0."""
    max_w: float
    """Draw of the board at duty 1."""
    busy: bool = True
    """The worker has work: only then does a draw below the ceiling call for more duty."""


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """The watts allowed, and why."""

    ceiling_w: float
    """Watts held, between the draw at `min_duty` and the board's most."""
    reason: Reason
    """What binds."""
    eclipse: bool
    """Forecast umbra, or a dark array."""
    allowed_w: float
    """Watts the binding limit gives before service's minimum: below `ceiling_w` when it is not enough."""
    target_soc: float | None
    """State of charge the rules want at the next umbra entry; None in eclipse, by a plan, or when unknown."""


class Limits:
    """Decides the ceiling. No clock, no I/O.

    Parameters
    ----------
    settings
        Tuning.
    """

    def __init__(self, settings: GovernorSettings | None = None) -> None:
        self.settings = settings or GovernorSettings()
        self._guarding = False

    def handle(self, inputs: PowerInputs) -> Ceiling:
        """Return the ceiling for this moment."""
        s = self.settings
        span_w = max(inputs.max_w - inputs.idle_w, 1e-9)
        service_w = inputs.idle_w + s.min_duty * span_w
        limits: dict[Reason, float] = {Reason.BOARD: inputs.max_w}
        target = None
        eps = inputs.eps
        if eps is None or self._stale(inputs):
            limits[Reason.UNKNOWN_BUS] = inputs.idle_w + s.unknown_bus_share * span_w
            eclipse = _in_umbra(inputs)
            self._guarding = False
        else:
            eclipse = _in_umbra(inputs) or eps.array_w < DARK_SHARE * eps.array_sun_w
            if inputs.planned_w is not None:
                limits[Reason.PLAN] = inputs.planned_w
                # What may be overspent before the loop has brought the draw down belongs to the margin.
                overspent_j = (inputs.max_w - service_w) * s.response_s * inputs.rate
                margin = s.floor_guard + inputs.soc_sigma + overspent_j / capacity_j(eps.battery_wh)
                if eclipse:
                    limits[Reason.BATTERY] = self._reach_w(inputs, eps, margin)
                else:
                    limits[Reason.BATTERY] = self._ready_w(inputs, eps, margin, service_w)
            elif eclipse:
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
        return Ceiling(
            ceiling_w=min(max(min(limits.values()), service_w), inputs.max_w),
            reason=reason,
            eclipse=eclipse,
            allowed_w=limits[reason],
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
        """Return the payload watts of the rules in this eclipse."""
        s = self.settings
        sustained_w = self._orbit_w(inputs, eps)[1] if _in_umbra(inputs) else s.eclipse_share * inputs.max_w
        return min(self._reach_w(inputs, eps, s.soc_margin), max(sustained_w, service_w))

    def _reach_w(self, inputs: PowerInputs, eps: BusEps, margin: float) -> float:
        """Return the payload watts the battery gives to the end of this eclipse, a margin above the floor."""
        s = self.settings
        usable = max(0.0, eps.battery_soc - eps.soc_floor - margin)
        usable_j = usable * capacity_j(eps.battery_wh) * s.discharge_efficiency
        left_s = s.unforeseen_eclipse_s
        if inputs.umbra is not None and _in_umbra(inputs):
            left_s = (inputs.umbra.exit_ns - inputs.t_ns) / NS_PER_S
        return usable_j / max(left_s, s.settle_s * inputs.rate) - eps.platform_w

    def _ready_w(self, inputs: PowerInputs, eps: BusEps, margin: float, service_w: float) -> float:
        """Return the payload watts after which the battery still carries bare service through the eclipse.

        By what the array gives now, whatever it was expected to give.
        """
        s = self.settings
        gives_j = capacity_j(eps.battery_wh) * s.discharge_efficiency
        needed = eps.soc_floor + margin
        left_s = s.unforeseen_eclipse_s
        if inputs.umbra is not None:
            needed += (eps.platform_w + service_w) * inputs.umbra.duration_s / gives_j
            left_s = (inputs.umbra.entry_ns - inputs.t_ns) / NS_PER_S
        spare_j = (eps.battery_soc - needed) * gives_j
        return eps.array_w - eps.platform_w + spare_j / max(left_s, s.settle_s * inputs.rate)

    def _sunlight_w(self, inputs: PowerInputs, eps: BusEps, service_w: float) -> tuple[float, float | None]:
        """Return the payload watts sunlight gives, and the state of charge wanted at umbra entry."""
        s = self.settings
        spare_w = s.array_derating * eps.array_sun_w - eps.platform_w
        to_go = s.target_soc
        left_s = inputs.period_s or s.unforeseen_eclipse_s
        if inputs.umbra is not None:
            _, dark_w = self._orbit_w(inputs, eps)
            gives_j = capacity_j(eps.battery_wh) * s.discharge_efficiency
            per_w = inputs.umbra.duration_s / gives_j
            reserve = eps.soc_floor + s.soc_margin
            least = reserve + (eps.platform_w + service_w) * per_w
            wanted = reserve + (eps.platform_w + max(dark_w, service_w)) * per_w
            # Over the target only for what bare service takes; else the eclipse plan gives less.
            to_go = min(wanted, max(s.target_soc, min(least, 1.0)))
            left_s = (inputs.umbra.entry_ns - inputs.t_ns) / NS_PER_S
        left_s = max(left_s, s.settle_s * inputs.rate)
        missing_j = max(0.0, to_go - eps.battery_soc) * capacity_j(eps.battery_wh) / s.charge_efficiency
        return spare_w - missing_j / left_s, to_go


def _in_umbra(inputs: PowerInputs) -> bool:
    umbra = inputs.umbra
    return umbra is not None and umbra.entry_ns <= inputs.t_ns < umbra.exit_ns


def threshold_share(soc: float, soc_floor: float) -> float:
    """Return one of four levels of the span above bare service by state of charge, 0 to 1.

    The policy that the planner is compared with: it knows nothing of eclipses.
    """
    full = (soc - soc_floor) / max(1.0 - soc_floor, 1e-9)
    return 1.0 if full > 0.8 else 0.66 if full > 0.55 else 0.33 if full > 0.3 else 0.0
