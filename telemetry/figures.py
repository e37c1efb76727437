"""What `penumbra bench`, `calibrate` and `study` leave behind for machines: the fields of their JSON.

A figure that could not be measured is null, never 0. Times and rates are medians with the smallest and the
largest run: machines are shared, and a single figure would hide by how much.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, description="count")]
Bytes = Annotated[int, Meta(ge=0, description="byte")]
Watts = Annotated[float, Meta(ge=0, description="W")]
Share = Annotated[float, Meta(ge=0, description="1 = one core")]
TokensPerSecond = Annotated[float, Meta(ge=0, description="token/s")]
Percent = Annotated[float, Meta(ge=0, le=100, description="%")]
Nats = Annotated[float, Meta(description="nat")]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parts of a measurement."""


class Spread(_Part, frozen=True, kw_only=True):
    """One figure over several interleaved runs. The unit is that of the field which holds it."""

    median: float
    min: float
    max: float


class PairedCost(_Part, frozen=True, kw_only=True):
    """What one thing costs over another, percent of time, from pairs of short runs in alternating order."""

    median: Annotated[float, Meta(description="%")]
    min: Annotated[float, Meta(description="%")]
    max: Annotated[float, Meta(description="%")]
    low95: Annotated[float, Meta(description="%")]
    """Lower end of the 95 % bootstrap interval of the median."""
    high95: Annotated[float, Meta(description="%")]
    """Upper end of it."""
    pairs: Count


class Machine(_Part, frozen=True, kw_only=True):
    """Where a measurement was taken."""

    cpu: str
    features: list[str]
    """Vector features of the CPU that kernels choose by."""
    cores: Count
    threads: Count
    """Threads each contender was given."""
    memory_bytes: Bytes
    python: str
    numpy: str
    onnxruntime: str
    llama_cpp_python: str | None
    """Null when the `peers` extra is not installed or was not asked for."""
    load_before: float
    """Load average over one minute before the first run: other work on the cores."""
    load_after: float


class BenchRatios(_Part, frozen=True, kw_only=True):
    """The ratios the bars are set on. Each run gives one; null without the peer."""

    decode1_vs_llama: Spread | None
    """One sequence, protected, against llama.cpp, tokens/s."""
    decode8_vs_decode1: Spread
    """Eight sequences together against one, both protected, tokens/s."""
    decode8_vs_llama: Spread | None
    """Eight sequences together, protected, against llama.cpp with eight, tokens/s."""
    prefill512_vs_llama: Spread | None
    """512 prompt tokens, protected, against llama.cpp, tokens/s."""
    floor_share: Spread
    """Time the memory alone would take for the bytes of a token, by the time a token took, protected."""


class BenchCosts(_Part, frozen=True, kw_only=True):
    """What protection costs, one sequence."""

    verified: PairedCost
    """Verified decoding against the same model and head with nothing proven."""
    checks: PairedCost
    """Compute checks on top of verified decoding."""


class CostParts(_Part, frozen=True, kw_only=True):
    """The cost of verified decoding by its parts, each timed inside the process that decodes."""

    scan_ms: Spread
    """One proof: weights and KV rows."""
    epoch_tokens: Spread
    """Steps the epochs took, as flown."""
    step_ms: Spread
    """A decode step, digests not counted."""
    digest_us: Spread
    """Digests of the KV rows of one position, us a token."""
    cost_pct: Spread
    """(proof / steps of the epoch + digests) / step, %."""


class DecodeRow(_Part, frozen=True, kw_only=True):
    """Decoding by one contender at one batch size."""

    contender: Literal["off", "on", "checked", "llama.cpp"]
    """`off`: nothing proven; `on`: verified decoding; `checked`: compute checks as well."""
    batch: Count
    """Sequences decoded together."""
    tokens_s: Spread
    """All sequences together, token/s."""
    step_ms: Spread
    """Time of a step of the whole batch, proofs spread over the steps, ms."""


class PrefillRow(_Part, frozen=True, kw_only=True):
    """A prompt by one contender, until the hidden state or logits that follow it are there."""

    contender: Literal["off", "on", "llama.cpp"]
    tokens: Count
    time_ms: Spread


class MemoryFloor(_Part, frozen=True, kw_only=True):
    """Memory bandwidth, and the time it alone takes for a token."""

    read_gb_s: Spread
    """Sequential read of memory as large as the live weights, all threads, GB/s (10^9)."""
    method: str
    """How it was read: the fastest of the ways tried."""
    token_bytes: Bytes
    """Bytes of weights one token of one sequence reads. KV rows (under 1 % here) are left out."""
    floor_ms: Spread
    share_off: Spread
    """As `floor_share`, with nothing proven."""


