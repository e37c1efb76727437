"""The ONNX Runtime session of a model image, with the options that keep the weights in mapped memory."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from node.inference.manifest import GRAPH
from telemetry.errors import PenumbraError


def open_session(image_dir: Path, threads: int) -> ort.InferenceSession:
    """Load a model image.

    The graph in the image is already optimised and its weights are packed, so neither is done again: the
    session maps the packed weights from ``weights.bin`` and computes on that mapping. Worker threads do
    not spin while waiting: spinning buys a few percent of speed and burns a core's worth of power between
    steps.

    Parameters
    ----------
    image_dir
        Directory of the slot; check it with `check_machine` first.
    threads
        Threads that compute, 1 or more. The result does not depend on it, to the bit.

    Raises
    ------
    PenumbraError
        ONNX Runtime cannot load the image.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = True
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    path = image_dir / GRAPH
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise PenumbraError(
            f"{path}: ONNX Runtime cannot load it: {error}",
            "build the image again: `penumbra model build --force`",
        ) from error
