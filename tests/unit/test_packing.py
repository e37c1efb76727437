"""Originals rebuilt from packed bytes: exactly, or known not to be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.inference import layout
from node.inference.builder import build_image
from node.inference.manifest import CHECKED_TRUNK, TRUNK, WEIGHTS, load_manifest
from node.inference.model import open_model
from node.inference.packing import STRIPS, PackedMatrix, can_hold, unpack
from node.inference.probe import run_probes, same


def strips_of(matrix: PackedMatrix) -> list[tuple[int, int]]:
    """First and last column of each strip."""
    even = matrix.columns // matrix.strip * matrix.strip
    rest = matrix.columns - even if matrix.strip == 64 else matrix.block
    found = [(first, first + matrix.strip) for first in range(0, even, matrix.strip)]
    return found + [(first, first + rest) for first in range(even, matrix.columns, rest or 1)]


def pack(codes: np.ndarray, scales: np.ndarray, matrix: PackedMatrix) -> np.ndarray:
    """The layout as its description says, element by element."""
    bits, block = matrix.bits, matrix.block
    values: list[int] = []
    order: list[float] = []
    whole = matrix.rows // 4 * 4
    for first in range(0, whole, 4):
        for start, stop in strips_of(matrix):
            for row in range(first, first + 4):
                values += strip_bytes(codes[row, start:stop].tolist(), bits)
                order += scales[row, start // block : stop // block].tolist()
    for row in range(whole, matrix.rows):
        for start, stop in strips_of(matrix):
            values += strip_bytes(codes[row, start:stop].tolist(), bits)
        order += scales[row].tolist()

    def aligned(raw: bytes) -> bytes:
        return raw + bytes(-len(raw) % 64)

    sums = bytes(-(-matrix.rows // 16) * 16 * matrix.blocks * 4)
    packed = aligned(bytes(values)) + aligned(sums) + np.array(order, np.float32).tobytes()
    return np.frombuffer(packed, np.uint8)


def strip_bytes(columns: list[int], bits: int) -> list[int]:
    half = len(columns) // 2
    return columns if bits == 8 else [columns[j] | columns[half + j] << 4 for j in range(half)]


@settings(deadline=None)
@given(
    rows=st.integers(1, 21),
    strips=st.integers(0, 3),
    rest=st.integers(0, 3),
    bits=st.sampled_from([4, 8]),
    strip=st.sampled_from(STRIPS),
    data=st.data(),
)
def test_what_is_packed_comes_back(rows, strips, rest, bits, strip, data):  # noqa: PLR0917
    block = data.draw(st.sampled_from([16, 32, 64] if (bits, strip) != (4, 128) else [32, 64]))
    rest = 0 if (bits, strip) == (4, 64) else rest * block % strip
    columns = strip * strips + rest or strip
    matrix = PackedMatrix(
        weight="w", scale="s", rows=rows, columns=columns, bits=bits, block=block, strip=strip
    )
    numbers = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = numbers.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    scales = numbers.random((rows, columns // block), np.float32)
    packed = pack(codes, scales, matrix)
    assert can_hold(matrix, len(packed))
    assert not can_hold(matrix, len(packed) - 1)
    found = unpack(packed, matrix, np.empty(matrix.original_bytes, np.uint8))
    expected = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    assert np.array_equal(found.codes.reshape(rows, -1), expected)
    assert np.array_equal(found.scales, scales)


@pytest.mark.parametrize(
    ("columns", "bits", "block", "strip"),
    [
        (96, 4, 32, 64),
        (128, 2, 64, 64),
        (128, 8, 128, 64),
        (256, 4, 16, 128),
        (256, 8, 256, 128),
        (128, 8, 32, 32),
    ],
)
def test_layouts_not_known_are_said_not_to_be(columns, bits, block, strip):
    matrix = PackedMatrix(weight="w", scale="s", rows=4, columns=columns, bits=bits, block=block, strip=strip)
    assert not can_hold(matrix, 1 << 20)


def test_no_original_of_a_trunk_is_stored(tiny_image):
    manifest = load_manifest(tiny_image)
    stored = {tensor.name for tensor in (*manifest.tensors, *manifest.originals)}
    rebuilt = manifest.rebuilt[CHECKED_TRUNK]
    assert rebuilt == manifest.rebuilt[TRUNK]
    assert len(rebuilt) in {0, 4 * manifest.shape.layers}, (
        "a CPU's layout is known for all matrices or for none"
    )
    assert not stored & {name for matrix in rebuilt for name in (matrix.weight, matrix.scale)}
    assert {f"{matrix.weight}.packed" for matrix in rebuilt} <= stored


def test_memory_of_originals_is_given_back(tiny_image):
    model = open_model(tiny_image, 1)
    _, trunk, screen = model.kept
    assert not any(trunk[:])
    assert not any(screen[:])
    first = run_probes(model.trunk, model.shape)
    trunk[:] = bytes([0xFF]) * len(trunk)
    assert same(run_probes(model.trunk, model.shape), first)


def test_where_the_layout_is_not_known_originals_are_stored(tiny_gguf, tiny_image, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "can_hold", lambda *_: False)
    image = build_image(tiny_gguf, tmp_path)
    manifest = load_manifest(image)
    assert not any(manifest.rebuilt.values())
    assert manifest.known_answers == load_manifest(tiny_image).known_answers
    # Where the layout of this CPU is not known, the other image holds originals too.
    known = any(load_manifest(tiny_image).rebuilt.values())
    assert ((image / WEIGHTS).stat().st_size > (tiny_image / WEIGHTS).stat().st_size) == known
    expected = run_probes(open_model(tiny_image, 1).trunk, manifest.shape)
    moved = Path(shutil.move(image, tmp_path / "moved"))
    assert same(run_probes(open_model(moved, 1).trunk, manifest.shape), expected)
