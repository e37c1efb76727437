"""Each row of the FDIR table: its fault is made to happen in a real node, and what the row asks for is done.

With its row disabled each of these tests must fail: `test_fdir_traceability` runs them so. Rows are flown as
they are packaged, but for limits and times that would need minutes or gigabytes here (`edit`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from board_trees import TREES, write
from node_bench import NODE, Bench, config_text, open_bench

from hil import row_faults
from hil.bench.machine import describe_machine
from hil.link_proxy import LinkProxy
from node.runtime import EXIT_RESTART
from telemetry import bus, commands, topics
from telemetry.errors import PenumbraError
from telemetry.figures import Calibration, CurrentProfile
from telemetry.link import BrokerAddress, MqttLink
from telemetry.packets import FdirReport, Mode, Outcome

ENABLED_S = 20.0
DISABLED_S = 4.0
"""Time that what a row asks for may take. With the row disabled it must not come at all, so less will do."""
EPS = bus.BusEps(
    t_ns=0,
    battery_soc=0.9,
    battery_v=14.0,
    battery_a=0.0,
    battery_wh=80.0,
    array_w=60.0,
    array_sun_w=60.0,
    platform_w=10.0,
    soc_floor=0.5,
)


class RowBench(Bench):
    """A bench whose node has the FDIR table under test."""

    overrides: dict[str, str]
    proof_s: float
    fault = ""
    """One of `row_faults.NODE_FAULTS`."""
    worker: list[str] | None = None
    """Command line of the worker, if it is one of `row_faults.faulty_worker`."""

    async def proof(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for what only the row under test does."""
        await self.until(condition, what, self.proof_s)

    async def reported(self, row: str, outcome: Outcome, level: int) -> FdirReport:
        """Wait for a report of the row with this outcome."""

        def found() -> list[FdirReport]:
            return [r for r in self.fdir(row) if (r.outcome, r.level) == (outcome, level)]

        await self.proof(lambda: bool(found()), f"report {outcome} of {row}")
        return found()[0]

    async def ended_to_be_restarted(self, row: str) -> None:
        """Wait until the node ends for a new start, which then delivers the report of the row."""
        assert self.process is not None
        process = self.process
        await self.proof(lambda: process.returncode is not None, "end of the node")
        assert process.returncode == EXIT_RESTART
        self.worker = self.worker or row_faults.faulty_worker("trip")
        await self.start_process()
        await self.reported(row, Outcome.STARTED, 4)

    async def start_process(self, starter: str = "") -> None:
        run = f"row_faults.run_node({self.fault!r}, " if self.fault else "runtime.main("
        code = (
            "import sys\nfrom pathlib import Path\nfrom hil import row_faults\nfrom node import runtime\n"
            f"sys.exit({run}Path(sys.argv[1]), {self.worker!r} or sys.argv[2:] or None))"
        )
        await super().start_process(starter or code)

    async def serving(self) -> None:
        """Start the node and wait until its worker is ready."""
        await self.start()
        await self.until(lambda: bool(self.events("worker.ready")), "worker")

    async def publish_bus(self, channel: str, message: bus.BusMessage) -> None:
        await self.publish(topics.bus(NODE, channel), bus.encode(message))

    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def the_worker(self) -> int:
        pid = self.worker_pid()
        assert pid is not None
        return pid


@contextlib.asynccontextmanager
async def publishing(
    bench: RowBench, channel: str, make: Callable[[], bus.BusMessage]
) -> AsyncIterator[None]:
    """Publish a message of the bus again and again, in a task."""

    async def publish() -> None:
        while True:
            await bench.publish_bus(channel, make())
            await asyncio.sleep(0.1)

    task = asyncio.create_task(publish(), name="test.bus")
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


OpenRow = Callable[..., contextlib.AbstractAsyncContextManager[RowBench]]


@pytest.fixture
def open_row(tmp_path: Path, fdir_table: Path, request: pytest.FixtureRequest) -> OpenRow:
    @contextlib.asynccontextmanager
    async def open_(**overrides: str) -> AsyncIterator[RowBench]:
        settings = {
            "fdir__table": f'"{fdir_table}"',
            "fdir__sample_s": "0.1",
            "fdir__model_file": '"none.gguf"',
            "worker__start_timeout_s": "10.0",
        } | overrides
        async with open_bench(tmp_path, kind=RowBench, **settings) as bench:
            assert isinstance(bench, RowBench)
            bench.overrides = settings
            bench.proof_s = DISABLED_S if request.config.getoption("--fdir-disable") else ENABLED_S
            yield bench

    return open_


