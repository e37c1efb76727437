"""The trunk computes what the model says, however its tokens are fed; a checked one says if it did not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from reference_gemma import ReferenceGemma
from tiny_gemma import Size, write_tiny_gguf

from node.inference.builder import build_image
from node.inference.gguf_source import GgufSource, quantize
from node.inference.graph import check_names, checksum, stack
from node.inference.image import image_info
from node.inference.manifest import TOKENIZER, attach_weights, load_manifest
from node.inference.model import Model, open_model
from node.inference.tokenizer import Tokenizer

ROOM = 64
IDS = [int(number) for number in np.random.default_rng(3).integers(4, 300, 40)]
"""More tokens than the window of 16 positions, so sliding and global layers differ."""


class Cache:
    """Caches bound in place, as the worker binds them."""

    def __init__(self, model: Model, batch: int = 1, window_room: int = ROOM, room: int = ROOM) -> None:
        self.model, self.batch, self.length, self.base = model, batch, 0, 0
        self.rows = {}
        for layer in range(model.shape.layers):
            length = room if model.shape.is_global(layer) else window_room
            for part in ("key", "value"):
                dimensions = (batch, model.shape.kv_heads, length, model.shape.head_dim)
                self.rows[f"{part}.{layer}"] = np.zeros(dimensions, np.float32)
        self.residual: NDArray[np.float32] | None = None

    def feed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed tokens; returns the hidden states, shape (batch, tokens, width)."""
        start = self.length
        self.length += ids.shape[1]
        feed = {
            "input_ids": ids,
            "position_ids": np.tile(np.arange(start, self.length), (self.batch, 1)),
            "seqlens_k": np.full(self.batch, self.length - 1, np.int32),
            "total_sequence_length": np.array(self.length, np.int32),
            "window_seqlens_k": np.full(self.batch, self.length - self.base - 1, np.int32),
            "window_total_sequence_length": np.array(self.length - self.base, np.int32),
        }
        binding = self.model.trunk.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(rows) for name, rows in self.rows.items()}
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name, value in values.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
        for output in self.model.trunk.get_outputs():
            if output.name.startswith("present_"):
                binding.bind_ortvalue_output(output.name, values[output.name.removeprefix("present_")])
            else:
                binding.bind_output(output.name)
        self.model.trunk.run_with_iobinding(binding)
        outputs = [value.numpy().copy() for value in binding.get_outputs()[:2]]
        self.residual = outputs[1] if self.model.checked else None
        return outputs[0]

    def slide(self, rows: int) -> None:
        """Drop the first rows of all sliding-window layers."""
        for name, cache in self.rows.items():
            if not self.model.shape.is_global(int(name.split(".")[1])):
                cache[:, :, :-rows] = cache[:, :, rows:].copy()
        self.base += rows


@pytest.fixture(scope="module")
def model(tiny_image: Path) -> Model:
    return open_model(tiny_image, 1)


@pytest.fixture(scope="module")
def table(tiny_gguf: Path) -> NDArray[np.float32]:
    return embedding(tiny_gguf)


@pytest.fixture(scope="module")
def truth(tiny_gguf: Path) -> NDArray[np.float64]:
    return ReferenceGemma(tiny_gguf).logits(IDS)


def embedding(gguf: Path) -> NDArray[np.float32]:
    source = GgufSource(gguf)
    return source.matrix("token_embd.weight", source.shape.vocab, source.shape.width).to_float()


def ids(*numbers: int) -> NDArray[np.int64]:
    return np.array([numbers], np.int64)


def assert_close(found: NDArray[np.float32], truth: NDArray[np.float64]) -> None:
    """Activations are quantised to 8 bits per block: that costs some percent of the logits' spread."""
    assert found.shape == truth.shape
    assert np.abs(found - truth).max() < 0.15 * truth.std()
    assert np.corrcoef(found, truth)[0, 1] > 0.999


def test_prefill_agrees_with_the_reference(model, table, truth):
    found = Cache(model).feed(ids(*IDS))[0] @ table.T
    for position, expected in zip(found, truth, strict=True):
        assert_close(position, expected)
    assert found[-1].argmax() == truth[-1].argmax()


