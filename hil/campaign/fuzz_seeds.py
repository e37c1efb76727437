"""A sound packet of every type, for mutation."""

from __future__ import annotations

from typing import Final

from hil.bench.link_load import T0_NS, backlog
from telemetry.packets import (
    BootReport,
    CommandSchedule,
    FdirReport,
    FdirStatus,
    FlightRecord,
    KeyReport,
    Level,
    Outcome,
    Packet,
    Product,
    ProductChunk,
    ProductPart,
    RowReport,
    ScheduledCommand,
    SecurityReport,
    UploadReport,
)

_SHA256: Final = "0123456789abcdef" * 4
_ROW: Final = RowReport(
    row="worker.ping", state="enabled", watch="FALSE", point="TRUE", fired=False, evaluations=900,
    consecutive=0, cumulative=3, actions=1, last_violation_s=12.5,
)  # fmt: skip
_ENTRY: Final = ScheduledCommand(
    entry=3, execute_ns=T0_NS, name="ping", key_id="ground-1", command_seq=9, sequence="dawn"
)
_KEY: Final = KeyReport(state="active", use="command", last_seq=41)


def examples() -> list[Packet]:
    """Return them; those of the outage's backlog are as a node makes them."""
    of_type = {packet.type_name: packet for packet, _ in backlog(61)}
    others: list[Packet] = [
        FdirReport(
            monitor="weights.digest", level=Level.IN_WORKER_REPAIR, outcome=Outcome.REPAIRED, action="repair",
            detected_ns=T0_NS, recovered_ns=T0_NS + 1, region="weights", page=12, role="attn_qkv",
            evidence={"bit": 3, "why": "digest", "share": 0.5, "again": False, "none": None},
        ),
        FlightRecord(reason="asked for", level=Level.NODE_RESTART, noted=20, entries=bytes(range(64))),
        FdirStatus(overall="enabled", external_control=False, resets=1, max_resets=3, rows=[_ROW, _ROW],
                   table_sha256=_SHA256),
        BootReport(
            software="0.1.0", boot=7, clean_shutdown=False, config_sha256=_SHA256, image_id="abc",
            board="sim", python="3.11.7", onnxruntime="1.32.0", resumed_job="j", resumed_jobs=["j", "k"],
        ),
        SecurityReport(
            accepted=3, redelivered=1, rejected={"bad_mac": 2}, last_key_id="ground-1", last_seq=41,
            last_reason="bad_mac", keys={"ground-1": _KEY},
        ),
        UploadReport(sha256=_SHA256, kind="image", chunks=9, received=4, missing=[(1, 2), (6, 8)], refused=3),
        CommandSchedule(entries=[_ENTRY], sequences=["dawn"]),
        Product(product="dump-1", kind="memory_dump", name="config", size_bytes=90, chunk_bytes=32,
                sha256=_SHA256,
                parts=[ProductPart(first_byte=0, size_bytes=90, file="libc.so.6", offset=4096)]),
        ProductChunk(product="dump-1", index=1, data=bytes(range(64))),
    ]  # fmt: skip
    return list({**of_type, **{packet.type_name: packet for packet in others}}.values())
