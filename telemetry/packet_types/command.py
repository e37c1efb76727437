"""Packets about telecommands: verification, schedule, uploads, security."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import msgspec

from telemetry.packet_types.base import Count, Nanoseconds, Packet, Stream


class Stage(StrEnum):
    """Stages of command verification (after PUS service 1)."""

    ACCEPTED = "accepted"
    STARTED = "started"
    PROGRESS = "progress"
    COMPLETED = "completed"


class Verification(Packet, frozen=True, kw_only=True):
    """Report on one telecommand."""

    stream: ClassVar[Stream] = Stream.VERIFICATION
    type_name: ClassVar[str] = "verification"

    key_id: str
    """Key the telecommand was signed with."""
    command_seq: Count
    """Sequence number of the telecommand."""
    name: str
    """Name of the command."""
    stage: Stage
    ok: bool
    """Whether this stage succeeded."""
    code: str
    """`ok`, or why not: a rejection code, `unknown_command`, `bad_argument`, or a failure code."""
    reason: str = ""
    """What the code means here, in words; for `ok` what the ground could not know, e.g. an entry's number."""
    entry: Count | None = None
    """Entry of the schedule this is about: `name` is then the command it holds, key and number are those of
    the telecommand that put it there. None for the telecommand itself."""


class UploadReport(Packet, frozen=True, kw_only=True):
    """What has arrived of the upload that is open, asked for by `upload_status`."""

    stream: ClassVar[Stream] = Stream.VERIFICATION
    type_name: ClassVar[str] = "upload"

    sha256: str
    """SHA-256 of the whole, hexadecimal; empty when no upload is open."""
    kind: str = ""
    """`image` or `fdir_table`."""
    chunks: Count = 0
    """Chunks it has."""
    received: Count = 0
    """Of these, how many the node holds on its disk."""
    missing: list[tuple[int, int]] = []
    """Ranges (first, last) of chunks it lacks, both included, ascending; the first 256 of them."""
    refused: Count = 0
    """Messages on the topic of uploads that were not taken, since boot: not authentic, of another upload, of
    the wrong size, or more than could wait."""


class ScheduledCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of the schedule."""

    entry: Count
    execute_ns: Nanoseconds
    """Mission time (UTC) of execution."""
    name: str
    """Name of the command."""
    key_id: str
    """Key of the telecommand that put it there."""
    command_seq: Count
    """Sequence number of that telecommand."""
    sequence: str | None
    """Sequence it is a step of; None if it was inserted by itself."""


class CommandSchedule(Packet, frozen=True, kw_only=True):
    """The schedule of commands, asked for by `schedule_list`."""

    stream: ClassVar[Stream] = Stream.VERIFICATION
    type_name: ClassVar[str] = "command_schedule"

    entries: list[ScheduledCommand]
    """In the order of execution."""
    sequences: list[str]
    """Names of the sequences that are loaded."""


class KeyReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key of the node's ring. Its secret never leaves the node."""

    state: str
    """`standby`, `active` or `retired`."""
    use: str
    """`command` or `recovery`."""
    last_seq: Count | None
    """Sequence number last accepted with it (durable); None if none was."""


class SecurityReport(Packet, frozen=True, kw_only=True):
    """Counters of the command authenticator, on each rejection (throttled) and with each ledger."""

    stream: ClassVar[Stream] = Stream.SECURITY
    type_name: ClassVar[str] = "security"

    accepted: Count
    """Telecommands accepted, since boot."""
    redelivered: Count
    """Telecommands that came again, and were answered with what was stored, since boot."""
    rejected: dict[str, int]
    """Rejections by reason (see the table of rejection codes)."""
    last_key_id: str | None
    """Key of the telecommand last accepted (durable)."""
    last_seq: Count | None
    """Sequence number last accepted with that key (durable): the next may be up to a window above it."""
    last_reason: str | None
    """Reason of the last rejection, since boot."""
    keys: dict[str, KeyReport] = {}
    """The keys, by id."""
