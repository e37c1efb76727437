"""The injector against a live process that maps weights and an arena as the worker does."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
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
from hil.memory import ArenaView, NotThere, ProcessMemory, RowSite, RowSites, WeightSites, WorkerMemory
from node.config import NodeConfig
from node.inference.arena import ARENA_VERSION, ArenaShape, KvArena, SeatState
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
    fields = {"role": "ffn_gate_up", "layer": 0, "read": True} | extra
    return MappedTensor(
        name=name,
        offset=first_page * PAGE,
        length=length,
        first_page=first_page,
        page_count=-(-length // PAGE),
        **fields,
    )  # type: ignore[arg-type]


TENSORS = (
    tensor("embed", 0, 2 * PAGE, role="embed", layer=None, rows=8),
    tensor("gate_up", 2, PAGE + 100),
    tensor("once", 4, PAGE, role="scale", read=False),
    tensor("head", 5, 300, role="head", layer=None),
)
SHAPE = ArenaShape(
    version=ARENA_VERSION, image_id="0" * 16, layers=3, kv_heads=2, head_dim=16, positions=64, window=32,
    window_step=8, global_every=3, seats=3,
)  # fmt: skip
ACTIVE = SeatState(job="j", prompt_tokens=5, generated=4, positions=8, max_tokens=9)


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
    gate_up = range(2 * PAGE, 3 * PAGE + 100)
    head = range(5 * PAGE, 5 * PAGE + 300)
    assert {offset for offset, _ in seen} == {*gate_up, *head}
    assert sites.locate(np.nextafter(1.0, 0.0)).tensor.name == "head"
    assert sites.locate(0.0).tensor.name == "gate_up"


def test_an_image_without_protected_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no protected weights"):
        WeightSites(TENSORS[:1])


def test_weight_flip_lands_in_the_process_and_not_in_the_file(bench: Bench) -> None:
    before = (bench.image / WEIGHTS).read_bytes()
    strike = bench.memory().strike(bench.pid, fault())
    offset = strike.page * PAGE + strike.byte
    assert (strike.tensor, strike.role, strike.target) == ("gate_up", "ffn_gate_up", Target.WEIGHTS)
    assert strike.before == before[offset]
    assert strike.before ^ strike.after == 1 << strike.bit
    assert bench.byte("w", offset) == strike.after
    assert bench.byte("w", offset + 1) == before[offset + 1]
    assert (bench.image / WEIGHTS).read_bytes() == before


def test_row_sites_cover_the_written_rows_of_active_seats_evenly_and_nothing_else() -> None:
    states = [
        SeatState(job="a", positions=20, base=16),
        SeatState(job="b", positions=9, parked=True),
        SeatState(job="c", positions=3),
    ]
    sites = RowSites(SHAPE, states)
    # 1 global layer and 2 window layers, K and V, 2 heads each.
    assert sites.rows == 4 * 20 + 8 * 4 + 4 * 3 + 8 * 3
    bits = sites.rows * 16 * 32
    step = 16 * 32 // 4
    found = [sites.locate((i + 0.5) / bits) for i in range(0, bits, step)]
    seen = {(s.seat, s.job, s.bank, s.plane, s.position, s.row) for s in found}
    assert seen == {
        *((0, "a", "global", plane, at, at) for plane in range(4) for at in range(20)),
        *((0, "a", "window", plane, at, at - 16) for plane in range(8) for at in range(16, 20)),
        *((2, "c", "global", plane, at, at) for plane in range(4) for at in range(3)),
        *((2, "c", "window", plane, at, at) for plane in range(8) for at in range(3)),
    }
    one_row = {(s.byte, s.bit) for i in range(16 * 32) for s in [sites.locate((i + 0.5) / bits)]}
    assert one_row == {(byte, bit) for byte in range(64) for bit in range(8)}
    assert sites.locate(np.nextafter(1.0, 0.0)) == RowSite(2, "c", "window", 7, 2, 2, 63, 7)
    with pytest.raises(NotThere, match="no KV row"):
        RowSites(SHAPE, [SeatState()] * 3).locate(0.5)


def test_kv_flip_lands_in_a_committed_row(bench: Bench) -> None:
    for seat in (0, 2):
        bench.arena.reserve(seat, 64)
        bench.arena.seats[seat].commit(msgspec.structs.replace(ACTIVE, job=f"j{seat}", base=8 * (seat == 2)))
    bench.arena.seats[2].commit(msgspec.structs.replace(bench.arena.seats[2].state, positions=11))
    kv = bench.arena.kv
    rng = np.random.default_rng(1)
    for rows in kv.values():
        rows[:] = rng.random(rows.shape)
    clean = {bank: rows.copy() for bank, rows in kv.items()}
    seen = set()
    for where in np.linspace(0, 0.9999, 40):
        strike = bench.memory().strike(bench.pid, fault(where, Target.KV))
        bank = strike.bank
        assert bank in {"global", "window"}
        other = "window" if bank == "global" else "global"
        assert np.array_equal(kv[other], clean[other])
        bad = np.argwhere(kv[bank].view(np.uint32) != clean[bank].view(np.uint32))
        assert len(bad) == 1
        layer_kv, seat, head, row, word = (int(n) for n in bad[0])
        base = 8 if seat == 2 and bank == "window" else 0
        assert (strike.seat, strike.job, strike.head) == (seat, f"j{seat}", head)
        assert strike.page == base + row < (8 if seat == 0 else 11)
        assert strike.byte // 4 == word
        assert strike.role == ("v" if layer_kv % 2 else "k")
        assert strike.layer == SHAPE.layers_of(bank)[layer_kv // 2]
        assert strike.tensor == f"{strike.role} of layer {strike.layer}, head {head}, position {strike.page}"
        assert not strike.moved
        words = [int(rows[bank].view(np.uint32)[tuple(bad[0])]) for rows in (kv, clean)]
        assert words[0] ^ words[1] == 1 << (8 * (strike.byte % 4) + strike.bit)
        kv[bank][:] = clean[bank]
        seen.add((seat, bank, strike.role))
    assert len(seen) == 8


def test_a_flip_while_the_seat_changes_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.arena.reserve(0, 64)
    bench.arena.seats[0].commit(ACTIVE)
    flip = ProcessMemory.flip

    def slow(self: ProcessMemory, address: int, bit: int) -> tuple[int, int]:
        bench.arena.seats[0].commit(msgspec.structs.replace(ACTIVE, job="other"))
        return flip(self, address, bit)

    monkeypatch.setattr(ProcessMemory, "flip", slow)
    assert bench.memory().strike(bench.pid, fault(0.5, Target.KV)).moved


@pytest.mark.parametrize(
    "state",
    [
        SeatState(),
        SeatState(job="j", prompt_tokens=5),
        SeatState(job="j", prompt_tokens=5, generated=4, positions=8, parked=True),
        SeatState(job="j", prompt_tokens=5, generated=4, positions=8, finish="eos"),
    ],
)
def test_no_kv_row_in_use_is_not_struck(bench: Bench, state: SeatState) -> None:
    bench.arena.reserve(1, 64)
    bench.arena.seats[1].commit(state)
    with pytest.raises(NotThere, match="no KV row"):
        bench.memory().strike(bench.pid, fault(0.5, Target.KV))
    assert not any(rows.any() for rows in bench.arena.kv.values())


def test_arena_view_agrees_with_the_arena(bench: Bench) -> None:
    view = ArenaView(bench.arena.path)
    bench.arena.seats[1].commit(ACTIVE)
    assert view.read() == (SHAPE, [seat.state for seat in bench.arena.seats])
    commits = view.commits()
    assert [(c.seat, c.job, c.generated) for c in commits] == [(0, "", 0), (1, "j", 4), (2, "", 0)]
    assert commits[1].serial == bench.arena.seats[1].state.serial
    assert len({c.t_ns for c in commits}) == 1


def test_arena_that_is_missing_short_or_broken_reads_as_none(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    assert ArenaView(path).read() is None
    assert ArenaView(path).commits() == []
    path.write_bytes(bytes(100))
    assert ArenaView(path).read() is None
    path.write_bytes(np.random.default_rng(1).bytes(5 * PAGE))
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
    bench.arena.reserve(0, 64)
    bench.arena.seats[0].commit(ACTIVE)
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


def test_watch_notes_commits_of_each_seat_once_and_the_death_of_a_worker(bench: Bench) -> None:
    injector = make(bench, [], lambda: 0.0)
    seats, begun_ns = bench.arena.seats, time.time_ns()
    injector.step(0.0)
    assert injector.idle
    seats[0].commit(SeatState(job="j", generated=1))
    seats[2].commit(SeatState(job="k", generated=5))
    injector.step(0.1)
    injector.step(0.2)
    seats[0].commit(SeatState(job="j", generated=2))
    injector.step(0.3)
    assert [(c.seat, c.generated) for c in injector.commits if c.job] == [(0, 1), (2, 5), (0, 2)]
    assert injector.epochs_since(begun_ns) == 2
    assert not injector.idle
    seats[0].commit(SeatState(job="j", generated=2, finish="eos"))
    seats[2].commit(SeatState(job="k", generated=5, parked=True))
    injector.step(0.4)
    assert injector.idle
    assert injector.epochs_since(begun_ns) == 2
    bench.process.kill()
    bench.process.wait()
    injector.step(0.5)
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
