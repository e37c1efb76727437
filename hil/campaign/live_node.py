"""A real node under fire: broker, ground and bus around it, its parent above it, jobs coming all the time.

The node is the flight's own process with the flight's own worker, under `node.supervise`. The ground is
always in contact; every block of text that comes down is compared with the reference of its job.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from fdir.table import PACKAGED
from hil.accounts import ledger_fact
from hil.broker import EmbeddedBroker
from hil.campaign.records import Header, Records
from hil.campaign.texts import Text, make_texts, with_references
from hil.ground import GroundStation
from hil.processes import all_processes, descendants, find_worker
from hil.record import LedgerFact
from hil.run_dir import to_toml
from hil.shared_memory import owned
from node.config import NodeConfig
from node.inference.manifest import image_id, load_manifest
from node.inference.slots import active_image
from telemetry import bus, topics
from telemetry.archive import Archive
from telemetry.certificate import verify_results
from telemetry.commands import Infer
from telemetry.errors import PenumbraError
from telemetry.frame import Frame
from telemetry.keys import KeyRing, generate_key_file
from telemetry.link import LinkDown, MqttLink
from telemetry.packets import BootReport, Event, FdirReport, Packet, Result

R = TypeVar("R", bound=msgspec.Struct)
NAME: Final = "campaign"
FEED_S: Final = 2.0
"""Time without a feed after which the parent kills the node, s: short, for more trials an hour."""
BUS_PERIOD_S: Final = 0.5
UP_S: Final = 90.0
DRAIN_S: Final = 120.0
STOP_S: Final = 40.0
PARENT: Final = """
import ctypes, os, signal, sys
from pathlib import Path
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: it does not outlive the campaign
if os.getppid() != int(sys.argv[3]):
    sys.exit(1)
from node.supervise import Limits, main, node_command
limits = Limits(feed_s=float(sys.argv[2]), start_s=30.0, quick_s=0.5, wait_s=0.05, longest_wait_s=0.5)
sys.exit(main(node_command(Path(sys.argv[1])), limits, lambda text: print(text, file=sys.stderr, flush=True)))
"""


class LiveSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the node is run."""

    threads: int = 2
    batch: int = 4
    seats: int = 6
    positions: int = 512
    jobs: int = 6
    """Jobs asked for and not ended, at any time."""


@dataclass
class Seen:
    """What came down, counted."""

    released: int = 0
    wrong: int = 0
    jobs: int = 0
    wrong_ends: int = 0
    reports: list[tuple[Frame, FdirReport]] = field(default_factory=list)
    boots: list[tuple[Frame, BootReport]] = field(default_factory=list)
    blocks_ns: list[tuple[int, int]] = field(default_factory=list)
    """Of each new block: when the node made it (mission time, which is the host's), when it was here, ns."""


