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
from node.inference.packing import PackedMatrix, can_hold, unpack
from node.inference.probe import run_probes, same


def pack(codes: np.ndarray, scales: np.ndarray, matrix: PackedMatrix) -> np.ndarray:
    """The layout as its description says, element by element."""
    bits, block = matrix.bits, matrix.block
    values: list[int] = []
    order: list[float] = []
    whole = matrix.rows // 4 * 4
    for first in range(0, whole, 4):
        for strip in range(0, matrix.columns, 64):
            for row in range(first, first + 4):
                values += strip_bytes(codes[row], strip, bits)
                order += scales[row, strip // block : min(strip + 64, matrix.columns) // block].tolist()
    for row in range(whole, matrix.rows):
        for strip in range(0, matrix.columns, 64):
            values += strip_bytes(codes[row], strip, bits)
        order += scales[row].tolist()

    def aligned(raw: bytes) -> bytes:
        return raw + bytes(-len(raw) % 64)

    sums = bytes(-(-matrix.rows // 16) * 16 * matrix.blocks * 4)
    packed = aligned(bytes(values)) + aligned(sums) + np.array(order, np.float32).tobytes()
    return np.frombuffer(packed, np.uint8)


def strip_bytes(row: np.ndarray, strip: int, bits: int) -> list[int]:
    columns = row[strip : strip + 64].tolist()
    return columns if bits == 8 else [columns[j] | columns[32 + j] << 4 for j in range(32)]


@settings(deadline=None)
@given(rows=st.integers(1, 21), strips=st.integers(1, 3), bits=st.sampled_from([4, 8]), data=st.data())
def test_what_is_packed_comes_back(rows, strips, bits, data):
    block = data.draw(st.sampled_from([16, 32, 64]))
    columns = 64 * strips - (data.draw(st.sampled_from([0, 32])) if bits == 8 and block < 64 else 0)
    matrix = PackedMatrix(weight="w", scale="s", rows=rows, columns=columns, bits=bits, block=block)
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


@pytest.mark.parametrize(("columns", "bits", "block"), [(96, 4, 32), (128, 2, 64), (128, 8, 128)])
def test_layouts_not_known_are_said_not_to_be(columns, bits, block):
    matrix = PackedMatrix(weight="w", scale="s", rows=4, columns=columns, bits=bits, block=block)
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
    assert (image / WEIGHTS).stat().st_size > (tiny_image / WEIGHTS).stat().st_size
    expected = run_probes(open_model(tiny_image, 1).trunk, manifest.shape)
    moved = Path(shutil.move(image, tmp_path / "moved"))
    assert same(run_probes(open_model(moved, 1).trunk, manifest.shape), expected)
