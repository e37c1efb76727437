"""What the node's tests need: a broker, a node process with the scripted worker, a small ground."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from hil.broker import EmbeddedBroker
from hil.shared_memory import owned
from node.clock import CONFIRM_AFTER_S
from node.config import NodeConfig
from telemetry import bus, topics
from telemetry.ack import encode_ack
from telemetry.archive import Archive
from telemetry.block import frames_in
from telemetry.commands import Arguments
from telemetry.envelope import encode_command, make_command
from telemetry.keys import KeyRing, generate_key_file
from telemetry.link import MqttLink
from telemetry.packets import Event, FdirReport, Housekeeping, Stream, Verification

NODE = "test-node"
WORKER = Path(__file__).parents[1] / "scripted_worker.py"
STARTER = """
import sys
from pathlib import Path
from node.runtime import main
sys.exit(main(Path(sys.argv[1]), sys.argv[2:] or None))
"""


def config_text(url: str, **overrides: str) -> str:
    """A configuration with short periods; `section__key="value"` overrides."""
    sections: dict[str, dict[str, str]] = {
        "node": {"name": f'"{NODE}"', "state_dir": '"state"'},
        "model": {"images_dir": '"images"'},
        "bus": {"url": f'"{url}"'},
        "link": {"url": f'"{url}"'},
        "keys": {"file": '"keys.toml"'},
        "worker": {
            "epoch_tokens": "4",
            "ping_period_s": "0.1",
            "ping_warn_s": "0.3",
            "ping_fatal_s": "0.8",
            "start_timeout_s": "5.0",
        },
        "telemetry": {
            "housekeeping_period_s": "0.2",
            "ledger_period_s": "0.5",
            "retransmit_s": "0.5",
        },
    }
    for name, value in overrides.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    return "\n".join(
        f"[{section}]\n" + "\n".join(f"{key} = {value}" for key, value in table.items())
        for section, table in sections.items()
    )


class Bench:
    """A node process, and the ground it talks to."""

    def __init__(self, directory: Path, url: str, **overrides: str) -> None:
        self.directory = directory
        self.url = url
        self.config = directory / "node.toml"
        self.config.write_text(config_text(url, **overrides))
        keys = directory / "keys.toml"
        generate_key_file(keys)
        self.ring = KeyRing.load(keys)
        self.archive = Archive.open(directory / "archive.db")
        self.process: asyncio.subprocess.Process | None = None
        self.ack = True
        self.seq = 0
        self.worker_arguments: list[str] = []
        self.real_worker = False
        self.mission_offset_ns = 0
        """Mission time less host time, once a test has set the mission clock."""
        filters = [topics.tm(NODE, "+"), topics.bus(NODE, "load")]
        self.loads: list[bus.BusLoad] = []
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.link = MqttLink(url, "test-ground", filters, self._on_message)

    def _on_message(self, topic: str, payload: bytes) -> None:
        if topic == topics.bus(NODE, "load"):
            message = bus.decode("load", payload)
            assert isinstance(message, bus.BusLoad)
            self.loads.append(message)
        else:
            for frame in frames_in(topic, payload):
                self._frames.put_nowait(frame)

    async def archive_and_acknowledge(self) -> None:
        while True:
            frames = [await self._frames.get()]
            while not self._frames.empty():
                frames.append(self._frames.get_nowait())
            ingested = self.archive.ingest(frames)
            assert ingested.rejected == 0
            if self.ack:
                for ack in self.archive.acks(NODE):
                    await self.publish(topics.ack(NODE), encode_ack(ack, self.ring.signing_key()))

    async def publish(self, topic: str, payload: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            await self.link.publish(topic, payload)

    async def set_mission_time(self, t_ns: int, rate: float = 1.0) -> None:
        """Steer the node's mission clock as the bus does: a second sample confirms the first."""
        began_ns = time.time_ns()
        self.mission_offset_ns = t_ns - began_ns
        for _ in range(2):
            now_ns = t_ns + round((time.time_ns() - began_ns) * rate)
            await self.publish(topics.bus(NODE, "time"), bus.encode(bus.BusTime(t_ns=now_ns, rate=rate)))
            await asyncio.sleep(2 * CONFIRM_AFTER_S)

    async def start(self) -> None:
        """Start the node and wait for its first housekeeping."""
        boots = self.boot
        await self.start_process()
        await self.until(lambda: self.boot > boots and bool(self.new_housekeeping()), "housekeeping")

    async def start_process(self, starter: str = STARTER) -> None:
        """Start the process alone, with other code around `node.runtime.main` if a test needs it."""
        await self.link.connected.wait()
        with (self.directory / "node.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                starter,
                str(self.config),
                *([] if self.real_worker else [sys.executable, str(WORKER), *self.worker_arguments]),
                stdout=log,
                stderr=log,
            )

    def new_housekeeping(self) -> list[Housekeeping]:
        """Housekeeping of the latest boot."""
        packets = self.archive.packets(NODE, Housekeeping)
        boot = self.boot
        return [p for frame, p in packets if frame.boot == boot]

    @property
    def boot(self) -> int:
        """Number of the boot the node process is in, read from its own log."""
        return self.log().count(": boot ")

    def log(self) -> str:
        path = self.directory / "node.log"
        return path.read_text() if path.exists() else ""

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 20)

    async def until(self, condition: Callable[[], bool], what: str, bound_s: float = 15.0) -> None:
        deadline = time.monotonic() + bound_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {bound_s} s; node.log:\n{self.log()[-4000:]}")
            await asyncio.sleep(0.05)

    async def command(self, arguments: Arguments, lifetime_s: float = 60.0) -> bytes:
        """Send a command; return its bytes."""
        now_ns = time.time_ns() + self.mission_offset_ns
        command = make_command(
            arguments,
            key_id=self.ring.signing_key().id,
            seq=self.seq,
            t_issue_ns=now_ns - 1,
            t_expire_ns=now_ns + round(lifetime_s * 1e9),
            node=NODE,
        )
        self.seq += 1
        payload = encode_command(command, self.ring)
        await self.publish(topics.tc(NODE), payload)
        return payload

    async def execute(self, arguments: Arguments) -> Verification:
        """Send a command and return its last verification."""
        seq = self.seq
        await self.command(arguments)
        await self.until(lambda: bool(self.completed(seq)), f"completion of {arguments.name}")
        return self.completed(seq)[0]

    def verifications(self, seq: int) -> list[Verification]:
        packets = self.archive.packets(NODE, Verification)
        return [v for _, v in packets if v.command_seq == seq]

    def completed(self, seq: int) -> list[Verification]:
        return [v for v in self.verifications(seq) if v.stage == "completed" or not v.ok]

    def events(self, name: str) -> list[Event]:
        return [p for _, p in self.archive.packets(NODE, Event) if p.name == name]

    def fdir(self, monitor: str) -> list[FdirReport]:
        return [p for _, p in self.archive.packets(NODE, FdirReport) if p.monitor == monitor]

    def text(self, job: str) -> bytes:
        return b"".join(r.text for r in self.archive.results(NODE).get(job, []))

    def finished(self, job: str) -> str | None:
        results = self.archive.results(NODE).get(job, [])
        return results[-1].finish if results else None

    def worker_pid(self) -> int | None:
        """Pid of the worker process now, from the node's children in /proc."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def signal_worker(self, number: signal.Signals) -> int:
        pid = self.worker_pid()
        assert pid is not None
        os.kill(pid, number)
        return pid

    def sequences_have_no_gap(self) -> bool:
        return all(len(ranges) == 1 and ranges[0][0] == 0 for ranges in self.archive.sequences(NODE).values())

    def streams(self) -> set[Stream]:
        return {key[1] for key in self.archive.sequences(NODE)}


@contextlib.asynccontextmanager
async def open_bench(directory: Path, kind: type[Bench] = Bench, **overrides: str) -> AsyncIterator[Bench]:
    """A broker and a ground; the node is started by the test, and ended here if the test did not."""
    async with EmbeddedBroker() as broker:
        bench = kind(directory, broker.url, **overrides)
        try:
            # Shared memory outlives every process, and has to be known as this run's while no node is up.
            with owned(NodeConfig.load(bench.config).arena_path):
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(bench.link.run(), name="test.ground.link"),
                        group.create_task(bench.archive_and_acknowledge(), name="test.ground.archive"),
                    ]
                    try:
                        yield bench
                    finally:
                        if bench.process is not None and bench.process.returncode is None:
                            await bench.kill()
                        for task in tasks:
                            task.cancel()
        finally:
            bench.archive.close()
