"""An independent forward pass of a Gemma 3 text model: float32 numpy, weights dequantised by package gguf.

Nothing here is shared with the graph, the image or their builder but the reader of the file, which the tests
hold against package gguf's (that one takes 14 s for Gemma's vocabulary): metadata, positions, windows, norms,
rotary angles and the head are interpreted and computed anew, so an error there shows as a difference.
A whole text is one call: matrix products over all positions, attention in strips of queries.

After llama.cpp, ``src/models/gemma3.cpp`` and ``src/llama-model.cpp``; norm weights in a GGUF already
include Gemma's "+ 1".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from node.inference.gguf_file import GgufFile, TensorEntry

Floats = NDArray[np.float32]

_STRIP: Final = 256
"""Queries whose scores are held at once: 256 x 4,000 scores of one head are 4 MB."""
_DEFAULT_PATTERN: Final = 6
_LOCAL_BASE: Final = 10_000.0
_LAYERS_27B: Final = 62
"""The one size whose attention scale follows width / heads."""


class ReferenceGemma:
    """The model in a GGUF.

    Parameters
    ----------
    path
        A Gemma 3 text model; head tied to the embedding or not, any of the types package gguf knows.
    """

    def __init__(self, path: Path) -> None:
        file = GgufFile(path)
        self._fields = file.metadata
        self.weights = {name: _floats(file, entry) for name, entry in file.tensors.items()}
        self.layers = int(self._field("block_count"))
        self.width = int(self._field("embedding_length"))
        self.heads = int(self._field("attention.head_count"))
        self.kv_heads = int(self._field("attention.head_count_kv", self.heads))
        self.head_dim = int(self._field("attention.key_length", self.width // self.heads))
        self.window = int(self._field("attention.sliding_window"))
        self.every = int(self._field("attention.sliding_window_pattern", _DEFAULT_PATTERN))
        self.epsilon = np.float32(self._field("attention.layer_norm_rms_epsilon"))
        self.global_base = float(self._field("rope.freq_base"))
        self.global_scale = float(self._field("rope.scaling.factor", 1.0))
        self.local_base = float(self._field("rope.freq_base_swa", _LOCAL_BASE))
        scale_dim = self.width // self.heads if self.layers == _LAYERS_27B else self.head_dim
        self.scale = np.float32(1 / np.sqrt(scale_dim))

    def hidden(self, ids: Sequence[int]) -> Floats:
        """Return the normalised hidden state at every position, shape ``(len(ids), width)``."""
        x = self.weights["token_embd.weight"][list(ids)] * np.float32(np.sqrt(self.width))
        for layer in range(self.layers):
            attended = self._attention(self._norm(x, layer, "attn_norm"), layer)
            x = x + self._norm(attended, layer, "post_attention_norm")
            fed = self._feed(self._norm(x, layer, "ffn_norm"), layer)
            x = x + self._norm(fed, layer, "post_ffw_norm")
        return _rms(x, self.weights["output_norm.weight"], self.epsilon)

    @property
    def head(self) -> Floats:
        """The output table, shape ``(vocab, width)``: its own, or the embedding where the file has none."""
        return self.weights.get("output.weight", self.weights["token_embd.weight"])

    def logits(self, hidden: Floats, strip: int = _STRIP) -> Iterator[Floats]:
        """Yield the logits of up to `strip` positions at a time, shape ``(strip, vocab)``."""
        for start in range(0, len(hidden), strip):
            yield hidden[start : start + strip] @ self.head.T

    def _field(self, name: str, default: float | None = None) -> float:
        field = self._fields.get(f"gemma3.{name}", default)
        if not isinstance(field, int | float):
            raise KeyError(f"gemma3.{name}")
        return field

    def _weight(self, layer: int, name: str) -> Floats:
        return self.weights[f"blk.{layer}.{name}.weight"]

    def _norm(self, x: Floats, layer: int, name: str) -> Floats:
        return _rms(x, self._weight(layer, name), self.epsilon)

    def _attention(self, x: Floats, layer: int) -> Floats:
        count = len(x)
        everywhere = layer % self.every == self.every - 1
        angle = np.arange(count) / (self.global_scale if everywhere else 1.0)
        base = self.global_base if everywhere else self.local_base

        def heads(name: str, number: int) -> Floats:
            projected = x @ self._weight(layer, name).T
            return projected.reshape(count, number, self.head_dim).transpose(1, 0, 2)

        query = _rotate(self._norm(heads("attn_q", self.heads), layer, "attn_q_norm"), angle, base)
        key = _rotate(self._norm(heads("attn_k", self.kv_heads), layer, "attn_k_norm"), angle, base)
        value = heads("attn_v", self.kv_heads)
        output = np.empty((count, self.heads, self.head_dim), np.float32)
        for start in range(0, count, _STRIP):
            stop = min(start + _STRIP, count)
            first = 0 if everywhere else max(0, start - self.window + 1)
            here, there = np.arange(start, stop)[:, None], np.arange(first, stop)
            unseen = there > here
            if not everywhere:
                unseen |= there <= here - self.window
            for head in range(self.heads):
                source = head * self.kv_heads // self.heads
                scores = query[head, start:stop] @ key[source, first:stop].T * self.scale
                scores[unseen] = -np.inf
                share = np.exp(scores - scores.max(axis=1, keepdims=True))
                share /= share.sum(axis=1, keepdims=True)
                output[start:stop, head] = share @ value[source, first:stop]
        return output.reshape(count, -1) @ self._weight(layer, "attn_output").T

    def _feed(self, x: Floats, layer: int) -> Floats:
        gate, up = x @ self._weight(layer, "ffn_gate").T, x @ self._weight(layer, "ffn_up").T
        root = np.float32(np.sqrt(2 / np.pi))
        gelu = np.float32(0.5) * gate * (1 + np.tanh(root * (gate + np.float32(0.044715) * gate**3)))
        down: Floats = (gelu * up) @ self._weight(layer, "ffn_down").T
        return down


def _floats(file: GgufFile, entry: TensorEntry) -> Floats:
    raw = file.data(entry)
    if entry.kind == GGMLQuantizationType.F32:
        return raw.view(np.float32).reshape(entry.shape)
    values: Floats = dequantize(raw.reshape(*entry.shape[:-1], -1), entry.kind)
    return values


def _rms(x: Floats, weight: Floats, epsilon: np.float32) -> Floats:
    normed: Floats = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight
    return normed


def _rotate(x: Floats, position: NDArray[np.float64], base: float) -> Floats:
    """Rotate the halves of each head, shape ``(heads, count, head_dim)``, by angles taken in float64."""
    half = x.shape[-1] // 2
    angle = position[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return np.concatenate(
        (x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1
    )
