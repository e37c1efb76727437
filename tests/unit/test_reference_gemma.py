"""Two independent forward passes agree: the fast float32 one of the bench, and the plain float64 one here."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import reference_gemma
import tiny_gemma
from numpy.typing import NDArray

from hil.bench import reference_gemma as fast
from node.inference.gguf_source import GgufSource

IDS = [int(number) for number in np.random.default_rng(4).integers(4, 300, 50)]
"""More than three windows of 16."""


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> fast.ReferenceGemma:
    return fast.ReferenceGemma(tiny_gguf)


def logits(model: fast.ReferenceGemma, ids: list[int], strip: int = 7) -> NDArray[np.float32]:
    return np.concatenate([*model.logits(model.hidden(ids), strip)])


def test_it_agrees_with_the_plain_one_to_float32(model, tiny_gguf):
    expected = reference_gemma.ReferenceGemma(tiny_gguf).logits(IDS)
    found = logits(model, IDS)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))


def test_strips_of_queries_do_not_change_the_result(model, monkeypatch):
    whole = model.hidden(IDS)
    monkeypatch.setattr(fast, "_STRIP", 8)
    assert np.allclose(model.hidden(IDS), whole, atol=1e-5)


def test_a_position_does_not_see_what_follows(model):
    other = [*IDS[:30], *reversed(IDS[30:])]
    assert np.array_equal(model.hidden(IDS)[:30], model.hidden(other)[:30])


def test_a_sliding_layer_does_not_see_beyond_its_window(model, tiny_gguf):
    """With every layer sliding, what lies further back than all windows together has no say."""
    sliding = fast.ReferenceGemma(tiny_gguf)
    sliding.every = sliding.layers + 1
    reach = sliding.layers * (sliding.window - 1)
    far = reach + 1
    ids = [int(number) for number in np.random.default_rng(5).integers(4, 300, far + 10)]
    changed = [(ids[0] + 7) % 300, *ids[1:]]
    assert np.allclose(sliding.hidden(ids)[far:], sliding.hidden(changed)[far:], atol=1e-6)
    assert not np.allclose(sliding.hidden(ids)[1:reach], sliding.hidden(changed)[1:reach], atol=1e-4)
    assert not np.allclose(model.hidden(ids)[far:], model.hidden(changed)[far:], atol=1e-6)


@pytest.mark.parametrize("change", ["global_base", "local_base", "window", "every", "scale"])
def test_each_figure_of_the_metadata_matters(model, tiny_gguf, change):
    other = fast.ReferenceGemma(tiny_gguf)
    value = getattr(other, change)
    setattr(other, change, value + 1 if change in {"window", "every"} else value * 2)
    assert not np.allclose(other.hidden(IDS), model.hidden(IDS), atol=1e-3)


def test_query_and_key_norms_matter(model, tiny_gguf):
    other = fast.ReferenceGemma(tiny_gguf)
    other.weights["blk.0.attn_k_norm.weight"] = other.weights["blk.0.attn_k_norm.weight"] * np.float32(2)
    assert not np.allclose(other.hidden(IDS), model.hidden(IDS), atol=1e-3)


def test_an_untied_head_is_used(model, tiny_gguf):
    other = fast.ReferenceGemma(tiny_gguf)
    other.weights["output.weight"] = -other.weights["token_embd.weight"]
    assert np.array_equal(logits(other, IDS), -logits(model, IDS))


def test_the_pattern_of_layers_may_be_missing(tmp_path):
    """llama.cpp's default then holds, for reference and source alike."""
    path = tiny_gemma.write_tiny_gguf(
        tmp_path / "m.gguf", without=frozenset({"attention.sliding_window_pattern", "attention.key_length"})
    )
    found, shape = fast.ReferenceGemma(path), GgufSource(path).shape
    assert (found.every, found.head_dim) == (shape.global_every, shape.head_dim) == (6, 32)


def test_a_missing_figure_is_named(tmp_path):
    path = tiny_gemma.write_tiny_gguf(tmp_path / "m.gguf", without=frozenset({"attention.sliding_window"}))
    with pytest.raises(KeyError, match=r"gemma3\.attention\.sliding_window"):
        fast.ReferenceGemma(path)


def test_weights_are_those_the_package_dequantises(model, tiny_gguf):
    for tensor in gguf.GGUFReader(tiny_gguf).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(model.weights[tensor.name], expected)