class LiveNode:
    """The node and all that it needs. An async context.

    Parameters
    ----------
    folder
        For its state, keys and logs.
    images
        Directory of model images.
    texts
        Jobs with their references; run over and over.
    settings
        How it is run.
    """

    def __init__(self, folder: Path, images: Path, texts: list[Text], settings: LiveSettings) -> None:
        self.seen = Seen()
        self.folder = folder
        self._images, self._texts, self._settings = images, texts, settings
        self._jobs: dict[str, Text] = {}
        self._ended: set[str] = set()
        self._blocks: set[tuple[str, int]] = set()
        self._number = 0
        self._process: asyncio.subprocess.Process | None = None
        self._stack = AsyncExitStack()
        self._news = asyncio.Event()
        self._closing = False

    @property
    def database(self) -> Path:
        """The node's `node.db`."""
        return self.folder / "state" / "node.db"

    async def __aenter__(self) -> LiveNode:
        self.folder.mkdir(parents=True, exist_ok=True)
        broker = await self._stack.enter_async_context(EmbeddedBroker())
        self._write_config(broker.url)
        ring = KeyRing.load(self.folder / "keys.toml")
        self.archive = Archive.open(self.folder / "archive.db")
        self._stack.callback(self.archive.close)
        self.ground = GroundStation(
            broker.url, NAME, self.archive, ring, now_ns=time.time_ns, on_packet=self._on_packet
        )
        self.ground.in_contact = True
        self._bus = MqttLink(broker.url, f"bus-{NAME}", [], lambda _topic, _payload: None)
        self._tasks = [
            asyncio.create_task(self.ground.run(), name="hil.campaign.ground"),
            asyncio.create_task(self._bus.run(), name="hil.campaign.bus-link"),
            asyncio.create_task(self._speak(), name="hil.campaign.bus"),
        ]
        self._stack.push_async_callback(self._end_tasks)
        self._stack.enter_context(owned(NodeConfig.load(self.folder / "node.toml").arena_path))
        await asyncio.wait_for(self.ground.connected.wait(), UP_S)
        with (self.folder / "node.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PARENT),
                *(str(self.folder / "node.toml"), str(FEED_S), str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._stack.push_async_callback(self._kill_all)
        self._fill()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        await self._stack.aclose()

    # What can be struck.

    def node_pid(self) -> int | None:
        """Return the pid of the node, None while there is none."""
        parent = self._process.pid if self._process is not None else None
        if parent is None:
            return None
        return next((p.pid for p in all_processes() if p.parent == parent), None)

    def worker_pid(self) -> int | None:
        """Return the pid of the worker, None while there is none."""
        node = self.node_pid()
        return None if node is None else find_worker(node)

    # What is waited for.

    async def until(self, met: Callable[[], bool], bound_s: float) -> bool:
        """Wait for something that comes down, at most `bound_s`; return whether it came."""
        deadline_s = time.monotonic() + bound_s
        while not met():
            rest_s = deadline_s - time.monotonic()
            if rest_s <= 0:
                return False
            if self._process is not None and self._process.returncode is not None:
                raise self.failed(f"the node's parent ended with code {self._process.returncode}")
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), min(rest_s, 0.5))
        return True

    def block_since(self, t_ns: int) -> tuple[int, int] | None:
        """Return when the first block made after `t_ns` was made, and was here, ns; None if there is none."""
        return next((both for both in self.seen.blocks_ns if both[0] > t_ns), None)

    def failed(self, what: str) -> PenumbraError:
        """Return an error that says where the node's log is."""
        return PenumbraError(what, f"read {self.folder / 'node.log'}")

    @property
    def all_ended(self) -> bool:
        """Whether every job asked for has ended."""
        return self._jobs.keys() == self._ended

    def drain(self) -> None:
        """Ask for no more jobs."""
        self._closing = True

    async def stop(self) -> tuple[int, LedgerFact, list[str]]:
        """Stop the node in order; return its exit code, its ledger, and what certificates do not prove."""
        self._closing = True
        assert self._process is not None  # noqa: S101 - entered
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(self._process.wait(), STOP_S)
        await self.until_quiet()
        fact = ledger_fact(self.archive, NAME, self.database)
        blocks = [block for blocks in self.archive.results(NAME).values() for block in blocks]
        images = sorted({block.certificate.image_id for block in blocks})
        problems = [
            f"{verdict.job}: {finding.text}"
            for verdict in verify_results(blocks, image_ids=images)
            for finding in verdict.findings
        ]
        if len(images) != 1:
            problems.append(f"blocks of {len(images)} images")
        return code, fact, problems

    async def until_quiet(self, bound_s: float = 10.0) -> None:
        """Wait until nothing comes down any more."""
        deadline_s = time.monotonic() + bound_s
        while time.monotonic() < deadline_s:
            before = self.ground.counts.archived
            await asyncio.sleep(0.5)
            if self.ground.counts.archived == before and not self.ground.backlog:
                return

    # Inside.

    def _write_config(self, url: str) -> None:
        s = self._settings
        generate_key_file(self.folder / "keys.toml")
        # Hundreds of faults on purpose must not climb the ladder: bounds of attempts are tested elsewhere.
        table = PACKAGED.read_text(encoding="utf-8")
        lines = ["attempts = 0" if line.startswith("attempts =") else line for line in table.splitlines()]
        (self.folder / "table.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sections: dict[str, dict[str, Any]] = {
            "node": {"name": NAME, "state_dir": "state"},
            "model": {"images_dir": str(self._images.resolve()), "threads": s.threads},
            "bus": {"url": url},
            "link": {"url": url},
            "keys": {"file": "keys.toml"},
            "worker": {
                "batch": s.batch, "seats": s.seats, "positions": s.positions,
                "epoch_tokens": 8, "epoch_s": 0.25, "restart_limit": 1000, "restart_window_s": 1.0,
                "ping_period_s": 0.1, "ping_warn_s": 0.3, "ping_fatal_s": 1.0,
            },
            "telemetry": {"housekeeping_period_s": 0.5, "ledger_period_s": 1.0, "retransmit_s": 1.0},
            "fdir": {
                "table": "table.toml", "max_resets": 100, "sample_s": 0.5, "stable_s": 0.5,
                "other_slot_after": 100, "safe_after": 100,
            },
        }  # fmt: skip
        (self.folder / "node.toml").write_text(to_toml(sections), encoding="utf-8")

    async def _speak(self) -> None:
        """Say the time and that there is power, as the bus does."""
        while True:
            now_ns = time.time_ns()
            eps = bus.BusEps(
                t_ns=now_ns, battery_soc=0.95, battery_v=14.8, battery_a=0.1, battery_wh=500.0, array_w=200.0,
                array_sun_w=200.0, platform_w=10.0, soc_floor=0.3,
            )  # fmt: skip
            for channel, message in (("time", bus.BusTime(t_ns=now_ns, rate=1.0)), ("eps", eps)):
                with suppress(LinkDown):
                    await self._bus.publish(topics.bus(NAME, channel), bus.encode(message))
            await asyncio.sleep(BUS_PERIOD_S)

    def _fill(self) -> None:
        """Ask for jobs until enough are under way."""
        while not self._closing and len(self._jobs) - len(self._ended) < self._settings.jobs:
            text = self._texts[self._number % len(self._texts)]
            job = f"{text.name}-{self._number}"
            self._number += 1
            self._jobs[job] = text
            self.ground.uplink.queue(
                [Infer(job=job, prompt=text.prompt, max_tokens=text.max_tokens, sampling=text.sampling)]
            )

    def _on_packet(self, frame: Frame, packet: Packet) -> None:
        match packet:
            case Result():
                self._compare(frame, packet)
            case FdirReport():
                self.seen.reports.append((frame, packet))
            case BootReport():
                self.seen.boots.append((frame, packet))
            case Event():
                pass
            case _:
                return
        self._news.set()

    def _compare(self, frame: Frame, block: Result) -> None:
        # A block is sent again while its acknowledgement is on its way.
        if (block.job, block.first) in self._blocks and block.finish is None:
            return
        self._blocks.add((block.job, block.first))
        text = self._jobs.get(block.job)
        expected = [] if text is None else text.tokens[block.first : block.first + len(block.tokens)]
        self.seen.released += len(block.tokens)
        self.seen.wrong += sum(one != other for one, other in zip(block.tokens, expected, strict=False))
        self.seen.wrong += max(0, len(block.tokens) - len(expected))
        self.seen.blocks_ns.append((frame.t_ns, time.time_ns()))
        if block.finish is not None and block.job not in self._ended:
            self._ended.add(block.job)
            self.seen.jobs += 1
            self.seen.wrong_ends += text is None or block.first + len(block.tokens) != len(text.tokens)
            self._fill()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _kill_all(self) -> None:
        """End the parent and what is below it; only what was started here."""
        if self._process is None or self._process.returncode is not None:
            return
        below = descendants(self._process.pid, all_processes())
        for pid in (self._process.pid, *(process.pid for process in below)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self._process.wait()


@asynccontextmanager
async def live_campaign(
    images: Path,
    out: Path,
    kind: type[R],
    *,
    plan: str,
    seed: int,
    settings: LiveSettings,
    bytes_a_token: int,
    say: Callable[[str, float], None],
) -> AsyncIterator[tuple[Records[R], LiveNode]]:
    """Open a campaign's records, and a node that serves; at the end stop it in order, and note how it closed.

    Raises
    ------
    PenumbraError
        The node does not come up, or the directory holds another campaign.
    """
    image = active_image(images)
    identity = image_id(load_manifest(image))
    header = Header(plan=plan, seed=seed, image_id=identity, settings=msgspec.to_builtins(settings))
    with Records(out, header, kind) as records:
        say("reference texts", 0.0)
        texts = with_references(
            make_texts(settings.positions // 2, count=8, long=1, bytes_a_token=bytes_a_token),
            image, identity, keep=out, positions=settings.positions, threads=settings.threads,
        )  # fmt: skip
        async with LiveNode(out / f"node-{time.time_ns()}", images, texts, settings) as live:
            if not await live.until(lambda: live.seen.released > 0, UP_S):
                raise live.failed(f"no token within {UP_S:g} s")
            started_s = time.monotonic()
            yield records, live
            # Every job asked for has to come down whole.
            live.drain()
            whole = await live.until(lambda: live.all_ended, DRAIN_S)
            code, ledger, problems = await live.stop()
            seen = live.seen
            records.note(
                worker=live.folder.name, released=seen.released, wrong=seen.wrong, jobs=seen.jobs,
                wrong_ends=seen.wrong_ends, all_ended=whole, exit_code=code, lost=ledger.lost,
                duplicated=ledger.duplicated, consistent=ledger.consistent, generated=ledger.generated,
                boots=len({frame.boot for frame, _ in seen.boots}), unproven=len(problems),
                first_unproven=problems[0] if problems else None, garbage=live.ground.counts.garbage,
                wall_s=round(time.monotonic() - started_s, 1),
            )  # fmt: skip
