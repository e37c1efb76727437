"""Messages of the spacecraft bus, as the node sees them (topics `bus/*`, msgpack maps).

On the bench the plant publishes them; in flight the bus gateway does. `load` and `request` go the other way:
the board reports what it draws, which is what the power unit would measure (ADR 0001), and asks for help.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

SENSOR_RANGES: Final[dict[str, tuple[float, float]]] = {
    "battery_soc": (0.0, 1.0),
    "battery_v": (0.0, 100.0),
    "battery_a": (-100.0, 100.0),
    "array_w": (0.0, 100_000.0),
}
"""Fields of `bus/eps` that sensors give, each in up to `SENSOR_SETS` sets, and the values they can have."""
SENSOR_SETS: Final = 3
"""Most sensor sets a power unit may have: its main one and two redundant ones."""

NS_PER_S: Final = 1_000_000_000
EARLIEST_NS: Final = 946_684_800 * NS_PER_S
"""2000-01-01 UTC: no mission time lies before it."""
LATEST_NS: Final = 4_102_444_800 * NS_PER_S
"""2100-01-01 UTC: nor after it."""
LEAST_WH: Final = 1.0
"""No battery that feeds a payload computer has less, Wh (assumed: that of a 1U CubeSat has 10)."""

# Physical ranges: what no spacecraft of this kind has, and what arithmetic may rely on (all assumed).
MissionNs = Annotated[int, Meta(ge=EARLIEST_NS, le=LATEST_NS, description="ns")]
NodeNs = Annotated[int, Meta(ge=0, le=LATEST_NS, description="ns")]
"""By the node's clock: until `bus/time` sets it, a board without a battery for its clock has 1970."""
Rate = Annotated[float, Meta(ge=0.0001, le=10_000, description="s/s")]
Soc = Annotated[float, Meta(ge=0, le=1, description="0 to 1")]
BatteryV = Annotated[float, Meta(ge=0, le=100, description="V")]
BatteryA = Annotated[float, Meta(ge=-100, le=100, description="A")]
BatteryWh = Annotated[float, Meta(ge=LEAST_WH, le=100_000, description="Wh")]
SourceW = Annotated[float, Meta(ge=0, le=100_000, description="W")]
LoadW = Annotated[float, Meta(ge=0, le=10_000, description="W")]
BusC = Annotated[float, Meta(ge=-150, le=200, description="degC")]
Name = Annotated[str, Meta(min_length=0, max_length=64)]
Text = Annotated[str, Meta(min_length=0, max_length=1000)]
Int64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class BusError(ValueError):
    """Bytes that are no message of the bus: no msgpack, or a field missing, unknown or out of its range."""


class BusMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all bus messages."""

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field} is not finite")


class BusTime(BusMessage, frozen=True, kw_only=True):
    """Mission time from the bus. A time far off, or at another rate, is held until a second one agrees."""

    t_ns: MissionNs
    """UTC, ns since 1970."""
    rate: Rate = 1.0
    """Mission seconds a second of physical time: above 1 is an accelerated bench."""


class BusOrbit(BusMessage, frozen=True, kw_only=True):
    """Orbital elements for the node's own forecast: a TLE, or an Orbit Mean-elements Message."""

    line1: Annotated[str, Meta(min_length=69, max_length=69)] | None = None
    line2: Annotated[str, Meta(min_length=69, max_length=69)] | None = None
    omm: Annotated[dict[Name, Any], Meta(max_length=100)] | None = None
    """Fields by their names in CCSDS 502.0, instead of the two lines. Numbers may come as text; null and
    blank text are no value. Fields that do not move the satellite may hold anything. Times are UTC, the
    elements SGP4's, about the Earth in TEME: a message that says otherwise is refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lines = (self.line1 is not None, self.line2 is not None)
        if lines != ((True, True) if self.omm is None else (False, False)):
            raise ValueError("either line1 and line2 are given, or omm")


class EpsSensors(BusMessage, frozen=True, kw_only=True):
    """One redundant set of sensors of the power unit.

    A node takes null, or a value that is not finite or out of range, as no value of that sensor; the rest of
    the message counts all the same.
    """

    battery_soc: Soc | None = None
    battery_v: BatteryV | None = None
    battery_a: BatteryA | None = None
    array_w: SourceW | None = None
    t_ns: MissionNs | None = None
    """When this set was sampled, UTC; null: with the message. One that stands still tells of a stale set."""


class BusEps(BusMessage, frozen=True, kw_only=True):
    """Electrical power system.

    Values of its sensors (`battery_soc`, `battery_v`, `battery_a`, `array_w`) may come from up to three sets;
    a node votes on them, and takes each as `EpsSensors` says.
    """

    t_ns: MissionNs
    battery_soc: Soc
    battery_v: BatteryV
    battery_a: BatteryA
    """Battery current, positive when charging, A."""
    battery_wh: BatteryWh
    """Capacity, Wh."""
    array_w: SourceW
    """Power the solar array delivers now, W."""
    array_sun_w: SourceW
    """Power the array delivers in full sunlight, W."""
    platform_w: SourceW
    """Draw of the rest of the spacecraft, W."""
    soc_floor: Soc
    """State of charge the spacecraft must not go under."""
    redundant: Annotated[list[EpsSensors], Meta(max_length=SENSOR_SETS - 1)] = []
    """Second and third set of sensors."""


class RefusedValue(BusMessage, frozen=True, kw_only=True):
    """A sensor's value that was not taken as one."""

    sensor_set: int
    """0: the main set."""
    field: str
    value: str
    """As it came, in words: NaN cannot be compared."""
    why: Literal["nan", "range"]
    """`nan`: not finite, or null."""