def edit(table: Path, row: str, **values: str) -> None:
    """Change limits of a row in a copy of the table."""
    head, *blocks = table.read_text().split("[[row]]\n")
    (place,) = [n for n, block in enumerate(blocks) if f'id = "{row}"' in block.splitlines()]
    for key, value in values.items():
        blocks[place], count = re.subn(
            rf"\b{key} = [^,}}\n]*[^,}}\s]", f"{key} = {value}", blocks[place], count=1
        )
        assert count == 1, key
    table.write_text("[[row]]\n".join([head, *blocks]))


def tiny(bench: RowBench, tiny_images: Path) -> None:
    """Let the real worker run the tiny model."""
    shutil.copytree(tiny_images, bench.directory / "images")
    bench.real_worker = True


REAL = {"model__threads": "1", "worker__positions": "256", "worker__epoch_s": "0.1"}


@pytest.mark.fdir("weights.digest")
async def test_weights_digest(open_row: OpenRow, tiny_images: Path) -> None:
    async with open_row(**REAL) as bench:
        tiny(bench, tiny_images)
        await bench.serving()
        struck = row_faults.flip_weight(bench.config, 3)
        report = await bench.reported("weights.digest", Outcome.REPAIRED, 0)
        assert (report.page, report.region) == (struck.page, "weights")
        assert report.recovered_ns is not None
        assert not bench.fdir("worker.exit")


@pytest.mark.fdir("kv.digest")
async def test_kv_digest(open_row: OpenRow, tiny_images: Path) -> None:
    async with open_row(**REAL) as bench:
        tiny(bench, tiny_images)
        await bench.serving()
        for number in range(40):
            await bench.command(commands.Infer(job=f"j{number}", prompt="Orbit", max_tokens=200))
        deadline_s = time.monotonic() + bench.proof_s
        while not bench.fdir("kv.digest") and time.monotonic() < deadline_s:
            with contextlib.suppress(PenumbraError):  # no row is in use just now
                row_faults.flip_kv(bench.config)
            await asyncio.sleep(0.2)
        report = await bench.reported("kv.digest", Outcome.REPAIRED, 0)
        assert report.region == "kv"


@pytest.mark.fdir("compute.check")
async def test_compute_check(open_row: OpenRow) -> None:
    async with open_row() as bench:
        bench.worker = row_faults.faulty_worker("trip")
        await bench.serving()
        row_faults.trigger(bench.the_worker())
        report = await bench.reported("compute.check", Outcome.REDONE, 1)
        assert report.evidence["residual"] == 9.0


async def restarted(bench: RowBench, row: str) -> None:
    first = bench.the_worker()
    await bench.reported(row, Outcome.RESTARTED, 2)
    assert bench.the_worker() != first


@pytest.mark.fdir("worker.fatal")
async def test_worker_fatal(open_row: OpenRow) -> None:
    async with open_row() as bench:
        bench.worker = row_faults.faulty_worker("fatal")
        await bench.serving()
        row_faults.trigger(bench.the_worker())
        await restarted(bench, "worker.fatal")


@pytest.mark.fdir("worker.ping")
async def test_worker_ping(open_row: OpenRow) -> None:
    async with open_row() as bench:
        await bench.serving()
        row_faults.stop_process(bench.the_worker())
        await restarted(bench, "worker.ping")


@pytest.mark.fdir("worker.exit")
async def test_worker_exit(open_row: OpenRow) -> None:
    async with open_row() as bench:
        await bench.serving()
        first = bench.the_worker()
        row_faults.kill_process(first)
        await bench.reported("worker.exit", Outcome.RESTARTED, 2)
        assert bench.the_worker() != first


@pytest.mark.fdir("worker.start")
async def test_worker_start(open_row: OpenRow) -> None:
    async with open_row(worker__start_timeout_s="0.5") as bench:
        bench.worker = row_faults.faulty_worker("never_ready")
        await bench.start()
        report = await bench.reported("worker.start", Outcome.STARTED, 2)
        assert report.action == "restart_worker"


