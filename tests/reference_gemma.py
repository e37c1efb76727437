"""An independent forward pass of a Gemma 3 text model: float64 numpy, weights by the package gguf.

Nothing here is shared with the graph builder: positions, windows, norms and rotary angles are computed anew,
so an error in the graph shows as a difference.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class ReferenceGemma:
    """The model in a GGUF whose metadata state a sliding-window pattern."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def field(name: str) -> float:
            return reader.fields[f"gemma3.{name}"].contents()

        self.weights: dict[str, Floats] = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }
        self.layers = int(field("block_count"))
        self.width = int(field("embedding_length"))
        self.heads = int(field("attention.head_count"))
        self.kv_heads = int(field("attention.head_count_kv"))
        self.head_dim = int(field("attention.key_length"))
        self.window = int(field("attention.sliding_window"))
        self.every = int(field("attention.sliding_window_pattern"))
        self.epsilon = field("attention.layer_norm_rms_epsilon")
        self.global_base = field("rope.freq_base")

    def logits(self, ids: list[int]) -> Floats:
        """Logits at every position, shape ``(len(ids), vocab)``."""
        table = self.weights["token_embd.weight"]
        x = table[ids] * np.sqrt(self.width)
        for layer in range(self.layers):
            x = x + self._norm(
                self._attention(self._norm(x, layer, "attn_norm"), layer), layer, "post_attention_norm"
            )
            x = x + self._norm(self._feed(self._norm(x, layer, "ffn_norm"), layer), layer, "post_ffw_norm")
        return _rms(x, self.weights["output_norm.weight"], self.epsilon) @ table.T

    def _weight(self, layer: int, name: str) -> Floats:
        return self.weights[f"blk.{layer}.{name}.weight"]

    def _norm(self, x: Floats, layer: int, name: str) -> Floats:
        return _rms(x, self._weight(layer, name), self.epsilon)

    def _attention(self, x: Floats, layer: int) -> Floats:
        count = len(x)
        everywhere = layer % self.every == self.every - 1
        base = self.global_base if everywhere else 10_000.0

        def heads(name: str, number: int) -> Floats:
            return (x @ self._weight(layer, name).T).reshape(count, number, self.head_dim)

        query = _rotate(self._norm(heads("attn_q", self.heads), layer, "attn_q_norm"), base)
        key = _rotate(self._norm(heads("attn_k", self.kv_heads), layer, "attn_k_norm"), base)
        value = heads("attn_v", self.kv_heads)
        output = np.empty((count, self.heads, self.head_dim))
        for here in range(count):
            first = 0 if everywhere else max(0, here - self.window + 1)
            for head in range(self.heads):
                source = head * self.kv_heads // self.heads
                scores = key[first : here + 1, source] @ query[here, head] / np.sqrt(self.head_dim)
                share = np.exp(scores - scores.max())
                output[here, head] = share / share.sum() @ value[first : here + 1, source]
        return output.reshape(count, -1) @ self._weight(layer, "attn_output").T

    def _feed(self, x: Floats, layer: int) -> Floats:
        gate, up = x @ self._weight(layer, "ffn_gate").T, x @ self._weight(layer, "ffn_up").T
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return (gelu * up) @ self._weight(layer, "ffn_down").T


def _rms(x: Floats, weight: Floats, epsilon: float) -> Floats:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight


def _rotate(x: Floats, base: float) -> Floats:
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate(
        (x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1
    )
