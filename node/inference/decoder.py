"""Plain greedy decoding of one sequence on KV planes bound in place: no proof, no policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from node.inference.manifest import GemmaShape

PREFILL_CHUNK = 64
"""Prompt tokens a run of the session takes. Chunks leave the cache the same to the bit (measured.md), and
between two of them the worker answers pings."""


class Decoder:
    """Run the model over a KV cache in caller's memory.

    Parameters
    ----------
    session
        A session of the image's graph (see `node.inference.graph` for inputs and outputs).
    shape
        Dimensions of the model.
    kv
        The cache, float32, shape (planes, positions, head_dim), plane order as in `node.inference.arena`.
        ONNX Runtime reads and writes it in place.

    Raises
    ------
    RuntimeError
        ONNX Runtime copied the cache instead of binding it: nothing could be proven then.
    """

    def __init__(self, session: ort.InferenceSession, shape: GemmaShape, kv: npt.NDArray[np.float32]) -> None:
        self.positions = int(kv.shape[1])
        self.vocab = shape.vocab
        self._session = session
        self._cache: dict[str, Any] = {}
        for layer in range(shape.layers):
            for offset, name in enumerate(("key", "value")):
                first = (layer * 2 + offset) * shape.kv_heads
                plane = kv[first : first + shape.kv_heads][np.newaxis]
                value = ort.OrtValue.ortvalue_from_numpy(plane)
                if value.data_ptr() != plane.ctypes.data:
                    raise RuntimeError("ONNX Runtime copied the KV cache instead of binding it in place")
                self._cache[f"{name}.{layer}"] = value
        logits = np.empty((1, shape.vocab), np.float32)
        self._logits: npt.NDArray[np.float32] = logits[0]
        self._logits_value = ort.OrtValue.ortvalue_from_numpy(logits)
        self._token = np.zeros((1, 1), np.int64)
        self._last = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._step_binding = self._bind(self._token, self._last, self._total)

    def step(self, token: int, position: int) -> npt.NDArray[np.float32]:
        """Feed `token` at `position`; return the logits that follow it.

        The KV row of `position` is written. The logits, shape (vocab,), are valid until the next run.
        """
        self._token[0, 0] = token
        self._last[0] = position
        self._total[...] = position + 1
        self._session.run_with_iobinding(self._step_binding)
        return self._logits

    def prefill(
        self, tokens: Sequence[int], between: Callable[[int, int], None] = lambda start, stop: None
    ) -> npt.NDArray[np.float32]:
        """Feed a prompt from position 0; return the logits after its last token.

        Parameters
        ----------
        tokens
            1 to `positions` token ids.
        between
            Called after each chunk with the positions whose KV rows it wrote.
        """
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = np.asarray(tokens[start : start + PREFILL_CHUNK], np.int64)[np.newaxis]
            stop = start + chunk.shape[1]
            binding = self._bind(chunk, np.array([stop - 1], np.int32), np.array(stop, np.int32))
            self._session.run_with_iobinding(binding)
            between(start, stop)
        return self._logits

    def _bind(
        self, tokens: npt.NDArray[np.int64], last: npt.NDArray[np.int32], total: npt.NDArray[np.int32]
    ) -> Any:
        binding = self._session.io_binding()
        for name, array in (("input_ids", tokens), ("seqlens_k", last), ("total_sequence_length", total)):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output("logits", self._logits_value)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        return binding


def greedy(logits: npt.NDArray[np.float32]) -> int:
    """Return the id of the largest logit; the lowest id where two are equal."""
    return int(logits.argmax())
