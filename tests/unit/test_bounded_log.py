"""The worker's log keeps its latest lines, and no more."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from waiting import until

from node.bounded_log import MAX_BYTES, cut
from node.worker_process import WorkerProcess

CHATTER = f"""
import sys, time
for number in range(3 * {MAX_BYTES} // 100):
    sys.stderr.write(f"line {{number:06d}} " + "x" * 88 + "\\n")
sys.stderr.flush()
time.sleep(30)
"""


def test_the_latest_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(100)))
    assert not cut(path, 1000)
    with path.open("ab") as writer:
        writer.write(b"x" * 300 + b"\n")
        writer.flush()
        assert cut(path, 1000)
        writer.write(b"next\n")
    lines = path.read_bytes().split(b"\n")
    assert lines[0] in [b"line %d" % number for number in range(100)]
    assert lines[-3:] == [b"x" * 300, b"next", b""]
    assert path.stat().st_size <= 500 + 5


async def test_a_worker_that_writes_without_end_does_not_fill_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    process = WorkerProcess(
        [sys.executable, "-c", CHATTER],
        socket_path=tmp_path / "worker.sock",
        log_path=path,
        generation=1,
        on_message=lambda _: None,
        on_fault=lambda _row, _reason: None,
    )

    def last_line_is_there() -> bool:
        return path.exists() and b"line 007863" in path.read_bytes()[-200:]

    async with asyncio.TaskGroup() as group:
        group.create_task(process.run())
        await until(lambda: last_line_is_there() and path.stat().st_size <= MAX_BYTES, 60)
        process.kill()
