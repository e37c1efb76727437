"""Telecommands about telecommands: arming, the schedule, sequences."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import crc32c
import msgspec
from msgspec import Meta

from telemetry.dictionary.base import Arguments, Hazard
from telemetry.frame import MissionTime

CommandName = Annotated[str, Meta(pattern=r"^[a-z][a-z_]{0,39}\Z", description="name of a command")]


SequenceName = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,39}\Z", description="1 to 40 of a-z, 0-9, '.', '_', '-'")
]


class Arm(Arguments, frozen=True, kw_only=True):
    """Let a hazardous command be given, once, with exactly these arguments, within 60 s of physical time.

    Giving it with others, or a restart of the node, disarms.
    """

    name: ClassVar[str] = "arm"
    hazard: ClassVar[Hazard] = Hazard.NONE

    command: CommandName
    args: dict[str, Any] = {}


class ScheduleInsert(Arguments, frozen=True, kw_only=True):
    """Have a command executed later, by mission time. The verification tells the number of its entry.

    The schedule survives restarts. A command whose time passed by more than 30 s unexecuted is skipped, and
    reported so, unless it ends a restriction (a cap lifted or raised, an FDIR row enabled, external control
    off): that is carried out however late. While a step of mission time is not confirmed, it waits.
    Not for hazardous commands, those of keys, `arm`, and what would feed the schedule itself.
    """

    name: ClassVar[str] = "schedule_insert"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    t_ns: MissionTime
    """Mission time (UTC) of execution, ahead of now, ns since 1970."""
    command: CommandName
    args: dict[str, Any] = {}


Entry = Annotated[int, Meta(ge=1, le=2**63 - 1, description="number of an entry")]


class ScheduleDelete(Arguments, frozen=True, kw_only=True):
    """Take an entry out of the schedule."""

    name: ClassVar[str] = "schedule_delete"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    entry: Entry


class ScheduleShift(Arguments, frozen=True, kw_only=True):
    """Move one entry of the schedule, or all, in mission time. If one came to lie in the past, none moves."""

    name: ClassVar[str] = "schedule_shift"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    by_s: Annotated[float, Meta(ge=-1e7, le=1e7, description="-10,000,000 to 10,000,000 s")]
    entry: Entry | None = None
    """None for all."""


class ScheduleList(Arguments, frozen=True, kw_only=True):
    """Send what is scheduled, and the names of the sequences that are loaded."""

    name: ClassVar[str] = "schedule_list"
    hazard: ClassVar[Hazard] = Hazard.NONE


class SequenceStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One command of a sequence."""

    delay_s: Annotated[float, Meta(ge=0, le=1e6, description="0 to 1,000,000 s")]
    """Mission time after the step before, or after the start."""
    command: CommandName
    args: dict[str, Any] = {}
    crc32c: Annotated[int, Meta(ge=0, lt=2**32, description="0 to 2^32 - 1")]
    """CRC-32C over msgpack [command, args], keys of all maps in order: proven when it is loaded, and again
    before it is executed."""


class SequenceLoad(Arguments, frozen=True, kw_only=True):
    """Store a named sequence of commands, in the place of one of that name. It survives restarts."""

    name: ClassVar[str] = "sequence_load"
    hazard: ClassVar[Hazard] = Hazard.NONE

    sequence: SequenceName
    steps: Annotated[tuple[SequenceStep, ...], Meta(min_length=1, max_length=64, description="1 to 64 steps")]


class SequenceStart(Arguments, frozen=True, kw_only=True):
    """Put the steps of a sequence into the schedule, from now on. A sequence runs once at a time.

    Its delays are kept when mission time steps. When it ends and steps of it were skipped, damaged or failed,
    the event `sequence.partial` says how many ran.
    """

    name: ClassVar[str] = "sequence_start"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    sequence: SequenceName


class SequenceStop(Arguments, frozen=True, kw_only=True):
    """Take what is left of a sequence out of the schedule."""

    name: ClassVar[str] = "sequence_stop"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    sequence: SequenceName


def step_crc(command: str, args: dict[str, Any]) -> int:
    """Return the CRC-32C of a step."""
    return crc32c.crc32c(_sorted_encoder.encode([command, args]))


def make_step(arguments: Arguments, delay_s: float = 0.0) -> SequenceStep:
    """Return a command as a step, with its CRC."""
    args = msgspec.msgpack.decode(msgspec.msgpack.encode(arguments))
    return SequenceStep(
        delay_s=delay_s, command=arguments.name, args=args, crc32c=step_crc(arguments.name, args)
    )


_sorted_encoder = msgspec.msgpack.Encoder(order="deterministic")
