"""`penumbra campaign run link`: schedules of kills, cuts and lies on the way from the spool to the archive.

Each trial has a node's end and a ground's end as processes (`hil.campaign.link_ends`), a broker (mosquitto
with MQTT 5, or amqtt with 3.1.1) and the fault proxy between node and broker. A random schedule strikes them;
then all is left in peace until the node's store is empty, and the books of both sides are compared, record by
record, from the two databases.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Final

import msgspec

from hil.bench.link_load import NODE
from hil.broker import EmbeddedBroker
from hil.campaign.link_ends import ARCHIVE_DB, DRAINED, KEYS, NODE_DB, QUIET, run_ground, run_node
from hil.campaign.records import Header, Records
from hil.link_faults import LinkFaults, Way
from hil.link_proxy import LinkProxy
from hil.mosquitto import Mosquitto, find_mosquitto
from hil.products import Assembled, products
from node.open_commands import OK
from telemetry.archive import Archive
from telemetry.commands import DumpMemory, UploadCommit
from telemetry.dictionary.codes import FailureCode
from telemetry.errors import PenumbraError
from telemetry.keys import generate_key_file
from telemetry.ledger import Key, LedgerCheck, reconcile, to_ranges
from telemetry.packets import Stage, Verification
from telemetry.spool import Spool

DRAIN_S: Final = 90.0
"""Longest wait for the store to be empty, s; then the trial has failed, and its directory is kept."""
STOP_S: Final = 5.0
EMBEDDED: Final = 4
"""One trial of so many uses the embedded broker, the others mosquitto."""


class LinkRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One schedule, and what the books said in the end."""

    index: int
    broker: str
    faults: dict[str, int]
    """Strikes by kind."""
    boots: int
    drained: bool
    generated: int
    archived: int
    dropped: int
    lost: int
    duplicated: int
    """Identities with two contents, and identities that are twice in the archive."""
    consistent: bool
    """Both ledgers agree, record by record."""
    problems: list[str]
    commands: int
    """Telecommands answered as executed."""
    jobs: int
    """Jobs in the node's queue: each of those commands made one, once."""
    dumps: int
    """Dumps that were completed."""
    dumps_broken: int
    """Of these, not whole in the archive, or not there."""
    uploads: int
    """Uploads that were committed."""
    interrupted: int
    """Commands that take long which a kill interrupted: reported so by the next boot."""
    unanswered: int
    """Commands that take long which were begun, and have no completion in the archive, or two."""
    wall_s: float

    @property
    def is_right(self) -> bool:
        """Whether nothing was lost, doubled or left without an answer."""
        return (
            self.drained
            and self.consistent
            and self.jobs == self.commands
            and not self.dumps_broken
            and not self.unanswered
        )


@dataclass
class _Scene:
    """One trial at work."""

    directory: Path
    seed: int
    broker: Mosquitto | EmbeddedBroker
    proxy: LinkProxy
    context: ForkServerContext
    chance: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    processes: dict[str, ForkServerProcess] = field(default_factory=dict)

    def start(self, end: str) -> None:
        if end == "node":
            arguments = (self.directory, self.proxy.url, self.seed)
            process = self.context.Process(target=run_node, args=arguments, daemon=True)
        else:
            scheme = "mqtt5" if isinstance(self.broker, Mosquitto) else "mqtt"
            url = f"{scheme}://127.0.0.1:{self.broker.port}"
            process = self.context.Process(target=run_ground, args=(self.directory, url), daemon=True)
        process.start()
        self.processes[end] = process

    async def kill(self, end: str) -> None:
        self.processes[end].kill()
        await _ended(self.processes[end])

    async def strike(self) -> None:
        """Do one thing by chance, and undo it."""
        chance = self.chance
        kind = chance.choice(KINDS)
        self.faults[kind] += 1
        for_s = chance.uniform(0.05, 0.5)
        match kind:
            case "kill_node" | "kill_ground":
                end = kind.removeprefix("kill_")
                await self.kill(end)
                await asyncio.sleep(for_s)
                self.start(end)
            case "stop_node" | "stop_ground":
                process = self.processes[kind.removeprefix("stop_")]
                _signal(process, signal.SIGSTOP)
                await asyncio.sleep(for_s)
                _signal(process, signal.SIGCONT)
            case "kill_broker":
                await self.broker.kill()
                await asyncio.sleep(for_s)
                await self.broker.start()
            case "window":
                self.proxy.shut()
                await asyncio.sleep(for_s)
                await self.proxy.open()
            case "cut":
                self.proxy.cut()
            case _:
                self.proxy.faults = _faults(kind, chance)
                await asyncio.sleep(2 * for_s)
                self.proxy.faults = LinkFaults()

    async def peace(self) -> bool:
        """End all faults and wait until the store is empty; return whether it came to that."""
        (self.directory / QUIET).touch()
        deadline_s = time.monotonic() + DRAIN_S
        while not (self.directory / DRAINED).exists():
            for end, process in self.processes.items():
                if not process.is_alive():
                    raise PenumbraError(
                        f"the {end}'s end died by itself, exit code {process.exitcode}",
                        f"see {self.directory}/{end}.log",
                    )
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(0.05)
        return True

    async def end(self) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await _ended(process)
            if process.is_alive():
                process.kill()
                await _ended(process)


