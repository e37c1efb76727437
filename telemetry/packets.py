"""Every telemetry packet: the body of a frame, typed, with units.

The wire form of a body is a msgpack map keyed by field name, so any msgpack client can read it.
Schema evolution: a new field needs a default, and a field never changes its type or unit.
`docs/icd.md` is generated from these classes: the text after each field is its description there.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, description="count")]
Seconds = Annotated[float, Meta(description="s")]
Watts = Annotated[float, Meta(description="W")]
Volts = Annotated[float, Meta(description="V")]
Amperes = Annotated[float, Meta(description="A")]
Celsius = Annotated[float, Meta(description="degC")]
Fraction = Annotated[float, Meta(ge=0, le=1, description="0 to 1")]
Nanoseconds = Annotated[int, Meta(description="ns")]


class Stream(StrEnum):
    """Telemetry streams: each has its own sequence numbers, priority and drop policy."""

    EVENT = "event"
    FDIR = "fdir"
    VERIFICATION = "verification"
    SECURITY = "security"
    BOOT = "boot"
    LEDGER = "ledger"
    RESULT = "result"
    PLAN = "plan"
    HOUSEKEEPING = "hk"
    PRODUCT = "product"


class Mode(StrEnum):
    """Node modes. SAFE: beacon, commands and telemetry, no inference."""

    BOOT = "boot"
    """Starting, until the first transition."""
    NOMINAL = "nominal"
    """Inference in sunlight."""
    ECLIPSE = "eclipse"
    """Inference in the Earth's shadow, on less power."""
    SAFE = "safe"
    """Beacon, commands and telemetry, no inference."""


class Severity(IntEnum):
    """Event severities (after PUS service 5)."""

    INFO = 1
    LOW = 2
    MEDIUM = 3
    HIGH = 4


class Stage(StrEnum):
    """Stages of command verification (after PUS service 1)."""

    ACCEPTED = "accepted"
    STARTED = "started"
    PROGRESS = "progress"
    COMPLETED = "completed"


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


