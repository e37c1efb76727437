"""Telecommands about faults: rows of the FDIR table, and memory that is scrubbed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from telemetry.dictionary.base import Arguments, Hazard

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


class RecomputeBaseline(Arguments, frozen=True, kw_only=True):
    """Take what a region of memory holds now for sound, after a legitimate change; an event tells of it."""

    name: ClassVar[str] = "recompute_baseline"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    region: RegionName