KINDS: Final = (
    *("kill_node", "kill_ground", "kill_broker", "stop_node", "stop_ground", "window", "cut"),
    *("black_hole", "half_open", "corrupt", "slow", "narrow", "resets"),
)


def _faults(kind: str, chance: random.Random) -> LinkFaults:
    match kind:
        case "black_hole":
            return LinkFaults(black_hole=chance.choice((Way.TO_GROUND, Way.TO_NODE, Way.BOTH)))
        case "half_open":
            return LinkFaults(half_open=True)
        case "corrupt":
            return LinkFaults(corrupt_per_byte=10 ** chance.uniform(-5, -3))
        case "slow":
            return LinkFaults(delay_s=chance.uniform(0, 0.2), jitter_s=chance.uniform(0, 0.2))
        case "narrow":
            return LinkFaults(to_ground_bit_s=10 ** chance.uniform(5, 6.5))
        case _:
            return LinkFaults(reset_hz=chance.uniform(1, 10))


def _signal(process: ForkServerProcess, number: signal.Signals) -> None:
    if process.pid is not None and process.is_alive():
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


async def _ended(process: ForkServerProcess) -> None:
    while process.is_alive():  # noqa: ASYNC110 - a process, no task
        await asyncio.sleep(0.01)


async def run_trial(index: int, seed: int, root: Path, context: ForkServerContext) -> LinkRecord:
    """Run one schedule; its directory is removed if the books are right.

    Raises
    ------
    PenumbraError
        An end died by itself.
    """
    begun_s = time.monotonic()
    directory = root / f"trial-{index}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    generate_key_file(directory / KEYS)
    chance = random.Random(f"{seed} {index}")  # noqa: S311 - schedules of faults
    embedded = index % EMBEDDED == EMBEDDED - 1
    broker: Mosquitto | EmbeddedBroker = EmbeddedBroker() if embedded else Mosquitto(directory)
    async with broker, LinkProxy(broker.port, seed=index, version5=not embedded) as proxy:
        scene = _Scene(directory, seed + index, broker, proxy, context, chance)
        try:
            await proxy.open()
            for end in ("node", "ground"):
                scene.start(end)
            await asyncio.sleep(chance.uniform(0.2, 0.8))
            for _ in range(chance.randrange(4, 10)):
                await scene.strike()
                await asyncio.sleep(chance.uniform(0, 0.4))
            drained = await scene.peace()
        finally:
            await scene.end()
    books = await asyncio.to_thread(_read_books, directory)
    record = LinkRecord(
        index=index, broker="amqtt" if embedded else "mosquitto", faults=dict(scene.faults), drained=drained,
        boots=books.boots, generated=books.check.generated, archived=books.archived,
        dropped=books.check.dropped, lost=books.check.lost,
        duplicated=books.check.duplicated + books.twice,
        consistent=books.check.consistent and books.check.stored == 0 and not books.twice,
        problems=books.check.problems, commands=books.commands, jobs=books.jobs, dumps=books.long.dumps,
        dumps_broken=books.long.broken, uploads=books.long.uploads, interrupted=books.long.interrupted,
        unanswered=books.long.unanswered,
        wall_s=time.monotonic() - begun_s,
    )  # fmt: skip
    if record.is_right:
        shutil.rmtree(directory)
    return record


@dataclass(frozen=True)
class _Books:
    check: LedgerCheck
    boots: int
    archived: int
    twice: int
    commands: int
    jobs: int
    long: _LongCommands


