"""Measure how far apart windows may begin for attention to give the same to the bit, when an image is built.

ONNX Runtime sums over the keys of a chunk of a prompt in blocks, counted from the first row of the cache. A
window that begins elsewhere has its blocks elsewhere, and its sums round differently: unless it begins at a
multiple of the block. The rows before a window add exact zeros. How long a block is depends on the kernel.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fdir.rows import GROUP
from node.inference.arithmetic import configure
from node.inference.manifest import GemmaShape
from node.inference.operators import PREFILL_ROWS, THREADS
from telemetry.errors import PenumbraError

LARGEST_STEP: Final = 1024
"""Longest block that is looked for: that of heads of 16 values; of 128 and more it is 128 (measured, x86 with
AVX-512, without the flash kernel: `node.inference.arithmetic.ENVIRONMENT`)."""
_Values = NDArray[np.float32]


def measure_window_step(shape: GemmaShape) -> int:
    """Return the least step, in positions, at whose multiples windows may begin.

    Parameters
    ----------
    shape
        Dimensions of the model.

    Returns
    -------
    A power of two from `GROUP` to `LARGEST_STEP`: with it, chunks and single steps that end at many positions
    gave the same to the bit from every window tried, and on any number of threads.

    Raises
    ------
    PenumbraError
        There is no such step, or threads change the result.
    """
    trial = _Trial(shape)
    step = GROUP
    while step <= LARGEST_STEP:
        if trial.holds(step):
            return step
        step *= 2
    raise PenumbraError(
        f"attention in heads of {shape.head_dim} differs with the begin of the window, also at multiples of "
        f"{LARGEST_STEP} positions",
        "this kernel of ONNX Runtime cannot be flown: take another version of it, and report the CPU",
    )


class _Trial:
    """Keys and values of random positions, and the operator alone."""

    def __init__(self, shape: GemmaShape) -> None:
        self._shape = shape
        self._sessions = [_session(shape, threads) for threads in THREADS]
        first = -(-shape.window // PREFILL_ROWS) * PREFILL_ROWS + PREFILL_ROWS
        # Every third chunk: its ends lie differently within blocks of any length.
        self._ends = range(first, first + 2 * LARGEST_STEP + PREFILL_ROWS, 3 * PREFILL_ROWS)
        numbers = np.random.default_rng(3)
        rows = (2, shape.kv_heads, self._ends[-1], shape.head_dim)
        self._rows = numbers.standard_normal(rows).astype(np.float32)
        self._queries = numbers.standard_normal((1, PREFILL_ROWS, shape.heads * shape.head_dim)).astype(
            np.float32
        )
        self._full: dict[tuple[int, int], bytes] = {}

    def holds(self, step: int) -> bool:
        """Return whether windows that begin at multiples of `step` give what the full cache gives."""
        return all(
            self._run(end, count, base) == self._of_full_cache(end, count)
            for end in self._ends
            for count in (1, PREFILL_ROWS)
            for base in self._bases(end, count, step)
        )

    def _bases(self, end: int, count: int, step: int) -> set[int]:
        """Return the first, the middle and the last multiple that leaves the window's rows in the cache."""
        most = max(0, end - count - self._shape.window + 1) // step
        return {step * number for number in (1, most // 2, most) if 0 < number <= most}

    def _of_full_cache(self, end: int, count: int) -> bytes:
        key = end, count
        if key not in self._full:
            self._full[key] = self._run(end, count, 0)
            if self._run(end, count, 0, session=1) != self._full[key]:
                raise PenumbraError(
                    f"attention over {end} positions differs between {THREADS[1]} threads and one",
                    "this kernel of ONNX Runtime cannot be flown: take another version of it, and report the "
                    "CPU",
                )
        return self._full[key]

    def _run(self, end: int, count: int, base: int, *, session: int = 0) -> bytes:
        """Return what the last `count` of `end` positions get from a cache that begins at `base`."""
        past = np.zeros((2, 1, *self._rows.shape[1:]), np.float32)
        past[:, 0, :, : end - count - base] = self._rows[:, :, base : end - count]
        new = self._rows[:, :, end - count : end].transpose(0, 2, 1, 3).reshape(2, 1, count, -1)
        given = {
            "query": self._queries[:, :count],
            "key": new[0],
            "value": new[1],
            "past_key": past[0],
            "past_value": past[1],
            "last": np.array([end - base - 1], np.int32),
            "total": np.array(end - base, np.int32),
        }
        result: _Values = self._sessions[session].run(["out"], given)[0]
        return result.tobytes()


def _session(shape: GemmaShape, threads: int) -> ort.InferenceSession:
    def floats(name: str, *dimensions: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dimensions)

    def integers(name: str, *dimensions: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.INT32, dimensions)

    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    caches = [floats(f"past_{part}", 1, shape.kv_heads, "M", shape.head_dim) for part in ("key", "value")]
    inputs = [
        floats("query", 1, "T", width), floats("key", 1, "T", kv_width), floats("value", 1, "T", kv_width),
        *caches, integers("last", 1), integers("total"),
    ]  # fmt: skip
    outputs = [
        floats("out", 1, "T", width),
        *(floats(f"present_{part}", 1, shape.kv_heads, "M", shape.head_dim) for part in ("key", "value")),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [each.name for each in inputs],
        [each.name for each in outputs],
        domain="com.microsoft",
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        scale=shape.attention_scale,
        local_window_size=shape.window,
    )
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    configure(settings)
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
