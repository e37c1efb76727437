"""Messages of the spacecraft bus, as the node sees them (topics `bus/*`, msgpack maps).

On the bench the plant publishes them; in flight the bus gateway does. `load` and `request` go the other way:
the board reports what it draws, which is what the power unit would measure (ADR 0001), and asks for help.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class BusMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all bus messages."""

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field} is not finite")


class BusTime(BusMessage, frozen=True, kw_only=True):
    """Mission time from the bus."""

    t_ns: int
    """UTC, ns since 1970."""
    rate: Annotated[float, Meta(gt=0, le=10_000)] = 1.0
    """Mission seconds a second of physical time: above 1 is an accelerated bench."""


class BusOrbit(BusMessage, frozen=True, kw_only=True):
    """Orbital elements for the node's own forecast."""

    line1: Annotated[str, Meta(min_length=69, max_length=69)]
    line2: Annotated[str, Meta(min_length=69, max_length=69)]


class BusEps(BusMessage, frozen=True, kw_only=True):
    """Electrical power system."""

    t_ns: int
    battery_soc: Annotated[float, Meta(ge=0, le=1)]
    battery_v: Annotated[float, Meta(ge=0, le=100)]
    battery_a: Annotated[float, Meta(ge=-100, le=100)]
    """Battery current, positive when charging, A."""
    battery_wh: Annotated[float, Meta(gt=0, le=100_000)]
    """Capacity, Wh."""
    array_w: Annotated[float, Meta(ge=0, le=100_000)]
    """Power the solar array delivers now, W."""
    array_sun_w: Annotated[float, Meta(ge=0, le=100_000)]
    """Power the array delivers in full sunlight, W."""
    platform_w: Annotated[float, Meta(ge=0, le=100_000)]
    """Draw of the rest of the spacecraft, W."""
    soc_floor: Annotated[float, Meta(ge=0, le=1)]
    """State of charge the spacecraft must not go under."""


class BusThermal(BusMessage, frozen=True, kw_only=True):
    """Temperatures seen by the bus."""

    t_ns: int
    board_c: Annotated[float, Meta(ge=-150, le=200)]
    radiator_c: Annotated[float, Meta(ge=-150, le=200)]


class BusContact(BusMessage, frozen=True, kw_only=True):
    """Radio state, and the next contact window."""

    t_ns: int
    in_contact: bool
    station: str = ""
    next_start_ns: int | None = None
    next_end_ns: int | None = None


class BusLoad(BusMessage, frozen=True, kw_only=True):
    """What the payload computer draws (published by the node)."""

    t_ns: int
    power_w: Annotated[float, Meta(ge=0, le=10_000)]


class BusRequest(BusMessage, frozen=True, kw_only=True):
    """What the payload computer asks the spacecraft for (published by the node, several times)."""

    t_ns: int
    """When it was decided: the same in every repetition of a request."""
    request: Literal["power_cycle"]
    """`power_cycle`: take the supply away for a moment, which ends a latch-up."""
    reason: str
    """Why, in words."""
    evidence: dict[str, str | int | float | bool | None] = {}


CHANNELS: dict[str, type[BusMessage]] = {
    "time": BusTime,
    "orbit": BusOrbit,
    "eps": BusEps,
    "thermal": BusThermal,
    "contact": BusContact,
    "load": BusLoad,
    "request": BusRequest,
}
FROM_NODE = ("load", "request")
"""Channels that the node publishes; it listens to all others."""


def encode(message: BusMessage) -> bytes:
    """Return the msgpack map of a bus message."""
    return msgspec.msgpack.encode(message)


def decode(channel: str, payload: bytes) -> BusMessage:
    """Decode and validate a bus message.

    Raises
    ------
    ValueError
        Unknown channel, or the payload is not valid for it: ranges, types, NaN, unknown fields.
    """
    try:
        kind = CHANNELS[channel]
    except KeyError:
        raise ValueError(f"unknown bus channel {channel!r}") from None
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"bus/{channel}: {error}") from error
