"""Configuration of the node: one TOML file, strict and typed.

An unknown key, a wrong type, a value out of range or two values that contradict each other are refused
with a message that names file, section, key, value and what is allowed. Relative paths are taken from
the directory of the file. `docs/node-example.toml` shows every key with its default.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from fdir.health import PingLimits
from fdir.recovery import RestartPolicy
from node.boards import BoardSettings
from node.inference.slots import active_image
from node.power.ceiling import GovernorSettings
from node.power.planner import PlannerSettings
from node.watchdog import WatchdogConfig
from telemetry.errors import PenumbraError
from telemetry.link import BrokerAddress, tls_context
from telemetry.strict_toml import load_toml
from telemetry.tls import TlsFiles
from telemetry.topics import check_node_name

SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux (`sun_path` less its terminating zero)."""

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Text = Annotated[str, Meta(min_length=1, max_length=4096)]
TextOrEmpty = Annotated[str, Meta(max_length=4096)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections."""


class NodeSection(Section, frozen=True, kw_only=True):
    """Who the node is, and where it keeps its state."""

    name: Text
    """Name in every topic: 1 to 31 of a-z, 0-9 and '-'."""
    state_dir: Text
    """Directory for `node.db`, `worker.sock`, `worker.log` and `code.manifest`; made if missing."""


class ModelSection(Section, frozen=True, kw_only=True):
    """Which model image the worker loads."""

    images_dir: Text
    """Directory that holds the image slots."""
    slot: Literal["active", "a", "b"] = "active"
    """`a`, `b`, or the one that `penumbra model switch` made active; read when the node starts."""
    threads: Annotated[int, Meta(ge=1, le=256)] = 2
    """Threads the worker computes with."""


class BusSection(Section, frozen=True, kw_only=True):
    """The spacecraft bus."""

    url: Text
    """MQTT broker of the bus, e.g. `mqtt://127.0.0.1:1883`."""
    tls_ca: TextOrEmpty = ""
    """Certificate of the authority, for `mqtts://` and `mqtts5://`; empty: no TLS."""
    tls_certificate: TextOrEmpty = ""
    """Certificate of the node, where the broker asks for one."""
    tls_key: TextOrEmpty = ""
    """Its private key, mode 0600."""


class LinkSection(Section, frozen=True, kw_only=True):
    """The space link."""

    url: Text
    """MQTT broker at the far end of the space link; may be that of the bus."""
    tls_ca: TextOrEmpty = ""
    """As for the bus."""
    tls_certificate: TextOrEmpty = ""
    tls_key: TextOrEmpty = ""
    max_unacked: Annotated[int, Meta(ge=1, le=100_000)] = 2048
    """Records that may wait for the archive's acknowledgement at once."""
    batch_bytes: Annotated[int, Meta(ge=512, le=1 << 20)] = 64 << 10
    """Bytes of frames sent at once: what takes half a second on the slowest link, or less."""


class KeysSection(Section, frozen=True, kw_only=True):
    """Keys of the ground."""

    file: Text
    """Key file, mode 0600, see `telemetry.keys`."""
    require_sealed: bool = False
    """Whether telecommands must be encrypted (AES-256-GCM), not only signed."""


class WorkerSection(Section, frozen=True, kw_only=True):
    """The inference worker and its supervision. Times are physical seconds."""

    batch: Annotated[int, Meta(ge=1, le=64)] = 8
    """Jobs decoded together at most."""
    seats: Annotated[int, Meta(ge=1, le=128)] = 10
    """Sequences the KV arena holds: those of the batch, and more that are parked or may lend a prefix."""
    epoch_tokens: Annotated[int, Meta(ge=1, le=1024)] = 32
    """Tokens of a block: what one certificate covers."""
    positions: Annotated[int, Meta(ge=16, le=32_768)] = 4096
    """Positions of a sequence: prompt and answer of a job together."""
    overhead_budget: Annotated[float, Meta(ge=0.001, le=0.5)] = 0.01
    """Share of the time that proofs of memory may take: it sets how long an epoch is."""
    epoch_s: Annotated[float, Meta(ge=0.05, le=60)] = 2.0
    """Longest time between two proofs of memory, s, whatever the budget says."""
    checked: bool = False
    """Check every matrix product by its checksum: finds faults that leave no trace in memory."""
    redundant_modes: list[Literal["nominal", "eclipse"]] = []
    """Modes in which every epoch is decoded twice and compared, at half the speed."""
    retries: Annotated[int, Meta(ge=0, le=100)] = 6
    """Times a dirty epoch is decoded again before the worker gives up."""
    ping_period_s: Seconds = 0.5
    ping_warn_s: Seconds = 1.0
    ping_fatal_s: Seconds = 2.5
    start_timeout_s: Seconds = 20.0
    """Time from the start of the process to `Ready`."""
    stop_timeout_s: Annotated[float, Meta(gt=0, le=10)] = 3.0
    """Time a worker has to end in order before it is killed."""
    restart_limit: Annotated[int, Meta(ge=1, le=1000)] = 5
    """Restarts within the window; one fault more and the image is looked at (row `worker.restarts`)."""
    restart_window_s: Seconds = 60.0

    def __post_init__(self) -> None:
        if self.seats < self.batch:
            raise ValueError(
                f"seats {self.seats} must not be below batch {self.batch}: every job of the batch needs one"
            )
        if len(set(self.redundant_modes)) < len(self.redundant_modes):
            raise ValueError(f"redundant_modes {self.redundant_modes} must name each mode once")
        if not self.ping_period_s <= self.ping_warn_s < self.ping_fatal_s:
            raise ValueError(
                f"ping_period_s {self.ping_period_s:g} <= ping_warn_s {self.ping_warn_s:g}"
                f" < ping_fatal_s {self.ping_fatal_s:g} does not hold"
            )

    def ping_limits(self) -> PingLimits:
        """Return the limits of the health pings."""
        return PingLimits(self.ping_period_s, self.ping_warn_s, self.ping_fatal_s, self.ping_period_s)

    def restart_policy(self) -> RestartPolicy:
        """Return the bounds of the recovery ladder."""
        return RestartPolicy(
            limit=self.restart_limit, window_s=self.restart_window_s, start_timeout_s=self.start_timeout_s
        )


class TelemetrySection(Section, frozen=True, kw_only=True):
    """Telemetry and its store. Times are physical seconds."""

    housekeeping_period_s: Annotated[float, Meta(ge=0.05, le=3600)] = 1.0
    ledger_period_s: Annotated[float, Meta(ge=0.05, le=86_400)] = 5.0
    spool_max_bytes: Annotated[int, Meta(ge=65_536, le=1 << 40)] = 64 << 20
    """Frames the spool holds before its drop policy acts, bytes."""
    database_max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 41)] = 256 << 20
    """Size that `node.db`, its log and the reserve never exceed together, bytes."""
    retransmit_s: Annotated[float, Meta(ge=0.1, le=3600)] = 5.0
    """Age of an unacknowledged record after which it is sent again."""

    def __post_init__(self) -> None:
        if self.database_max_bytes < 4 * self.spool_max_bytes:
            raise ValueError(
                f"database_max_bytes {self.database_max_bytes} must be at least four times spool_max_bytes"
                f" {self.spool_max_bytes}: it bounds jobs, indexes and the log of the database as well"
            )


