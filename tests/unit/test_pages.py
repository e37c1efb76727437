"""Page digests over the memory of a live session."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fdir.pages import (
    BLOCK_PAGES,
    PAGE_SIZE,
    MappedTensor,
    PageTable,
    Span,
    WeightMemory,
    live_mappings,
    page_digests,
)
from node.inference.manifest import WEIGHTS, attach_weights, load_manifest, load_page_table
from node.inference.model import Model, open_model
from node.inference.probe import run_probes, run_screen, same
from telemetry.errors import PenumbraError


@pytest.fixture
def image(tiny_image, tmp_path):
    return Path(shutil.copytree(tiny_image, tmp_path / "a"))


@pytest.fixture
def manifest(image):
    return load_manifest(image)


@pytest.fixture
def model(image):
    return open_model(image, 1)


@pytest.fixture
def memory(image, manifest, model):
    return attach_weights(image, manifest)


def test_a_checked_model_is_watched_whole(image, manifest):
    model = open_model(image, 1, checked=True)
    memory = attach_weights(image, manifest, checked=True)
    assert {tensor.name for tensor in memory.tensors} == {tensor.name for tensor in manifest.tensors}
    assert memory.scan() == []
    assert model.check_limits is not None


def test_sound_memory_has_no_bad_page(memory):
    assert memory.scan() == []
    assert memory.scan_blocks(range(memory.block_count)) == []


def test_what_a_scan_covers(memory, manifest):
    whole = [tensor for tensor in manifest.mapped(False) if tensor.read and not tensor.rows]
    assert memory.live_bytes == sum(tensor.page_count for tensor in whole) * PAGE_SIZE
    by_row = sum(-(-tensor.page_count // BLOCK_PAGES) for tensor in memory.tensors if tensor.rows)
    assert len(memory.live_blocks) >= len(whole)
    assert len(memory.row_blocks) == by_row
    # What only loading reads: which tensors that is depends on the CPU's layout.
    unread = any(not tensor.read and not tensor.rows for tensor in manifest.mapped(False))
    assert (memory.block_count > len(memory.live_blocks) + by_row) == unread


def test_a_flip_is_found_and_named_for_every_role(memory, manifest):
    for role in {tensor.role for tensor in memory.tensors if tensor.read and not tensor.rows}:
        tensor = next(tensor for tensor in memory.tensors if tensor.role == role and not tensor.rows)
        page = tensor.first_page + tensor.page_count - 1
        view = memory.page_view(page)
        view[5] ^= 0x80
        (bad,) = memory.scan()
        assert (bad.page, bad.tensor, bad.role, bad.layer) == (page, tensor.name, role, tensor.layer)
        assert bad.address == memory.page_address(page)
        view[5] ^= 0x80
        assert memory.scan() == []


def test_several_bad_pages_come_in_file_order_from_a_pool_too(memory):
    live = [tensor for tensor in memory.tensors if tensor.read and not tensor.rows]
    pages = [live[index].first_page for index in (0, 9, 20)]
    for page in pages:
        memory.page_view(page)[0] ^= 1
    with ThreadPoolExecutor(2) as pool:
        assert [bad.page for bad in memory.scan(pool, 3)] == sorted(pages)
    assert [bad.page for bad in memory.scan()] == sorted(pages)


def results(model: Model) -> list[np.ndarray]:
    return [*run_probes(model.trunk, model.shape), *run_screen(model.screen)]


@pytest.mark.parametrize("role", ["attn_qkv", "ffn_down", "head"])
def test_writing_memory_changes_the_answer_and_writing_back_restores_it(memory, model, role):
    expected = results(model)
    tensor = next(tensor for tensor in memory.tensors if tensor.role == role)
    view = memory.page_view(tensor.first_page + 1)
    view ^= 0x40
    assert not same(results(model), expected)
    view ^= 0x40
    assert same(results(model), expected)


def test_what_is_said_not_to_be_read_does_not_matter(memory, model):
    expected = results(model)
    for tensor in memory.tensors:
        if not tensor.read:
            for page in range(tensor.first_page, tensor.first_page + tensor.page_count):
                memory.page_view(page)[:] = 0xFF
    assert same(results(model), expected)


@pytest.mark.parametrize(("role", "name"), [("embed", "token_embd.weight"), ("rope", "rope.global.sin")])
def test_rows_are_checked_by_number(memory, role, name):
    table = next(tensor for tensor in memory.tensors if tensor.name == name)
    row_bytes = table.length // table.rows
    struck = table.rows - 1
    memory.page_view((table.offset + struck * row_bytes) // PAGE_SIZE)[(struck * row_bytes) % PAGE_SIZE] ^= 1
    assert memory.scan() == []
    assert memory.scan_pages(memory.row_pages(role, np.array([0, 1]))) == []
    (bad,) = memory.scan_pages(memory.row_pages(role, np.array([[0], [struck]])))
    assert bad.role == role
    assert [bad] == memory.scan_blocks(memory.row_blocks)


def test_named_blocks_and_pages_are_checked_along(memory):
    table = next(tensor for tensor in memory.tensors if tensor.name == "token_embd.weight")
    memory.page_view(table.first_page + 1)[7] ^= 1
    with ThreadPoolExecutor(2) as pool:
        for where in ({}, {"pages": [table.first_page]}):
            assert memory.scan(**where) == memory.scan(pool, 2, **where) == []
        for where in ({"blocks": memory.row_blocks}, {"pages": [table.first_page + 1]}):
            (bad,) = memory.scan(**where)
            assert (bad.page, bad.role) == (table.first_page + 1, "embed")
            assert memory.scan(pool, 2, **where) == [bad]


def test_a_block_with_many_pages_named_is_checked_as_a_whole():
    data = np.random.default_rng(2).integers(0, 256, 100 * PAGE_SIZE, dtype=np.uint8)
    tensor = MappedTensor(
        name="t", role="embed", layer=None, offset=0, length=len(data), first_page=0, page_count=100,
        rows=100, read=True,
    )  # fmt: skip
    table = PageTable.build(memoryview(data.tobytes()), memoryview(b""), [tensor])
    memory = WeightMemory([tensor], [data.ctypes.data], table)
    data[99 * PAGE_SIZE] ^= 1
    assert memory.scan(pages=range(40)) == []
    assert [bad.page for bad in memory.scan(pages=range(60))] == [99]


def test_row_pages_cover_all_bytes_of_the_rows(memory):
    for role, rows in (("embed", [0]), ("embed", [63, 64, 65]), ("rope", [0, 255]), ("rope", range(256))):
        expected = {
            byte // PAGE_SIZE
            for tensor in memory.tensors
            if tensor.rows and tensor.role == role
            for row in rows
            for byte in (
                tensor.offset + row * (tensor.length // tensor.rows),
                tensor.offset + (row + 1) * (tensor.length // tensor.rows) - 1,
            )
        }
        assert memory.row_pages(role, np.array(rows)).tolist() == sorted(expected)
    assert memory.row_pages("embed", np.array([], np.int64)).tolist() == []
    assert memory.row_pages("norm", np.array([0])).tolist() == []


def test_addresses_are_those_of_the_file_offsets(memory, image):
    raw = (image / WEIGHTS).read_bytes()
    for tensor in memory.tensors:
        assert memory.page_view(tensor.first_page).tobytes() == raw[tensor.offset :][:PAGE_SIZE]
        assert memory.address(tensor.offset + 3) == memory.page_address(tensor.first_page) + 3


def test_pages_of_no_tensor_have_no_address(memory, manifest):
    original = manifest.originals[0].first_page
    assert not memory.holds(original)
    for page in (original, -1, manifest.weight_pages):
        with pytest.raises(KeyError):
            memory.page_address(page)


def test_without_a_model_the_first_tensor_is_named(image, manifest):
    with pytest.raises(PenumbraError, match=f"tensor {manifest.tensors[0].name} .* is not mapped"):
        attach_weights(image, manifest)


def test_two_models_are_refused(image, manifest, model):
    other = open_model(image, 1)
    with pytest.raises(PenumbraError, match="mapped 2 times"):
        attach_weights(image, manifest)
    del other
    attach_weights(image, manifest)


def test_damaged_digests_are_refused(image, manifest):
    (image / "digests.bin").write_bytes(b"\0" * manifest.sizes["digests.bin"])
    with pytest.raises(PenumbraError, match=r"digests\.bin: damaged"):
        load_page_table(image, manifest)


def test_digests_of_other_pages_are_refused(manifest):
    with pytest.raises(PenumbraError, match="16 bytes"):
        PageTable.from_bytes(bytes(16), manifest.weight_pages, manifest.parity_pages, manifest.tensors)


def test_a_table_survives_writing_and_reading(image, manifest):
    raw = load_page_table(image, manifest).to_bytes()
    again = PageTable.from_bytes(raw, manifest.weight_pages, manifest.parity_pages, manifest.tensors)
    assert again.to_bytes() == raw


def test_a_last_page_counts_as_padded_with_zeros():
    short, padded = b"x" * (PAGE_SIZE + 7), (b"x" * (PAGE_SIZE + 7)).ljust(2 * PAGE_SIZE, b"\0")
    assert page_digests(memoryview(short)).tolist() == page_digests(memoryview(padded)).tolist()
    assert len(page_digests(memoryview(b""))) == 0


def test_mappings_of_this_and_of_another_process_are_found(tmp_path):
    path = tmp_path / "a file"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    assert live_mappings(path) == []
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 2 * PAGE_SIZE, offset=PAGE_SIZE) as mapping:
        (span,) = live_mappings(path)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        assert span == Span(address, PAGE_SIZE, 2 * PAGE_SIZE)
        assert live_mappings(path, os.getpid()) == [span]
    program = (
        "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [(span.file_offset, span.length) for span in live_mappings(path, process.pid)] == [
            (0, 4 * PAGE_SIZE)
        ]


def test_attach_needs_every_tensor(memory, image, manifest):
    """A tensor that lies where nothing is mapped, though its neighbours are."""
    ghost = manifest.originals[0]
    with pytest.raises(PenumbraError, match=f"{ghost.name} .* is not mapped"):
        WeightMemory.attach(image / WEIGHTS, (*memory.tensors, ghost), memory.table)
