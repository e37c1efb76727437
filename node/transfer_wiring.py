"""Dumps, products, uploads and image slots, wired to the components of the node."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path

from fdir.boot import Slot
from node.config import NodeConfig
from node.image_slots import ImageSlots
from node.job_runner import JobRunner
from node.long_commands import LongCommands, Reporter
from node.memory_dump import MemoryRegions
from node.products import CHUNK_BYTES, Products
from node.pulse import Pulse
from node.recorder import Recorder
from node.scrubber import SUPERVISOR_CODE, WORKER_CODE
from node.transfers import Transfers
from node.uploads import Uploads
from node.worker_service import WorkerService
from telemetry.database import Database
from telemetry.keys import KeyRing
from telemetry.spool import Spool


class TransferParts:
    """All of them.

    Parameters
    ----------
    config
        The configuration.
    boot, slot
        Boot counter, and the image slot the worker runs from.
    ring
        Keys of the ground.
    worker, runner
        Whose memory and image it is, whose jobs end when the image becomes another.
    database, spool, recorder
        Where state, chunks and reports go.
    tables
        Returns what encodes the tables in use, by name of their region.
    reporter
        Returns who stores reports of commands that take long.

    Attributes
    ----------
    slots, uploads, commands, long_commands
        The parts that others need.
    """

    def __init__(
        self,
        config: NodeConfig,
        boot: int,
        slot: Slot | None,
        *,
        ring: KeyRing,
        worker: WorkerService,
        runner: JobRunner,
        database: Database,
        spool: Spool,
        recorder: Recorder,
        tables: Callable[[], Mapping[str, Callable[[], bytes]]],
        reporter: Callable[[], Reporter],
    ) -> None:
        self.slots = ImageSlots(config, slot, worker=worker, database=database)
        self.slots.end_begun = runner.fail_begun
        images = Path(config.model.images_dir)
        self.uploads = Uploads(config.node.name, ring, config.state_dir, images, database)
        self._products = Products(
            config.state_dir / "products",
            boot,
            database=database,
            spool=spool,
            recorder=recorder,
            chunk_bytes=min(CHUNK_BYTES, config.link.batch_bytes),
        )
        regions = MemoryRegions(
            worker_pid=lambda: worker.pid,
            arena=config.arena_path,
            tables=tables,
            code=(SUPERVISOR_CODE, WORKER_CODE),
        )
        self.commands = Transfers(
            regions=regions, products=self._products, incoming=self.uploads, slots=self.slots
        )
        self.long_commands = LongCommands(self.commands.work, reporter, self.commands.executed)

    @property
    def pulses(self) -> list[Pulse]:
        """Ends of the health pings of the tasks."""
        return [self._products.pulse, self.uploads.pulse, self.long_commands.pulse]

    def tasks(self) -> list[tuple[str, Coroutine[None, None, None]]]:
        """Return the tasks to run, with their names."""
        return [
            ("node.commands.long", self.long_commands.run()),
            ("node.products.run", self._products.run()),
            ("node.uploads.run", self.uploads.run()),
        ]
