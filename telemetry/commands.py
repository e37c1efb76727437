"""The dictionary of telecommands: typed arguments with ranges, and what each can do to the mission."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

import crc32c
import msgspec
from msgspec import Meta

from telemetry.frame import MissionTime, Sequence
from telemetry.sampling import Sampling


class Hazard(StrEnum):
    """What a command can do to the mission if sent by mistake."""

    NONE = "none"
    SERVICE = "service"
    """Can interrupt or starve the inference service; reversible by command."""
    HAZARDOUS = "hazardous"
    """Cannot be taken back by command, or can cost the node what it needs to serve: armed, then fired."""


class ArgumentCode(StrEnum):
    """Why an authentic command is refused; the code of its failed verification."""

    UNKNOWN_COMMAND = "unknown_command"
    BAD_ARGUMENT = "bad_argument"


class CommandError(ValueError):
    """Bytes that are no telecommand, or a telecommand that does not fit the dictionary.

    `code` is None for bytes that are no telecommand.
    """

    def __init__(self, reason: str, code: ArgumentCode | None = None) -> None:
        super().__init__(reason)
        self.code = code


JobId = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z", description="1 to 64 of a-z, 0-9, '.', '_', '-'")
]


Priority = Annotated[int, Meta(ge=0, le=9, description="0 to 9")]
DEFAULT_PRIORITY = 5


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the arguments of every command."""

    name: ClassVar[str]
    hazard: ClassVar[Hazard]


class Ping(Arguments, frozen=True, kw_only=True):
    """Answer with the four stages of verification, and do nothing."""

    name: ClassVar[str] = "ping"
    hazard: ClassVar[Hazard] = Hazard.NONE


class Infer(Arguments, frozen=True, kw_only=True, omit_defaults=True):
    """Put an inference job into the durable queue.

    The next job is the one of highest priority; of equals the one of earliest deadline, then the oldest.
    A job asked for with the first three fields only has the same bytes as before there were others.
    """

    name: ClassVar[str] = "infer"
    hazard: ClassVar[Hazard] = Hazard.NONE

    job: JobId
    """Names the job in its results; must be new."""
    prompt: Annotated[str, Meta(min_length=1, max_length=16000, description="1 to 16000 characters")]
    max_tokens: Annotated[int, Meta(ge=1, le=2048, description="1 to 2048 tokens")]
    sampling: Sampling = Sampling()
    """How tokens are chosen; greedy when left out."""
    priority: Priority = DEFAULT_PRIORITY
    """9 goes first. A higher job waiting for a place in the batch takes that of a lower one, which goes on
    later with the same text."""
    deadline_ns: MissionTime | None = None
    """Mission time (UTC) at which the job ends as it is, finished or not, ns since 1970. None: never."""


class Cancel(Arguments, frozen=True, kw_only=True):
    """End a job at the end of its current epoch, or take it out of the queue."""

    name: ClassVar[str] = "cancel"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    job: JobId


class SetMode(Arguments, frozen=True, kw_only=True):
    """Enter safe mode, or leave it. Nominal and eclipse then follow the sunlight."""

    name: ClassVar[str] = "set_mode"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    mode: Literal["nominal", "safe"]


class SetPowerCap(Arguments, frozen=True, kw_only=True):
    """Bound the ceiling of the governor from above. None takes the bound away."""

    name: ClassVar[str] = "set_power_cap"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    power_w: Annotated[float, Meta(ge=0.1, le=1000, description="0.1 to 1000 W")] | None


class ReportLedger(Arguments, frozen=True, kw_only=True):
    """Send a ledger packet and a security report now."""

    name: ClassVar[str] = "report_ledger"
    hazard: ClassVar[Hazard] = Hazard.NONE


RowId = Annotated[
    str,
    Meta(
        pattern=r"^(\*|[a-z][a-z0-9_]*(\.[a-z0-9_]+){0,3})\Z",
        max_length=64,
        description="id of a row of the FDIR table, or '*'",
    ),
]


class SetFdirRow(Arguments, frozen=True, kw_only=True):
    """Enable a row of the FDIR table, make it passive, or disable it. Survives restarts.

    Persistence counters stay as they are. A row that has fired stays so.
    """

    name: ClassVar[str] = "set_fdir_row"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    row: RowId
    """`*` for the FDIR as a whole, above the states of the rows, which stay."""
    state: Literal["enabled", "passive", "disabled"]
    """`passive`: evaluated and reported, no action. The checks of decoding, which act inside the worker
    (`weights.digest`, `kv.digest`, `compute.check`), cannot be passive."""


class RearmFdir(Arguments, frozen=True, kw_only=True):
    """Let a row that has fired fire again."""

    name: ClassVar[str] = "rearm_fdir"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    row: RowId
    """`*` for all rows."""


class ExternalControl(Arguments, frozen=True, kw_only=True):
    """Tell the FDIR to keep its hands off, or to act again. Survives restarts.

    While it is on, findings are reported and no recovery is begun; a lost worker stays lost.
    """

    name: ClassVar[str] = "external_control"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    on: bool


