"""Find out what a session maps from its weights file, and what of it the steps of the model really read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fdir.pages import PAGE_SIZE, MappedTensor, Span, live_mappings, memory_view
from node.inference.manifest import GemmaShape

_PROBES: Final = ((1, (40, 1, 7)), (4, (8, 1)))
"""Batch size and tokens of each run in turn: kernels differ for one row, a few rows and many."""
_ROOM: Final = 64
_STRIKE: Final = 0xA5


def run_probes(session: ort.InferenceSession, shape: GemmaShape) -> list[NDArray[np.float32]]:
    """Run a fixed set of prefills and steps.

    Parameters
    ----------
    session
        A session of the graph, see `node.inference.graph`.
    shape
        Its dimensions; ``context`` must be 64 or more.

    Returns
    -------
    Logits and caches of every run, to be compared bit for bit with those of another session.
    """
    names = [output.name for output in session.get_outputs()]
    tokens = np.random.default_rng(0)
    results: list[NDArray[np.float32]] = []
    for batch, lengths in _PROBES:
        room = np.zeros((batch, shape.kv_heads, _ROOM, shape.head_dim), np.float32)
        caches = {f"{part}.{layer}": room for layer in range(shape.layers) for part in ("key", "value")}
        total = 0
        for length in lengths:
            total += length
            feed: dict[str, NDArray[np.generic]] = {
                "input_ids": tokens.integers(0, shape.vocab, (batch, length)),
                "seqlens_k": np.full(batch, total - 1, np.int32),
                "total_sequence_length": np.array(total, np.int32),
                **{f"past_{name}": cache for name, cache in caches.items()},
            }
            outputs = dict(zip(names, session.run(names, feed), strict=True))
            caches = {name: outputs[f"present_{name}"] for name in caches}
            results += [outputs["logits"], *caches.values()]
    return results


def same(left: Sequence[NDArray[np.float32]], right: Sequence[NDArray[np.float32]]) -> bool:
    """Tell whether two sets of results are equal to the bit."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True))


def mapped_addresses(weights: Path, tensors: Sequence[MappedTensor]) -> dict[str, int]:
    """Return where this process has mapped tensors of a weights file; what is not mapped is absent."""
    spans = live_mappings(weights)
    return {tensor.name: address for tensor in tensors if (address := _address(spans, tensor)) is not None}


def is_read(
    session: ort.InferenceSession,
    shape: GemmaShape,
    addresses: Sequence[tuple[int, int]],
    expected: Sequence[NDArray[np.float32]],
) -> bool:
    """Overwrite memory of a session and tell whether its results change. The session is spoilt afterwards.

    Parameters
    ----------
    session
        The session.
    shape
        Its dimensions.
    addresses
        Address and length in bytes of each stretch to overwrite.
    expected
        Results of `run_probes` while the memory was sound.
    """
    for address, length in addresses:
        memory = np.frombuffer(memory_view(address, length), np.uint8)
        memory ^= np.uint8(_STRIKE)
    return not same(run_probes(session, shape), expected)


def _address(spans: Sequence[Span], tensor: MappedTensor) -> int | None:
    end = tensor.offset + tensor.page_count * PAGE_SIZE
    for span in spans:
        if span.file_offset <= tensor.offset and end <= span.file_offset + span.length:
            return span.address + tensor.offset - span.file_offset
    return None
