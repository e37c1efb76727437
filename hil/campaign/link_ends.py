"""The two ends of the space link as processes of their own, so that SIGKILL means what it says.

The node's end is the flight's own store, recorder, downlink, intake and commanding, without worker and bus;
it makes telemetry of every stream as fast as a busy node. The ground's end is the station with its archive,
and sends jobs. Both go on until SIGTERM. A file `quiet` in their directory ends the making; `answered` tells
that no command waits for its answer any more, then `drained` that every record was acknowledged. Times are
shorter than in flight, so that a schedule takes seconds.
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
from typing import Final

from hil.bench.link_load import NODE, backlog
from hil.ground import GroundStation
from node import state
from node.commanding import Commanding
from node.downlink import Downlink, DownlinkWindow
from node.intake import Intake
from node.jobs import JobQueue
from node.recorder import Recorder
from node.schedule import Schedule
from telemetry.archive import Archive
from telemetry.authenticator import Authenticator
from telemetry.commands import Infer
from telemetry.database import Database
from telemetry.keys import KeyRing
from telemetry.link import MqttLink
from telemetry.packets import Packet
from telemetry.spool import Spool

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
STILL_S: Final = 0.4
"""The store must have been empty for so long."""


def run_node(directory: Path, url: str, seed: int) -> None:
    """Run the node's end; never returns before SIGTERM."""
    _run(directory, "node.log", _node(directory, url, seed))


def run_ground(directory: Path, url: str) -> None:
    """Run the ground's end; never returns before SIGTERM."""
    _run(directory, "ground.log", _ground(directory, url))


def _run(directory: Path, log: str, main: Coroutine[None, None, None]) -> None:
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
            for each in (spool.create, jobs.create, authenticator.load, schedule.create):
                each(connection)

        await database.run(create)
        recorder = Recorder(database, spool, time.time_ns)
        commanding = Commanding(
            database=database, spool=spool, jobs=jobs, authenticator=authenticator, recorder=recorder,
            on_executed=lambda _: None, schedule=schedule, mission_ns=time.time_ns,
        )  # fmt: skip
        intake = Intake(
            NODE, ring, recorder, on_command=commanding.offer, on_upload=lambda _: None,
            on_ack=lambda ack: downlink.on_ack(ack), on_flow=lambda flow: downlink.on_flow(flow),  # noqa: PLW0108
            on_bus=lambda _: None,
        )  # fmt: skip
        link = MqttLink(
            url, f"penumbra-{NODE}-link", intake.link_topics, intake.on_message, keepalive_s=1,
            publish_timeout_s=TIMEOUT_S, max_backoff_s=0.2,
        )  # fmt: skip
        downlink = Downlink(NODE, database, spool, link, DownlinkWindow(2048, RETRANSMIT_S))
        async with asyncio.TaskGroup() as group:
            for service in (recorder, commanding, link, downlink):
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
        if (await database.run(spool.size))[0] or not (directory / ANSWERED).exists():
            empty_s = time.monotonic()
        if time.monotonic() - empty_s > STILL_S:
            (directory / DRAINED).touch()
        await asyncio.sleep(POLL_S)


async def _ground(directory: Path, url: str) -> None:
    archive = Archive.open(directory / ARCHIVE_DB)
    try:
        ring = KeyRing.load(directory / KEYS)
        station = GroundStation(url, NODE, archive, ring, now_ns=time.time_ns, reack_s=REACK_S)
        station.in_contact = True
        async with asyncio.TaskGroup() as group:
            group.create_task(station.run(), name="link_ends.station")
            for number in itertools.count():
                quiet = (directory / QUIET).exists()
                if quiet and not station.uplink.pending:
                    (directory / ANSWERED).touch()
                if not quiet and station.uplink.pending < 2:
                    job = f"job-{os.getpid()}-{number}"
                    station.uplink.queue([Infer(job=job, prompt="p", max_tokens=1)])
                await asyncio.sleep(COMMAND_S)
    finally:
        archive.close()
