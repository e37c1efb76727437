"""The node as a process whose state lies on a small disk that fills: by itself, or by others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_bench import NODE, Bench, open_bench
from small_disk import fill, small_disk, used_bytes

from telemetry import commands
from telemetry.packets import BootReport

BOUND = 1 << 20
SIZES = {
    "telemetry__spool_max_bytes": str(BOUND // 8),
    "telemetry__database_max_bytes": str(BOUND),
    "telemetry__housekeeping_period_s": "0.05",
}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "state", 3_000_000) as directory:
        yield directory


def boots(bench: Bench) -> list[int]:
    return [report.boot for _, report in bench.archive.packets(NODE, BootReport)]


async def until_nothing_waits(bench: Bench) -> None:
    """Wait until all but the latest records are acknowledged, as the node's own housekeeping says."""
    await bench.until(
        lambda: any(sample.spool_records < 100 for sample in bench.new_housekeeping()[-1:]),
        "acknowledged records",
        60,
    )


async def test_with_the_ground_away_the_files_stay_within_the_bound_and_all_recovers(
    tmp_path: Path, state: Path
) -> None:
    async with open_bench(tmp_path, **SIZES) as bench:
        bench.ack = False
        await bench.start()
        largest = 0

        def is_full() -> bool:
            nonlocal largest
            largest = max(largest, used_bytes(state, "node.db"))
            return bench.new_housekeeping()[-1].spool_bytes > 0.9 * BOUND / 8

        await bench.until(is_full, "a full spool", 60)
        assert largest <= BOUND
        assert (await bench.execute(commands.Ping())).ok
        bench.ack = True
        await until_nothing_waits(bench)
        assert (await bench.execute(commands.Infer(job="j1", prompt="x", max_tokens=8))).ok
        await bench.until(lambda: bench.finished("j1") == "length", "end of job j1")
        assert await bench.stop() == 0
        await bench.start()
        assert not bench.events("database.lost")
        assert "Traceback" not in bench.log()


async def test_a_disk_that_others_filled_costs_no_command_and_no_boot(tmp_path: Path, state: Path) -> None:
    async with open_bench(tmp_path, **SIZES) as bench:
        await bench.start()
        fill(state / "other")
        bench.ack = False
        await bench.until(lambda: bool(bench.events("disk.full")), "report of the full disk", 30)
        assert (await bench.execute(commands.Ping())).ok
        bench.ack = True
        await until_nothing_waits(bench)
        # Neither after a kill nor after an ordered stop does anybody free space in orbit.
        for end in ("kill", "stop"):
            if end == "kill":
                await bench.kill()
            else:
                assert await bench.stop() == 0
            fill(state / f"more-{end}")
            known = len(boots(bench))
            await bench.start_process()
            await bench.until(lambda k=known: len(boots(bench)) > k, f"a boot after {end}", 30)
            assert (await bench.execute(commands.Ping())).ok
            await until_nothing_waits(bench)
        assert boots(bench) == [1, 2, 3]
        for path in ("other", "more-kill", "more-stop"):
            (state / path).unlink()
        await bench.until(lambda: bool(bench.events("disk.room")), "report of room", 30)
        await asyncio.sleep(0)
        assert (state / "node.db.reserve").exists()
        assert await bench.stop() == 0
        assert "Traceback" not in bench.log()


async def test_a_first_boot_on_a_full_disk_is_in_memory_until_there_is_room(
    tmp_path: Path, state: Path
) -> None:
    async with open_bench(tmp_path, **SIZES) as bench:
        fill(state / "other")
        await bench.start_process()
        await bench.until(lambda: bool(bench.events("disk.memory")), "report of the full disk", 30)
        assert (await bench.execute(commands.Ping())).ok
        assert boots(bench)[0] > 1_000_000_000  # no boot counted on a disk has such a number
        (state / "other").unlink()
        await bench.until(lambda: bool(bench.events("disk.room")), "report of room", 30)
        await bench.kill()
        known = len(boots(bench))
        await bench.start_process()
        await bench.until(lambda: len(boots(bench)) > known, "the next boot")
        assert boots(bench)[-1] == boots(bench)[0] + 1
        assert await bench.stop() == 0
