"""The FDIR under telecommand, in a real node: states that outlive it, external control, read-outs, dumps."""

from __future__ import annotations

import signal
from pathlib import Path

from node_bench import NODE, Bench, open_bench

from fdir.flight_recorder import EntryKind, read_dump
from fdir.table import PACKAGED
from telemetry import commands
from telemetry.packets import FdirStatus, FlightRecord, Housekeeping, Outcome, RowReport

FAST = {"fdir__sample_s": "0.2"}


async def query(bench: Bench) -> FdirStatus:
    before = len(bench.archive.packets(NODE, FdirStatus))
    assert (await bench.execute(commands.QueryFdir())).ok
    await bench.until(lambda: len(bench.archive.packets(NODE, FdirStatus)) > before, "status of the FDIR")
    return bench.archive.packets(NODE, FdirStatus)[-1][1]


def row(status: FdirStatus, row_id: str) -> RowReport:
    return next(one for one in status.rows if one.row == row_id)


async def lose_worker(bench: Bench) -> None:
    """Kill the worker, and wait until the node has noticed."""
    bench.signal_worker(signal.SIGKILL)
    await bench.until(
        lambda: bench.worker_pid() is None or bool(bench.fdir("worker.exit")), "loss of the worker"
    )


async def test_states_commanded_hold_over_a_kill_of_the_node(tmp_path: Path) -> None:
    async with open_bench(tmp_path, **FAST) as bench:
        await bench.start()
        await bench.until(lambda: bool(bench.events("worker.ready")), "worker")
        assert row(await query(bench), "worker.exit").state == "enabled"
        assert (await bench.execute(commands.SetFdirRow(row="worker.exit", state="disabled"))).ok
        await bench.kill()
        await bench.start()
        status = await query(bench)
        assert row(status, "worker.exit").state == "disabled"
        assert status.overall == "enabled"
        await bench.until(lambda: bench.new_housekeeping()[-1].worker_state == "running", "worker")
        await lose_worker(bench)
        # A fault of a row that is disabled is not acted on, until the ground enables it again.
        await bench.until(lambda: bench.new_housekeeping()[-1].worker_state == "lost", "loss in housekeeping")
        assert bench.worker_pid() is None
        assert (await bench.execute(commands.SetFdirRow(row="worker.exit", state="enabled"))).ok
        await bench.until(lambda: bool(bench.fdir("worker.exit")), "recovery of what was not forgotten")
        await bench.until(lambda: bench.worker_pid() is not None, "another worker")
        housekeeping: Housekeeping = bench.new_housekeeping()[-1]
        assert housekeeping.worker_restarts >= 0


async def test_rows_that_are_not_there_or_cannot_be_passive_are_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    async with open_bench(tmp_path, **FAST) as bench:
        await bench.start()
        for command, code in (
            (commands.SetFdirRow(row="no.row", state="enabled"), "unknown_row"),
            (commands.SetFdirRow(row="kv.digest", state="passive"), "not_passive"),
            (commands.RearmFdir(row="no.row"), "unknown_row"),
            (commands.ScrubNow(region="no.region"), "unknown_region"),
        ):
            answer = await bench.execute(command)
            assert not answer.ok
            assert answer.code == code, answer
        assert (await bench.execute(commands.SetFdirRow(row="*", state="passive"))).ok
        assert (await query(bench)).overall == "passive"
        assert (await bench.execute(commands.RearmFdir(row="*"))).ok
        assert (await bench.execute(commands.ScrubNow(region="config"))).ok


async def test_under_external_control_nothing_is_done_and_it_is_told(tmp_path: Path) -> None:
    async with open_bench(tmp_path, **FAST) as bench:
        await bench.start()
        await bench.until(lambda: bool(bench.events("worker.ready")), "worker")
        assert (await bench.execute(commands.ExternalControl(on=True))).ok
        bench.signal_worker(signal.SIGKILL)
        await bench.until(
            lambda: any(r.outcome is Outcome.REPORTED for r in bench.fdir("worker.exit")),
            "report without action",
        )
        assert bench.worker_pid() is None
        await bench.kill()
        await bench.start()
        assert (await query(bench)).external_control, "it outlives the node"
        assert (await bench.execute(commands.ExternalControl(on=False))).ok
        await bench.until(lambda: bench.worker_pid() is not None, "worker")
        await bench.until(lambda: bool(bench.events("worker.ready")), "a worker that is ready")
        bench.signal_worker(signal.SIGKILL)
        await bench.until(
            lambda: any(r.outcome is Outcome.RESTARTED for r in bench.fdir("worker.exit")), "a restart"
        )


