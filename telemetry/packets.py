"""Every telemetry packet: the body of a frame, typed, with units.

The wire form of a body is a msgpack map keyed by field name, so any msgpack client can read it.
Schema evolution: a new field needs a default, and a field never changes its type or unit.
`docs/icd.md` is generated from these classes: the text after each field is its description there.
"""

from __future__ import annotations

from telemetry.packet_types.base import (
    Mode,
    Packet,
    Severity,
    Stream,
)
from telemetry.packet_types.command import (
    CommandSchedule,
    KeyReport,
    ScheduledCommand,
    SecurityReport,
    Stage,
    UploadReport,
    Verification,
)
from telemetry.packet_types.fdir import (
    FdirReport,
    FdirStatus,
    FirstFinding,
    FlightRecord,
    Level,
    Outcome,
    RowReport,
)
from telemetry.packet_types.health import (
    BootReport,
    Event,
    Housekeeping,
)
from telemetry.packet_types.power import (
    PlanSegment,
    PowerPlan,
)
from telemetry.packet_types.result import (
    Certificate,
    Result,
)
from telemetry.packet_types.store import (
    Ledger,
    Product,
    ProductChunk,
    ProductId,
    ProductPart,
    StreamLedger,
)

__all__ = (
    "BY_TYPE",
    "PACKETS",
    "PRIORITY",
    "BootReport",
    "Certificate",
    "CommandSchedule",
    "Event",
    "FdirReport",
    "FdirStatus",
    "FirstFinding",
    "FlightRecord",
    "Housekeeping",
    "KeyReport",
    "Ledger",
    "Level",
    "Mode",
    "Outcome",
    "Packet",
    "PlanSegment",
    "PowerPlan",
    "Product",
    "ProductChunk",
    "ProductId",
    "ProductPart",
    "Result",
    "RowReport",
    "ScheduledCommand",
    "SecurityReport",
    "Severity",
    "Stage",
    "Stream",
    "StreamLedger",
    "UploadReport",
    "Verification",
)

PACKETS: tuple[type[Packet], ...] = (
    Housekeeping, Event, Result, Verification, CommandSchedule, UploadReport, FdirReport, FlightRecord,
    FdirStatus, BootReport, PowerPlan, Ledger, SecurityReport, Product, ProductChunk,
)  # fmt: skip
"""Every packet type, in the order of the ICD."""

BY_TYPE: dict[str, type[Packet]] = {p.type_name: p for p in PACKETS}

PRIORITY: dict[Stream, int] = {
    Stream.SECURITY: 0,
    Stream.FDIR: 0,
    Stream.EVENT: 1,
    Stream.VERIFICATION: 1,
    Stream.BOOT: 1,
    Stream.LEDGER: 2,
    Stream.RESULT: 3,
    Stream.PLAN: 4,
    Stream.HOUSEKEEPING: 5,
    Stream.PRODUCT: 6,
}
"""Downlink priority by stream, 0 first."""