class ResetCounters(Arguments, frozen=True, kw_only=True):
    """Forget the attempts of the recovery ladder and the restarts of the node it has asked for."""

    name: ClassVar[str] = "reset_counters"
    hazard: ClassVar[Hazard] = Hazard.NONE


class LoadFdir(Arguments, frozen=True, kw_only=True, omit_defaults=True):
    """Put an FDIR table in force. Survives restarts.

    A table that is refused leaves the one in force; the answer says which row is wrong, and why. States that
    were commanded stay, as far as they fit.
    """

    name: ClassVar[str] = "load_fdir"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    source: Literal["configured", "uplinked", "previous"] = "configured"
    """`configured`: read anew from the file that the configuration names; `uplinked`: the one that
    `upload_commit` took over last; `previous`: back to the one that was in force before this one."""


RegionName = Annotated[
    str, Meta(pattern=r"^[a-z][a-z0-9_.]{0,63}\Z", description="name of a region, e.g. supervisor.code")
]


class ScrubNow(Arguments, frozen=True, kw_only=True):
    """Check a region of memory whole, out of turn. An event tells the result."""

    name: ClassVar[str] = "scrub_now"
    hazard: ClassVar[Hazard] = Hazard.NONE

    region: RegionName


class QueryFdir(Arguments, frozen=True, kw_only=True):
    """Send the state of the whole FDIR table now, and the flight recorder if asked."""

    name: ClassVar[str] = "query_fdir"
    hazard: ClassVar[Hazard] = Hazard.NONE

    recorder: bool = False
    """Whether to send a dump of the flight recorder too."""


KeyId = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z", description="id of a key in the node's key file")
]


class ActivateKey(Arguments, frozen=True, kw_only=True):
    """Make a key in standby usable. At most two keys for commands are active at once. Survives restarts."""

    name: ClassVar[str] = "activate_key"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    key: KeyId


class RetireKey(Arguments, frozen=True, kw_only=True):
    """Make a key unusable for good. To be signed with another key, which thereby proves that it works."""

    name: ClassVar[str] = "retire_key"
    hazard: ClassVar[Hazard] = Hazard.HAZARDOUS

    key: KeyId


class Resync(Arguments, frozen=True, kw_only=True):
    """Raise the last accepted sequence number of a key, when the ground is out of its window.

    Only a recovery key may give it; the security report tells the number of each key.
    """

    name: ClassVar[str] = "resync"
    hazard: ClassVar[Hazard] = Hazard.NONE

    key: KeyId
    last_seq: Sequence
    """Numbers above this one are accepted from now on, within the window. Never below the last accepted."""


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
    reported so. Not for hazardous commands, those of keys, `arm`, and what would feed the schedule itself.
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
    """Put the steps of a sequence into the schedule, from now on. A sequence runs once at a time."""

    name: ClassVar[str] = "sequence_start"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    sequence: SequenceName


class SequenceStop(Arguments, frozen=True, kw_only=True):
    """Take what is left of a sequence out of the schedule."""

    name: ClassVar[str] = "sequence_stop"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    sequence: SequenceName


class RestartWorker(Arguments, frozen=True, kw_only=True):
    """Replace the inference worker. Jobs go on where the last proven token was."""

    name: ClassVar[str] = "restart_worker"
    hazard: ClassVar[Hazard] = Hazard.SERVICE


class RecomputeBaseline(Arguments, frozen=True, kw_only=True):
    """Take what a region of memory holds now for sound, after a legitimate change; an event tells of it."""

    name: ClassVar[str] = "recompute_baseline"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    region: RegionName


class SetRates(Arguments, frozen=True, kw_only=True):
    """Set the periods of housekeeping and ledger; None: that of the configuration. Survives restarts."""

    name: ClassVar[str] = "set_rates"
    hazard: ClassVar[Hazard] = Hazard.NONE

    housekeeping_s: Annotated[float, Meta(ge=0.05, le=3600, description="0.05 to 3600 s")] | None = None
    ledger_s: Annotated[float, Meta(ge=0.05, le=86_400, description="0.05 to 86,400 s")] | None = None


class DumpMemory(Arguments, frozen=True, kw_only=True):
    """Send what a region of memory holds now, as a product. Its completion names the product."""

    name: ClassVar[str] = "dump_memory"
    hazard: ClassVar[Hazard] = Hazard.NONE

    region: RegionName
    first_byte: Annotated[int, Meta(ge=0, le=2**40, description="0 to 2^40")] = 0
    """Where to begin within the region."""
    size_bytes: Annotated[int, Meta(ge=1, le=16 << 20, description="1 to 16,777,216 byte")] = 1 << 20
    """Most bytes to send."""


ProductName = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z", description="1 to 64 of a-z, 0-9, '.', '_', '-'")
]
ChunkIndex = Annotated[int, Meta(ge=0, lt=2**32, description="0 to 2^32 - 1")]


