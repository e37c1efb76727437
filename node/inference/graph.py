"""The ONNX graph of a Gemma 3 text model up to and including its last norm: the trunk, on 8-bit weights.

One graph serves prefill and decoding, any batch size, any number of new tokens, any cache length.

Inputs
    ``input_ids``
        int64 ``[B, T]``: the new tokens.
    ``position_ids``
        int64 ``[B, T]``: the position of each in its text, from 0.
    ``seqlens_k``
        int32 ``[B]``: for each row, rows in the caches of global layers once the new ones are in, minus 1.
    ``total_sequence_length``
        int32, scalar: the largest ``seqlens_k`` plus 1. With ``T > 1`` a batch must be one row, or start from
        empty caches with rows of equal length (a limit of GroupQueryAttention).
    ``window_seqlens_k``, ``window_total_sequence_length``
        The same for the caches of sliding-window layers, which need not begin at position 0: what lies
        before the window may be dropped, and the rest moved to the front.
    ``past_key.{i}``, ``past_value.{i}``
        float32 ``[B, kv_heads, M, head_dim]`` for a global layer ``i``, ``[B, kv_heads, W, head_dim]`` for a
        sliding-window layer; ``M`` and ``W`` are the room, not the length.
Outputs
    ``hidden``
        float32 ``[B, T, width]``: what the head takes, of each position.
    ``residual``
        float32 ``[B, T, 4 * layers]``, of a checked trunk only: for each matrix product (`check_names`) how
        far its result is from its checksum. See below.
    ``present_key.{i}``, ``present_value.{i}``
        As ``past_*``. Bind each to the very buffer of its ``past_*``: the new rows are then appended in place
        and nothing else is written.

Keys are cached after rotation. In a cache that begins at position ``base``, position ``p`` of row ``b`` is
``past_key.{i}[b, :, p - base, :]``.

Operators: ``MatMulNBits`` (8 bits, blocks of 32, activations quantised to 8 bits per block:
accuracy_level 4), ``GroupQueryAttention``, ``SimplifiedLayerNormalization``, the same after an addition, and
standard ONNX. Query, key and value are one product, gate and up another. The embedding gathers 8-bit rows and
their scales; the full float table never exists. The order of operations follows llama.cpp,
``src/models/gemma3.cpp``.

Each weight matrix has four more rows, which are cut off its result: three 8-bit parts of minus the sum of
all other rows, each the rounding error of the one before, and zeros. So all components of the uncut result
add up to the rounding of float32 and no more, whatever the input and however it was rounded to 8 bits. A
checked trunk adds them up; that is its residual. Products whose input has no fixed length (``attn_output``,
``ffn_down``) are judged relative to the length of their result, which the norm that follows computes anyway.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from node.inference.gguf_source import BLOCK, GgufSource, QuantMatrix, quantize
from node.inference.manifest import GemmaShape
from telemetry.errors import PenumbraError

OPSET: Final = 20
"""The first with Gelu."""
IR_VERSION: Final = 10
_MICROSOFT: Final = "com.microsoft"
_ABSOLUTE: Final = ("attn_qkv", "ffn_gate_up")
"""Matrix products whose input a norm has brought to a fixed length."""
_RELATIVE: Final = ("attn_output", "ffn_down")
"""Those whose residual is divided by the root mean square of the result."""
_CHECK_PARTS: Final = 3
"""8-bit parts of a checksum: the error left is below float32 rounding."""
_CHECK_ROWS: Final = 4
"""Rows a checksum adds, the last zero: kernels take four rows at a time."""


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

    def rms_norm(
        self, name: str, x: str, weight: NDArray[np.float32], epsilon: float, scale: str = ""
    ) -> str:
        """Normalise; with ``scale``, that output is 1 / root mean square, for each row."""
        gain = self.constant(f"{name}.weight", weight)
        node = helper.make_node(
            "SimplifiedLayerNormalization",
            [x, gain],
            [name, scale] if scale else [name],
            name=name,
            axis=-1,
            epsilon=epsilon,
            stash_type=1,
        )
        self.nodes.append(node)
        return name

    def add_and_norm(
        self, name: str, x: str, delta: str, weight: NDArray[np.float32], epsilon: float
    ) -> tuple[str, str]:
        """Add, then normalise, in one operator; returns sum and normalised sum."""
        gain = self.constant(f"{name}.weight", weight)
        total = f"{name}_sum"
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [delta, x, gain],
            [name, "", "", total],
            name=name,
            domain=_MICROSOFT,
            epsilon=epsilon,
        )
        self.nodes.append(node)
        return total, name

    def split(self, x: str, parts: dict[str, int]) -> list[str]:
        """Split the last axis into named parts of these lengths."""
        sizes = self.constant(
            f"split.{'.'.join(map(str, parts.values()))}", np.array([*parts.values()], np.int64)
        )
        self.nodes.append(helper.make_node("Split", [x, sizes], list(parts), name=f"{x}_split", axis=-1))
        return list(parts)


class _Trunk:
    """Builds one trunk."""

    def __init__(self, source: GgufSource, shape: GemmaShape, checked: bool) -> None:
        self.source, self.shape, self.checked = source, shape, checked
        self.graph = _Graph()
        self.sums: dict[str, str] = {}
        """By name of the product, the sum of its uncut result."""
        self.scales: dict[str, str] = {}
        """By name of the product, if its residual is relative, the factor that makes it so."""

    def build(self) -> None:
        graph, shape = self.graph, self.shape
        for kind in ("local", "global"):
            cos, sin = rope_tables(shape, kind == "global")
            graph.constant(f"rope.{kind}.cos", cos)
            graph.constant(f"rope.{kind}.sin", sin)
        x = _embedding(graph, self.source, shape)
        normed = graph.rms_norm("blk.0.attn_norm", x, self._vector("blk.0.attn_norm"), shape.rms_eps)
        for layer in range(shape.layers):
            last = layer + 1 == shape.layers
            x, normed = self._layer(layer, x, normed, "output_norm" if last else f"blk.{layer + 1}.attn_norm")
        graph.add("Identity", "hidden", [normed])
        if self.checked:
            self._residual()

    def _vector(self, name: str) -> NDArray[np.float32]:
        return self.source.vector(f"{name}.weight")

    def _layer(self, layer: int, x: str, normed: str, next_norm: str) -> tuple[str, str]:
        """Add a layer; returns the residual stream and what the next norm makes of it."""
        graph, shape, prefix = self.graph, self.shape, f"blk.{layer}"
        inner, kv_inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = {"attn_q": inner, "attn_k": kv_inner, "attn_v": kv_inner}
        query, key, value = self._product(layer, "attn_qkv", normed, sizes)
        query = _head_norm(self, f"{prefix}.attn_q", query, shape.heads)
        key = _head_norm(self, f"{prefix}.attn_k", key, shape.kv_heads)
        attended = _attention(graph, shape, layer, [query, key, value])
        (output,) = self._product(layer, "attn_output", attended, {"attn_output": shape.width})
        output = self._post_norm(f"{prefix}.post_attention_norm", output, f"{prefix}.attn_output")
        name = f"{prefix}.ffn_norm"
        x, normed = graph.add_and_norm(name, x, output, self._vector(name), shape.rms_eps)

        sizes = {"ffn_gate": shape.ffn, "ffn_up": shape.ffn}
        gate, up = self._product(layer, "ffn_gate_up", normed, sizes)
        gated = graph.add(
            "Mul", f"{prefix}.gated", [graph.add("Gelu", f"{prefix}.gelu", [gate], approximate="tanh"), up]
        )
        (down,) = self._product(layer, "ffn_down", gated, {"ffn_down": shape.width})
        down = self._post_norm(f"{prefix}.post_ffw_norm", down, f"{prefix}.ffn_down")
        return graph.add_and_norm(next_norm, x, down, self._vector(next_norm), shape.rms_eps)

    def _post_norm(self, name: str, x: str, product: str) -> str:
        scale = f"{name}_scale" if self.checked else ""
        self.scales[product] = scale
        return self.graph.rms_norm(name, x, self._vector(name), self.shape.rms_eps, scale)

    def _product(self, layer: int, role: str, x: str, parts: dict[str, int]) -> list[str]:
        """Multiply by matrices of the file, stacked; ``parts`` are their names and numbers of rows.

        Returns
        -------
        The result of each, without the checksum.
        """
        prefix, graph = f"blk.{layer}", self.graph
        name = f"{prefix}.{role}"
        columns = {"attn_output": self.shape.heads * self.shape.head_dim, "ffn_down": self.shape.ffn}
        weights = stack(
            [
                self.source.matrix(f"{prefix}.{part}.weight", rows, columns.get(role, self.shape.width))
                for part, rows in parts.items()
            ]
        )
        y = graph.matmul(name, x, stack([weights, checksum(weights)]), name)
        if self.checked:
            axis = graph.constant("check.axis", np.array([-1], np.int64))
            self.sums[name] = graph.add("ReduceSum", f"{name}.sum", [y, axis], keepdims=1)
        sizes = {f"{prefix}.{part}.result": rows for part, rows in parts.items()}
        return graph.split(y, {**sizes, f"{name}.checksum": _CHECK_ROWS})[:-1]

    def _residual(self) -> None:
        """Join all residuals in the order of `check_names`."""
        graph, names = self.graph, check_names(self.shape)
        relative = [name for name in names if is_relative(name)]
        absolute = len(names) - len(relative)
        sums = graph.add("Concat", "check.sums", [self.sums[name] for name in names], axis=-1)
        size = graph.add("Abs", "check.size", [sums])
        first, second = graph.split(size, {"check.absolute": absolute, "check.unscaled": len(relative)})
        scales = graph.add("Concat", "check.scales", [self.scales[name] for name in relative], axis=-1)
        scaled = graph.add("Mul", "check.relative", [second, scales])
        graph.add("Concat", "residual", [first, scaled], axis=-1)


def build_trunk(
    source: GgufSource, shape: GemmaShape, *, checked: bool
) -> tuple[onnx.ModelProto, dict[str, NDArray[np.generic]]]:
    """Build the trunk of a model.

    Parameters
    ----------
    source
        Where the weights come from.
    shape
        Its dimensions; ``context`` is the number of positions the rotary tables are made for.
    checked
        Whether the graph checks its matrix products and returns ``residual``. ``hidden`` and the caches are
        the same to the bit either way.

    Returns
    -------
    The model without its initialisers, and the initialisers by name:
    ``blk.{layer}.{part}.{weight|scale}``, or a name that begins with ``token_embd``, ``output_norm``,
    ``rope``, ``heads``, ``split`` or ``check``.

    Raises
    ------
    PenumbraError
        A tensor is missing or of the wrong shape, or a dimension is none the operators can take.
    """
    _check_dimensions(source, shape)
    trunk = _Trunk(source, shape, checked)
    trunk.build()
    return _model(trunk.graph, shape, checked), trunk.graph.tensors


def check_names(shape: GemmaShape) -> tuple[str, ...]:
    """Return the matrix product of each column of ``residual``."""
    layers = range(shape.layers)
    return tuple(
        f"blk.{layer}.{role}" for group in (_ABSOLUTE, _RELATIVE) for layer in layers for role in group
    )


def is_relative(name: str) -> bool:
    """Tell whether the residual of a matrix product is relative to the length of its result."""
    return name.endswith(_RELATIVE)


def stack(matrices: list[QuantMatrix]) -> QuantMatrix:
    """Put the rows of matrices under one another; where their blocks differ, all get the smaller ones."""
    block = min(matrix.block for matrix in matrices)
    scales = [np.repeat(matrix.scales, matrix.block // block, axis=1) for matrix in matrices]
    return QuantMatrix(np.concatenate([matrix.codes for matrix in matrices]), np.concatenate(scales))


def checksum(weights: QuantMatrix) -> QuantMatrix:
    """Return minus the sum of a matrix's rows in 8-bit parts, shape ``(4, columns)``, the last row zero.

    It has the blocks of the matrix, in which the operator rounds the input.
    """
    codes = weights.codes.reshape(len(weights.codes), -1, weights.block).astype(np.float64) - 128
    left = -np.einsum("rbk,rb->bk", codes, weights.scales.astype(np.float64)).reshape(1, -1)
    parts = []
    for _ in range(_CHECK_PARTS):
        parts.append(quantize(left.astype(np.float32), weights.block))
        left = left - parts[-1].to_float()
    parts += [quantize(np.zeros_like(left, np.float32), weights.block)] * (_CHECK_ROWS - _CHECK_PARTS)
    return stack(parts)


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
    table = source.matrix("token_embd.weight", shape.vocab, shape.width)
    rows = graph.add(
        "GatherBlockQuantized",
        "embed.rows",
        [
            graph.constant("token_embd.weight", table.codes),
            "input_ids",
            graph.constant("token_embd.scale", table.scales),
        ],
        _MICROSOFT,
        bits=8,
        block_size=table.block,
        gather_axis=0,
        quantize_axis=1,
    )
    gain = graph.constant("token_embd.gain", np.array(math.sqrt(shape.width), np.float32))
    return graph.add("Mul", "embed", [rows, gain])


def _head_norm(trunk: _Trunk, name: str, x: str, heads: int) -> str:
    """Normalise each head by itself: ``[B, T, heads * head_dim]`` in and out."""
    graph, shape = trunk.graph, trunk.shape
    gain = graph.constant(f"{name}_norm.weight", trunk.source.vector(f"{name}_norm.weight"))
    return graph.add(
        "BranchwiseRMSNorm",
        f"{name}_norm",
        [x, gain],
        _MICROSOFT,
        num_branches=heads,
        epsilon=shape.rms_eps,
    )


def _attention(graph: _Graph, shape: GemmaShape, layer: int, qkv: list[str]) -> str:
    is_global = shape.is_global(layer)
    rope, lengths = ("rope.global", "") if is_global else ("rope.local", "window_")
    output = f"blk.{layer}.attn"
    inputs = [
        *qkv,
        f"past_key.{layer}",
        f"past_value.{layer}",
        f"{lengths}seqlens_k",
        f"{lengths}total_sequence_length",
        f"{rope}.cos",
        f"{rope}.sin",
        "position_ids",
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


def _model(graph: _Graph, shape: GemmaShape, checked: bool) -> onnx.ModelProto:
    def value(name: str, kind: int, dimensions: list[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dimensions)

    def cache(layer: int) -> list[str | int]:
        return ["B", shape.kv_heads, "M" if shape.is_global(layer) else "W", shape.head_dim]

    caches = [(f"{part}.{layer}", cache(layer)) for layer in range(shape.layers) for part in ("key", "value")]
    inputs = [
        value("input_ids", TensorProto.INT64, ["B", "T"]),
        value("position_ids", TensorProto.INT64, ["B", "T"]),
    ]
    for prefix in ("", "window_"):
        inputs.append(value(f"{prefix}seqlens_k", TensorProto.INT32, ["B"]))
        inputs.append(value(f"{prefix}total_sequence_length", TensorProto.INT32, []))
    inputs += [value(f"past_{name}", TensorProto.FLOAT, dimensions) for name, dimensions in caches]
    outputs = [value("hidden", TensorProto.FLOAT, ["B", "T", shape.width])]
    if checked:
        outputs.append(value("residual", TensorProto.FLOAT, ["B", "T", len(check_names(shape))]))
    outputs += [value(f"present_{name}", TensorProto.FLOAT, dimensions) for name, dimensions in caches]
    body = helper.make_graph(graph.nodes, "gemma3", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="penumbra")