def test_every_decoding_step_agrees_with_the_reference(model, table, truth):
    cache = Cache(model)
    steps = [cache.feed(ids(number))[0, 0] @ table.T for number in IDS]
    for step, expected in zip(steps, truth, strict=True):
        assert_close(step, expected)
    agree = np.mean([step.argmax() == expected.argmax() for step, expected in zip(steps, truth, strict=True)])
    assert agree >= 0.9


@pytest.mark.parametrize("window", [15, 17, 10_000])
def test_a_window_one_position_off_would_be_noticed(model, table, truth, tiny_gguf, window):
    reference = ReferenceGemma(tiny_gguf)
    reference.window = window
    found = Cache(model).feed(ids(*IDS))[0, -1] @ table.T
    assert np.abs(found - reference.logits(IDS)[-1]).max() > 3 * np.abs(found - truth[-1]).max()


SIZES = [
    Size(layers=3, global_every=2),
    Size(layers=6, global_every=6, heads=4, kv_heads=2, head_dim=16),
    Size(layers=2, width=128, ffn=96, untied=True),
]


@pytest.mark.parametrize("size", SIZES, ids=["pattern", "kv_heads", "untied"])
def test_other_sizes_are_read_from_the_file(tmp_path, size):
    gguf = write_tiny_gguf(tmp_path / "other.gguf", size=size)
    model = open_model(build_image(gguf, tmp_path / "images"), 1)
    hidden = Cache(model).feed(ids(*IDS))[0]
    for position, expected in zip(hidden @ embedding(gguf).T, ReferenceGemma(gguf).logits(IDS), strict=True):
        assert_close(position, expected)
    source = GgufSource(gguf)
    name = "output.weight" if size.untied else "token_embd.weight"
    head = source.matrix(name, source.shape.vocab, source.shape.width).to_float()
    (best,) = model.head.top(hidden[-1:], [3])
    exact = head.astype(np.float64) @ hidden[-1].astype(np.float64)
    assert best.ids[:3].tolist() == np.argsort(-exact)[:3].tolist()
    assert best.logits[:3] == pytest.approx(np.sort(exact)[::-1][:3], rel=1e-5)


def test_prefill_in_chunks_is_the_same_to_the_bit(model):
    whole, chunks = Cache(model), Cache(model)
    expected = whole.feed(ids(*IDS))
    found = [chunks.feed(ids(*IDS[start : start + 8])) for start in range(0, len(IDS), 8)]
    assert np.array_equal(np.concatenate(found, axis=1), expected)
    assert all(np.array_equal(chunks.rows[name], rows) for name, rows in whole.rows.items())


def test_a_cache_that_keeps_only_the_window_is_the_same_to_the_bit(model):
    """Rows before the window are dropped, the others moved: no result depends on where they lie."""
    whole, window = Cache(model), Cache(model, window_room=24)
    for number in IDS:
        if window.length - window.base == 24:
            window.slide(8)
        assert np.array_equal(window.feed(ids(number)), whole.feed(ids(number)))
    assert window.base > 0


@pytest.fixture(scope="module")
def long_gguf(tmp_path_factory) -> Path:
    size = Size(layers=3, context=32768)
    return write_tiny_gguf(tmp_path_factory.mktemp("long") / "long.gguf", size=size)


def test_a_context_of_32768_positions_can_be_built_and_its_last_position_reached(long_gguf, tmp_path):
    """Rotary tables grow with the context, but a step reads one row of each, and a scan none."""
    short = build_image(long_gguf, tmp_path / "short")
    model = open_model(build_image(long_gguf, tmp_path / "long", context=32768), 1)
    assert load_manifest(short).shape.context == 4096
    assert model.shape.context == 32768
    assert image_info(model.directory).live_bytes == image_info(short).live_bytes
    cache = Cache(model, room=32768)
    cache.length, cache.base = 32767, 32767 - 20
    assert np.isfinite(cache.feed(ids(5))).all()
    written = np.flatnonzero(cache.rows["key.2"].any(axis=(0, 1, 3)))
    assert written.tolist() == [32767]
    with pytest.raises(RuntimeError, match="position_ids value 32768"):
        cache.feed(ids(5))


def test_a_batch_is_the_same_as_each_row_alone_to_the_bit(model):
    rows = np.array([IDS[:8], IDS[8:16], IDS[16:24], IDS[24:32]], np.int64)
    together = Cache(model, batch=4)
    together.feed(rows)
    step = together.feed(np.array([[5], [6], [7], [8]], np.int64))
    for number in range(4):
        alone = Cache(model)
        alone.feed(rows[number : number + 1])
        assert np.array_equal(alone.feed(ids(5 + number))[0], step[number])