class EpsReading(BusMessage, frozen=True, kw_only=True):
    """`bus/eps` as it is received: checked by sensor instead of as a whole."""

    t_ns: MissionNs
    sets: tuple[EpsSensors, ...]
    """The main set first."""
    refused: tuple[RefusedValue, ...] = ()
    battery_wh: BatteryWh
    array_sun_w: SourceW
    platform_w: SourceW
    soc_floor: Soc

    @classmethod
    def of(cls, message: BusEps) -> EpsReading:
        """Return the reading of a message that is valid as a whole."""
        main = EpsSensors(**{name: getattr(message, name) for name in SENSOR_RANGES}, t_ns=message.t_ns)
        return cls(
            t_ns=message.t_ns,
            sets=(main, *message.redundant),
            battery_wh=message.battery_wh,
            array_sun_w=message.array_sun_w,
            platform_w=message.platform_w,
            soc_floor=message.soc_floor,
        )


class BusThermal(BusMessage, frozen=True, kw_only=True):
    """Temperatures seen by the bus."""

    t_ns: MissionNs
    board_c: BusC
    radiator_c: BusC


class ContactSpan(BusMessage, frozen=True, kw_only=True):
    """One contact window, UTC."""

    start_ns: MissionNs
    end_ns: MissionNs


class BusContact(BusMessage, frozen=True, kw_only=True):
    """Radio state, and the next contact window."""

    t_ns: MissionNs
    in_contact: bool
    station: Name = ""
    next_start_ns: MissionNs | None = None
    next_end_ns: MissionNs | None = None
    windows: Annotated[list[ContactSpan], Meta(max_length=64)] = []
    """Windows under way and ahead, by their start: jobs are planned by them."""
    known_until_ns: MissionNs | None = None
    """UTC up to which `windows` holds all there are; null: it does not say."""


class BusLoad(BusMessage, frozen=True, kw_only=True):
    """What the payload computer draws (published by the node)."""

    t_ns: NodeNs
    power_w: LoadW


class BusRequest(BusMessage, frozen=True, kw_only=True):
    """What the payload computer asks the spacecraft for (published by the node, several times)."""

    t_ns: NodeNs
    """When it was decided: the same in every repetition of a request."""
    request: Literal["power_cycle"]
    """`power_cycle`: take the supply away for a moment, which ends a latch-up."""
    reason: Text
    """Why, in words."""
    evidence: Annotated[dict[Name, Text | Int64 | float | bool | None], Meta(max_length=40)] = {}


CHANNELS: dict[str, type[BusMessage]] = {
    "time": BusTime,
    "orbit": BusOrbit,
    "eps": BusEps,
    "thermal": BusThermal,
    "contact": BusContact,
    "load": BusLoad,
    "request": BusRequest,
}
PARTS: tuple[type[BusMessage], ...] = (EpsSensors, ContactSpan)
"""Parts of the messages, as the ICD documents them."""
FROM_NODE = ("load", "request")
"""Channels that the node publishes; it listens to all others."""


def encode(message: BusMessage) -> bytes:
    """Return the msgpack map of a bus message."""
    return msgspec.msgpack.encode(message)


def decode(channel: str, payload: bytes) -> BusMessage:
    """Decode and validate a bus message.

    Raises
    ------
    BusError
        Unknown channel, or the payload is not valid for it: ranges, types, NaN, unknown fields.
    """
    try:
        kind = CHANNELS[channel]
    except KeyError:
        raise BusError(f"unknown bus channel {channel!r}") from None
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BusError(f"bus/{channel}: {error}") from error


def decode_eps(payload: bytes) -> EpsReading:
    """Decode `bus/eps` leniently by sensor: one bad value costs that value, not the message.

    Raises
    ------
    BusError
        The payload is no such message: another type, a missing or unknown field, or a value out of range
        that no sensor gives (capacity, floor, ...).
    """
    try:
        raw: Any = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BusError(f"bus/eps: {error}") from error
    refused: list[RefusedValue] = []
    if isinstance(raw, dict):
        redundant = raw.get("redundant")
        others = redundant if isinstance(redundant, list) else []
        # Stand-ins keep the strict decoding below to the rest of the message.
        gaps = _take_out(raw, 0, refused)
        for number, each in enumerate(others, 1):
            if isinstance(each, dict):
                for name in _take_out(each, number, refused):
                    each[name] = None
        raw |= {name: SENSOR_RANGES[name][0] for name in gaps}
    else:
        gaps = []
    try:
        whole = msgspec.convert(raw, BusEps)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BusError(f"bus/eps: {error}") from error
    reading = EpsReading.of(whole)
    main = msgspec.structs.replace(reading.sets[0], **dict.fromkeys(gaps))
    return msgspec.structs.replace(reading, sets=(main, *reading.sets[1:]), refused=tuple(refused))


def _take_out(values: dict[Any, Any], number: int, refused: list[RefusedValue]) -> list[str]:
    """Note the sensors of a set whose value is no value; other types are left to the strict check."""
    found: list[str] = []
    for name, (low, high) in SENSOR_RANGES.items():
        if name not in values:
            continue
        value = values[name]
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            why: Literal["nan", "range"] = "nan"
        elif isinstance(value, int | float) and not isinstance(value, bool) and not low <= value <= high:
            why = "range"
        else:
            continue
        found.append(name)
        # A redundant sensor may be absent for good, which null says: nothing to report.
        if not (value is None and number):
            text = "null" if value is None else str(value)
            refused.append(RefusedValue(sensor_set=number, field=name, value=text[:40], why=why))
    return found
