"""Safe mode is small, and the parent brings back a node whose loop hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from node_bench import Bench, open_bench

from hil.row_faults import kill_process, trigger
from telemetry.packets import BootReport, Mode

SAFE_RSS_BYTES = 60_000_000
"""Bar of issue 4."""


def status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} of process {pid}")


def test_the_node_loads_no_inference_stack() -> None:
    code = (
        "import sys, node.runtime\n"
        "heavy = {'onnxruntime', 'onnx', 'node.inference.model', 'node.inference.worker'}\n"
        "sys.exit(', '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_after_unintended_reboots_the_node_is_in_safe_mode_under_60_mb(tmp_path: Path) -> None:
    async with open_bench(tmp_path, fdir__safe_after="2", fdir__other_slot_after="2") as bench:
        for _ in range(2):
            await bench.start()
            assert bench.process is not None
            kill_process(bench.process.pid)
            await bench.process.wait()
        await bench.start()
        report = bench.archive.packets("test-node", BootReport)[-1][1]
        assert report.unintended_reboots == 2
        assert any("safe mode after 2 unintended reboots" in reason for reason in report.reasons)
        await bench.until(lambda: bench.new_housekeeping()[-1].mode is Mode.SAFE, "safe mode")
        await bench.until(lambda: len(bench.new_housekeeping()) > 10, "some service")
        assert bench.worker_pid() is None
        used = status_bytes(bench.process.pid, "VmRSS")
        assert used < SAFE_RSS_BYTES, f"{used / 1e6:.1f} MB"
        assert await bench.stop() == 0


PARENT = """
import sys
from pathlib import Path
from node.supervise import Limits, main
child = (
    "import sys; from pathlib import Path; from hil import row_faults;"
    "sys.exit(row_faults.run_node('hold_for_ever', Path(sys.argv[1]), sys.argv[2:]))"
)
limits = Limits(feed_s=2.0, start_s=30.0, wait_s=0.1)
sys.exit(main([sys.executable, "-c", child, *sys.argv[1:]], limits, print))
"""


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Supervised(Bench):
    def node_pid(self) -> int:
        assert self.process is not None
        (pid,) = children(self.process.pid)
        return pid


async def test_a_node_whose_loop_hangs_is_killed_by_its_parent_and_serves_again(tmp_path: Path) -> None:
    async with open_bench(tmp_path, kind=Supervised) as bench:
        assert isinstance(bench, Supervised)
        await bench.start_process(PARENT)
        await bench.until(lambda: bench.boot == 1 and bool(bench.new_housekeeping()), "housekeeping")
        first = bench.node_pid()
        trigger(first)
        await bench.until(lambda: bench.boot == 2 and bool(bench.new_housekeeping()), "a second boot", 30)
        assert bench.node_pid() != first
        reports = [p for _, p in bench.archive.packets("test-node", BootReport)]
        assert [(r.boot, r.clean_shutdown) for r in reports] == [(1, True), (2, False)]
        second = bench.node_pid()
        os.kill(second, signal.SIGSTOP)
        await bench.until(lambda: bench.boot == 3 and bool(bench.new_housekeeping()), "a third boot", 30)
        assert await bench.stop() == 0
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
