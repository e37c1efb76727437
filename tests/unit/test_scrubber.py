"""The supervisor's scrub at work: what it finds in a live process and in a table reaches the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from waiting import until

from fdir.regions import Evidence
from fdir.segments import CodeMapping, code_mappings
from hil.memory import ProcessMemory
from node.scrubber import SUPERVISOR_CODE, WORKER_CODE, Scrubber
from telemetry.errors import PenumbraError

CHILD = "import sys, ctypes; ctypes.CDLL(sys.argv[1]); print(1, flush=True); sys.stdin.read()"


class Node:
    """A scrubber that runs, and what it told."""

    def __init__(self, manifest: Path) -> None:
        self.damages: list[tuple[str, str, Evidence, bool]] = []
        self.notes: list[str] = []
        self.threads: set[int] = set()
        self.scrubber = Scrubber(
            manifest, on_damage=self._damage, on_note=self.notes.append, budget_s=0.05, period_s=0.01
        )
        self.table = b"limit = 4"
        self.scrubber.protect("table", lambda: self.table, self._restore)

    def _damage(self, *damage: object) -> None:
        self.threads.add(threading.get_ident())
        self.damages.append(damage)  # type: ignore[arg-type]

    def _restore(self, content: bytes) -> None:
        self.table = content

    async def until(self, true: Callable[[], object]) -> None:
        await until(lambda: bool(true()), 20.0)

    async def passes(self, count: int = 1) -> None:
        goal = self.scrubber.status().passes + count + 1  # one may be half done
        await self.until(lambda: self.scrubber.status().passes >= goal)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path / "code.manifest")
    task = asyncio.create_task(node.scrubber.run(), name="scrub")
    yield node
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penumbra-scrub")]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], CodeMapping]]:
    import _ctypes

    library = shutil.copy(_ctypes.__file__, tmp_path / "library.so")
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        yield (
            process,
            next(
                mapping
                for mapping in code_mappings(maps)
                if mapping.path == str(library) and mapping.executable
            ),
        )
        process.kill()


def region(node: Node, name: str) -> object:
    return next(one for one in node.scrubber.status().regions if one.name == name)


async def test_sound_memory_is_scrubbed_pass_after_pass_and_nothing_is_told(node, worker, tmp_path):
    node.scrubber.watch_worker(worker[0].pid)
    await node.passes(2)
    status = node.scrubber.status()
    assert {one.name for one in status.regions} == {"table", SUPERVISOR_CODE, WORKER_CODE}
    assert all(one.passes and one.size and not one.miscompares for one in status.regions)
    assert status.pass_s is not None
    assert status.pass_age_s < 20
    assert (node.damages, node.notes) == ([], [])
    assert (tmp_path / "code.manifest").stat().st_size > 10_000


async def test_a_struck_worker_is_mended_and_told_in_the_loop(node, worker):
    process, mapping = worker
    node.scrubber.watch_worker(process.pid)
    await node.passes()
    with ProcessMemory(process.pid) as memory:
        memory.flip(mapping.address + 99, 2)
    await node.until(lambda: node.damages)
    ((name, row, evidence, repaired),) = node.damages
    assert (name, row, repaired) == (WORKER_CODE, "memory.segments", True)
    assert (evidence["region"], evidence["process"], evidence["method"]) == (WORKER_CODE, "worker", "file")
    assert node.threads == {threading.get_ident()}
    await node.passes()
    assert len(node.damages) == 1


async def test_a_struck_table_is_restored(node):
    await node.passes()
    node.table = b"limit = 5"
    await node.until(lambda: node.damages)
    ((name, row, _, repaired),) = node.damages
    assert (name, row, repaired, node.table) == ("table", "memory.tables", True, b"limit = 4")
    node.table = b"limit = 6"
    node.scrubber.recompute("table")  # what is in use by then becomes the baseline
    before = len(node.damages)
    await node.passes()
    assert len(node.damages) == before


async def test_off_means_off_and_on_order_it_is_checked_all_the_same(node):
    await node.passes()
    node.scrubber.set_enabled("table", False)
    await node.passes()
    node.table = b"limit = 5"
    await node.passes()
    assert node.damages == []
    node.scrubber.set_enabled(None, False)
    node.scrubber.scrub_now("table")
    await node.until(lambda: node.notes)
    assert node.notes == ["memory region table checked: 1 damaged, 1 repaired"]
    assert len(node.damages) == 1


async def test_an_unknown_region_is_refused(node):
    with pytest.raises(PenumbraError, match="no region weights; there are table"):
        node.scrubber.scrub_now("weights")


async def test_a_worker_that_ends_or_is_replaced_is_followed_without_a_word(node, worker):
    process, _ = worker
    node.scrubber.watch_worker(process.pid)
    await node.until(lambda: any(one.name == WORKER_CODE for one in node.scrubber.status().regions))
    process.kill()
    process.wait()
    await node.passes()
    node.scrubber.watch_worker(process.pid)  # gone already: the supervisor will know soon
    await node.passes()
    node.scrubber.watch_worker(None)
    await node.passes()
    assert {one.name for one in node.scrubber.status().regions} == {"table", SUPERVISOR_CODE}
    assert (node.damages, node.notes) == ([], [])


async def test_a_process_that_may_not_be_traced_is_told_and_the_rest_goes_on(node, worker, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    await node.passes()
    monkeypatch.setattr("node.scrubber.ProcessCode", refuse)
    node.scrubber.watch_worker(worker[0].pid)
    await node.until(lambda: node.notes)
    assert node.notes == ["code of the worker is not watched: Permission denied"]
    await node.passes()


async def test_a_manifest_that_cannot_be_written_is_told_once(tmp_path, caplog):
    node = Node(tmp_path / "missing" / "code.manifest")
    task = asyncio.create_task(node.scrubber.run(), name="scrub")
    try:
        await node.passes(3)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert [note.split(": ", 1)[1] for note in node.notes] == ["cannot be written: No such file or directory"]
