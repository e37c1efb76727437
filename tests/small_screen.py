"""A head of a few hundred rows, with its screen in a session, for tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from node.inference.arithmetic import OPTIONS
from node.inference.gguf_source import QuantMatrix
from node.inference.head import ScreenedHead
from node.inference.operators import measure, products, sum_limit
from node.inference.screen import Screen, build_screen


@dataclass(frozen=True)
class SmallHead:
    table: QuantMatrix
    hidden: NDArray[np.float32]
    """What the screen was built from."""
    screen: Screen
    session: ort.InferenceSession
    head: ScreenedHead

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float64]:
        """Every logit, float64, computed another way."""
        weights = self.table.codes.astype(np.float64) - 128.0
        weights *= np.repeat(self.table.scales.astype(np.float64), self.table.block, axis=1)
        result: NDArray[np.float64] = weights @ hidden.astype(np.float64)
        return result


def small_table(vocab: int, width: int, block: int, seed: int) -> QuantMatrix:
    """Rows of which some are zero, some equal, some of one block only, and some of extreme codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, 256, (vocab, width)).astype(np.uint8)
    scales = rng.uniform(0.0005, 0.002, (vocab, width // block)).astype(np.float32)
    codes[3] = codes[9]
    scales[3] = scales[9]
    codes[5] = 128
    codes[6, block:] = 128
    codes[7] = rng.choice([0, 255], width)
    scales[8] = 0
    return QuantMatrix(codes, scales)


def open_screen(screen: Screen, threads: int = 1) -> ort.InferenceSession:
    model = onnx.ModelProto()
    model.CopyFrom(screen.model)
    for name, value in screen.tensors.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor = model.graph.initializer.add(name=name, data_type=kind, dims=value.shape)
        tensor.raw_data = np.ascontiguousarray(value).tobytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in OPTIONS.items():
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def open_head(table: QuantMatrix, screen: Screen, session: ort.InferenceSession) -> ScreenedHead:
    codes = table.codes.reshape(len(table.codes), -1, table.block)
    return ScreenedHead(session, codes, table.scales, screen.rotation, screen.bounds)


@lru_cache(maxsize=16)
def small_head(vocab: int = 640, width: int = 128, block: int = 32, seed: int = 0) -> SmallHead:
    table = small_table(vocab, width, block, seed)
    rng = np.random.default_rng(seed + 1)
    hidden = (rng.standard_normal((400, width)) * np.geomspace(20, 0.5, width)).astype(np.float32)
    screen = build_screen(table, hidden)
    session = open_screen(screen)
    head = open_head(table, screen, session)
    operators = [measure(each, alike=False) for each in products(screen.model, screen.tensors)]
    limit = sum_limit(head, screen, table, hidden, operators)
    screen = replace(screen, bounds=msgspec.structs.replace(screen.bounds, sum_limit=limit))
    return SmallHead(table, hidden, screen, session, open_head(table, screen, session))
