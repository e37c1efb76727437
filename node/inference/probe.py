"""Find out what sessions map from their weights file, and what of it the steps of the model really read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
import xxhash
from numpy.typing import NDArray

from fdir.pages import PAGE_SIZE, MappedTensor, Span, live_mappings, memory_view
from fdir.residency import can_observe, drop_pages, present_pages
from node.inference.manifest import PACKED, GemmaShape

_PROBES: Final = ((1, (40, 1, 7)), (4, (8, 1)))
"""Batch size and tokens of each run in turn: kernels differ for one row, a few rows and many."""
_SCREEN_BATCHES: Final = (1, 4)
_KNOWN: Final = ((1, (8, 1)),)
_KNOWN_SCREEN: Final = (1, 4)
"""For a single row the kernel of 4-bit weights leaves a tenth of the packed bytes unread (measured)."""
_ROOM: Final = 64
_STRIKE: Final = 0xA5
_SLACK_PAGES: Final = 1
"""Packed weights end in up to 126 bytes of slack that are not read; these may have a page of their own."""


def run_probes(
    trunk: ort.InferenceSession,
    shape: GemmaShape,
    probes: Sequence[tuple[int, Sequence[int]]] = _PROBES,
) -> list[NDArray[np.float32]]:
    """Run a fixed set of prefills and steps.

    Parameters
    ----------
    trunk
        A session of a trunk, see `node.inference.graph`.
    shape
        Its dimensions; ``context`` must be 64 or more.
    probes
        Batch size and tokens of each run in turn, for each probe.

    Returns
    -------
    Hidden states, caches and, if the trunk is checked, residuals of every run, to be compared bit for bit
    with those of another session.
    """
    names = [output.name for output in trunk.get_outputs()]
    tokens = np.random.default_rng(0)
    results: list[NDArray[np.float32]] = []
    for batch, lengths in probes:
        room = np.zeros((batch, shape.kv_heads, _ROOM, shape.head_dim), np.float32)
        caches = {f"{part}.{layer}": room for layer in range(shape.layers) for part in ("key", "value")}
        total = 0
        for length in lengths:
            positions = np.arange(total, total + length)
            total += length
            last, largest = np.full(batch, total - 1, np.int32), np.array(total, np.int32)
            feed: dict[str, NDArray[np.generic]] = {
                "input_ids": tokens.integers(0, shape.vocab, (batch, length)),
                "position_ids": np.tile(positions, (batch, 1)),
                "seqlens_k": last,
                "total_sequence_length": largest,
                "window_seqlens_k": last,
                "window_total_sequence_length": largest,
                **{f"past_{name}": cache for name, cache in caches.items()},
            }
            outputs = dict(zip(names, trunk.run(names, feed), strict=True))
            caches = {name: outputs[f"present_{name}"] for name in caches}
            results += outputs.values()
    return results


def run_screen(
    screen: ort.InferenceSession, batches: Sequence[int] = _SCREEN_BATCHES
) -> list[NDArray[np.float32]]:
    """Run a screen on fixed inputs.

    Parameters
    ----------
    screen
        A session of a screen, see `node.inference.screen`.
    batches
        Batch size of each run.

    Returns
    -------
    All outputs of every run.
    """
    numbers = np.random.default_rng(0)
    results: list[NDArray[np.float32]] = []
    for batch in batches:
        feed = {
            entry.name: numbers.integers(-127, 128, (batch, entry.shape[1])).astype(np.float32)
            for entry in screen.get_inputs()
        }
        results += screen.run(None, feed)
    return results


def known_answer(trunk: ort.InferenceSession, screen: ort.InferenceSession, shape: GemmaShape) -> str:
    """Digest what sessions compute for a fixed input: a prefill of eight tokens, one step, one screening.

    The results depend on every weight; they are the same to the bit for any number of threads.

    Parameters
    ----------
    trunk
        Session of the trunk.
    screen
        Session of the screen.
    shape
        Dimensions of the model.

    Returns
    -------
    xxh3_128 of all results, 32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    for result in (*run_probes(trunk, shape, _KNOWN), *run_screen(screen, _KNOWN_SCREEN)):
        digest.update(np.ascontiguousarray(result).data)
    return digest.hexdigest()


def same(left: Sequence[NDArray[np.float32]], right: Sequence[NDArray[np.float32]]) -> bool:
    """Tell whether two sets of results are equal to the bit."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True))


def prove_sessions(
    trunk: ort.InferenceSession,
    screen: ort.InferenceSession,
    shape: GemmaShape,
    weights: Path,
    tensors: Sequence[MappedTensor],
) -> tuple[str, list[str]]:
    """Ask for the known answer, and see which packed weights were not read from the mapped file for it.

    Parameters
    ----------
    trunk, screen
        Sessions that were just loaded: their mapped pages are dropped, and changes to them are lost.
    shape
        Dimensions of the model.
    weights
        The weights file.
    tensors
        What they should have mapped from it.

    Returns
    -------
    The answer, and the names of the unused tensors; none where the kernel does not tell.
    """
    packed = [tensor for tensor in tensors if tensor.name.endswith(PACKED)]
    spans = live_mappings(weights)
    places = {tensor.name: _addresses(spans, tensor) for tensor in packed}
    for tensor in packed:
        for address in places[tensor.name]:
            drop_pages(address, tensor.page_count * PAGE_SIZE)
    answer = known_answer(trunk, screen, shape)
    if not can_observe():
        return answer, []

    def was_read(tensor: MappedTensor) -> bool:
        return any(
            present_pages(address, tensor.page_count).sum() >= tensor.page_count - _SLACK_PAGES
            for address in places[tensor.name]
        )

    return answer, [tensor.name for tensor in packed if not was_read(tensor)]


def mapped_addresses(weights: Path, tensors: Sequence[MappedTensor]) -> dict[str, list[int]]:
    """Return where this process has mapped tensors of a weights file: once for each session that does."""
    spans = live_mappings(weights)
    return {tensor.name: _addresses(spans, tensor) for tensor in tensors}


def is_read(
    run: Callable[[], Sequence[NDArray[np.float32]]],
    addresses: Sequence[tuple[int, int]],
    expected: Sequence[NDArray[np.float32]],
) -> bool:
    """Overwrite memory of a session and tell whether its results change. The session is spoilt afterwards.

    Parameters
    ----------
    run
        Runs the probes.
    addresses
        Address and length in bytes of each stretch to overwrite.
    expected
        What it returned while the memory was sound.
    """
    for address, length in addresses:
        memory = np.frombuffer(memory_view(address, length), np.uint8)
        memory ^= np.uint8(_STRIKE)
    return not same(run(), expected)


def _addresses(spans: Sequence[Span], tensor: MappedTensor) -> list[int]:
    """Return where a tensor is mapped: once for each session of this process."""
    end = tensor.offset + tensor.page_count * PAGE_SIZE
    return [
        span.address + tensor.offset - span.file_offset
        for span in spans
        if span.file_offset <= tensor.offset and end <= span.file_offset + span.length
    ]
