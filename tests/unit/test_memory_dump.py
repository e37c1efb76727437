"""What a dump holds is what the memory held, byte for byte, and where it came from."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.memory_dump import DumpError, MemoryRegions

NAMES = ("supervisor.code", "worker.code", "worker.weights", "worker.kv", "config")


class Setup:
    """Regions of this process as supervisor and worker, with a weights file that is mapped and struck."""

    def __init__(self, directory: Path) -> None:
        self.pid: int | None = os.getpid()
        self.weights = directory / "weights.bin"
        self.weights.write_bytes(bytes(range(256)) * 64)
        self.arena = directory / "arena"
        with self.weights.open("rb") as file:
            self.mapping = mmap.mmap(
                file.fileno(),
                8192,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=4096,
            )
        self.regions = MemoryRegions(
            worker_pid=lambda: self.pid,
            arena=self.arena,
            tables=lambda: {"config": lambda: b"0123456789"},
            code=("supervisor.code", "worker.code"),
        )


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.mapping.close()


def test_every_region_has_a_name(setup: Setup) -> None:
    assert setup.regions.names == NAMES


def test_a_strike_in_mapped_weights_is_in_the_dump_and_not_in_the_file(setup: Setup) -> None:
    setup.mapping[100] ^= 0x10
    dump = setup.regions.read("worker.weights", 0, 1 << 20)
    content = setup.weights.read_bytes()[4096:12288]
    assert [at for at in range(8192) if dump.content[at] != content[at]] == [100]
    (part,) = dump.parts
    assert (part.first_byte, part.size_bytes, part.file, part.offset) == (0, 8192, str(setup.weights), 4096)


def test_a_window_of_a_region_says_where_it_is_in_the_file(setup: Setup) -> None:
    dump = setup.regions.read("worker.weights", 5000, 100)
    assert dump.content == setup.weights.read_bytes()[9096:9196]
    (part,) = dump.parts
    assert (part.first_byte, part.size_bytes, part.offset) == (0, 100, 9096)
    with pytest.raises(DumpError, match="it has 8192 bytes, byte 8192 is none"):
        setup.regions.read("worker.weights", 8192, 1)


@pytest.mark.parametrize("region", ["supervisor.code", "worker.code"])
def test_code_is_what_its_files_hold(setup: Setup, region: str) -> None:
    dump = setup.regions.read(region, 0, 2 << 20)
    assert len(dump.content) == 2 << 20
    executable = [
        part for part in dump.parts if part.file.endswith((".so", ".so.6")) or "python" in part.file
    ]
    assert executable
    same = 0
    for part in dump.parts:
        path = Path(part.file)
        if not path.is_file():
            continue
        with path.open("rb") as file:
            file.seek(part.offset)
            content = file.read(part.size_bytes)
        mine = dump.content[part.first_byte : part.first_byte + len(content)]
        same += sum(a == b for a, b in zip(mine, content, strict=True))
    # Relocated pages differ from the file.
    assert same > 0.9 * len(dump.content)
    assert sum(part.size_bytes for part in dump.parts) == len(dump.content)


def test_tables_and_arena(setup: Setup) -> None:
    assert setup.regions.read("config", 3, 4).content == b"3456"
    with pytest.raises(DumpError, match="no worker has made it yet"):
        setup.regions.read("worker.kv", 0, 1)
    setup.arena.write_bytes(b"rows" * 10)
    assert setup.regions.read("worker.kv", 38, 100).content == b"ws"
    with pytest.raises(DumpError, match="byte 40 is none"):
        setup.regions.read("worker.kv", 40, 1)


def test_without_a_worker_its_memory_is_not_there(setup: Setup) -> None:
    setup.pid = None
    with pytest.raises(DumpError, match="there is no worker now"):
        setup.regions.read("worker.weights", 0, 1)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    setup.pid = gone.pid
    with pytest.raises((DumpError, FileNotFoundError)):
        setup.regions.read("worker.code", 0, 1)