def test_threads_do_not_change_a_bit(model, tiny_image):
    two = Cache(open_model(tiny_image, 2))
    assert np.array_equal(two.feed(ids(*IDS)), Cache(model).feed(ids(*IDS)))


def test_caches_are_written_in_place_and_only_where_new(model):
    cache = Cache(model)
    cache.feed(ids(*IDS[:8]))
    before = {name: rows.copy() for name, rows in cache.rows.items()}
    cache.feed(ids(5))
    for name, rows in cache.rows.items():
        changed = np.flatnonzero((rows != before[name]).any(axis=(0, 1, 3)))
        assert changed.tolist() == [8], name


def test_checks_change_no_bit_of_the_result(model, tiny_image):
    plain, checked = Cache(model), Cache(open_model(tiny_image, 1, checked=True))
    for chunk in (IDS[:8], IDS[8:9], IDS[9:10]):
        assert np.array_equal(checked.feed(ids(*chunk)), plain.feed(ids(*chunk)))
        assert checked.residual is not None
        assert checked.residual.shape == (1, len(chunk), len(check_names(model.shape)))


def test_residuals_of_sound_computation_are_within_the_limits(tiny_image):
    """On tokens the limits were not made from, for one row, for many, and in a batch."""
    model = open_model(tiny_image, 1, checked=True)
    tokens = np.random.default_rng(9).integers(4, 300, (4, ROOM))
    for batch in (1, 4):
        cache = Cache(model, batch=batch)
        for start, stop in ((0, 40), *((step, step + 1) for step in range(40, ROOM))):
            cache.feed(tokens[:batch, start:stop])
            assert (cache.residual <= model.check_limits).all()


@pytest.fixture
def struck_model(tiny_image: Path, tmp_path: Path) -> Model:
    return open_model(Path(shutil.copytree(tiny_image, tmp_path / "a")), 1, checked=True)


@pytest.mark.parametrize("steps", [1, 8])
def test_a_struck_weight_trips_the_check_of_its_product_and_no_other(struck_model, steps):
    """Page digests are not asked: this stands for a fault in computing, such as a wrong bit in a register."""
    model, names = struck_model, check_names(struck_model.shape)
    memory = attach_weights(model.directory, model.manifest, checked=True)
    for column, name in enumerate(names):
        tensor = next(tensor for tensor in memory.tensors if tensor.name == f"{name}.weight.packed")
        view = memory.page_view(tensor.first_page)
        view[96:104] ^= 0x40
        cache = Cache(model)
        cache.feed(ids(*IDS[:steps]))
        tripped = (cache.residual > model.check_limits).any(axis=(0, 1))
        view[96:104] ^= 0x40
        assert np.flatnonzero(tripped).tolist() == [column], name


def test_a_checksum_is_minus_the_sum_of_all_rows(tiny_gguf):
    weights = GgufSource(tiny_gguf).matrix("blk.0.ffn_up.weight", 128, 64)
    parts = checksum(weights)
    expected = -weights.to_float().sum(axis=0, dtype=np.float64)
    found = parts.to_float().sum(axis=0, dtype=np.float64)
    assert np.abs(found - expected).max() < 2**-20 * np.abs(expected).max()
    assert parts.block == weights.block


def test_stacked_matrices_keep_their_weights_whatever_their_blocks(tiny_gguf):
    whole = GgufSource(tiny_gguf).matrix("blk.0.ffn_up.weight", 128, 64)
    fine = quantize(whole.to_float(), 16)
    stacked = stack([whole, fine])
    assert stacked.block == 16
    assert np.array_equal(stacked.to_float(), np.concatenate((whole.to_float(), fine.to_float())))


@pytest.mark.gemma
def test_gemma_goes_on_sensibly(gemma_image):
    model = open_model(gemma_image, 2)
    tokenizer = Tokenizer(gemma_image / TOKENIZER)
    cache = Cache(model)
    hidden = cache.feed(ids(*tokenizer.encode("Water boils at a temperature of")))
    text: list[int] = []
    while len(text) < 5:
        (best,) = model.head.top(hidden[:, -1], [1])
        text.append(int(best.ids[0]))
        hidden = cache.feed(ids(text[-1]))
    assert tokenizer.decode(text) == " 100 degrees"
