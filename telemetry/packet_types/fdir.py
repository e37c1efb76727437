"""Packets about faults, and what was done about them."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from telemetry.packet_types.base import Count, Nanoseconds, Packet, Seconds, Stream


class Level(IntEnum):
    """Recovery levels (design section 6)."""

    IN_WORKER_REPAIR = 0
    """The worker repaired the damage in place."""
    EPOCH_REDO = 1
    """The epoch was thrown away and decoded again."""
    WORKER_RESTART = 2
    """The worker process was replaced."""
    IMAGE_REBUILD = 3
    """The other image slot, or a rebuilt image."""
    NODE_RESTART = 4
    """The node ended, to be started again by the watchdog."""
    SAFE_MODE = 5
    """Beacon, commands and telemetry, no inference."""


class Outcome(StrEnum):
    """How a recovery action ended."""

    STARTED = "started"
    REPAIRED = "repaired"
    REDONE = "redone"
    RESTARTED = "restarted"
    ESCALATED = "escalated"
    FAILED = "failed"
    REPORTED = "reported"
    """Nothing was to be done about it, or nothing is done while the ground has control."""


class FirstFinding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The first finding of a merged report: its fields are those of its own report."""

    level: Level
    action: str
    detected_ns: Nanoseconds
    recovered_ns: Nanoseconds | None
    region: str = ""
    page: Count | None = None
    role: str = ""
    evidence: dict[str, str | int | float | bool | None] = {}


class FdirReport(Packet, frozen=True, kw_only=True, omit_defaults=True):
    """One detection, with evidence, action, outcome and latency; or several, merged in a full store.

    A merged report stands for all findings of one row and outcome from the first to the last. Its other
    fields are those of the last one, those of the first are in `first`. Who counts findings takes the union
    of `covers` by row and outcome: reports that were merged may have come down as well.
    """

    stream: ClassVar[Stream] = Stream.FDIR
    type_name: ClassVar[str] = "fdir"

    monitor: str
    """What noticed: a row of the FDIR table (docs/fdir-table.md), or `epoch.proof` for an epoch that was
    decoded again."""
    level: Level
    outcome: Outcome
    action: str
    """What was done about it."""
    detected_ns: Nanoseconds
    """Host clock (CLOCK_REALTIME) of the detection: physical time, comparable with the bench's strikes."""
    recovered_ns: Nanoseconds | None
    """Host clock when service was whole again, None if it is not."""
    region: str = ""
    """`weights`, `kv` or `compute`, empty when about none of them."""
    page: Count | None = None
    """Page number in weights.bin; position of a KV row, whose `evidence` names `job` and `seat`; number of a
    matrix product, 0 for the other checks of computation."""
    role: str = ""
    """Tensor role from the manifest; bank of a KV row, `global` or `window`; what was checked of a
    computation: `matmul`, `hidden`, `logits` or `redundancy`."""
    evidence: dict[str, str | int | float | bool | None] = {}
    """With `evidence_cut`, some of it was left out for lack of room."""
    count: Annotated[int, Meta(ge=1, description="count")] = 1
    """Findings it stands for. More than `covers` names: the oldest, of boots beyond the latest 32."""
    first: FirstFinding | None = None
    """The first of them; None unless merged."""
    covers: list[tuple[Count, Count, Count]] = []
    """What it stands for, as ranges [boot, first, last] of running numbers, both included, ascending by boot:
    the spool numbers the reports of a row and outcome from 1 in each boot. Empty: of an earlier version."""


class FlightRecord(Packet, frozen=True, kw_only=True):
    """Dump of the flight recorder: the last stimuli and actions before a recovery of level 3 or above."""

    stream: ClassVar[Stream] = Stream.FDIR
    type_name: ClassVar[str] = "flight_record"

    reason: str
    """What made it be sent: a row of the FDIR table and its finding, or a crash."""
    level: Level | None
    """Level of the recovery; None for a crash, and on command."""
    noted: Count
    """Stimuli and actions noted since boot; the dump holds the latest."""
    entries: bytes
    """msgpack array of entries, oldest first, each `[t_ns, kind, machine, name, fields]`: host clock
    (CLOCK_REALTIME), `stimulus` or `action`, who decided, the event or action, and its fields as a map."""


class RowReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """State and counters of a row of the FDIR table, since boot."""

    row: str
    """Its id in the table."""
    state: str
    """`enabled`, `passive` (reported, not acted on) or `disabled`."""
    watch: str
    """Result of its check: `false`, `true`, `stale`, `error` or `unchecked`."""
    point: str
    """Result over its persistence: `pass`, `fail`, `stale`, `error` or `unchecked`."""
    fired: bool
    """True from its action until it is re-armed."""
    evaluations: Count
    consecutive: Count
    """Violations in a row until now."""
    cumulative: Count
    """Violations."""
    actions: Count
    """Times it fired."""
    last_violation_s: Seconds | None = None
    """Physical time since it last changed to a violation; None when it never did."""


class FdirStatus(Packet, frozen=True, kw_only=True):
    """Answer to the command `query_fdir`: the whole FDIR table as it stands."""

    stream: ClassVar[Stream] = Stream.FDIR
    type_name: ClassVar[str] = "fdir_status"

    table_sha256: str
    """SHA-256 of the table, hexadecimal."""
    overall: str
    """State of the FDIR as a whole, `enabled`, `passive` or `disabled`; the lower of it and a row's holds."""
    external_control: bool
    """True while the ground has told the FDIR to keep its hands off."""
    resets: Count
    """Restarts of the node that the FDIR has asked for, not cleared yet."""
    max_resets: Count
    """So many are allowed; then safe mode."""
    rows: list[RowReport]