@pytest.mark.fdir("worker.protocol")
async def test_worker_protocol(open_row: OpenRow) -> None:
    async with open_row() as bench:
        bench.worker = row_faults.faulty_worker("garbage")
        await bench.serving()
        first = bench.the_worker()
        row_faults.trigger(first)
        await bench.reported("worker.protocol", Outcome.RESTARTED, 2)
        assert bench.the_worker() != first


@pytest.mark.fdir("worker.memory")
async def test_worker_memory(open_row: OpenRow, fdir_table: Path) -> None:
    edit(fdir_table, "worker.memory", high="250_000_000.0", persistence="2")
    async with open_row() as bench:
        bench.worker = row_faults.faulty_worker("grow")
        await bench.serving()
        row_faults.trigger(bench.the_worker())
        await restarted(bench, "worker.memory")


NEVER_UP = {"worker__start_timeout_s": "0.3", "worker__restart_limit": "1"}


@pytest.mark.fdir("worker.restarts")
async def test_worker_restarts(open_row: OpenRow) -> None:
    async with open_row(**NEVER_UP) as bench:
        bench.worker = row_faults.faulty_worker("never_ready")
        await bench.start()
        report = await bench.reported("worker.restarts", Outcome.STARTED, 3)
        assert report.action == "switch_image"


@pytest.mark.fdir("image.damaged")
async def test_image_damaged(open_row: OpenRow, tiny_images: Path) -> None:
    async with open_row(**REAL) as bench:
        tiny(bench, tiny_images)
        row_faults.damage_image(bench.directory / "images" / "a")
        await bench.start()
        report = await bench.reported("image.damaged", Outcome.REPAIRED, 3)
        assert report.evidence["method"] == "page_copy"
        await bench.until(lambda: bool(bench.events("worker.ready")), "worker on the mended image")


@pytest.mark.fdir("node.restart")
async def test_node_restart(open_row: OpenRow, tiny_images: Path) -> None:
    async with open_row(**REAL) as bench:
        tiny(bench, tiny_images)
        for slot in "ab":
            row_faults.damage_image(bench.directory / "images" / slot)
        await bench.start()
        await bench.ended_to_be_restarted("node.restart")


@pytest.mark.fdir("loop.lag")
async def test_loop_lag(open_row: OpenRow, fdir_table: Path) -> None:
    edit(fdir_table, "loop.lag", high="0.2")
    async with open_row() as bench:
        bench.fault = "hold_loop"
        await bench.serving()
        row_faults.trigger(bench.pid())
        await bench.ended_to_be_restarted("loop.lag")


@pytest.mark.fdir("task.ping")
async def test_task_ping(open_row: OpenRow) -> None:
    limits = {"fdir__ping_period_s": "0.1", "fdir__ping_warn_s": "0.5", "fdir__ping_fatal_s": "1.5"}
    async with open_row(**limits) as bench:
        bench.fault = "hang_task"
        await bench.serving()
        row_faults.trigger(bench.pid())
        await bench.ended_to_be_restarted("task.ping")


@pytest.mark.fdir("node.memory")
async def test_node_memory(open_row: OpenRow, fdir_table: Path) -> None:
    edit(fdir_table, "node.memory", high="300_000_000.0", persistence="2")
    async with open_row() as bench:
        bench.fault = "grow"
        await bench.serving()
        row_faults.trigger(bench.pid())
        await bench.ended_to_be_restarted("node.memory")


SCRUB = {"fdir__scrub_period_s": "0.06", "fdir__scrub_budget_s": "0.04"}


@pytest.mark.fdir("memory.segments")
async def test_memory_segments(open_row: OpenRow) -> None:
    async with open_row(**SCRUB) as bench:
        await bench.serving()
        row_faults.flip_code(bench.pid())
        report = await bench.reported("memory.segments", Outcome.REPAIRED, 0)
        assert report.evidence["method"] == "file"


@pytest.mark.fdir("memory.tables")
async def test_memory_tables(open_row: OpenRow) -> None:
    async with open_row(**SCRUB) as bench:
        await bench.serving()
        places = row_faults.find_text(bench.pid(), b"the board is too hot")
        assert places
        for place in places:
            # Some are copies that nobody uses any more: striking those shows nowhere.
            row_faults.flip_table(bench.pid(), place)
            await asyncio.sleep(0.5)
            if bench.fdir("memory.tables"):
                break
        report = await bench.reported("memory.tables", Outcome.REPAIRED, 0)
        assert report.evidence["region"] == "fdir.table"


