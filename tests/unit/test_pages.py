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

from fdir.pages import PAGE_SIZE, PageTable, Span, WeightMemory, live_mappings, page_digests
from node.inference.image import open_session
from node.inference.manifest import WEIGHTS, attach_weights, load_manifest, load_page_table
from node.inference.probe import run_probes, same
from telemetry.errors import PenumbraError


@pytest.fixture
def image(tiny_image, tmp_path):
    return Path(shutil.copytree(tiny_image, tmp_path / "a"))


@pytest.fixture
def manifest(image):
    return load_manifest(image)


@pytest.fixture
def session(image):
    return open_session(image, 1)


@pytest.fixture
def memory(image, manifest, session):
    return attach_weights(image, manifest)


def test_sound_memory_has_no_bad_page(memory):
    assert memory.scan() == []
    assert memory.scan_blocks(range(memory.block_count)) == []


def test_what_a_scan_covers(memory, manifest):
    whole = [tensor for tensor in manifest.tensors if tensor.read and not tensor.sparse]
    assert memory.live_bytes == sum(tensor.page_count for tensor in whole) * PAGE_SIZE
    assert 0 < memory.live_blocks < memory.block_count


def test_a_flip_is_found_and_named_for_every_role(memory, manifest):
    for role in {tensor.role for tensor in manifest.tensors if tensor.read and not tensor.sparse}:
        tensor = next(tensor for tensor in manifest.tensors if tensor.role == role and not tensor.sparse)
        page = tensor.first_page + tensor.page_count - 1
        view = memory.page_view(page)
        view[5] ^= 0x80
        (bad,) = memory.scan()
        assert (bad.page, bad.tensor, bad.role, bad.layer) == (page, tensor.name, role, tensor.layer)
        assert bad.address == memory.page_address(page)
        view[5] ^= 0x80
        assert memory.scan() == []


def test_several_bad_pages_come_in_file_order_from_a_pool_too(memory):
    pages = [memory.tensors[index].first_page for index in (0, 9, 20) if memory.tensors[index].read]
    for page in pages:
        memory.page_view(page)[0] ^= 1
    with ThreadPoolExecutor(2) as pool:
        assert [bad.page for bad in memory.scan(pool, 3)] == sorted(pages)
    assert [bad.page for bad in memory.scan()] == sorted(pages)


def test_writing_memory_changes_the_answer_and_writing_back_restores_it(memory, manifest, session):
    expected = run_probes(session, manifest.shape)
    head = next(tensor for tensor in manifest.tensors if tensor.role == "head")
    view = memory.page_view(head.first_page + 1)
    view ^= 0x40
    assert not same(run_probes(session, manifest.shape), expected)
    view ^= 0x40
    assert same(run_probes(session, manifest.shape), expected)


def test_what_is_said_not_to_be_read_does_not_matter(memory, manifest, session):
    expected = run_probes(session, manifest.shape)
    for tensor in manifest.tensors:
        if not tensor.read:
            for page in range(tensor.first_page, tensor.first_page + tensor.page_count):
                memory.page_view(page)[:] = 0xFF
    assert same(run_probes(session, manifest.shape), expected)


def test_embedding_rows_are_checked_by_token(memory, manifest):
    table = next(tensor for tensor in manifest.tensors if tensor.name == "token_embd.weight")
    vocab = manifest.shape.vocab
    row_bytes = table.length // vocab
    struck = vocab - 1
    memory.page_view((table.offset + struck * row_bytes) // PAGE_SIZE)[(struck * row_bytes) % PAGE_SIZE] ^= 1
    assert memory.scan() == []
    assert memory.scan_pages(memory.row_pages(np.array([0, 1]), vocab)) == []
    (bad,) = memory.scan_pages(memory.row_pages(np.array([[0], [struck]]), vocab))
    assert bad.role == "embed"


def test_row_pages_cover_all_bytes_of_the_rows(memory, manifest):
    vocab = manifest.shape.vocab
    for rows in ([0], [63, 64, 65], list(range(vocab))):
        expected = {
            byte // PAGE_SIZE
            for tensor in manifest.tensors
            if tensor.sparse
            for row in rows
            for byte in (
                tensor.offset + row * (tensor.length // vocab),
                tensor.offset + (row + 1) * (tensor.length // vocab) - 1,
            )
        }
        assert memory.row_pages(np.array(rows), vocab).tolist() == sorted(expected)
    assert memory.row_pages(np.array([], np.int64), vocab).tolist() == []


def test_addresses_are_those_of_the_file_offsets(memory, image, manifest):
    raw = (image / WEIGHTS).read_bytes()
    for tensor in manifest.tensors:
        assert memory.page_view(tensor.first_page).tobytes() == raw[tensor.offset :][:PAGE_SIZE]
        assert memory.address(tensor.offset + 3) == memory.page_address(tensor.first_page) + 3


def test_pages_of_no_tensor_have_no_address(memory, manifest):
    original = manifest.originals[0].first_page
    assert not memory.holds(original)
    for page in (original, -1, manifest.weight_pages):
        with pytest.raises(KeyError):
            memory.page_address(page)


def test_without_a_session_the_first_tensor_is_named(image, manifest):
    with pytest.raises(PenumbraError, match=f"tensor {manifest.tensors[0].name} .* is not mapped"):
        attach_weights(image, manifest)


def test_two_sessions_are_refused(image, manifest, session):
    other = open_session(image, 1)
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


def test_a_table_survives_writing_and_reading(memory, manifest):
    raw = memory.table.to_bytes()
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


def test_attach_needs_every_tensor(memory, image, manifest, session):
    """A tensor that lies where nothing is mapped, though its neighbours are."""
    ghost = manifest.originals[0]
    with pytest.raises(PenumbraError, match=f"{ghost.name} .* is not mapped"):
        WeightMemory.attach(image / WEIGHTS, (*manifest.tensors, ghost), memory.table)