class Packet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every telemetry packet. `stream` says in which stream it travels."""

    stream: ClassVar[Stream]
    type_name: ClassVar[str]


class Housekeeping(Packet, frozen=True, kw_only=True):
    """The node's state, at a fixed rate of physical time."""

    stream: ClassVar[Stream] = Stream.HOUSEKEEPING
    type_name: ClassVar[str] = "housekeeping"

    mode: Mode
    uptime_s: Seconds
    """Physical time since this boot."""
    clock_locked: bool
    """True while mission time is steered by the bus."""
    sunlit: Fraction | None
    """Forecast sunlit fraction of the solar disc now; None without orbital elements."""
    eclipse_entry_ns: Nanoseconds | None
    """Mission time (UTC) of the next forecast umbra entry."""
    eclipse_exit_ns: Nanoseconds | None
    """Mission time (UTC) of the next forecast umbra exit."""
    battery_soc: Fraction | None
    """State of charge as the bus reports it; None while unknown or old."""
    array_w: Watts | None
    """What the solar array delivers, as the bus reports it; None while unknown or old."""
    load_w: Watts | None
    """Draw of the payload computer as the board driver reads it; None while its meter says nothing."""
    ceiling_w: Watts
    """Ceiling the governor holds."""
    duty: Fraction
    """Share of time the worker may decode (token pacing)."""
    board_c: Celsius | None
    """Board temperature, from its own sensor or the bus; None when neither tells."""
    ecc_corrected: Count | None = None
    """Memory errors that ECC corrected since boot; None where the board does not tell."""
    ecc_uncorrected: Count | None = None
    """Memory errors that it could not."""
    worker_state: str
    """State of the inference worker as its supervisor sees it."""
    worker_generation: Count
    """Number of the worker process, counted from the first of this boot."""
    worker_restarts: Count
    """Worker processes that had to be replaced, since boot."""
    tokens_released: Count
    """Tokens released since the node was first started (durable)."""
    tokens_discarded: Count
    """Provisional tokens thrown away by dirty epochs, since boot."""
    token_rate_hz: Annotated[float, Meta(ge=0, description="tokens/s")]
    """Released tokens a second of physical time, last period."""
    epochs_clean: Count
    """Epochs whose memory was proven, since boot."""
    epochs_dirty: Count
    """Epochs whose memory was not, and which were decoded again, since boot."""
    strikes_detected: Count
    """Damaged pages and rows found, since boot."""
    strikes_repaired: Count
    """Of these, repaired in place, or computed anew."""
    scan_ms: Annotated[float, Meta(ge=0, description="ms")]
    """Mean time of one proof of an epoch, last period."""
    jobs_queued: Count
    """Jobs accepted and not finished."""
    jobs_done: Count
    """Jobs finished since the node was first started (durable)."""
    spool_records: Count
    """Records on the node's disk, not yet acknowledged."""
    spool_bytes: Annotated[int, Meta(ge=0, description="byte")]
    """Frames on the node's disk, not yet acknowledged."""
    link_up: bool
    """True while the space link is connected."""
    commands_accepted: Count
    """Telecommands accepted, since boot."""
    commands_rejected: Count
    """Telecommands rejected, since boot."""
    garbage_messages: Count
    """Messages on any topic that could not be read, counted and dropped."""
    jobs_active: Count = 0
    """Jobs that have a place in the batch now."""
    batch: Count = 0
    """Most jobs decoded together, at the present operating point."""
    threads: Count = 0
    """Threads the worker computes with; 0 while there is no worker."""
    prefill_tokens: Count = 0
    """Prompt tokens read by the worker, since boot; those of a shared prefix are read once."""
    compute_trips: Count = 0
    """Computations that failed a check although their memory was right, since boot."""
    fdir_enabled: Count = 0
    """Rows of the FDIR table that are enabled."""
    fdir_passive: Count = 0
    """Rows that are evaluated and reported, and act on nothing."""
    fdir_disabled: Count = 0
    """Rows that are switched off."""
    fdir_external: bool = False
    """True while the ground has told the FDIR to keep its hands off: it reports, and does nothing."""
    fdir_detections: Count = 0
    """Findings of enabled rows, since boot."""
    fdir_actions: Count = 0
    """Recovery actions carried out, since boot."""
    fdir_level: Count | None = None
    """Level of the highest recovery under way; None when there is none."""
    resets: Count = 0
    """Restarts of the node that the FDIR has asked for, since the ground or a long clean time cleared them
    (durable)."""
    scrub_pass_s: Seconds | None = None
    """Time the last full pass over code and tables took; None before the first is done."""
    scrub_age_s: Seconds = 0.0
    """Time since the end of the last full pass, or since the start."""
    scrub_miscompares: Count = 0
    """Damaged stretches of code and tables found, since boot."""
    worker_scrub_pass_s: Seconds | None = None
    """Time of the worker's last pass over all pages of the model image; None before the first is done."""
    loop_lag_ms: Annotated[float, Meta(ge=0, description="ms")] = 0.0
    """Longest time the event loop was not free, last period."""
    watchdog: str = "none"
    """Watchdog that is fed: `device`, `systemd`, `parent` or `none`."""
    watchdog_fed: Count = 0
    """Times it was fed, since boot."""
    sensor_rejections: Count = 0
    """Values of the bus that were rejected, since boot."""
    eps_source: str = "none"
    """Where the state of charge comes from: `voted`, `single`, `estimated` or `none`."""
    state_repairs: Count = 0
    """Values held in three copies that were mended by a vote, since boot."""


class Event(Packet, frozen=True, kw_only=True):
    """Something happened once."""

    stream: ClassVar[Stream] = Stream.EVENT
    type_name: ClassVar[str] = "event"

    severity: Severity
    name: str
    """Event identifier in dotted form, e.g. `worker.restarted`."""
    text: str
    """What happened, in words."""
    evidence: dict[str, str | int | float | bool | None] = {}


class Certificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Proof that a block of tokens came from memory that was right (design section 5)."""

    image_id: str
    """First 16 hex digits of the SHA-256 of the image manifest."""
    epoch: Count
    """Epoch number within the job, from 0, counting committed epochs only."""
    kv_digest: bytes
    """8 bytes: xxh3_64 chained over the KV row digests of the block, big-endian."""
    chain: bytes
    """32 bytes: SHA-256 over the previous chain value and this block; see `telemetry.certificate`."""


class Result(Packet, frozen=True, kw_only=True):
    """A committed block of tokens of one inference job."""

    stream: ClassVar[Stream] = Stream.RESULT
    type_name: ClassVar[str] = "result"

    job: str
    """Name of the job, from its command."""
    first: Count
    """Index of the block's first token within the generated text, from 0."""
    tokens: list[int]
    """Token ids of the block."""
    text: bytes
    """UTF-8 bytes these tokens add to the text. May end inside a character: join before decoding."""
    certificate: Certificate
    prompt_tokens: list[int] | None = None
    """Token ids of the prompt, in the job's first block only: the chain starts from them."""
    finish: str | None = None
    """None while the job goes on; else `length`, `eos`, `stop`, `cancelled`, `deadline` or `failed: ...`."""
    logprobs: list[float] | None = None
    """Natural logarithm of each token's probability, in order, when the job asked for them."""


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
    """`ok`, or a short reason code such as `unknown_command` or `bad_argument`."""
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


class FdirReport(Packet, frozen=True, kw_only=True):
    """One detection, with evidence, action, outcome and latency."""

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


class BootReport(Packet, frozen=True, kw_only=True):
    """Sent once a boot: who we are and why we started."""

    stream: ClassVar[Stream] = Stream.BOOT
    type_name: ClassVar[str] = "boot"

    software: str
    """Version of the flight software."""
    boot: Count
    """Boot counter; part of the identity of every record of this boot."""
    clean_shutdown: bool
    """True when the boot before ended in an ordered stop."""
    config_sha256: str
    """SHA-256 of the configuration file, hexadecimal."""
    image_id: str | None
    """Model image the node is configured for; None when there is none."""
    board: str
    """Board driver."""
    python: str
    """Version of Python."""
    onnxruntime: str | None
    """Version of ONNX Runtime; None when it is not known."""
    resumed_job: str | None
    """First of the jobs that go on where the boot before left them; None when there is none."""
    resumed_jobs: list[str] = []
    """All of them, in order of arrival."""
    mode: Mode = Mode.NOMINAL
    """What the boot manager decided: `nominal` or `safe`."""
    slot: str | None = None
    """Image slot it decided for, `a` or `b`; None for the one that is active."""
    reasons: list[str] = []
    """Why, where it is not the usual."""
    unintended_reboots: Count = 0
    """Boots in a row that did not end in order and were not asked for, this one's included."""
    resets: Count = 0
    """Restarts of the node that the FDIR has asked for, see housekeeping."""
    repaired_state: list[str] = []
    """Values of the state on disk of which a copy was damaged, and was mended by a vote."""
    fdir_sha256: str = ""
    """SHA-256 of the FDIR table, hexadecimal."""