async def test_a_struck_row_of_the_table_in_use_is_restored_in_place(open_row: OpenRow) -> None:
    async with open_row(**SCRUB) as bench:
        bench.fault = "spoil_row"
        await bench.serving()
        row_faults.trigger(bench.pid())
        report = await bench.reported("memory.tables", Outcome.REPAIRED, 0)
        assert str(report.evidence["part"]).startswith("values in use")
        await asyncio.sleep(1.0)
        assert len(bench.fdir("memory.tables")) == 1, "it was not whole after that"
        assert bench.fdir("node.restart") == []


@pytest.mark.fdir("memory.state")
async def test_memory_state(open_row: OpenRow) -> None:
    async with open_row() as bench:
        await bench.start()
        assert await bench.stop() == 0
        row_faults.flip_state(bench.directory / "state" / "node.db", "boot")
        await bench.start()
        report = await bench.reported("memory.state", Outcome.REPAIRED, 0)
        assert report.evidence["value"] == "boot"


async def test_a_struck_copy_of_the_mode_in_memory_is_outvoted(open_row: OpenRow) -> None:
    async with open_row() as bench:
        bench.fault = "flip_mode"
        await bench.start()
        row_faults.trigger(bench.pid())
        report = await bench.reported("memory.state", Outcome.REPAIRED, 0)
        assert report.evidence["value"] == "mode"
        assert bench.new_housekeeping()[-1].mode is Mode.NOMINAL


@pytest.mark.fdir("spool.record")
async def test_spool_record(open_row: OpenRow) -> None:
    async with open_row() as bench:
        bench.ack = False
        await bench.start()
        assert await bench.stop() == 0
        row_faults.flip_spool(bench.directory / "state" / "node.db")
        await bench.start()
        await bench.reported("spool.record", Outcome.REPORTED, 0)


@pytest.mark.fdir("spool.fill")
async def test_spool_fill(open_row: OpenRow) -> None:
    small = {"telemetry__spool_max_bytes": "65536", "telemetry__housekeeping_period_s": "0.05"}
    async with open_row(**small) as bench, LinkProxy(BrokerAddress.parse(bench.url).port) as gate:
        bench.config.write_text(config_text(bench.url, **bench.overrides, link__url=f'"{gate.url}"'))
        await gate.open()
        await bench.start()
        gate.shut()
        await bench.until(lambda: spooled_bytes(bench) > 60_000, "a full spool", 30)
        await asyncio.sleep(1.0)
        await gate.open()
        await bench.reported("spool.fill", Outcome.REPORTED, 0)


def spooled_bytes(bench: Bench) -> int:
    with contextlib.closing(sqlite3.connect(bench.directory / "state" / "node.db", timeout=10)) as connection:
        return int(connection.execute("SELECT COALESCE(SUM(bytes), 0) FROM spool_usage").fetchone()[0])


@pytest.mark.fdir("node.resets")
async def test_node_resets(open_row: OpenRow) -> None:
    async with open_row(**NEVER_UP, fdir__max_resets="0") as bench:
        bench.worker = row_faults.faulty_worker("never_ready")
        await bench.start()
        await bench.reported("node.resets", Outcome.ESCALATED, 5)
        await bench.until(lambda: bench.new_housekeeping()[-1].mode is Mode.SAFE, "safe mode")


@pytest.mark.fdir("boot.unintended")
async def test_boot_unintended(open_row: OpenRow) -> None:
    async with open_row(fdir__safe_after="2", fdir__other_slot_after="2") as bench:
        for _ in range(2):
            await bench.start()
            row_faults.kill_process(bench.pid())
            assert bench.process is not None
            await bench.process.wait()
        await bench.start()
        await bench.reported("boot.unintended", Outcome.ESCALATED, 5)
        await bench.until(lambda: bench.new_housekeeping()[-1].mode is Mode.SAFE, "safe mode")
        assert bench.worker_pid() is None


