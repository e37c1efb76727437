"""Telecommands that run the service: jobs, modes, watts, reports."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from telemetry.dictionary.base import Arguments, Hazard
from telemetry.frame import MissionTime
from telemetry.sampling import Sampling


class Ping(Arguments, frozen=True, kw_only=True):
    """Answer with the four stages of verification, and do nothing."""

    name: ClassVar[str] = "ping"
    hazard: ClassVar[Hazard] = Hazard.NONE


JobId = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z", description="1 to 64 of a-z, 0-9, '.', '_', '-'")
]


Priority = Annotated[int, Meta(ge=0, le=9, description="0 to 9")]


DEFAULT_PRIORITY = 5


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
    """Text: names of control pieces in it, such as `<bos>` or `<start_of_turn>`, reach the model as their
    characters, so a prompt cannot open a turn. Only pieces that stand for text, such as `<table>` or a run of
    spaces, are one token. The node puts the token that begins a text before it."""
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


class SetRates(Arguments, frozen=True, kw_only=True):
    """Set the periods of housekeeping and ledger; None: that of the configuration. Survives restarts."""

    name: ClassVar[str] = "set_rates"
    hazard: ClassVar[Hazard] = Hazard.NONE

    housekeeping_s: Annotated[float, Meta(ge=0.05, le=3600, description="0.05 to 3600 s")] | None = None
    ledger_s: Annotated[float, Meta(ge=0.05, le=86_400, description="0.05 to 86,400 s")] | None = None


class RestartWorker(Arguments, frozen=True, kw_only=True):
    """Replace the inference worker. Jobs go on where the last proven token was."""

    name: ClassVar[str] = "restart_worker"
    hazard: ClassVar[Hazard] = Hazard.SERVICE