class ResendProduct(Arguments, frozen=True, kw_only=True):
    """Send a product's head and some of its chunks once more: what the ground's archive lacks."""

    name: ClassVar[str] = "resend_product"
    hazard: ClassVar[Hazard] = Hazard.NONE

    product: ProductName
    first: ChunkIndex = 0
    last: ChunkIndex | None = None
    """Last chunk, included; None: to the end."""


class DeleteProduct(Arguments, frozen=True, kw_only=True):
    """Drop a product, and what of it was not sent yet. The ground has it, or does not want it."""

    name: ClassVar[str] = "delete_product"
    hazard: ClassVar[Hazard] = Hazard.NONE

    product: ProductName


Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 hexadecimal digits")]
MAX_CHUNK_BYTES = 64 * 1024


class UploadBegin(Arguments, frozen=True, kw_only=True):
    """Open an upload, or go on with it if it is open. One is open at a time; it survives restarts."""

    name: ClassVar[str] = "upload_begin"
    hazard: ClassVar[Hazard] = Hazard.NONE

    kind: Literal["image", "fdir_table"]
    """`image`: a tar of the files of a model image; `fdir_table`: TOML, see docs/fdir-table.md."""
    sha256: Sha256
    """Of the whole; names the upload."""
    size_bytes: Annotated[int, Meta(ge=1, le=16 << 30, description="1 to 2^34 byte")]
    chunk_bytes: Annotated[int, Meta(ge=256, le=MAX_CHUNK_BYTES, description="256 to 65,536 byte")]
    """Size of every chunk but the last."""


class UploadStatus(Arguments, frozen=True, kw_only=True):
    """Send which chunks of the open upload are missing."""

    name: ClassVar[str] = "upload_status"
    hazard: ClassVar[Hazard] = Hazard.NONE


class UploadAbort(Arguments, frozen=True, kw_only=True):
    """Drop the open upload."""

    name: ClassVar[str] = "upload_abort"
    hazard: ClassVar[Hazard] = Hazard.SERVICE


class UploadCommit(Arguments, frozen=True, kw_only=True):
    """Prove the open upload, and take it over. Nothing that is in use changes.

    An image goes into the slot that is not in use, whose own is gone with that; a table becomes the one that
    `load_fdir` calls `uplinked`. Chunks that the proof finds damaged on board are missing again, and can be
    sent anew.
    """

    name: ClassVar[str] = "upload_commit"
    hazard: ClassVar[Hazard] = Hazard.HAZARDOUS

    sha256: Sha256
    """The upload that is meant."""


class SwitchImage(Arguments, frozen=True, kw_only=True):
    """Run the worker from the other image slot, once the image in it is proven. Survives restarts.

    Jobs that have begun end as failed if the image is another one: no text is written by two models. If no
    worker comes up from it, the slot before is used again.
    """

    name: ClassVar[str] = "switch_image"
    hazard: ClassVar[Hazard] = Hazard.HAZARDOUS

    slot: Literal["a", "b"]


class RollbackImage(Arguments, frozen=True, kw_only=True):
    """Go back to the slot that was used before the last switch: `switch_image`, without arming."""

    name: ClassVar[str] = "rollback_image"
    hazard: ClassVar[Hazard] = Hazard.SERVICE


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

COMMANDS: dict[str, type[Arguments]] = {
    kind.name: kind
    for kind in (
        *(Ping, Infer, Cancel, SetMode, SetPowerCap, ReportLedger),
        *(SetFdirRow, RearmFdir, ExternalControl, ResetCounters, LoadFdir, ScrubNow, QueryFdir),
        *(ActivateKey, RetireKey, Resync, Arm, ScheduleInsert, ScheduleDelete, ScheduleShift, ScheduleList),
        *(SequenceLoad, SequenceStart, SequenceStop, RestartWorker, RecomputeBaseline, SetRates),
        *(DumpMemory, ResendProduct, DeleteProduct),
        *(UploadBegin, UploadStatus, UploadAbort, UploadCommit, SwitchImage, RollbackImage),
    )
}
"""The dictionary of commands, by name."""
RECOVERY = frozenset(kind.name for kind in (Ping, ReportLedger, SetMode, ActivateKey, RetireKey, Resync, Arm))
"""What a recovery key may give."""


def parse_arguments(name: str, args: object) -> Arguments:
    """Return the typed arguments of a command.

    Raises
    ------
    CommandError
        With `code` set: no such command, or an argument missing, unknown or out of its range.
    """
    kind = COMMANDS.get(name)
    if kind is None:
        raise CommandError(
            f"no command {name[:40]!r}; there are {', '.join(COMMANDS)}", ArgumentCode.UNKNOWN_COMMAND
        )
    try:
        return msgspec.convert(args, kind)
    except msgspec.ValidationError as error:
        raise CommandError(f"{name}: {error}", ArgumentCode.BAD_ARGUMENT) from None
