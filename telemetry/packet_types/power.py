"""Packets about power."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from telemetry.packet_types.base import Count, Fraction, Nanoseconds, Packet, Stream, Watts


class PlanSegment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of a power plan."""

    end_ns: Nanoseconds
    """Mission time (UTC) at which it ends."""
    ceiling_w: Watts
    """Draw planned."""
    battery_soc: Fraction
    """State of charge expected at its end."""


class PowerPlan(Packet, frozen=True, kw_only=True):
    """The ceiling and why: with each new plan, and on each change of reason or of more than 5 %."""

    stream: ClassVar[Stream] = Stream.PLAN
    type_name: ClassVar[str] = "plan"

    ceiling_w: Watts
    """Ceiling the governor holds from now on."""
    duty: Fraction
    """Share of time the worker may decode (token pacing)."""
    reason: str
    """What binds: `board`, `plan`, `array`, `battery`, `thermal`, `command`, `floor`, `unknown_bus`."""
    battery_soc: Fraction | None
    """State of charge it was decided on; None while unknown."""
    soc_floor: Fraction
    """State of charge the plan must not go under."""
    eclipse_entry_ns: Nanoseconds | None
    """Mission time (UTC) of the next forecast umbra entry."""
    eclipse_exit_ns: Nanoseconds | None
    """Mission time (UTC) of the next forecast umbra exit."""
    source: str = "rules"
    """Who decides: `planner`, `rules`, `threshold`."""
    binding: str = "none"
    """What keeps the plan from more watts now: `board`, `cap`, `demand` (no more jobs), `battery_floor`,
    `next_eclipse` (charge wanted at the end of the horizon), `thermal`, `worth` (better spent later)."""
    binds_at_ns: Nanoseconds | None = None
    """Mission time at which the bound is met."""
    note: str = ""
    """Why there is no plan."""
    eclipse_source: str = "unknown"
    """Where the eclipses come from: `forecast`, `sensed` (by the array), `unknown`."""
    edge_margin_s: float = 0.0
    """Error reckoned with of their edges."""
    soc_sigma: Fraction = 0.0
    """Error of the state of charge."""
    array_gain: float = 1.0
    """Measured power of the array by the expected one."""
    die_c: float | None = None
    """Predicted temperature of the die, degC."""
    least_priority: int = 0
    """Jobs below it are shed: there is no energy for them now."""
    backlog_tokens: Count = 0
    """Tokens of open jobs."""
    backlog_clear_ns: Nanoseconds | None = None
    """Mission time at which they will be done by the plan; None: not within its horizon, or no plan."""
    battery_cycles: float = 0.0
    """Cycles of the battery since boot."""
    battery_wear: float = 0.0
    """Share of its life they used, by the configured table."""
    horizon: list[PlanSegment] = []
    """The plan, with the packet that first reports it."""
