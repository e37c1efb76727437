"""A model as the worker runs it: the sessions of an image and its head, loaded and proven.

Trunk and screen are sessions of ONNX Runtime, which map their tensors from ``weights.bin``. What they do not
map (the screen's rotation, the table of an untied head) this module maps itself, private and writable, so
that it is scanned, struck and repaired like the rest.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fdir.pages import PAGE_SIZE, MappedTensor, memory_view
from node.inference import manifest as m
from node.inference.arithmetic import configure
from node.inference.head import ScreenedHead
from node.inference.packing import PackedMatrix, unpack
from node.inference.probe import mapped_addresses, prove_sessions
from telemetry.errors import PenumbraError

_REBUILD = "build the image again: `penumbra model build --force`"
_ALIGNMENT = 64
SPIN_US = "50"
"""How long a thread waits awake for the next operator, us: 3 % off a step for 2 % more CPU time, and no loss
beside a busy process (measured, AMD Zen 3)."""
_AGAIN = "check the files with `penumbra model verify`; if they are whole, load again"


@dataclass(frozen=True)
class Model:
    """What a worker runs. Keep it as long as anything looks at its memory.

    Parameters
    ----------
    directory
        The image slot it was loaded from.
    manifest
        That image's manifest.
    trunk
        Session of ``trunk.onnx`` or ``trunk_checked.onnx``; `node.inference.graph` tells inputs and outputs.
    screen
        Session of ``screen.onnx``, which `head` runs.
    head
        Finds the largest logits of a hidden state.
    checked
        Whether the trunk also returns ``residual``.
    check_limits
        float32, shape ``(matmuls,)``: the largest sound residual of each, in the order of
        ``manifest.checks.names``; None unless `checked`.
    kept
        Memory that must live as long: the mapping of tensors no session maps, and what `load_graph` says.
    """

    directory: Path
    manifest: m.Manifest
    trunk: ort.InferenceSession
    screen: ort.InferenceSession
    head: ScreenedHead
    checked: bool
    check_limits: NDArray[np.float32] | None
    kept: tuple[mmap.mmap, ...]

    @property
    def shape(self) -> m.GemmaShape:
        """Dimensions of the model."""
        return self.manifest.shape


def open_model(image_dir: Path, threads: int, *, checked: bool = False) -> Model:
    """Load a model image, and prove that it computes on the mapped weights what it did when it was built.

    ONNX Runtime packs the original weights again while loading, and takes the packed ones of the image only
    if the two are equal; else it may, without a word, compute on packed weights in memory of its own, which
    no page digest covers. So the mapped pages are dropped, a known answer is asked for, and all packed
    weights must have come back from the mapping.

    Parameters
    ----------
    image_dir
        Directory of the slot.
    threads
        Threads that compute, 1 or more. The result does not depend on it, to the bit.
    checked
        Take the trunk whose matrix products are checked by checksums.

    Raises
    ------
    PenumbraError
        The manifest is missing or damaged, the image is for another machine, ONNX Runtime cannot load it,
        or the sessions fail the proof.
    """
    model = load_model(image_dir, threads, checked=checked)
    manifest = model.manifest
    sessions = (model.trunk, model.screen)
    answer, unused = prove_sessions(
        *sessions, manifest.shape, image_dir / m.WEIGHTS, manifest.mapped(checked)
    )
    expected = manifest.known_answers[m.CHECKED_TRUNK if checked else m.TRUNK]
    if answer != expected:
        raise PenumbraError(
            f"{image_dir}: the loaded model computes {answer}, not the known answer {expected}", _AGAIN
        )
    if unused:
        raise PenumbraError(
            f"{image_dir}: ONNX Runtime does not compute on the image's {unused[0]} but packed its own: "
            "what it read while loading was damaged",
            _AGAIN,
        )
    return model


def load_model(image_dir: Path, threads: int, *, checked: bool = False) -> Model:
    """Load an image built for this machine, without a proof of what it computes.

    Parameters
    ----------
    image_dir
        Directory of the slot.
    threads
        Threads that compute, 1 or more.
    checked
        Take the trunk whose matrix products are checked by checksums.

    Raises
    ------
    PenumbraError
        The manifest is missing or damaged, the image is for another machine, or ONNX Runtime cannot load it.
    """
    manifest = m.load_manifest(image_dir)
    m.check_machine(manifest, image_dir, ort.__version__)
    weights = image_dir / m.WEIGHTS
    before = mapped_addresses(weights, manifest.tensors)
    graphs = (m.CHECKED_TRUNK if checked else m.TRUNK, m.SCREEN)
    with ThreadPoolExecutor(len(graphs), "penumbra-load") as pool:
        loading = [
            pool.submit(load_graph, image_dir / name, threads, manifest.tensors, manifest.rebuilt[name])
            for name in graphs
        ]
        (trunk, first), (screen, second) = (future.result() for future in loading)
    own, arrays = _map_own(weights, manifest)
    if f"{m.TABLE}.weight" not in arrays:
        after = mapped_addresses(weights, manifest.tensors)
        new = {name: set(after[name]) - set(before[name]) for name in after}
        arrays |= _embedding_table(manifest, new)
    limits = np.array(manifest.checks.limits, np.float32) if checked else None
    head = _head(manifest, screen, arrays)
    return Model(image_dir, manifest, trunk, screen, head, checked, limits, (own, first, second))


def load_graph(
    path: Path, threads: int, tensors: Sequence[MappedTensor], rebuilt: Sequence[PackedMatrix]
) -> tuple[ort.InferenceSession, mmap.mmap]:
    """Load a graph of an image, its packed matrices recognised by originals that are rebuilt from them.

    Parameters
    ----------
    path
        The graph.
    threads
        Threads that compute, 1 or more.
    tensors
        Tensors of the weights file.
    rebuilt
        Matrices whose originals are not in the file.

    Returns
    -------
    The session, and the memory the originals were in: it is empty by now, but the session knows its address,
    so it must be kept as long.

    Raises
    ------
    PenumbraError
        ONNX Runtime cannot load the graph.
    """
    places = {tensor.name: tensor for tensor in tensors}
    sizes = [-(-matrix.original_bytes // _ALIGNMENT) * _ALIGNMENT for matrix in rebuilt]
    memory = mmap.mmap(-1, max(sum(sizes), PAGE_SIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # large pages are faster to fill, where the kernel has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(memory, np.uint8)
    weights = np.memmap(path.with_name(m.WEIGHTS), np.uint8, "r")
    given: dict[str, ort.OrtValue] = {}
    at = 0
    for matrix, size in zip(rebuilt, sizes, strict=True):
        packed = places[matrix.weight + m.PACKED]
        content = weights[packed.offset : packed.offset + packed.length]
        original = unpack(content, matrix, room[at : at + matrix.original_bytes])
        given[matrix.weight] = ort.OrtValue.ortvalue_from_numpy(original.codes)
        given[matrix.scale] = ort.OrtValue.ortvalue_from_numpy(original.scales)
        at += size
    session = load_session(path, threads, given)
    memory.madvise(mmap.MADV_DONTNEED)
    return session, memory


def load_session(
    path: Path, threads: int, given: Mapping[str, ort.OrtValue] | None = None
) -> ort.InferenceSession:
    """Load an optimised graph.

    The graphs in an image are already optimised and their weights are packed: a session maps the packed
    weights from ``weights.bin``, private and writable, and computes on that mapping. Threads that
    wait spin for `SPIN_US` only: without end, a step was 40 % slower when another process wanted a core.

    Parameters
    ----------
    path
        The graph.
    threads
        Threads that compute, 1 or more.
    given
        Tensors by name that are not in the graph's weights file.

    Raises
    ------
    PenumbraError
        ONNX Runtime cannot load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    configure(options)
    for name, value in (given or {}).items():
        options.add_initializer(name, value)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise PenumbraError(f"{path}: ONNX Runtime cannot load it: {error}", _REBUILD) from error


