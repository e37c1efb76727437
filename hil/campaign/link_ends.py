"""The two ends of the space link as processes of their own, so that SIGKILL means what it says.

The node's end is the flight's own store, recorder, downlink, intake, commanding, products and uploads,
without worker and bus; it makes telemetry of every stream as fast as a busy node. The ground's end is the
station with its archive; it sends jobs, has memory dumped, and uploads tables. Both go on until SIGTERM. A
file `quiet` in their directory ends the making; `answered` tells that no command waits for its answer any
more, then `drained` that every record was acknowledged. Times are shorter than in flight, so that a schedule
takes seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
import sqlite3
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Final, cast

from fdir.table import PACKAGED
from hil.bench.link_load import NODE, backlog
from hil.ground import GroundStation
from hil.tether import die_with
from hil.uploader import upload
from node import open_commands, state, transfers
from node.commanding import Commanding
from node.downlink import Downlink, DownlinkWindow
from node.image_slots import ImageSlots
from node.intake import Intake
from node.jobs import JobQueue
from node.long_commands import LongCommands
from node.memory_dump import MemoryRegions
from node.products import Products
from node.recorder import Recorder
from node.schedule import Schedule
from node.transfers import Transfers
from node.uploads import Uploads
from telemetry.archive import Archive
from telemetry.authenticator import Authenticator
from telemetry.commands import DumpMemory, Infer, UploadAbort
from telemetry.database import Database
from telemetry.errors import PenumbraError
from telemetry.keys import KeyRing
from telemetry.link import MqttLink
from telemetry.packets import Packet
from telemetry.spool import Spool

_log = logging.getLogger(__name__)

KEYS: Final = "keys.toml"
NODE_DB: Final = "node.db"
ARCHIVE_DB: Final = "archive.db"
QUIET: Final = "quiet"
ANSWERED: Final = "answered"
DRAINED: Final = "drained"
CAPACITY_BYTES: Final = 64 << 20
RETRANSMIT_S: Final = 0.5
TIMEOUT_S: Final = 1.0
"""Deadline of connecting and publishing (4 s in flight)."""
REACK_S: Final = 0.3
"""Interval of acknowledging everything anew (2 s in flight)."""
POLL_S: Final = 0.02
MAKE_S: Final = 0.01
"""Interval of making telemetry; 1 to 8 packets each."""
COMMAND_S: Final = 0.1
LIFE_S: Final = 600.0
"""An end stops by itself after so long: whoever started it may have been killed."""
DUMP_EVERY: Final = 3
"""One command of so many is a dump."""
DUMP_BYTES: Final = 60_000
REGION: Final = "random"
"""What is dumped: other bytes each time."""
TABLE: Final = "table.toml"
CHUNK_BYTES: Final = 1024
"""Of uploads: a table then has some twenty chunks."""
STILL_S: Final = 0.4
"""The store must have been empty for so long."""


def run_node(directory: Path, url: str, seed: int) -> None:
    """Run the node's end; never returns before SIGTERM."""
    _run(directory, "node.log", _node(directory, url, seed))


def run_ground(directory: Path, url: str) -> None:
    """Run the ground's end; never returns before SIGTERM."""
    _run(directory, "ground.log", _ground(directory, url))


def _run(directory: Path, log: str, main: Coroutine[None, None, None]) -> None:
    die_with(os.getppid())  # the server of forks, which ends with the campaign
    logging.basicConfig(filename=directory / log, level=logging.WARNING, force=True)
    asyncio.run(_until_sigterm(main))