async def test_the_flight_recorder_comes_down_with_level_3_and_on_command(tmp_path: Path) -> None:
    limits = {"worker__restart_limit": "1", "fdir__model_file": '"none.gguf"', "fdir__max_resets": "0"}
    async with open_bench(tmp_path, **FAST, **limits) as bench:
        bench.worker_arguments = ["--start", "exit"]
        await bench.start()
        await bench.until(lambda: bool(bench.archive.packets(NODE, FlightRecord)), "dump", 20)
        dump = bench.archive.packets(NODE, FlightRecord)[0][1]
        assert dump.level is not None
        assert dump.level >= 3
        entries = read_dump(dump.entries)
        assert {entry.kind for entry in entries} == set(EntryKind)
        assert {entry.machine for entry in entries} >= {"monitors", "ladder", "worker"}
        times = [entry.t_ns for entry in entries]
        assert times == sorted(times)
        before = len(bench.archive.packets(NODE, FlightRecord))
        assert (await bench.execute(commands.QueryFdir(recorder=True))).ok
        await bench.until(lambda: len(bench.archive.packets(NODE, FlightRecord)) > before, "dump on command")
        assert (await bench.execute(commands.ResetCounters())).ok
        assert (await query(bench)).resets == 0


def table_in(directory: Path, text: str) -> Path:
    path = directory / "table.toml"
    path.write_text(text, encoding="utf-8")
    return path


async def test_a_table_is_loaded_by_command_and_a_refused_one_leaves_it_as_it_is(
    tmp_path: Path,
) -> None:
    packaged = PACKAGED.read_text(encoding="utf-8")
    bad = packaged.replace("high = 95.0", "high = nan")
    assert bad != packaged
    path = table_in(tmp_path, packaged)
    async with open_bench(tmp_path, **FAST, fdir__table=f'"{path}"') as bench:
        await bench.start()
        first = (await query(bench)).table_sha256
        table_in(tmp_path, packaged.replace("high = 95.0", "high = 96.0"))
        assert (await bench.execute(commands.LoadFdir())).ok
        second = (await query(bench)).table_sha256
        assert second != first
        await bench.until(lambda: bool(bench.events("fdir.table_loaded")), "event of the table")

        table_in(tmp_path, bad)
        answer = await bench.execute(commands.LoadFdir())
        assert (answer.ok, answer.code) == (False, "table_refused")
        for word in ("board.hot", "high", "nan", "finite"):
            assert word in answer.reason
        assert (await query(bench)).table_sha256 == second
        # The scrub takes a loaded table for what it is, and no damage.
        assert (await bench.execute(commands.ScrubNow(region="fdir.table"))).ok
        await bench.until(
            lambda: any("fdir.table checked" in e.text for e in bench.events("scrub.note")),
            "check of the table",
        )
        assert bench.fdir("memory.tables") == []

        await bench.kill()
        await bench.start()
        assert (await query(bench)).table_sha256 == second, "the last good one, not the bad file"
        await bench.until(lambda: bool(bench.events("fdir.table_refused")), "report of the refused file")
        assert "board.hot" in bench.events("fdir.table_refused")[0].text


async def test_a_first_boot_with_a_refused_table_ends_with_what_to_mend(tmp_path: Path) -> None:
    path = table_in(tmp_path, "row = 3")
    async with open_bench(tmp_path, fdir__table=f'"{path}"') as bench:
        await bench.start_process()
        assert bench.process is not None
        assert await bench.process.wait() == 2
        assert "table.toml" in bench.log()
        assert "mend: " in bench.log()
        assert "Traceback" not in bench.log()
