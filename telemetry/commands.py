"""The dictionary of telecommands: typed arguments with ranges, and what each can do to the mission.

They are defined by subject in `telemetry.dictionary`; this is where others take them from.
"""

from __future__ import annotations

import msgspec

from telemetry.dictionary.base import (
    ArgumentCode,
    Arguments,
    CommandError,
    Hazard,
)
from telemetry.dictionary.fdir import (
    ExternalControl,
    LoadFdir,
    QueryFdir,
    RearmFdir,
    RecomputeBaseline,
    RegionName,
    ResetCounters,
    RowId,
    ScrubNow,
    SetFdirRow,
)
from telemetry.dictionary.keys import (
    ActivateKey,
    KeyId,
    Resync,
    RetireKey,
)
from telemetry.dictionary.operation import (
    DEFAULT_PRIORITY,
    Cancel,
    Infer,
    JobId,
    Ping,
    Priority,
    ReportLedger,
    RestartWorker,
    SetMode,
    SetPowerCap,
    SetRates,
)
from telemetry.dictionary.schedule import (
    Arm,
    CommandName,
    Entry,
    ScheduleDelete,
    ScheduleInsert,
    ScheduleList,
    ScheduleShift,
    SequenceLoad,
    SequenceName,
    SequenceStart,
    SequenceStep,
    SequenceStop,
    make_step,
    step_crc,
)
from telemetry.dictionary.transfer import (
    MAX_CHUNK_BYTES,
    MAX_UPLOAD_BYTES,
    ChunkIndex,
    DeleteProduct,
    DumpMemory,
    ProductName,
    ResendProduct,
    RollbackImage,
    Sha256,
    SwitchImage,
    UploadAbort,
    UploadBegin,
    UploadCommit,
    UploadStatus,
)

__all__ = (
    "COMMANDS",
    "DEFAULT_PRIORITY",
    "MAX_CHUNK_BYTES",
    "MAX_UPLOAD_BYTES",
    "RECOVERY",
    "ActivateKey",
    "ArgumentCode",
    "Arguments",
    "Arm",
    "Cancel",
    "ChunkIndex",
    "CommandError",
    "CommandName",
    "DeleteProduct",
    "DumpMemory",
    "Entry",
    "ExternalControl",
    "Hazard",
    "Infer",
    "JobId",
    "KeyId",
    "LoadFdir",
    "Ping",
    "Priority",
    "ProductName",
    "QueryFdir",
    "RearmFdir",
    "RecomputeBaseline",
    "RegionName",
    "ReportLedger",
    "ResendProduct",
    "ResetCounters",
    "RestartWorker",
    "Resync",
    "RetireKey",
    "RollbackImage",
    "RowId",
    "ScheduleDelete",
    "ScheduleInsert",
    "ScheduleList",
    "ScheduleShift",
    "ScrubNow",
    "SequenceLoad",
    "SequenceName",
    "SequenceStart",
    "SequenceStep",
    "SequenceStop",
    "SetFdirRow",
    "SetMode",
    "SetPowerCap",
    "SetRates",
    "Sha256",
    "SwitchImage",
    "UploadAbort",
    "UploadBegin",
    "UploadCommit",
    "UploadStatus",
    "make_step",
    "parse_arguments",
    "step_crc",
)

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