class Window(_Part, frozen=True, kw_only=True):
    """A time in which a strike on some memory would go unseen: see `docs/verified-decoding.md`."""

    name: str
    time_us: Spread
    """Its length at one sequence, us."""


class FreshStart(_Part, frozen=True, kw_only=True):
    """A new process each time: to the first token, and the most memory it ever held."""

    contender: Literal["penumbra", "llama.cpp"]
    import_s: Spread
    """Interpreter and imports, from the start of the process to that of the load."""
    load_s: Spread
    """The model loaded (and, ours, proven)."""
    first_token_s: Spread
    """From the start of the load to the first token of a short prompt; ours proven as well."""
    peak_bytes: dict[str, int]
    """VmHWM by number of sequences, bytes. Pages of files and shared memory count."""


class Bar(_Part, frozen=True, kw_only=True):
    """One bar of the order, and what became of it."""

    name: str
    measured: float | None
    """Median."""
    bar: float
    stretch: float
    unit: str
    verdict: Literal["stretch", "passed", "falls short", "not measured"]


class BenchInference(_Part, frozen=True, kw_only=True):
    """The result of `penumbra bench inference`."""

    machine: Machine
    model: str
    image_id: str
    gguf_sha256: str
    runs: Count
    """Rounds; in each, every contender has its turn, in alternating order."""
    quick: bool
    """Short runs: good for a look, not for figures to be quoted."""
    ratios: BenchRatios
    cost_pct: BenchCosts
    load_to_first_token_s: Spread
    cost_parts: CostParts
    decode: list[DecodeRow]
    prefill: list[PrefillRow]
    memory: MemoryFloor
    starts: list[FreshStart]
    windows: list[Window]
    bars: list[Bar]
    wall_s: float


class PerplexityRow(_Part, frozen=True, kw_only=True):
    """How one implementation predicts the fixed text."""

    contender: Literal["penumbra", "penumbra float32", "reference", "llama.cpp"]
    """`penumbra`: as flown, activations rounded to 8 bits a block; `penumbra float32`: the same graph without
    that rounding."""
    perplexity: float
    against_reference_pct: Annotated[float, Meta(description="%")] | None
    """Perplexity over that of the reference, minus 1; null for the reference itself."""
    agreement_pct: Percent | None
    """Positions whose most probable token is that of the reference; null for the reference itself."""
    clear_agreement_pct: Percent | None
    """The same over the positions where the reference's first choice leads its second by 0.1 nat or more."""
    wall_s: float


class Disagreement(_Part, frozen=True, kw_only=True):
    """Where the most probable token differs from the reference's, and how close the choice was there."""

    contender: Literal["penumbra", "penumbra float32", "llama.cpp"]
    positions: Count
    gap_median: Nats | None
    """Reference logit of its first choice minus its second, median over those positions; null without any."""
    gap_max: Nats | None
    gap_all: Nats
    """The same gap, median over all positions."""
    second_choice: Count
    """Of those positions, how many took the reference's second choice."""


class BenchPerplexity(_Part, frozen=True, kw_only=True):
    """The result of `penumbra bench perplexity`."""

    machine: Machine
    model: str
    image_id: str
    gguf_sha256: str
    tokens: Count
    text_sha256: str
    rows: list[PerplexityRow]
    disagreements: list[Disagreement]
    against_llama_pct: Annotated[float, Meta(description="%")] | None
    """Our perplexity over that of llama.cpp, minus 1; null without the peer."""
    head_top1_equal: Count
    """Positions, of `head_positions`, whose first candidate of the flown head is the largest exact logit."""
    head_positions: Count
    head_log_total_error: Nats
    """Largest error of the flown head's log of the sum over the vocabulary, over those positions."""


class TokensRow(_Part, frozen=True, kw_only=True):
    """How two tokenizers compare on the texts of one part."""

    part: str
    texts: Count
    size_bytes: Bytes
    """As UTF-8."""
    tokens: Count
    """Ours."""
    equal: Count
    """Texts with the same ids (or, of single pieces, the same bytes) in both."""
    explained: dict[str, int]
    """Texts that differ exactly as a stated rule foresees, by rule."""
    unexplained: Count
    """All others that differ, or whose bytes our ids do not give back."""
    wall_s: float


class TokenDifference(_Part, frozen=True):
    """An unexplained difference; each field is cut to a length that can be read."""

    part: str
    text: str
    """From the place on where the ids differ."""
    ours: str
    """Ids from that place on, or bytes."""
    peer: str