class FdirSection(Section, frozen=True, kw_only=True):
    """Fault detection, isolation and recovery. Times are physical seconds."""

    table: TextOrEmpty = ""
    """FDIR table, see docs/fdir-table.md; empty: the one of the software."""
    max_resets: Annotated[int, Meta(ge=0, le=100)] = 3
    """Restarts of the node that the FDIR may ask for until they are cleared; then safe mode."""
    sample_s: Annotated[float, Meta(ge=0.05, le=60)] = 1.0
    """Period at which the monitored items are sampled."""
    stable_s: Seconds = 30.0
    """Time of service after which a boot counts as good."""
    other_slot_after: Annotated[int, Meta(ge=1, le=100)] = 2
    """Unintended reboots in a row after which the other image slot is used."""
    safe_after: Annotated[int, Meta(ge=1, le=100)] = 4
    """Unintended reboots in a row after which the node starts in safe mode."""
    model_file: TextOrEmpty = ""
    """Model file an image is built from when both slots are damaged; empty: the one of the package."""
    repair_timeout_s: Annotated[float, Meta(ge=1, le=7200)] = 600.0
    """Time the repair of an image may take."""
    scrub_budget_s: Annotated[float, Meta(ge=0.0005, le=1)] = 0.01
    """Time a cycle of the scrub of code and tables may take."""
    scrub_period_s: Annotated[float, Meta(ge=0.01, le=60)] = 0.5
    """Time between the starts of two cycles."""
    ping_period_s: Seconds = 1.0
    """Period of the health pings to the tasks of the node."""
    ping_warn_s: Seconds = 3.0
    ping_fatal_s: Seconds = 10.0
    lag_limit_s: Seconds = 3.0
    """Longest time the event loop may be held up while the watchdog is still fed."""
    latchup_profile: TextOrEmpty = ""
    """Model of the expected current, written by `penumbra calibrate`; empty: no latch-up detection."""

    def __post_init__(self) -> None:
        if not self.ping_period_s <= self.ping_warn_s < self.ping_fatal_s:
            raise ValueError(
                f"ping_period_s {self.ping_period_s:g} <= ping_warn_s {self.ping_warn_s:g}"
                f" < ping_fatal_s {self.ping_fatal_s:g} does not hold"
            )
        if self.other_slot_after > self.safe_after:
            raise ValueError(
                f"other_slot_after {self.other_slot_after} must not be above safe_after {self.safe_after}:"
                " the other slot would never be tried"
            )
        if self.scrub_budget_s >= self.scrub_period_s:
            raise ValueError(
                f"scrub_budget_s {self.scrub_budget_s:g} must be below scrub_period_s {self.scrub_period_s:g}"
            )

    def ping_limits(self) -> PingLimits:
        """Return the limits of the health pings to the node's own tasks."""
        return PingLimits(self.ping_period_s, self.ping_warn_s, self.ping_fatal_s, self.ping_period_s)


