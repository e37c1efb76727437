"""The injector against a live process that maps weights and an arena as the worker does."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fdir.pages import MappedTensor
from hil import memory as memory_module
from hil.faults import Fault, Strike, Target, draw_faults
from hil.injector import Injector, find_worker_of, inject_once
from hil.memory import ArenaView, NotThere, ProcessMemory, WeightSites, WorkerMemory
from node.config import NodeConfig
from node.inference.arena import ARENA_VERSION, ArenaShape, ArenaState, KvArena
from node.inference.manifest import MANIFEST, WEIGHTS, encode_manifest, load_manifest
from telemetry.errors import PenumbraError

PAGE = 4096

# Maps weights privately and the arena shared, then answers "w OFFSET" / "a OFFSET" with the byte it sees.
WORKER = """
import mmap, sys
weights = open(sys.argv[2], "rb"); arena = open(sys.argv[3], "r+b")
w = mmap.mmap(weights.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
a = mmap.mmap(arena.fileno(), 0)
print("ready", flush=True)
for line in sys.stdin:
    region, offset = line.split()
    print((w if region == "w" else a)[int(offset)], flush=True)
"""


def tensor(name: str, first_page: int, length: int, **extra: object) -> MappedTensor:
    fields = {"role": "ffn_up", "layer": 0, "sparse": False, "read": True} | extra
    return MappedTensor(
        name=name,
        offset=first_page * PAGE,
        length=length,
        first_page=first_page,
        page_count=-(-length // PAGE),
        **fields,
    )  # type: ignore[arg-type]


TENSORS = (
    tensor("embed", 0, 2 * PAGE, role="embed", layer=None, sparse=True),
    tensor("up", 2, PAGE + 100),
    tensor("once", 4, PAGE, role="scale", read=False),
    tensor("head", 5, 300, role="head", layer=None),
)
SHAPE = ArenaShape(version=ARENA_VERSION, image_id="0" * 16, layers=2, kv_heads=1, positions=24, head_dim=8)


@dataclass
class Bench:
    """A stand-in for a worker, and its files."""

    process: subprocess.Popen[str]
    image: Path
    arena: KvArena
    config: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def byte(self, region: str, offset: int) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{region} {offset}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def memory(self) -> WorkerMemory:
        return WorkerMemory(self.image, self.arena.path)


def write_image(image: Path, like: Path) -> None:
    """An image of six pages whose manifest is that of the tiny model but for its tensors."""
    image.mkdir(parents=True)
    weights = np.random.default_rng(5).integers(0, 256, 6 * PAGE, np.uint8).tobytes()
    (image / WEIGHTS).write_bytes(weights)
    manifest = msgspec.structs.replace(load_manifest(like), tensors=TENSORS, weight_pages=6)
    (image / MANIFEST).write_bytes(encode_manifest(manifest))


@pytest.fixture
def bench(tmp_path: Path, tiny_image: Path) -> Iterator[Bench]:
    write_image(tmp_path / "images" / "a", tiny_image)
    config = tmp_path / "node.toml"
    config.write_text(
        '[node]\nname = "t"\nstate_dir = "s"\n[model]\nimages_dir = "images"\n[bus]\nurl = "mqtt://h:1"\n'
        '[link]\nurl = "mqtt://h:1"\n[keys]\nfile = "k"\n'
    )
    loaded = NodeConfig.load(config)
    arena = KvArena(loaded.arena_path, SHAPE)
    command = [sys.executable, "-c", WORKER, "node.inference.worker", str(loaded.image_dir / WEIGHTS)]
    process = subprocess.Popen(
        [*command, str(arena.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield Bench(process, loaded.image_dir, arena, config)
    process.kill()
    process.communicate()
    arena.close()
    arena.path.unlink()


def fault(where: float = 0.3, target: Target = Target.WEIGHTS, at_s: float = 0.0, index: int = 0) -> Fault:
    return Fault(index=index, at_s=at_s, target=target, where=where)


def test_sites_cover_protected_bits_evenly_and_nothing_else() -> None:
    sites = WeightSites(TENSORS)
    assert sites.bits == 8 * (PAGE + 100 + 300)
    seen = {(s.offset, s.bit) for i in range(sites.bits) for s in [sites.locate((i + 0.5) / sites.bits)]}
    assert len(seen) == sites.bits
    up = range(2 * PAGE, 3 * PAGE + 100)
    head = range(5 * PAGE, 5 * PAGE + 300)
    assert {offset for offset, _ in seen} == {*up, *head}
    assert sites.locate(np.nextafter(1.0, 0.0)).tensor.name == "head"
    assert sites.locate(0.0).tensor.name == "up"


def test_an_image_without_protected_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no protected weights"):
        WeightSites(TENSORS[:1])


def test_weight_flip_lands_in_the_process_and_not_in_the_file(bench: Bench) -> None:
    before = (bench.image / WEIGHTS).read_bytes()
    strike = bench.memory().strike(bench.pid, fault())
    offset = strike.page * PAGE + strike.byte
    assert (strike.tensor, strike.role, strike.target) == ("up", "ffn_up", Target.WEIGHTS)
    assert strike.before == before[offset]
    assert strike.before ^ strike.after == 1 << strike.bit
    assert bench.byte("w", offset) == strike.after
    assert bench.byte("w", offset + 1) == before[offset + 1]
    assert (bench.image / WEIGHTS).read_bytes() == before


def test_kv_flip_lands_in_a_committed_row(bench: Bench) -> None:
    bench.arena.commit(ArenaState(job="j", prompt_tokens=5, generated=4, positions=8, max_tokens=9))
    kv = bench.arena.kv
    kv[:] = np.arange(kv.size, dtype=np.float32).reshape(kv.shape)
    clean = kv.copy()
    for where in (0.0, 0.37, 0.62, 0.9999):
        strike = bench.memory().strike(bench.pid, fault(where, Target.KV))
        bad = np.argwhere(kv.view(np.uint32) != clean.view(np.uint32))
        assert len(bad) == 1
        plane, position, word = (int(n) for n in bad[0])
        assert position < 8
        assert strike.page == plane * SHAPE.positions + position
        assert strike.byte // 4 == word
        assert strike.role == ("v" if plane % 2 else "k")
        assert strike.tensor == f"layer {plane // 2}, position {position}"
        assert strike.job == "j"
        change = int(kv.view(np.uint32)[plane, position, word]) ^ int(
            clean.view(np.uint32)[plane, position, word]
        )
        assert change == 1 << (8 * (strike.byte % 4) + strike.bit)
        kv[:] = clean


@pytest.mark.parametrize(
    "state",
    [
        ArenaState(),
        ArenaState(job="j", prompt_tokens=5),
        ArenaState(job="j", prompt_tokens=5, generated=4, positions=8, finish="eos"),
    ],
)
def test_no_kv_row_in_use_is_not_struck(bench: Bench, state: ArenaState) -> None:
    bench.arena.commit(state)
    clean = bench.arena.kv.copy()
    with pytest.raises(NotThere, match="no KV row"):
        bench.memory().strike(bench.pid, fault(0.5, Target.KV))
    assert np.array_equal(bench.arena.kv, clean)


def test_arena_view_agrees_with_the_arena(bench: Bench) -> None:
    view = ArenaView(bench.arena.path)
    state = ArenaState(job="j", prompt_tokens=5, generated=4, positions=8)
    bench.arena.commit(state)
    assert view.read() == (SHAPE, bench.arena.state)
    commit = view.commit()
    assert commit is not None
    assert (commit.job, commit.generated, commit.serial) == ("j", 4, bench.arena.state.serial)
    bench.arena.kv[0, 0, 0] = 1.5
    raw = bench.arena.path.read_bytes()
    assert np.frombuffer(raw, "<f4", 1, SHAPE.offsets()["kv"])[0] == 1.5
    assert len(raw) == bench.arena.size_bytes


def test_arena_that_is_missing_short_or_broken_reads_as_none(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    assert ArenaView(path).read() is None
    assert ArenaView(path).commit() is None
    path.write_bytes(bytes(100))
    assert ArenaView(path).read() is None
    path.write_bytes(os.urandom(5 * PAGE))
    assert ArenaView(path).read() is None


def test_process_that_is_gone_or_unmapped_memory(bench: Bench) -> None:
    bench.process.kill()
    bench.process.wait()
    with pytest.raises(NotThere):
        bench.memory().strike(bench.pid, fault())
    with ProcessMemory(os.getpid()) as own, pytest.raises(NotThere):
        own.flip(0, 0)
    with pytest.raises(NotThere, match="not mapped"):
        bench.memory().strike(os.getpid(), fault())


def test_memory_that_may_not_be_written_says_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(memory_module.os, "open", refuse)
    with pytest.raises(PenumbraError, match="may not be written") as caught:
        ProcessMemory(os.getpid())
    assert "ptrace_scope" in caught.value.mend
    assert "CAP_SYS_PTRACE" in caught.value.mend


def test_mappings_that_may_not_be_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[object]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(memory_module, "live_mappings", refuse)
    with pytest.raises(PenumbraError, match="may not be read"):
        bench.memory().strike(bench.pid, fault())


def make(bench: Bench, faults: list[Fault], clock: Callable[[], float]) -> Injector:
    return Injector(
        bench.memory(), faults, worker_pid=lambda: bench.pid, computing=lambda: (1, 1), elapsed_s=clock
    )


def test_faults_land_when_due_and_in_the_same_places_again(bench: Bench) -> None:
    faults = draw_faults(11, rate_hz=1.0, duration_s=20.0, kv_share=0.0)
    assert len(faults) > 5
    seen: list[list[tuple[int, int, int]]] = []
    for _ in range(2):
        elapsed = [0.0]
        injector = make(bench, faults, lambda: elapsed[0])  # noqa: B023 - called within this round only
        injector.step(0.0)
        assert injector.strikes == []
        elapsed[0] = faults[2].at_s
        injector.step(1.0)
        assert [s.index for s in injector.strikes] == [0, 1, 2]
        elapsed[0] = 30.0
        injector.step(2.0)
        assert len(injector.strikes) == len(faults)
        assert injector.not_injected == 0
        seen.append([(s.page, s.byte, s.bit) for s in injector.strikes])
    assert seen[0] == seen[1]


def test_kv_fault_waits_for_a_row_in_use(bench: Bench) -> None:
    heard: list[Strike] = []
    injector = Injector(
        bench.memory(),
        [fault(target=Target.KV)],
        worker_pid=lambda: bench.pid,
        computing=lambda: (1, 1),
        elapsed_s=lambda: 1.0,
        on_strike=heard.append,
    )
    injector.step(10.0)
    assert injector.waiting == injector.not_injected == 1
    bench.arena.commit(ArenaState(job="j", prompt_tokens=5, generated=4, positions=8))
    injector.step(12.5)
    assert injector.waiting == 0
    assert [s.deferred_s for s in heard] == [2.5]


def test_nothing_lands_once_injecting_is_off(bench: Bench) -> None:
    injector = make(bench, [fault()], lambda: 1.0)
    injector.injecting = False
    injector.step(0.0)
    assert injector.strikes == []
    assert injector.not_injected == 1


def test_a_worker_that_loads_is_not_struck(bench: Bench) -> None:
    names: list[tuple[int, int] | None] = [None]
    pids: list[int | None] = [bench.pid]
    injector = Injector(
        bench.memory(),
        [fault(index=0), fault(0.4, index=1, at_s=50.0)],
        worker_pid=lambda: pids[0],
        computing=lambda: names[0],
        elapsed_s=lambda: elapsed[0],
    )
    elapsed = [1.0]
    injector.step(0.0)
    assert injector.strikes == []
    names[0] = (1, 1)
    injector.step(1.0)
    assert len(injector.strikes) == 1
    # The worker dies, and the next one loads while the news is still of the first.
    other = subprocess.Popen([*bench.process.args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # type: ignore[misc]
    bench.process.kill()
    bench.process.wait()
    assert other.stdout is not None
    other.stdout.readline()
    elapsed[0], pids[0] = 60.0, other.pid
    injector.step(2.0)
    injector.step(3.0)
    assert len(injector.strikes) == 1
    names[0] = None
    injector.step(4.0)
    names[0] = (1, 2)
    injector.step(5.0)
    assert [s.pid for s in injector.strikes] == [bench.pid, other.pid]
    other.kill()
    other.communicate()


def test_watch_notes_commits_once_and_the_death_of_a_worker(bench: Bench) -> None:
    injector = make(bench, [], lambda: 0.0)
    bench.arena.commit(ArenaState(job="j", generated=1))
    injector.step(0.0)
    injector.step(0.1)
    bench.arena.commit(ArenaState(job="j", generated=2))
    injector.step(0.2)
    assert [c.generated for c in injector.commits] == [1, 2]
    bench.process.kill()
    bench.process.wait()
    injector.step(0.3)
    assert list(injector.worker_deaths) == [bench.pid]


async def test_run_goes_on_until_cancelled(bench: Bench) -> None:
    injector = make(bench, [fault()], lambda: 1.0)
    running = asyncio.create_task(injector.run())
    await asyncio.sleep(0.2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(injector.strikes) == 1


def test_inject_once_finds_the_worker_by_its_arena(bench: Bench) -> None:
    assert find_worker_of(bench.arena.path) == bench.pid
    first = inject_once(bench.config, Target.WEIGHTS, seed=3)
    assert bench.byte("w", first.page * PAGE + first.byte) == first.after
    again = inject_once(bench.config, Target.WEIGHTS, seed=3)
    assert (again.page, again.byte, again.bit) == (first.page, first.byte, first.bit)
    assert again.after == first.before
    with pytest.raises(PenumbraError, match="nothing to strike in kv"):
        inject_once(bench.config, Target.KV)
    bench.process.kill()
    bench.process.wait()
    with pytest.raises(PenumbraError, match="no worker of node 't'"):
        inject_once(bench.config, Target.WEIGHTS)


def test_strikes_survive_json(bench: Bench) -> None:
    strike = bench.memory().strike(bench.pid, fault())
    assert msgspec.json.decode(msgspec.json.encode(strike), type=Strike) == strike