class BenchTokens(_Part, frozen=True, kw_only=True):
    """The result of `penumbra bench tokens`."""

    machine: Machine
    model: str
    gguf_sha256: str
    seed: int
    faker: str | None
    """Release of the package that wrote most of the corpus."""
    locales: list[str]
    """Languages it wrote in, in turn."""
    corpus_bytes: dict[str, int]
    """Size of the corpus by kind, UTF-8."""
    corpus_sha256: str
    """The corpus is made at run time: from seed, Python and faker."""
    rows: list[TokensRow]
    rules: dict[str, str]
    """What explains a difference, by the name it is counted under."""
    made_control: dict[str, int]
    """User-defined pieces of the GGUF that llama.cpp makes control pieces: id by text."""
    unexplained: Count
    """0, or the command ends with exit code 1."""
    differences: list[TokenDifference]
    """The first ten unexplained ones."""
    wall_s: float


class OperatingPoint(_Part, frozen=True, kw_only=True):
    """One way to run the worker, and what it gives."""

    threads: Count
    batch: Count
    duty: float
    tokens_s: TokensPerSecond
    """Proven and committed, all sequences together."""
    cpu_share: Share
    """CPU time of the worker by physical time."""
    power_w: Watts | None
    """Mean draw; null unless the board measures it."""
    seconds: float
    """Length of the measurement."""
    power_mode: str | None = None
    """Power mode it was measured in; null on boards without."""
    board_c: Annotated[float, Meta(description="degC")] | None = None
    """Mean temperature of die or board meanwhile; null where the board does not tell."""


class CurrentProfile(_Part, frozen=True, kw_only=True):
    """What the draw of a board follows, by least squares over samples of load and draw.

    The latch-up detector holds the draw against it. A term whose quantity did not vary, or is not known, has
    coefficient 0.
    """

    idle_w: Watts
    """Draw without load, at the reference temperature."""
    core_w: Annotated[float, Meta(description="W for each core kept busy")]
    """At the reference clock."""
    core_w_per_ghz: Annotated[float, Meta(description="W for each busy core and GHz")] = 0.0
    freq_ghz: Annotated[float, Meta(ge=0, description="GHz")] = 0.0
    """Reference clock: the mean over the samples."""
    w_per_c: Annotated[float, Meta(description="W/K")] = 0.0
    temp_c: Annotated[float, Meta(description="degC")] = 0.0
    """Reference temperature: the mean over the samples."""
    residual_sigma_w: Watts
    """Standard deviation of what the terms do not explain, one sample."""
    quiet_sigma_w: Watts | None = None
    """The same over samples with little load; null without any."""
    samples: Count
    sample_s: Annotated[float, Meta(gt=0, description="s")]
    """Mean time between samples."""


class Calibration(_Part, frozen=True, kw_only=True):
    """The result of `penumbra calibrate`."""

    machine: Machine
    board: str
    identity: str = ""
    """Which board: a node refuses the points of another one."""
    board_measures: bool
    """False: the board computes its draw from CPU time. Such watts prove nothing, so they stay null."""
    image_id: str
    checked: bool
    """Compute checks were on."""
    idle_w: Watts | None = None
    """Mean draw without work; null unless the board measures it."""
    points: list[OperatingPoint]
    duty_half_share: float
    """Tokens/s at duty 0.5 by those at duty 1, one thread count and batch: 0.5 if pacing holds its word."""
    reloads: Count
    """Sessions loaded after the first. Must be 0: operating points change without one."""
    current: CurrentProfile | None = None
    """What the draw follows. Of a board that measures no watts it only shows how well the board's own
    settings come back, and how much the readings scatter. Null with too few samples."""


class CeilingBench(_Part, frozen=True, kw_only=True):
    """The result of `penumbra bench ceiling`."""

    machine: Machine
    image_id: str
    steps: Count
    """Caps in a row."""
    samples: Count
    """Means over one second, from two seconds after each step on."""
    over_share: Annotated[float, Meta(ge=0, le=1, description="0 to 1")]
    """Share of them above the cap."""
    excess_w: Watts
    """99 % of them were above the cap by this or less."""
    unused_share: Spread
    """How far below the cap the draw stayed, as a share of it."""
    settled_s: Spread | None
    """Time from a step down to the last mean above the new cap, s; null without a step down."""


class CodecRates(_Part, frozen=True, kw_only=True):
    """Frames of one event each, on one core, frame/s."""

    encode: Spread
    """Packet to frame: values checked, packed, CRC taken."""
    decode: Spread
    """Frame to packet: CRC and header checked, body read."""