class NodeConfig(Section, frozen=True, kw_only=True):
    """The whole configuration."""

    node: NodeSection
    model: ModelSection
    bus: BusSection
    link: LinkSection
    keys: KeysSection
    worker: WorkerSection = WorkerSection()
    power: GovernorSettings = GovernorSettings()
    planner: PlannerSettings = PlannerSettings()
    telemetry: TelemetrySection = TelemetrySection()
    board: BoardSettings = BoardSettings()
    fdir: FdirSection = FdirSection()
    watchdog: WatchdogConfig = WatchdogConfig()

    @classmethod
    def load(cls, path: Path) -> NodeConfig:
        """Read a configuration file.

        Raises
        ------
        PenumbraError
            The file is missing, no TOML, or anything in it is not allowed.
        """
        return load_toml(path, cls)._checked(path)

    @property
    def sha256(self) -> str:
        """SHA-256 of the effective configuration, defaults included, 64 hex digits."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    @property
    def state_dir(self) -> Path:
        """Directory of the node's files."""
        return Path(self.node.state_dir)

    @property
    def image_dir(self) -> Path:
        """Directory of the model image to be used.

        Raises
        ------
        PenumbraError
            It is to be the active one, and the file that names it is damaged.
        """
        images = Path(self.model.images_dir)
        return active_image(images) if self.model.slot == "active" else images / self.model.slot

    def slot_dir(self, slot: Literal["a", "b"]) -> Path:
        """Return the directory of an image slot."""
        return Path(self.model.images_dir) / slot

    @property
    def arena_path(self) -> Path:
        """Named shared memory of the KV arena; one a state directory, so two nodes never share one."""
        digest = hashlib.sha256(str(self.state_dir).encode()).hexdigest()[:8]
        return Path("/dev/shm") / f"penumbra-{self.node.name}-{digest}"  # noqa: S108 - tmpfs on purpose

    def _checked(self, path: Path) -> NodeConfig:
        """Return the configuration with its paths made absolute, checked against the system's limits."""
        try:
            check_node_name(self.node.name)
        except PenumbraError as error:
            raise PenumbraError(f"{path}: {error.what}", error.mend) from None
        base = path.absolute().parent
        bus, link = _with_base(self.bus, base), _with_base(self.link, base)
        sections: tuple[tuple[str, BusSection | LinkSection], ...] = (("bus", bus), ("link", link))
        for name, section in sections:
            try:
                tls_context(BrokerAddress.parse(section.url), tls_files(section))
            except PenumbraError as error:
                raise PenumbraError(f"{path}: {name}.url: {error.what}", error.mend) from None
        state_dir = Path(os.path.abspath(base / self.node.state_dir))
        socket_bytes = len(bytes(state_dir / "worker.sock"))
        if socket_bytes > SOCKET_PATH_BYTES:
            raise PenumbraError(
                f"{path}: node.state_dir = {str(state_dir)!r}: worker.sock in it has a path"
                f" of {socket_bytes} bytes, {SOCKET_PATH_BYTES} are allowed for a Unix socket",
                "choose a shorter path",
            )
        return msgspec.structs.replace(
            self,
            node=msgspec.structs.replace(self.node, state_dir=str(state_dir)),
            bus=bus,
            link=link,
            model=msgspec.structs.replace(self.model, images_dir=str(base / self.model.images_dir)),
            keys=msgspec.structs.replace(self.keys, file=str(base / self.keys.file)),
            planner=msgspec.structs.replace(
                self.planner, profile=str(base / self.planner.profile) if self.planner.profile else ""
            ),
            fdir=msgspec.structs.replace(
                self.fdir,
                **{
                    name: str(base / value)
                    for name in ("table", "model_file", "latchup_profile")
                    if (value := getattr(self.fdir, name))
                },
            ),
        )


Broker = TypeVar("Broker", BusSection, LinkSection)


def tls_files(section: BusSection | LinkSection) -> TlsFiles | None:
    """Return the files for TLS to the broker of a section, None without any. Raises `PenumbraError`."""
    return TlsFiles.of(section.tls_ca, section.tls_certificate, section.tls_key)


def _with_base(section: Broker, base: Path) -> Broker:
    """Return the section with the paths of its files taken from the directory of the configuration."""
    names = ("tls_ca", "tls_certificate", "tls_key")
    paths = {name: str(base / value) for name in names if (value := getattr(section, name))}
    return msgspec.structs.replace(section, **paths)