async def _until_sigterm(main: Coroutine[None, None, None]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    task = asyncio.ensure_future(main)
    stopping = asyncio.ensure_future(stop.wait())
    done, _ = await asyncio.wait({task, stopping}, timeout=LIFE_S, return_when=asyncio.FIRST_COMPLETED)
    for each in (task, stopping):
        each.cancel()
    await asyncio.gather(task, stopping, return_exceptions=True)
    if task in done:
        task.result()  # A defect: the process ends by its exception.


async def _node(directory: Path, url: str, seed: int) -> None:
    ring = KeyRing.load(directory / KEYS)
    database = await Database.open(directory / NODE_DB)
    try:
        if database.recovered_from is not None:
            raise RuntimeError(f"the database was lost: {database.recovered_from}")
        await database.run(state.create)
        boot = (await database.run(state.begin_boot)).boot
        spool, schedule = Spool(NODE, boot, CAPACITY_BYTES), Schedule()
        jobs, authenticator = JobQueue(spool), Authenticator(NODE, ring)

        def create(connection: sqlite3.Connection) -> None:
            for each in (
                *(spool.create, jobs.create, authenticator.load, schedule.create),
                *(transfers.create, open_commands.create),
            ):
                each(connection)

        await database.run(create)
        recorder = Recorder(database, spool, time.time_ns)
        products = Products(directory / "products", boot, database=database, spool=spool, recorder=recorder)
        uploads = Uploads(NODE, ring, directory, directory / "images", database)
        regions = MemoryRegions(
            worker_pid=lambda: None, arena=directory / "arena", code=("supervisor.code", "worker.code"),
            tables=lambda: {REGION: lambda: os.urandom(DUMP_BYTES)},
        )  # fmt: skip
        # No image is uploaded or switched here: that takes a worker.
        slots = cast("ImageSlots", None)
        moved = Transfers(regions=regions, products=products, incoming=uploads, slots=slots)
        long_commands = LongCommands(moved.work, lambda: commanding, moved.executed)
        commanding = Commanding(
            database=database, spool=spool, jobs=jobs, authenticator=authenticator, recorder=recorder,
            on_executed=moved.executed, on_begun=long_commands.begin, take_other=moved.take,
            schedule=schedule, mission_ns=time.time_ns,
        )  # fmt: skip
        intake = Intake(
            NODE, ring, recorder, on_command=commanding.offer, on_upload=uploads.offer,
            on_ack=lambda ack: downlink.on_ack(ack), on_flow=lambda flow: downlink.on_flow(flow),  # noqa: PLW0108
            on_bus=lambda _: None,
        )  # fmt: skip
        link = MqttLink(
            url, f"penumbra-{NODE}-link", intake.link_topics, intake.on_message, keepalive_s=1,
            publish_timeout_s=TIMEOUT_S, max_backoff_s=0.2,
        )  # fmt: skip
        downlink = Downlink(NODE, database, spool, link, DownlinkWindow(2048, RETRANSMIT_S))
        async with asyncio.TaskGroup() as group:
            for service in (recorder, commanding, long_commands, products, uploads, link, downlink):
                group.create_task(service.run(), name=f"link_ends.{type(service).__name__}")
            await _make(directory, recorder, random.Random(f"{seed} {boot}"))  # noqa: S311 - contents
            await _watch(directory, database, spool)
    finally:
        await database.close()


async def _make(directory: Path, recorder: Recorder, chance: random.Random) -> None:
    examples: list[Packet] = [packet for packet, _ in backlog(61) if packet.type_name != "product_chunk"]
    while not (directory / QUIET).exists():
        for _ in range(chance.randrange(1, 9)):
            recorder.post(chance.choice(examples))
        await asyncio.sleep(MAKE_S)


async def _watch(directory: Path, database: Database, spool: Spool) -> None:
    empty_s = time.monotonic()
    while True:
        busy = await database.run(lambda c: spool.size(c)[0] + _unfinished(c))
        if busy or not (directory / ANSWERED).exists():
            empty_s = time.monotonic()
        if time.monotonic() - empty_s > STILL_S:
            (directory / DRAINED).touch()
        await asyncio.sleep(POLL_S)


async def _upload_tables(directory: Path, station: GroundStation) -> None:
    """Upload tables that differ in a comment, one after the other, until there is peace."""
    text, path = PACKAGED.read_text(encoding="utf-8"), directory / TABLE
    # What a ground before this one has begun is ended first: one upload is open at a time.
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    while True:
        try:
            await upload(station, path, "fdir_table", chunk_bytes=CHUNK_BYTES)
        except PenumbraError as error:
            _log.warning("upload: %s", error)
            station.uplink.queue([UploadAbort()])
        if (directory / QUIET).exists():
            return
        new = path.with_suffix(".new")
        new.write_text(f"{text}\n# {time.time_ns()}\n", encoding="utf-8")
        new.replace(path)


def _unfinished(connection: sqlite3.Connection) -> int:
    """Return how much is still being carried out, or waits for room in the store."""
    (due,) = connection.execute("SELECT COUNT(*) FROM product_due").fetchone()
    return int(due) + len(open_commands.all_open(connection))


async def _ground(directory: Path, url: str) -> None:
    archive = Archive.open(directory / ARCHIVE_DB)
    try:
        ring = KeyRing.load(directory / KEYS)
        station = GroundStation(url, NODE, archive, ring, now_ns=time.time_ns, reack_s=REACK_S)
        station.in_contact = True
        async with asyncio.TaskGroup() as group:
            group.create_task(station.run(), name="link_ends.station")
            sending = group.create_task(_upload_tables(directory, station), name="link_ends.upload")
            for number in itertools.count():
                quiet = (directory / QUIET).exists()
                if quiet and not station.uplink.pending and sending.done():
                    (directory / ANSWERED).touch()
                if not quiet and station.uplink.pending < 2:
                    job = f"job-{os.getpid()}-{number}"
                    dump = number % DUMP_EVERY == DUMP_EVERY - 1
                    station.uplink.queue(
                        [DumpMemory(region=REGION) if dump else Infer(job=job, prompt="p", max_tokens=1)]
                    )
                await asyncio.sleep(COMMAND_S)
    finally:
        archive.close()