@dataclass(frozen=True)
class _LongCommands:
    dumps: int
    broken: int
    uploads: int
    interrupted: int
    unanswered: int


def _read_books(directory: Path) -> _Books:
    """Read both databases and hold every record of one side against the other."""
    archive = Archive.read(directory / ARCHIVE_DB)
    connection = sqlite3.connect(directory / NODE_DB, isolation_level=None)
    try:
        check, boots = _check(connection, archive)
        (jobs,) = connection.execute("SELECT COUNT(*) FROM jobs").fetchone()
        reports = [report for _, report in archive.packets(NODE, Verification)]
        long = _read_long(reports, products(archive, NODE))
        executed = {
            (report.key_id, report.command_seq)
            for report in reports
            if report.name == "infer" and report.stage is Stage.COMPLETED and report.ok
        }
        frames = archive.frames(NODE)
    finally:
        connection.close()
        archive.close()
    twice = len(frames) - len(set(frames))
    return _Books(check, boots, len(frames), twice, len(executed), jobs, long)


def _read_long(reports: Sequence[Verification], made: Sequence[Assembled]) -> _LongCommands:
    """Hold what long commands said against what came of them.

    A completion that was repeated, because the command was, counts once.
    """
    begun: set[int] = set()
    ends: dict[int, set[tuple[str, str]]] = {}
    for report in reports:
        if report.name not in (DumpMemory.name, UploadCommit.name):
            continue
        if report.stage is Stage.STARTED and report.ok:
            begun.add(report.command_seq)
        elif report.stage is Stage.COMPLETED:
            ends.setdefault(report.command_seq, set()).add((report.code, report.reason))
    codes = {seq: next(iter(told))[0] for seq, told in ends.items()}
    ok = {seq for seq, code in codes.items() if code == OK}
    dumped = {r.command_seq for r in reports if r.name == DumpMemory.name} & ok
    promised = {reason.split()[1] for seq in dumped for _, reason in ends[seq]}
    whole = {found.head.product for found in made if found.state == "whole"}
    return _LongCommands(
        dumps=len(dumped),
        broken=len(promised - whole),
        uploads=len(ok - dumped),
        interrupted=sum(code == FailureCode.INTERRUPTED for code in codes.values()),
        unanswered=sum(len(ends.get(seq, ())) != 1 for seq in begun),
    )


def _check(connection: sqlite3.Connection, archive: Archive) -> tuple[LedgerCheck, int]:
    spool = Spool(NODE, 2**31, 1 << 30)
    ledger = spool.ledger(connection)
    stored = {key: to_ranges(seqs) for key, seqs in spool.stored_sequences(connection).items()}
    dropped: dict[Key, set[int]] = {}
    for span in spool.dropped_ranges(connection):
        dropped.setdefault((span.boot, span.stream), set()).update(range(span.first, span.last + 1))
    check = reconcile(
        ledger, archive.sequences(NODE), stored=stored,
        dropped={key: to_ranges(seqs) for key, seqs in dropped.items()},
        duplicated=archive.conflicts(NODE), final=True,
    )  # fmt: skip
    return check, len({entry.boot for entry in ledger})


def _without_amqtt(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep what the tasks of a killed amqtt die of off the terminal."""
    if not type(context.get("exception")).__module__.startswith("amqtt"):
        loop.default_exception_handler(context)


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def run_link(
    out: Path,
    *,
    trials: int,
    seed: int,
    at_once: int,
    say: Callable[[str, float], None] = lambda text, part: None,
) -> None:
    """Run so many schedules, or the rest of them.

    Raises
    ------
    PenumbraError
        There is no mosquitto, or an end died by itself.
    """
    if find_mosquitto() is None:
        raise PenumbraError("mosquitto is not installed", "apt-get install mosquitto")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hil.campaign.link_ends"])
    header = Header(plan="link", seed=seed)
    with Records(out, header, LinkRecord) as records:
        left = [index for index in range(trials) if index not in records.done]
        waiting = iter(left)
        total, count = len(left), 0

        async def work() -> None:
            nonlocal count
            for index in waiting:
                records.add(await run_trial(index, seed, out, context))
                count += 1
                say(f"schedule {count} of {total}", count / total)

        asyncio.get_running_loop().set_exception_handler(_without_amqtt)
        # It warns of every write to a peer that was killed.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(work(), name="hil.campaign.link")
        except ExceptionGroup as group:
            if isinstance(error := _first(group), PenumbraError):
                raise error from None
            raise
