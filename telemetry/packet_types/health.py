"""Packets about the node itself: housekeeping, events, boots."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from telemetry.packet_types.base import (
    Celsius,
    Count,
    Fraction,
    Mode,
    Nanoseconds,
    Packet,
    Seconds,
    Severity,
    Stream,
    Watts,
)


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
    """Messages on any topic that were not taken, for whatever reason."""
    bus_messages: Count = 0
    """Messages of the bus that were taken, since boot."""
    dropped: dict[str, Count] = {}
    """`garbage_messages` by why they were dropped (`DropCode`)."""
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
