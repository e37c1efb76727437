"""Parity of mapped pages: what it restores, what it reports as lost, and that it never lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fdir import golden, parity
from fdir.pages import PAGE_SIZE, MappedTensor, PageTable, WeightMemory
from fdir.parity import DATA_PAGES, PARITY_PAGES, ParityFile, encode, golden_page, group_count, repair
from node.inference.manifest import PARITY, WEIGHTS, attach_weights, load_manifest
from node.inference.model import open_model
from node.inference.probe import run_probes, run_screen, same

PAGES = 100
"""Not a multiple of the group size: the last groups are short."""


class Bench:
    """A file of random pages with parity, and a copy of it in memory."""

    def __init__(self, directory: Path, pages: int = PAGES) -> None:
        self.file, self.parity_path = directory / "data", directory / "parity"
        self.good = np.random.default_rng(11).integers(0, 256, pages * PAGE_SIZE, dtype=np.uint8)
        self.file.write_bytes(self.good.tobytes())
        extra = bytearray(group_count(pages) * PARITY_PAGES * PAGE_SIZE)

        def write(at: int, block: bytes) -> None:
            extra[at : at + len(block)] = block

        self.parity_pages = encode(memoryview(self.good.tobytes()), write, threads=2)
        self.parity_path.write_bytes(extra)
        tensor = MappedTensor(
            name="t", role="other", layer=None, offset=0, length=pages * PAGE_SIZE,
            first_page=0, page_count=pages, read=True,
        )  # fmt: skip
        self.table = PageTable.build(memoryview(self.good.tobytes()), memoryview(bytes(extra)), [tensor])
        self.live = self.good.copy()
        self.memory = WeightMemory([tensor], [self.live.ctypes.data], self.table)
        self.parity = ParityFile(self.parity_path, self.table)

    def strike(self, *pages: int) -> None:
        for page in pages:
            self.live[page * PAGE_SIZE + page] ^= 1

    def repair(self, file: Path | None = None) -> parity.Repair:
        bad = [bad.page for bad in self.memory.scan()]
        return repair(self.memory, self.parity, bad, self.file if file is None else file)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def members(bench: Bench, group: int) -> list[int]:
    return list(range(group, PAGES, bench.parity.groups))


def test_the_parity_file_is_an_eighth(bench):
    assert bench.parity_pages == group_count(PAGES) * PARITY_PAGES == 14
    assert bench.parity_path.stat().st_size == 14 * PAGE_SIZE


def test_every_single_page_comes_back(bench, tmp_path):
    for page in range(PAGES):
        bench.strike(page)
        assert bench.repair(tmp_path / "none") == parity.Repair((page,), (), ())
        assert np.array_equal(bench.live, bench.good)


def test_a_group_gives_back_as_many_pages_as_it_has_parity(bench, tmp_path):
    struck = members(bench, 3)[-PARITY_PAGES:]
    bench.strike(*struck)
    assert bench.repair(tmp_path / "none").from_parity == tuple(struck)
    assert np.array_equal(bench.live, bench.good)


def test_a_burst_of_neighbours_comes_back(bench, tmp_path):
    burst = list(range(40, 40 + PARITY_PAGES * bench.parity.groups))
    bench.strike(*burst)
    assert bench.repair(tmp_path / "none").from_parity == tuple(burst)


def test_more_than_parity_can_bear_comes_from_the_file(bench):
    struck = members(bench, 3)[: PARITY_PAGES + 1]
    bench.strike(*struck)
    assert bench.repair() == parity.Repair((), tuple(struck), ())
    assert np.array_equal(bench.live, bench.good)


def test_what_neither_can_restore_is_lost_and_left_alone(bench, tmp_path):
    struck = members(bench, 3)[: PARITY_PAGES + 1]
    bench.strike(*struck, 1)
    before = bench.live.copy()
    assert bench.repair(tmp_path / "none") == parity.Repair((1,), (), tuple(struck))
    changed = np.flatnonzero((bench.live != before).reshape(PAGES, -1).any(axis=1))
    assert changed.tolist() == [1]


def test_a_file_struck_in_the_same_place_is_not_believed(bench):
    struck = members(bench, 0)[: PARITY_PAGES + 1]
    bench.strike(*struck)
    bench.file.write_bytes(bench.live.tobytes())
    assert bench.repair() == parity.Repair((), (), tuple(struck))


def test_an_unreported_bad_member_is_not_used(bench, tmp_path):
    """Only the first page is reported: the second must be found bad when it is read."""
    first, second = members(bench, 2)[:2]
    bench.strike(first, second)
    assert repair(bench.memory, bench.parity, [first], tmp_path / "none").from_parity == (first,)
    assert [bad.page for bad in bench.memory.scan()] == [second]


def test_a_bad_parity_page_costs_its_share_and_no_more(bench, tmp_path):
    raw = bytearray(bench.parity_path.read_bytes())
    raw[3 * PAGE_SIZE] ^= 1
    bench.parity_path.write_bytes(raw)
    one, two = members(bench, 3)[:2]
    bench.strike(one)
    assert bench.repair(tmp_path / "none").from_parity == (one,)
    bench.strike(one, two)
    assert bench.repair(tmp_path / "none").lost == (one, two)


def test_without_a_parity_file_the_data_file_helps(bench):
    bench.parity_path.unlink()
    bench.strike(7)
    assert bench.repair() == parity.Repair((), (7,), ())


@pytest.mark.parametrize("pages", [1, DATA_PAGES - 1, DATA_PAGES, DATA_PAGES + 1, 700])
def test_files_of_any_length(tmp_path, pages):
    bench = Bench(tmp_path, pages)
    bench.strike(pages - 1, 0)
    assert bench.repair(tmp_path / "none").lost == ()
    assert np.array_equal(bench.live, bench.good)


def test_progress_reaches_the_end():
    seen: list[float] = []
    encode(memoryview(bytes(40 * PAGE_SIZE)), lambda *_: None, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize("shm", [False, True], ids=["disk", "tmpfs"])
def test_golden_pages_are_those_of_the_file(tmp_path, shm):
    directory = Path("/dev/shm") if shm else tmp_path  # noqa: S108
    path = directory / f"penumbra-test-{tmp_path.name}"
    try:
        path.write_bytes(b"a" * PAGE_SIZE + b"b" * 10)
        assert golden_page(path, 0) == b"a" * PAGE_SIZE
        assert golden_page(path, 1) == (b"b" * 10).ljust(PAGE_SIZE, b"\0")
        assert golden_page(path, 2) == bytes(PAGE_SIZE)
    finally:
        path.unlink()


def test_where_direct_reading_is_refused_the_cache_is_dropped(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"c" * PAGE_SIZE)
    dropped: list[tuple[int, int]] = []
    real_open = golden.os.open

    def refuse_direct(name: Path, flags: int) -> int:
        if flags & golden.os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(name, flags)

    monkeypatch.setattr(golden.os, "open", refuse_direct)
    monkeypatch.setattr(
        golden.os, "posix_fadvise", lambda _fd, at, length, _advice: dropped.append((at, length))
    )
    assert golden_page(path, 0) == b"c" * PAGE_SIZE
    assert dropped == [(0, PAGE_SIZE)]


def test_a_live_session_answers_as_before_once_repaired(tiny_image, tmp_path):
    image = Path(shutil.copytree(tiny_image, tmp_path / "a"))
    manifest = load_manifest(image)
    model = open_model(image, 1)
    memory = attach_weights(image, manifest)

    def results() -> list[np.ndarray]:
        return [*run_probes(model.trunk, model.shape), *run_screen(model.screen)]

    expected = results()
    struck = [tensor.first_page for tensor in memory.tensors if tensor.role in {"head", "ffn_down", "norm"}]
    for page in struck:
        memory.page_view(page)[:64] ^= 0x7F
    assert not same(results(), expected)
    bad = [bad.page for bad in memory.scan()]
    assert bad == sorted(struck)
    outcome = repair(memory, ParityFile(image / PARITY, memory.table), bad, image / WEIGHTS)
    assert outcome.lost == ()
    assert sorted(outcome.from_parity + outcome.from_file) == bad
    assert same(results(), expected)
