"""The ONNX graph of a Gemma 3 text model, on 8-bit weights.

One graph serves prefill and decoding, any batch size, any number of new tokens, any cache length.

Inputs
    ``input_ids``
        int64 ``[B, T]``: the new tokens.
    ``seqlens_k``
        int32 ``[B]``: for each row, tokens in the cache once the new ones are in, minus 1.
    ``total_sequence_length``
        int32, scalar: the largest ``seqlens_k`` plus 1. With ``T > 1`` a batch must be one row, or start from
        empty caches with rows of equal length (a limit of GroupQueryAttention).
    ``past_key.{i}``, ``past_value.{i}``
        float32 ``[B, kv_heads, M, head_dim]`` for layer ``i``; ``M`` is the room, not the length.
Outputs
    ``logits``
        float32 ``[B, vocab]``: for the last of the ``T`` positions of each row.
    ``present_key.{i}``, ``present_value.{i}``
        As ``past_*``. Bind each to the very buffer of its ``past_*``: the new rows are then appended in place
        and nothing else is written.

Keys are cached after rotation. Position ``p`` of row ``b`` is ``past_key.{i}[b, :, p, :]``.

Operators: ``MatMulNBits`` (8 bits, blocks of 32, activations quantised to 8 bits per block:
accuracy_level 4), ``GroupQueryAttention``, ``SimplifiedLayerNormalization`` and standard ONNX. The
embedding gathers 8-bit rows and their scales; the full float table never exists. The order of operations
follows llama.cpp, ``src/models/gemma3.cpp``.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from node.inference.gguf_source import BLOCK, GgufSource, QuantMatrix
from node.inference.manifest import GemmaShape
from telemetry.errors import PenumbraError

OPSET: Final = 20
"""The first with Gelu."""
IR_VERSION: Final = 10
_MICROSOFT: Final = "com.microsoft"


class _Graph:
    """Collects nodes and initialisers; every method returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, NDArray[np.generic]] = {}

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.tensors[name] = value
        return name

    def add(self, op: str, name: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def matmul(self, name: str, x: str, weights: QuantMatrix, weight_name: str) -> str:
        rows, columns = weights.codes.shape
        codes, scales = self.matrix(weight_name, weights)
        return self.add(
            "MatMulNBits",
            name,
            [x, codes, scales],
            _MICROSOFT,
            K=columns,
            N=rows,
            bits=8,
            block_size=weights.block,
            accuracy_level=4,
        )

    def matrix(self, name: str, weights: QuantMatrix) -> tuple[str, str]:
        """Add a matrix in the form MatMulNBits takes; one that is used twice is stored once."""
        rows, columns = weights.codes.shape
        shape = (rows, columns // weights.block, weights.block)
        return (
            self.constant(f"{name}.weight", weights.codes.reshape(shape)),
            self.constant(f"{name}.scale", weights.scales),
        )

    def rms_norm(self, name: str, x: str, weight: NDArray[np.float32], epsilon: float) -> str:
        gain = self.constant(f"{name}.weight", weight)
        return self.add(
            "SimplifiedLayerNormalization", name, [x, gain], axis=-1, epsilon=epsilon, stash_type=1
        )


def build_graph(
    source: GgufSource, shape: GemmaShape
) -> tuple[onnx.ModelProto, dict[str, NDArray[np.generic]]]:
    """Build the graph of a model.

    Parameters
    ----------
    source
        Where the weights come from.
    shape
        Its dimensions; ``context`` is the number of positions the rotary tables are made for.

    Returns
    -------
    The model without its initialisers, and the initialisers by name:
    ``blk.{layer}.{part}.{weight|scale}``, or a name that begins with ``token_embd``, ``output``,
    ``output_norm``, ``rope`` or ``heads``.

    Raises
    ------
    PenumbraError
        A tensor is missing or of the wrong shape, or a dimension is none the operators can take.
    """
    _check_dimensions(source, shape)
    graph = _Graph()
    for kind in ("local", "global"):
        cos, sin = rope_tables(shape, kind == "global")
        graph.constant(f"rope.{kind}.cos", cos)
        graph.constant(f"rope.{kind}.sin", sin)
    x = _embedding(graph, source, shape)
    for layer in range(shape.layers):
        x = _layer(graph, source, shape, layer, x)
    _head(graph, source, shape, x)
    return _model(graph, shape), graph.tensors


def rope_tables(shape: GemmaShape, is_global: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosines and sines of the rotary embedding, float32, shape ``(context, head_dim / 2)`` each."""
    base = shape.rope_base_global if is_global else shape.rope_base_local
    scale = shape.rope_scale_global if is_global else 1.0
    frequency = base ** (-np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
    angle = np.outer(np.arange(shape.context, dtype=np.float64) / scale, frequency)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _check_dimensions(source: GgufSource, shape: GemmaShape) -> None:
    for name, value, unit in (
        ("embedding_length", shape.width, BLOCK),
        ("feed_forward_length", shape.ffn, BLOCK),
        ("attention.key_length", shape.head_dim, 16),
        ("attention.head_count", shape.heads, shape.kv_heads),
        ("attention.head_count * attention.key_length", shape.heads * shape.head_dim, BLOCK),
    ):
        if value % unit:
            raise PenumbraError(f"{source.path}: {name} is {value}; it must be a multiple of {unit}")


def _embedding(graph: _Graph, source: GgufSource, shape: GemmaShape) -> str:
    codes, scales = graph.matrix("token_embd", source.matrix("token_embd.weight", shape.vocab, shape.width))
    zero = graph.constant("token_embd.zero", np.array(128, np.float32))
    gain = graph.constant("token_embd.gain", np.array(math.sqrt(shape.width), np.float32))
    column = graph.constant("embed.column", np.array([3], np.int64))
    flat = graph.constant("embed.flat", np.array([0, 0, shape.width], np.int64))
    rows = graph.add("Gather", "embed.rows", [codes, "input_ids"], axis=0)
    row_scales = graph.add("Gather", "embed.row_scales", [scales, "input_ids"], axis=0)
    as_float = graph.add("Cast", "embed.float", [rows], to=TensorProto.FLOAT)
    signed = graph.add("Sub", "embed.signed", [as_float, zero])
    columns = graph.add("Unsqueeze", "embed.columns", [row_scales, column])
    values = graph.add("Mul", "embed.values", [signed, columns])
    joined = graph.add("Reshape", "embed.joined", [values, flat])
    return graph.add("Mul", "embed", [joined, gain])


def _layer(graph: _Graph, source: GgufSource, shape: GemmaShape, layer: int, x: str) -> str:
    prefix = f"blk.{layer}"

    def norm(name: str, value: str) -> str:
        return graph.rms_norm(
            f"{prefix}.{name}", value, source.vector(f"{prefix}.{name}.weight"), shape.rms_eps
        )

    def matmul(role: str, value: str, rows: int, columns: int) -> str:
        name = f"{prefix}.{role}"
        return graph.matmul(name, value, source.matrix(f"{name}.weight", rows, columns), name)

    inner, kv_inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    normed = norm("attn_norm", x)
    query = _head_norm(graph, source, shape, f"{prefix}.attn_q", matmul("attn_q", normed, inner, shape.width))
    key = _head_norm(
        graph, source, shape, f"{prefix}.attn_k", matmul("attn_k", normed, kv_inner, shape.width)
    )
    value = matmul("attn_v", normed, kv_inner, shape.width)
    attended = _attention(graph, shape, layer, [query, key, value])
    output = norm("post_attention_norm", matmul("attn_output", attended, shape.width, inner))
    x = graph.add("Add", f"{prefix}.attn_residual", [x, output])

    normed = norm("ffn_norm", x)
    gate = graph.add(
        "Gelu", f"{prefix}.gelu", [matmul("ffn_gate", normed, shape.ffn, shape.width)], approximate="tanh"
    )
    up = matmul("ffn_up", normed, shape.ffn, shape.width)
    gated = graph.add("Mul", f"{prefix}.gated", [gate, up])
    down = norm("post_ffw_norm", matmul("ffn_down", gated, shape.width, shape.ffn))
    return graph.add("Add", f"{prefix}.ffn_residual", [x, down])


def _head_norm(graph: _Graph, source: GgufSource, shape: GemmaShape, name: str, x: str) -> str:
    """Normalise each head by itself: ``[B, T, n * head_dim]`` in and out."""
    split = graph.constant("heads.split", np.array([0, 0, -1, shape.head_dim], np.int64))
    join = graph.constant("heads.join", np.array([0, 0, -1], np.int64))
    heads = graph.add("Reshape", f"{name}_heads", [x, split])
    normed = graph.rms_norm(f"{name}_norm", heads, source.vector(f"{name}_norm.weight"), shape.rms_eps)
    return graph.add("Reshape", f"{name}_joined", [normed, join])


def _attention(graph: _Graph, shape: GemmaShape, layer: int, qkv: list[str]) -> str:
    is_global = shape.is_global(layer)
    rope = "rope.global" if is_global else "rope.local"
    output = f"blk.{layer}.attn"
    inputs = [
        *qkv,
        f"past_key.{layer}",
        f"past_value.{layer}",
        "seqlens_k",
        "total_sequence_length",
        f"{rope}.cos",
        f"{rope}.sin",
    ]
    graph.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            inputs,
            [output, f"present_key.{layer}", f"present_value.{layer}"],
            name=output,
            domain=_MICROSOFT,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=shape.attention_scale,
            local_window_size=-1 if is_global else shape.window,
        )
    )
    return output


def _head(graph: _Graph, source: GgufSource, shape: GemmaShape, x: str) -> str:
    last = graph.constant("output.last", np.array(-1, np.int64))
    final = graph.add("Gather", "output.hidden", [x, last], axis=1)
    normed = graph.rms_norm("output_norm", final, source.vector("output_norm.weight"), shape.rms_eps)
    table = "output" if source.has("output.weight") else "token_embd"
    head = graph.matmul("output", normed, source.matrix(f"{table}.weight", shape.vocab, shape.width), table)
    return graph.add("Identity", "logits", [head])


def _model(graph: _Graph, shape: GemmaShape) -> onnx.ModelProto:
    def value(name: str, kind: int, dimensions: list[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dimensions)

    cache: list[str | int] = ["B", shape.kv_heads, "M", shape.head_dim]
    caches = [f"{part}.{layer}" for layer in range(shape.layers) for part in ("key", "value")]
    inputs = [
        value("input_ids", TensorProto.INT64, ["B", "T"]),
        value("seqlens_k", TensorProto.INT32, ["B"]),
        value("total_sequence_length", TensorProto.INT32, []),
        *(value(f"past_{name}", TensorProto.FLOAT, cache) for name in caches),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["B", shape.vocab]),
        *(value(f"present_{name}", TensorProto.FLOAT, cache) for name in caches),
    ]
    body = helper.make_graph(graph.nodes, "gemma3", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="penumbra")
