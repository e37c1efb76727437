"""The boot manager: from what the boots before left behind, decide how this one starts.

An *unintended* reboot is one without an ordered stop that nobody asked for: a crash, a kill by the watchdog,
a loss of power. They are counted in a row, until a boot has served long enough to be called good. Each is put
down to the image slot that was in use, so that a slot that does not work is left for the other one; after
more of them the node starts in safe mode, which is left by command only.

A restart that the recovery ladder asked for is intended; that it does not go on for ever is bounded there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias, get_args

Slot: TypeAlias = Literal["a", "b"]
SLOTS: tuple[Slot, ...] = get_args(Slot)
ROW = "boot.unintended"
"""Row of the FDIR table that allows safe mode after unintended reboots."""


@dataclass(frozen=True)
class BootLimits:
    """Bounds, numbers assumed.

    Raises
    ------
    ValueError
        A bound under 1, or the other slot would never be tried.
    """

    other_slot_after: int = 2
    """Unintended reboots of a slot in a row after which the other one is used."""
    safe_after: int = 4
    """Unintended reboots in a row after which the node starts in safe mode."""

    def __post_init__(self) -> None:
        if not 1 <= self.other_slot_after <= self.safe_after:
            raise ValueError(f"1 <= other_slot_after <= safe_after does not hold: {self}")


class SlotState(StrEnum):
    """What is known of an image slot without reading all of it."""

    MISSING = "missing"
    INVALID = "invalid"
    """Its manifest cannot be read, or a file of it is missing or has another size."""
    VALID = "valid"


class BootMode(StrEnum):
    """How the node starts."""

    NORMAL = "normal"
    SAFE = "safe"


@dataclass(frozen=True)
class BootFacts:
    """What is known at the start of a boot.

    Raises
    ------
    ValueError
        A negative count.
    """

    boot: int
    """Number of this boot, from 1."""
    clean_shutdown: bool
    """The boot before ended in an ordered stop, or there was none."""
    restart_requested: bool
    """The boot before was asked to end by the recovery ladder."""
    safe: bool
    """Safe mode as persisted."""
    unintended: int = 0
    """Unintended reboots in a row before this boot."""
    last_slot: Slot | None = None
    """Slot the boot before used; None: not known."""
    failed_starts: Mapping[Slot, int] = field(default_factory=dict)
    """Unintended reboots in a row put down to each slot."""
    slots: Mapping[Slot, SlotState] = field(default_factory=dict)
    """State of the slots; one that is not named is missing."""
    active: Slot = "a"
    """Slot the ground made active, or that the configuration names."""
    last_active: Slot | None = None
    """The same at the boot before."""
    pinned: bool = False
    """The configuration names a slot: no other is used."""
    may_enter_safe: bool = True
    """Row `boot.unintended` is enabled, and the ground has not taken over."""
    lost: tuple[str, ...] = ()
    """Names of stored values that were beyond a vote."""

    def __post_init__(self) -> None:
        if self.unintended < 0 or min(self.failed_starts.values(), default=0) < 0:
            raise ValueError(f"counts must not be negative: {self}")


@dataclass(frozen=True)
class BootDecision:
    """How the boot starts; to be persisted before anything else is done, see `node.state.keep_decision`."""

    mode: BootMode
    slot: Slot | None
    """Image slot for the worker; None: there is none, and the image has to be rebuilt."""
    reasons: tuple[str, ...]
    """Why it is not the ordinary start, as sentences; empty for that one."""
    is_unintended: bool
    """True when this boot follows an unintended reboot."""
    unintended: int
    """Unintended reboots in a row, this one included."""
    entered_safe: bool
    """True when safe mode is the answer to unintended reboots: a detection of `boot.unintended`."""
    failed_starts: Mapping[Slot, int]
    active: Slot


def decide(facts: BootFacts, limits: BootLimits | None = None) -> BootDecision:
    """Return how to start.

    Rules, in order:

    1. An ordered stop sets the count of unintended reboots to 0; a restart asked for leaves it.
    2. A slot that is pinned is used. Else the active one, unless it is not valid or has
       `other_slot_after` failed starts, and the other is valid with fewer.
    3. Safe mode if it was persisted, if that value was lost, or from `safe_after` unintended reboots on.
    """
    limits = BootLimits() if limits is None else limits
    reasons: list[str] = []
    failed = {slot: facts.failed_starts.get(slot, 0) for slot in SLOTS}
    unintended = facts.unintended
    is_unintended = not facts.clean_shutdown and not facts.restart_requested
    if is_unintended:
        unintended += 1
        if facts.last_slot is not None:
            failed[facts.last_slot] += 1
        reasons.append(f"unintended reboot, {unintended} in a row")
    elif facts.restart_requested:
        reasons.append("restart asked for by the recovery ladder")
    else:
        unintended = 0
    if facts.last_active is not None and facts.active != facts.last_active:
        # The ground chose it since: it gets its chance whatever happened before.
        failed[facts.active] = 0
    slot = _choose(facts, limits, failed, reasons)
    entered_safe = unintended >= limits.safe_after and facts.may_enter_safe and not facts.safe
    safe = facts.safe or entered_safe or "safe" in facts.lost
    if facts.safe:
        reasons.append("safe mode is left by command only")
    elif "safe" in facts.lost:
        reasons.append("whether the node was in safe mode is lost: safe mode")
    if entered_safe:
        reasons.append(f"safe mode after {unintended} unintended reboots, {limits.safe_after} are the limit")
    return BootDecision(
        mode=BootMode.SAFE if safe else BootMode.NORMAL,
        slot=slot,
        reasons=tuple(reasons),
        is_unintended=is_unintended,
        unintended=unintended,
        entered_safe=entered_safe,
        failed_starts=failed,
        active=facts.active,
    )


def _choose(
    facts: BootFacts, limits: BootLimits, failed: Mapping[Slot, int], reasons: list[str]
) -> Slot | None:
    active: Slot = facts.active
    other: Slot = "b" if active == "a" else "a"
    state = {slot: facts.slots.get(slot, SlotState.MISSING) for slot in SLOTS}
    if facts.pinned:
        return active if state[active] is not SlotState.MISSING else None
    if state[active] is not SlotState.VALID:
        if state[other] is SlotState.VALID:
            reasons.append(f"slot {other}: slot {active} is {state[active]}")
            return other
        # Neither works as it is; a damaged one can still be mended.
        return next((slot for slot in (active, other) if state[slot] is SlotState.INVALID), None)
    if failed[active] < limits.other_slot_after:
        return active
    if state[other] is SlotState.VALID and failed[other] < failed[active]:
        reasons.append(f"slot {other}: {failed[active]} failed starts of slot {active}")
        return other
    return active
