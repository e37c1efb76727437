"""What a flight leaves behind: the facts that the verdict judges and the report shows.

Everything is plain data in units named by the fields; times `t_s` are mission seconds after the start of
the flight. Truth (plant, strikes, contacts) comes from the bench, the rest from the archive on the ground
and, for what had not come down yet, from the spool left on the node's disk.
"""

from __future__ import annotations

import msgspec

from hil.faults import StrikeFate
from telemetry.packets import Housekeeping, PowerPlan, Stream
from telemetry.sampling import GREEDY, Sampling


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all facts."""


class PlantSample(Fact, frozen=True, kw_only=True):
    """True state of the spacecraft."""

    t_s: float
    soc: float
    """State of charge, 0 to 1."""
    array_w: float
    """Power the array delivers, W."""
    load_w: float
    """Draw of the payload computer, W."""
    platform_w: float
    """Draw of the rest, W."""
    sunlit: float
    """Share of the solar disc in view, 0 to 1."""
    board_c: float


class HousekeepingSample(Fact, frozen=True, kw_only=True):
    """A housekeeping packet, as the node stamped it."""

    t_s: float
    packet: Housekeeping


class PlanSample(Fact, frozen=True, kw_only=True):
    """A plan of the node, as it stamped it."""

    t_s: float
    packet: PowerPlan


class Window(Fact, frozen=True, kw_only=True):
    """A stretch of mission time: an umbra passage, or a contact."""

    start_s: float
    end_s: float
    name: str = ""
    """Ground station, for contacts."""


class Happening(Fact, frozen=True, kw_only=True):
    """An event of the flight, from the bench or the node."""

    t_s: float
    source: str
    """`bench`, `node` or `ground`."""
    name: str
    text: str
    severity: int = 1
    """1 to 4, as `telemetry.packets.Severity`."""


class JobFact(Fact, frozen=True, kw_only=True):
    """One inference job as it came down, and what it should have been."""

    job: str
    prompt: str
    max_tokens: int
    tokens: list[int]
    """Tokens released, in order."""
    text: bytes
    proven: int
    """How many of `tokens`, from the first, their certificates prove."""
    finish: str | None
    sampling: Sampling = GREEDY
    findings: list[str] = []
    """What is wrong with its certificates, in words."""
    reference: list[int] | None = None
    """Tokens of the fault-free run, as many as were released; None when there was no such run."""
    reference_text: bytes | None = None
    """The bytes those tokens are."""


class StreamAccount(Fact, frozen=True, kw_only=True):
    """Account of one (boot, stream), by node and ground."""

    boot: int
    stream: Stream
    generated: int
    acked: int
    stored: int
    dropped: int
    archived: int
    """Records of it in the ground's archive."""


class LedgerFact(Fact, frozen=True, kw_only=True):
    """The account of all telemetry, recomputed by the ground."""

    generated: int
    acked: int
    stored: int
    dropped: int
    lost: int
    duplicated: int
    consistent: bool
    problems: list[str]
    streams: list[StreamAccount]
    drop_reasons: dict[str, int] = {}


class ForecastError(Fact, frozen=True, kw_only=True):
    """Forecast against true umbra entry, for one forecast in flight."""

    t_s: float
    """When the forecast was made."""
    entry_s: float
    """True entry."""
    error_s: float
    """Forecast less truth, s."""


class OverheadFact(Fact, frozen=True, kw_only=True):
    """Cost of protection in paired runs, percent of decoding time."""

    median_pct: float
    min_pct: float
    max_pct: float
    pairs: int
    tokens: int


class Constant(Fact, frozen=True, kw_only=True):
    """A constant of the scenario and where it is from."""

    name: str
    value: str
    tag: str
    """`measured`, `estimated` or `assumed`."""
    note: str = ""


class Limits(Fact, frozen=True, kw_only=True):
    """What the verdict judges by."""

    soc_floor: float
    floor_violation_s: float
    eclipse_forecast_error_s: float
    min_flips: int
    min_contacts: int


class FlightRecord(Fact, frozen=True, kw_only=True):
    """A whole flight."""

    scenario: str
    description: str
    seed: int
    speed: float
    start_ns: int
    """Mission time of the start, UTC ns."""
    start_host_ns: int
    """CLOCK_REALTIME at the start, ns: `t_s` of a host time is its distance from here times `speed`."""
    wall_s: float
    """Physical time from start to end of the flight."""
    planned_s: float
    """Mission time that should have been flown."""
    flown_s: float
    """Mission time that was."""
    orbit_s: float
    eclipse_s: float
    """Time in umbra, s."""
    interrupted: bool
    limits: Limits
    plant: list[PlantSample]
    housekeeping: list[HousekeepingSample]
    plans: list[PlanSample]
    umbrae: list[Window]
    contacts: list[Window]
    fates: list[StrikeFate]
    flips_not_injected: int
    process_faults: list[Happening]
    worker_restarts: int
    node_restarts: int
    stopped_how: str
    """How the node ended when told to stop."""
    orphans_killed: int
    forecast: list[ForecastError]
    jobs: list[JobFact]
    tokens_discarded: int
    ledger: LedgerFact
    ground_garbage: int
    """Messages on the ground's topics that could not be read."""
    overhead: OverheadFact | None
    happenings: list[Happening]
    constants: list[Constant]
    acceleration: float | None
    """Flips injected for each one nature would cause in the same memory and time."""
    manifest: dict[str, str]
    """What flew: versions, image, host."""

    def host_to_s(self, host_ns: int) -> float:
        """Return mission seconds after the start of a host time (CLOCK_REALTIME, ns)."""
        return (host_ns - self.start_host_ns) / 1e9 * self.speed