@pytest.mark.fdir("board.latchup")
async def test_board_latchup(open_row: OpenRow, tmp_path: Path) -> None:
    # On a busy machine the share of the CPU and the simulated draw are some 0.3 W apart (measured).
    profile = CurrentProfile(idle_w=4.0, core_w=8.0, residual_sigma_w=0.3, samples=100, sample_s=0.25)
    calibration = Calibration(
        machine=describe_machine(1, peers=False, load_before=0.0),
        board="sim",
        board_measures=False,
        image_id="0" * 16,
        checked=False,
        points=[],
        duty_half_share=0.5,
        reloads=0,
        current=profile,
    )
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(calibration))
    async with open_row(fdir__latchup_profile=f'"{tmp_path}/profile.json"') as bench:
        bench.fault = "latch_up"
        await bench.serving()
        asked: list[bus.BusMessage] = []
        topic = topics.bus(NODE, "request")
        listener = MqttLink(
            bench.url, "test-power-unit", [topic], lambda _, data: asked.append(bus.decode("request", data))
        )
        listening = asyncio.create_task(listener.run(), name="test.power-unit")
        try:
            await listener.connected.wait()
            row_faults.trigger(bench.pid())
            await bench.proof(lambda: bool(asked), "request for a power cycle")
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        (request, *_) = asked
        assert isinstance(request, bus.BusRequest)
        assert request.request == "power_cycle"
        assert float(request.evidence["residual_w"] or 0) == pytest.approx(row_faults.LATCHUP_W, abs=0.5)
        await bench.reported("board.latchup", Outcome.STARTED, 4)


@pytest.mark.fdir("sensor.reject")
async def test_sensor_reject(open_row: OpenRow) -> None:
    async with open_row() as bench:
        await bench.start()
        async with publishing(bench, "eps", lambda: row_faults.spoil_sensor(EPS, 11.0)):
            report = await bench.reported("sensor.reject", Outcome.REPORTED, 0)
        assert (report.evidence["channel"], report.evidence["set"]) == ("battery_v", 1)


@pytest.mark.fdir("board.sensor")
async def test_board_sensor(open_row: OpenRow, tmp_path: Path) -> None:
    root = write(tmp_path / "root", TREES["orin-nx"])
    board = {"board__kind": '"jetson"', "board__sysfs_root": f'"{root}"'}
    async with open_row(**board) as bench:
        await bench.start()
        monitor = root / "sys/class/hwmon/hwmon0"
        sound = (monitor / "curr1_input").read_text()
        row_faults.stop_meter(monitor)
        report = await bench.reported("board.sensor", Outcome.REPORTED, 0)
        assert report.evidence["sensor"] == "rail VDD_IN"
        (monitor / "curr1_input").write_text(sound)
        await bench.until(lambda: bool(bench.events("board.sensor_restored")), "a meter that measures")


@pytest.mark.fdir("bus.stale")
async def test_bus_stale(open_row: OpenRow, fdir_table: Path) -> None:
    edit(fdir_table, "bus.stale", after_s="1.0")
    async with (
        open_row() as bench,
        publishing(bench, "eps", lambda: row_faults.drain_battery(EPS, 0.9)) as speaking,
    ):
        await bench.start()
        await bench.until(lambda: bench.new_housekeeping()[-1].battery_soc == 0.9, "values of the bus")
        assert not bench.fdir("bus.stale")
        row_faults.silence_bus(speaking)
        await bench.reported("bus.stale", Outcome.REPORTED, 0)


@pytest.mark.fdir("battery.low")
async def test_battery_low(open_row: OpenRow) -> None:
    async with open_row() as bench:
        await bench.start()
        async with publishing(bench, "eps", lambda: row_faults.drain_battery(EPS, 0.1)):
            await bench.reported("battery.low", Outcome.ESCALATED, 5)
        await bench.until(lambda: bench.new_housekeeping()[-1].mode is Mode.SAFE, "safe mode")


@pytest.mark.fdir("board.hot")
async def test_board_hot(open_row: OpenRow) -> None:
    async with open_row() as bench:
        await bench.start()
        async with publishing(bench, "thermal", lambda: row_faults.heat_board(105.0)):
            await bench.reported("board.hot", Outcome.ESCALATED, 5)
        await bench.until(lambda: bench.new_housekeeping()[-1].mode is Mode.SAFE, "safe mode")


@pytest.mark.fdir("command.rejected")
async def test_command_rejected(open_row: OpenRow) -> None:
    async with open_row() as bench:
        await bench.start()
        for payload in row_faults.forge_commands(NODE, bench.ring, 30):
            await bench.publish(topics.tc(NODE), payload)
        await bench.reported("command.rejected", Outcome.REPORTED, 0)