class PlanSegment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of a power plan."""

    end_ns: Nanoseconds
    """Mission time (UTC) at which it ends."""
    ceiling_w: Watts
    """Draw planned."""
    battery_soc: Fraction
    """State of charge expected at its end."""


class PowerPlan(Packet, frozen=True, kw_only=True):
    """The ceiling and why: with each new plan, and on each change of reason or of more than 5 %."""

    stream: ClassVar[Stream] = Stream.PLAN
    type_name: ClassVar[str] = "plan"

    ceiling_w: Watts
    """Ceiling the governor holds from now on."""
    duty: Fraction
    """Share of time the worker may decode (token pacing)."""
    reason: str
    """What binds: `board`, `plan`, `array`, `battery`, `thermal`, `command`, `floor`, `unknown_bus`."""
    battery_soc: Fraction | None
    """State of charge it was decided on; None while unknown."""
    soc_floor: Fraction
    """State of charge the plan must not go under."""
    eclipse_entry_ns: Nanoseconds | None
    """Mission time (UTC) of the next forecast umbra entry."""
    eclipse_exit_ns: Nanoseconds | None
    """Mission time (UTC) of the next forecast umbra exit."""
    source: str = "rules"
    """Who decides: `planner`, `rules`, `threshold`."""
    binding: str = "none"
    """What keeps the plan from more watts now: `board`, `cap`, `demand` (no more jobs), `battery_floor`,
    `next_eclipse` (charge wanted at the end of the horizon), `thermal`, `worth` (better spent later)."""
    binds_at_ns: Nanoseconds | None = None
    """Mission time at which the bound is met."""
    note: str = ""
    """Why there is no plan."""
    eclipse_source: str = "unknown"
    """Where the eclipses come from: `forecast`, `sensed` (by the array), `unknown`."""
    edge_margin_s: float = 0.0
    """Error reckoned with of their edges."""
    soc_sigma: Fraction = 0.0
    """Error of the state of charge."""
    array_gain: float = 1.0
    """Measured power of the array by the expected one."""
    die_c: float | None = None
    """Predicted temperature of the die, degC."""
    least_priority: int = 0
    """Jobs below it are shed: there is no energy for them now."""
    backlog_tokens: Count = 0
    """Tokens of open jobs."""
    backlog_clear_ns: Nanoseconds | None = None
    """Mission time at which they will be done by the plan; None: not within its horizon, or no plan."""
    battery_cycles: float = 0.0
    """Cycles of the battery since boot."""
    battery_wear: float = 0.0
    """Share of its life they used, by the configured table."""
    horizon: list[PlanSegment] = []
    """The plan, with the packet that first reports it."""


class StreamLedger(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Account of one (boot, stream)."""

    boot: Count
    """Boot counter of the records."""
    stream: Stream
    generated: Count
    """Records ever stored durably, or dropped at once by policy."""
    acked: Count
    """Records the ground's archive has acknowledged."""
    stored: Count
    """Records on the node's disk."""
    dropped: dict[str, int]
    """Records dropped by policy, by reason."""


class Ledger(Packet, frozen=True, kw_only=True):
    """generated = acked + stored + dropped, for every boot and stream, before this packet itself."""

    stream: ClassVar[Stream] = Stream.LEDGER
    type_name: ClassVar[str] = "ledger"

    streams: list[StreamLedger]


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


ProductId = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z", description="1 to 64 of a-z, 0-9, '.', '_', '-'")
]


class ProductPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of a memory dump."""

    first_byte: Annotated[int, Meta(ge=0, description="byte")]
    """Where it begins within the product."""
    size_bytes: Annotated[int, Meta(ge=0, description="byte")]
    file: str
    """File it is mapped from."""
    offset: Annotated[int, Meta(ge=0, description="byte")]
    """Where it begins in that file."""


class Product(Packet, frozen=True, kw_only=True):
    """Head of a large product: sent before its chunks, and all that is needed to verify the whole."""

    stream: ClassVar[Stream] = Stream.PRODUCT
    type_name: ClassVar[str] = "product"

    product: ProductId
    """Names the product in its chunks; used once."""
    kind: str
    """`memory_dump` or `file`."""
    name: str
    """What it holds: name of the memory region, or of the file."""
    first_byte: Annotated[int, Meta(ge=0, description="byte")] = 0
    """Where it begins within the region."""
    parts: list[ProductPart] = []
    """Where its bytes come from, in order, for a region that is mapped from files."""
    size_bytes: Annotated[int, Meta(ge=0, description="byte")]
    chunk_bytes: Annotated[int, Meta(ge=1, description="byte")]
    """Size of every chunk but the last."""
    sha256: str
    """SHA-256 of the whole, hexadecimal."""


class ProductChunk(Packet, frozen=True, kw_only=True):
    """A piece of a product."""

    stream: ClassVar[Stream] = Stream.PRODUCT
    type_name: ClassVar[str] = "product_chunk"

    product: ProductId
    index: Count
    """Number of the chunk, from 0: it begins at `index * chunk_bytes`."""
    data: bytes


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