def _map_own(weights: Path, manifest: m.Manifest) -> tuple[mmap.mmap, dict[str, NDArray[np.uint8]]]:
    """Map what no session maps, private and writable; returns the mapping and each tensor's bytes in it."""
    own = [tensor for tensor in manifest.tensors if not tensor.mapped_by]
    start = own[0].offset
    end = own[-1].offset + own[-1].page_count * PAGE_SIZE
    with weights.open("rb") as file:
        mapping = mmap.mmap(
            file.fileno(), end - start, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start
        )
    whole = np.frombuffer(mapping, np.uint8)
    return mapping, {t.name: whole[t.offset - start : t.offset - start + t.length] for t in own}


def _embedding_table(manifest: m.Manifest, addresses: dict[str, set[int]]) -> dict[str, NDArray[np.uint8]]:
    """Return the embedding table as the trunk has just mapped it, named as the table of a head."""
    lengths = {tensor.name: tensor.length for tensor in manifest.tensors}
    found = {}
    for kind in ("weight", "scale"):
        name = f"{m.EMBEDDING}.{kind}"
        (address,) = addresses[name]
        found[f"{m.TABLE}.{kind}"] = np.frombuffer(memory_view(address, lengths[name]), np.uint8)
    return found


def _head(
    manifest: m.Manifest, screen: ort.InferenceSession, arrays: dict[str, NDArray[np.uint8]]
) -> ScreenedHead:
    shape = manifest.shape
    scales = arrays[f"{m.TABLE}.scale"].view(np.float32).reshape(shape.vocab, -1)
    return ScreenedHead(
        screen,
        arrays[f"{m.TABLE}.weight"].reshape(*scales.shape, -1),
        scales,
        arrays[m.ROTATION].view(np.float64).reshape(shape.width, shape.width),
        manifest.screen,
    )
