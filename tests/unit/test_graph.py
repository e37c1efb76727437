"""The graph computes what the model says, whichever way its tokens are fed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from reference_gemma import ReferenceGemma

from node.inference.image import open_session
from node.inference.manifest import TOKENIZER, GemmaShape, load_manifest
from node.inference.tokenizer import Tokenizer

ROOM = 64
IDS = [int(number) for number in np.random.default_rng(3).integers(4, 300, 40)]
"""More tokens than the window of 16 positions, so sliding and global layers differ."""


class Cache:
    """Caches bound in place, as the worker binds them."""

    def __init__(self, session: ort.InferenceSession, shape: GemmaShape, batch: int = 1) -> None:
        self.session, self.batch, self.length = session, batch, 0
        dimensions = (batch, shape.kv_heads, ROOM, shape.head_dim)
        names = [f"{part}.{layer}" for layer in range(shape.layers) for part in ("key", "value")]
        self.rows = {name: np.zeros(dimensions, np.float32) for name in names}
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(rows) for name, rows in self.rows.items()}

    def feed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.length += ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("seqlens_k", np.full(self.batch, self.length - 1, np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(self.length, np.int32))
        binding.bind_output("logits")
        for name, value in self.values.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy().copy()


@pytest.fixture(scope="module")
def session(tiny_image: Path) -> ort.InferenceSession:
    return open_session(tiny_image, 1)


@pytest.fixture(scope="module")
def shape(tiny_image: Path) -> GemmaShape:
    return load_manifest(tiny_image).shape


@pytest.fixture(scope="module")
def truth(tiny_gguf: Path) -> NDArray[np.float64]:
    return ReferenceGemma(tiny_gguf).logits(IDS)


def ids(*numbers: int) -> NDArray[np.int64]:
    return np.array([numbers], np.int64)


def assert_close(found: NDArray[np.float32], truth: NDArray[np.float64]) -> None:
    """Activations are quantised to 8 bits per block: that costs some percent of the logits' spread."""
    assert found.shape == truth.shape
    assert np.abs(found - truth).max() < 0.15 * truth.std()
    assert np.corrcoef(found, truth)[0, 1] > 0.999


def test_prefill_agrees_with_the_reference(session, shape, truth):
    found = Cache(session, shape).feed(ids(*IDS))[0]
    assert_close(found, truth[-1])
    assert found.argmax() == truth[-1].argmax()


def test_every_decoding_step_agrees_with_the_reference(session, shape, truth):
    cache = Cache(session, shape)
    steps = [cache.feed(ids(number))[0] for number in IDS]
    for step, expected in zip(steps, truth, strict=True):
        assert_close(step, expected)
    agree = np.mean([step.argmax() == expected.argmax() for step, expected in zip(steps, truth, strict=True)])
    assert agree >= 0.9


@pytest.mark.parametrize("window", [15, 17, 10_000])
def test_a_window_one_position_off_would_be_noticed(session, shape, truth, tiny_gguf, window):
    reference = ReferenceGemma(tiny_gguf)
    reference.window = window
    found = Cache(session, shape).feed(ids(*IDS))[0]
    assert np.abs(found - reference.logits(IDS)[-1]).max() > 3 * np.abs(found - truth[-1]).max()


def test_prefill_in_chunks_is_the_same_to_the_bit(session, shape):
    whole, chunks = Cache(session, shape), Cache(session, shape)
    expected = whole.feed(ids(*IDS))
    for start in range(0, len(IDS), 8):
        found = chunks.feed(ids(*IDS[start : start + 8]))
    assert np.array_equal(found, expected)
    assert all(np.array_equal(chunks.rows[name], rows) for name, rows in whole.rows.items())


def test_a_batch_is_the_same_as_each_row_alone_to_the_bit(session, shape):
    rows = np.array([IDS[:8], IDS[8:16], IDS[16:24], IDS[24:32]], np.int64)
    together = Cache(session, shape, batch=4)
    together.feed(rows)
    step = together.feed(np.array([[5], [6], [7], [8]], np.int64))
    for number in range(4):
        alone = Cache(session, shape)
        alone.feed(rows[number : number + 1])
        assert np.array_equal(alone.feed(ids(5 + number))[0], step[number])


def test_threads_do_not_change_a_bit(session, shape, tiny_image):
    two = Cache(open_session(tiny_image, 2), shape)
    assert np.array_equal(two.feed(ids(*IDS)), Cache(session, shape).feed(ids(*IDS)))


@pytest.mark.gemma
def test_gemma_goes_on_sensibly(gemma_image):
    cache = Cache(open_session(gemma_image, 2), load_manifest(gemma_image).shape)
    tokenizer = Tokenizer(gemma_image / TOKENIZER)
    logits = cache.feed(ids(*tokenizer.encode("Water boils at a temperature of")))
    text: list[int] = []
    while len(text) < 5:
        text.append(int(logits[0].argmax()))
        logits = cache.feed(ids(text[-1]))
    assert tokenizer.decode(text) == " 100 degrees"


def test_caches_are_written_in_place_and_only_where_new(session, shape):
    cache = Cache(session, shape)
    cache.feed(ids(*IDS[:8]))
    before = {name: rows.copy() for name, rows in cache.rows.items()}
    cache.feed(ids(5))
    for name, rows in cache.rows.items():
        changed = np.flatnonzero((rows != before[name]).any(axis=(0, 1, 3)))
        assert changed.tolist() == [8], name