class LinkPass(_Part, frozen=True, kw_only=True):
    """One contact that has to take down a backlog, through a link of bounded rate."""

    backlog_s: float
    """Outage in which the backlog was generated, s."""
    pass_s: float
    """Length of the contact, s."""
    bit_s: Annotated[float, Meta(description="bit/s")]
    records: Count
    archived: Count
    """Records in the archive at the end, each once."""
    frames_bytes: Bytes
    """Frames of the backlog."""
    wire_bytes: Bytes
    """What went over the link to the ground for them, TCP payload with MQTT and blocks."""
    drained_s: float
    """From the begin of the contact until the last record was archived, acknowledged and deleted, s."""
    inversions: Count
    """Records archived before a more urgent one."""
    bulk_turns: Count
    """Records the floor rate may give to bulk out of order: one for each batch sent."""
    last_position: dict[str, int]
    """Place in the archive of the last record of each priority, by priority."""
    streams: dict[str, int]
    """Priority of each stream."""


class BenchLink(_Part, frozen=True, kw_only=True):
    """The result of `penumbra bench link`."""

    command: str
    machine: Machine
    frame_bytes: Bytes
    """Length of the event's frame that the rates are of."""
    rounds: Count
    codec_frames_s: CodecRates
    spool_records_s: Spread
    """Records made durable, in transactions of 256 with full sync, record/s."""
    end_to_end_frames_s: Spread
    """Spool, MQTT 5 through mosquitto, committed archive, acknowledgement, deletion, frame/s."""
    client_msgs_s: Spread
    """The bare MQTT client through the same broker, QoS 1, one frame a message, message/s."""
    black_hole_noticed_s: Spread
    """Time until an idle link that swallows everything is given up, s."""
    contact: LinkPass


class PercentOfBound(_Part, frozen=True, kw_only=True):
    """Value as a percentage of what a clairvoyant could have reached, over cells whose floor was kept."""

    median: Annotated[float, Meta(description="%")] | None
    """Null when the floor was broken in every cell."""
    worst: Annotated[float, Meta(description="%")] | None


class GovernorRow(_Part, frozen=True, kw_only=True):
    """One governor over all cells of a sweep."""

    governor: str
    percent_of_lp: PercentOfBound
    cells: Count
    floor_violations: Count
    """Cells in which the state of charge went below its floor. Their value counts nowhere else."""
    floor_violation_s: float
    """Mission time below the floor, all cells together, s."""
    deepest: Annotated[float, Meta(ge=0, le=1, description="0 to 1")]
    """Median depth of the deepest cycle."""
    wear_per_year: float
    """Median share of the battery's life that cycling uses in a year, by an assumed table of life."""
    sim_speed_x: float
    """Mission time by processor time of one core, plant and governor together; median."""


class StudyCell(_Part, frozen=True, kw_only=True):
    """One cell of a sweep under one governor."""

    governor: str
    beta_deg: float
    ratio: float
    """Mean array power by platform and payload at their most."""
    battery_wh: float
    errors: str
    array_loss: float
    seed: Count
    percent_of_lp: Annotated[float, Meta(description="%")]
    tokens: float
    value: float
    floor_violation_s: float
    soc_min: float
    deepest: float
    wear: float
    payload_mean_w: Watts
    eclipse_mean_w: Watts | None
    """Null in an orbit without eclipse."""
    board_max_c: float
    plans: Count
    fallbacks: Count
    """Plans that could not be made: the rules decided."""
    sim_speed_x: float


class PowerStudy(_Part, frozen=True, kw_only=True):
    """The result of `penumbra study power`."""

    machine: Machine
    orbits: Count
    """Of each cell."""
    percent_of_lp: PercentOfBound
    """Of the node's own planner."""
    floor_violations: Count
    """Cells in which it broke the floor, with and without loss of array."""
    sim_speed_x: float
    by_governor: list[GovernorRow]
    with_array_loss: GovernorRow | None
    """The planner again, with a tenth of the array lost unannounced; null when that was not run."""
    cells: list[StudyCell]


PARTS: tuple[type[msgspec.Struct], ...] = (
    Machine,
    Spread,
    PairedCost,
    BenchRatios,
    BenchCosts,
    CostParts,
    DecodeRow,
    PrefillRow,
    MemoryFloor,
    Window,
    FreshStart,
    Bar,
    PerplexityRow,
    Disagreement,
    TokensRow,
    TokenDifference,
    OperatingPoint,
    CurrentProfile,
    CodecRates,
    LinkPass,
    PercentOfBound,
    GovernorRow,
    StudyCell,
)
"""Parts of the results, in the order the ICD documents them."""
