"""What can be wrong with a link, and when: the faults of the proxy, and the script of a scenario. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

Delay = Annotated[float, Meta(ge=0, le=60)]
Bandwidth = Annotated[float, Meta(ge=1e3, le=1e10)]


class Way(StrEnum):
    """Directions of a link."""

    NONE = "none"
    TO_GROUND = "to_ground"
    TO_NODE = "to_node"
    BOTH = "both"

    def covers(self, way: Way) -> bool:
        """Return whether this is the given direction, or both."""
        return self in (way, Way.BOTH)

    def joined(self, other: Way) -> Way:
        """Return the directions of both together."""
        if self is other or other is Way.NONE:
            return self
        return other if self is Way.NONE else Way.BOTH


class LinkFaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is wrong with a link now. By default nothing is. Times are physical seconds."""

    delay_s: Delay = 0.0
    """One-way delay."""
    jitter_s: Delay = 0.0
    """Most that is added to the delay, evenly by chance. TCP keeps the order."""
    to_ground_bit_s: Bandwidth | None = None
    """Bandwidth from the node to the ground; None: that of the machine."""
    to_node_bit_s: Bandwidth | None = None
    """Bandwidth from the ground to the node."""
    black_hole: Way = Way.NONE
    """Direction in which bytes go in and do not come out; they do when it ends, as TCP sends them again."""
    corrupt_per_byte: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Probability that a bit of a byte is flipped."""
    half_open: bool = False
    """The ground's side of each connection dies, and the node is not told."""
    reset_hz: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """Resets of all connections a second, by chance."""

    def joined(self, other: LinkFaults) -> LinkFaults:
        """Return what is wrong when both are: the longer delay, the narrower bandwidth, and so on."""
        return LinkFaults(
            delay_s=max(self.delay_s, other.delay_s),
            jitter_s=max(self.jitter_s, other.jitter_s),
            to_ground_bit_s=_narrower(self.to_ground_bit_s, other.to_ground_bit_s),
            to_node_bit_s=_narrower(self.to_node_bit_s, other.to_node_bit_s),
            black_hole=self.black_hole.joined(other.black_hole),
            corrupt_per_byte=max(self.corrupt_per_byte, other.corrupt_per_byte),
            half_open=self.half_open or other.half_open,
            reset_hz=max(self.reset_hz, other.reset_hz),
        )

    def bit_s(self, way: Way) -> float | None:
        """Return the bandwidth in a direction."""
        return self.to_ground_bit_s if way is Way.TO_GROUND else self.to_node_bit_s


def _narrower(one: float | None, other: float | None) -> float | None:
    known = [value for value in (one, other) if value is not None]
    return min(known) if known else None


class LinkFault(LinkFaults, frozen=True, kw_only=True):
    """`[[link_faults]]` of a scenario: something is wrong with the link for a while."""

    at_s: Annotated[float, Meta(ge=0)]
    """Mission time from the start."""
    for_s: Annotated[float, Meta(gt=0)]
    """Mission time it lasts."""


def faults_at(script: Sequence[LinkFault], t_s: float) -> LinkFaults:
    """Return what is wrong at a time, mission s from the start."""
    now = LinkFaults()
    for fault in script:
        if fault.at_s <= t_s < fault.at_s + fault.for_s:
            now = now.joined(fault)
    return now
