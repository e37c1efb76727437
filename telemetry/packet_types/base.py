"""What all packets share: streams, units, enumerations."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, description="count")]
Seconds = Annotated[float, Meta(description="s")]
Watts = Annotated[float, Meta(description="W")]
Volts = Annotated[float, Meta(description="V")]
Amperes = Annotated[float, Meta(description="A")]
Celsius = Annotated[float, Meta(description="degC")]
Fraction = Annotated[float, Meta(ge=0, le=1, description="0 to 1")]
Nanoseconds = Annotated[int, Meta(description="ns")]


class Stream(StrEnum):
    """Telemetry streams: each has its own sequence numbers, priority and drop policy."""

    EVENT = "event"
    FDIR = "fdir"
    VERIFICATION = "verification"
    SECURITY = "security"
    BOOT = "boot"
    LEDGER = "ledger"
    RESULT = "result"
    PLAN = "plan"
    HOUSEKEEPING = "hk"
    PRODUCT = "product"


class Mode(StrEnum):
    """Node modes. SAFE: beacon, commands and telemetry, no inference."""

    BOOT = "boot"
    """Starting, until the first transition."""
    NOMINAL = "nominal"
    """Inference in sunlight."""
    ECLIPSE = "eclipse"
    """Inference in the Earth's shadow, on less power."""
    SAFE = "safe"
    """Beacon, commands and telemetry, no inference."""


class Severity(IntEnum):
    """Event severities (after PUS service 5)."""

    INFO = 1
    LOW = 2
    MEDIUM = 3
    HIGH = 4


class Packet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every telemetry packet. `stream` says in which stream it travels."""

    stream: ClassVar[Stream]
    type_name: ClassVar[str]
