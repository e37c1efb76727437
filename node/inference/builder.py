"""Build a model image from a GGUF.

Steps: read and requantise the weights; let ONNX Runtime optimise the graph and pack the weights for this
CPU; lay the packed weights out on pages of their own; load the result as the worker will, and record what
it maps and what of that its steps read; compute parity and digests; write the manifest; put the image in
its place.

All is written to a directory beside the slot that is renamed at the end: an interrupted build leaves the
slot as it was. Builds in one images directory wait for each other.

Outside ``weights.bin``, in ``model.onnx`` and so in private memory once loaded, not protected by page
digests: the graph itself (nodes, attributes such as the RMS epsilon and the attention scale) and five
integer constants of at most 32 bytes each (shapes, an axis and an index). ONNX Runtime's own code, heap and
activations are not either.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from fdir import parity
from fdir.pages import PAGE_SIZE, MappedTensor, PageTable
from node.inference import manifest as m
from node.inference.gguf_source import GgufSource
from node.inference.graph import build_graph
from node.inference.image import load_session, verify_image
from node.inference.layout import lay_out
from node.inference.probe import is_read, known_answer, mapped_addresses, run_probes, same
from node.inference.tokenizer import sentencepiece_model
from telemetry.errors import PenumbraError

Progress: TypeAlias = Callable[[str, float], object]

BUILDER_VERSION: Final = 3
"""Raised whenever a step changes what it writes."""
DEFAULT_CONTEXT: Final = 4096
"""Positions an image can address: rotary tables for 4,096 are 8 MB of every scan, for 32,768 they are 64."""
_INLINE_BYTES: Final = 64
"""Constants below this size go into the graph at first; `lay_out` moves those of float type out again."""


def _silent(_stage: str, _fraction: float) -> None:
    """Report nothing."""


def build_image(
    gguf: Path,
    images: Path,
    slot: m.Slot = "a",
    *,
    force: bool = False,
    context: int = DEFAULT_CONTEXT,
    progress: Progress = _silent,
) -> Path:
    """Build the image of a slot, or return at once if it is there, built from the same by the same.

    Parameters
    ----------
    gguf
        The model.
    images
        Directory of the slots; made if it is missing.
    slot
        ``"a"`` or ``"b"``.
    force
        Build even if the slot is up to date.
    context
        Positions the image can address, 64 or more; cut to what the model was trained for.
    progress
        Called with the name of a stage and the part of the whole build that is done, 0 to 1.

    Returns
    -------
    The slot's directory.

    Raises
    ------
    PenumbraError
        The GGUF cannot be used, or the directory cannot be written.
    """
    target = images / slot
    with _exclusive(images):
        progress("read", 0.0)
        build = _Build(GgufSource(gguf), context)
        if not force and build.is_done(target):
            progress("up to date", 1.0)
        else:
            with _new_slot(target) as work:
                build.run(work, progress)
            progress("done", 1.0)
    return target


def copy_image(images: Path, source: m.Slot, slot: m.Slot, *, force: bool = False) -> Path:
    """Fill a slot with the image of the other one, which is proven first.

    Parameters
    ----------
    images
        Directory of the slots.
    source
        The slot to copy.
    slot
        The slot to fill.
    force
        Copy even if the slot holds that image by its manifest and the sizes of its files.

    Returns
    -------
    The slot's directory.

    Raises
    ------
    PenumbraError
        The source is damaged, or the directory cannot be written.
    """
    target = images / slot
    with _exclusive(images):
        manifest = verify_image(images / source)
        if force or not _holds(target, manifest):
            with _new_slot(target) as work:
                for name in m.FILES:
                    shutil.copyfile(images / source / name, work / name)
                _flush(work)
    return target


class _Build:
    """One build: what it is made of, and its steps."""

    def __init__(self, source: GgufSource, context: int) -> None:
        self.source = source
        self.shape = msgspec.structs.replace(source.shape, context=min(context, source.shape.context))
        self.gguf_sha256 = source.sha256()
        self.cpu = m.cpu_fingerprint()

    def is_done(self, image: Path) -> bool:
        """Tell whether a slot holds what this build would make."""
        try:
            found = m.load_manifest(image)
        except PenumbraError:
            return False
        return (
            _holds(image, found)
            and found.builder == BUILDER_VERSION
            and found.gguf_sha256 == self.gguf_sha256
            and found.onnxruntime == ort.__version__
            and found.cpu == self.cpu
            and found.shape == self.shape
        )

    def run(self, work: Path, progress: Progress) -> None:
        """Write all files of the image."""
        raw = work / "raw"
        raw.mkdir()
        progress("quantise", 0.03)
        _write_raw(*build_graph(self.source, self.shape), raw)
        progress("pack", 0.25)
        expected = self._pack(raw)
        progress("lay out", 0.5)
        tensors = lay_out(
            raw / "packed.onnx",
            work / m.GRAPH,
            work / m.WEIGHTS,
            lambda part: progress("lay out", 0.5 + 0.15 * part),
        )
        shutil.rmtree(raw)
        progress("probe", 0.65)
        mapped, originals, answer = self._probe(work, tensors, expected)
        (work / m.TOKENIZER).write_bytes(sentencepiece_model(self.source))
        progress("parity", 0.75)
        table = _protect(work, mapped, lambda part: progress("parity", 0.75 + 0.2 * part))
        progress("write", 0.95)
        self._write_manifest(work, mapped, originals, answer, table)
        _flush(work)

    def _pack(self, raw: Path) -> list[NDArray[np.float32]]:
        """Let ONNX Runtime optimise the graph and pack its weights; return what it computes."""
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.log_severity_level = 3
        options.optimized_model_filepath = str(raw / "packed.onnx")
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", "packed.bin"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", str(_INLINE_BYTES)),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(key, value)
        session = ort.InferenceSession(str(raw / "raw.onnx"), options, providers=["CPUExecutionProvider"])
        return run_probes(session, self.shape)

    def _probe(
        self, work: Path, tensors: list[MappedTensor], expected: list[NDArray[np.float32]]
    ) -> tuple[list[MappedTensor], list[MappedTensor], str]:
        """Load the image as the worker will; return what it maps, what it only loaded, and its known answer.

        Scales are packed along with the weights, so a step should not read the separate ones; whether that
        is so is tried, not assumed.
        """
        session = load_session(work, 1)
        if not same(run_probes(session, self.shape), expected):
            raise PenumbraError(
                f"{work}: the finished image does not compute what the model it was packed from does",
                f"this is a fault of the builder with onnxruntime {ort.__version__}: report it",
            )
        addresses = mapped_addresses(work / m.WEIGHTS, tensors)
        mapped = [tensor for tensor in tensors if tensor.name in addresses]
        scales = [tensor for tensor in mapped if tensor.role == "scale"]
        answer = known_answer(session, self.shape)
        read = is_read(session, self.shape, [(addresses[t.name], t.length) for t in scales], expected)
        del session
        gc.collect()
        return (
            [msgspec.structs.replace(t, read=read if t.role == "scale" else True) for t in mapped],
            [msgspec.structs.replace(t, read=False) for t in tensors if t.name not in addresses],
            answer,
        )

    def _write_manifest(
        self,
        work: Path,
        mapped: list[MappedTensor],
        originals: list[MappedTensor],
        answer: str,
        table: PageTable,
    ) -> None:
        files = [name for name in m.FILES if name != m.MANIFEST]
        manifest = m.Manifest(
            format=m.FORMAT_VERSION,
            builder=BUILDER_VERSION,
            model=self.source.model_name,
            gguf_sha256=self.gguf_sha256,
            onnxruntime=ort.__version__,
            cpu=self.cpu,
            page_size=PAGE_SIZE,
            shape=self.shape,
            bos=self.source.bos,
            eos=self.source.eos,
            sizes={name: (work / name).stat().st_size for name in files},
            sha256={
                name: hashlib.sha256((work / name).read_bytes()).hexdigest()
                for name in (m.GRAPH, m.TOKENIZER, m.DIGESTS)
            },
            weight_pages=len(table.pages),
            parity_pages=len(table.parity),
            parity_data=parity.DATA_PAGES,
            parity_extra=parity.PARITY_PAGES,
            known_answer=answer,
            tensors=tuple(mapped),
            originals=tuple(originals),
        )
        (work / m.MANIFEST).write_bytes(m.encode_manifest(manifest))


def _write_raw(model: onnx.ModelProto, tensors: dict[str, NDArray[np.generic]], raw: Path) -> None:
    """Write the graph as ``raw.onnx`` and its larger initialisers as ``raw.bin``."""
    with (raw / "raw.bin").open("wb") as file:
        for name, value in tensors.items():
            contiguous = np.ascontiguousarray(value)
            entry = model.graph.initializer.add(
                name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(value.dtype), dims=value.shape
            )
            if value.nbytes < _INLINE_BYTES:
                entry.raw_data = contiguous.tobytes()
                continue
            entry.data_location = onnx.TensorProto.EXTERNAL
            for key, content in (("location", "raw.bin"), ("offset", file.tell()), ("length", value.nbytes)):
                entry.external_data.add(key=key, value=str(content))
            file.write(contiguous.data)
            file.write(bytes(-value.nbytes % PAGE_SIZE))
    onnx.save(model, str(raw / "raw.onnx"))


def _protect(work: Path, mapped: list[MappedTensor], progress: Callable[[float], object]) -> PageTable:
    """Write parity and digests of the weights file."""
    with (
        (work / m.WEIGHTS).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as weights,
        memoryview(weights) as data,
    ):
        pages = parity.group_count(len(data) // PAGE_SIZE) * parity.PARITY_PAGES
        with (work / m.PARITY).open("w+b") as out:
            out.truncate(pages * PAGE_SIZE)
            with mmap.mmap(out.fileno(), 0) as extra:

                def write(at: int, block: bytes) -> None:
                    extra[at : at + len(block)] = block

                parity.encode(data, write, progress, os.cpu_count() or 1)
                with memoryview(extra) as view:
                    table = PageTable.build(data, view, mapped)
    (work / m.DIGESTS).write_bytes(table.to_bytes())
    return table


def _flush(work: Path) -> None:
    """Bring all files to the disk: the golden copy must be there when the cached one is struck."""
    for path in (*work.iterdir(), work):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _holds(image: Path, manifest: m.Manifest) -> bool:
    """Tell whether a slot holds an image, by its manifest and the sizes of its files."""
    try:
        sizes = {name: (image / name).stat().st_size for name in manifest.sizes}
        return sizes == manifest.sizes and m.load_manifest(image) == manifest
    except (OSError, PenumbraError):
        return False


@contextmanager
def _new_slot(target: Path) -> Iterator[Path]:
    """Give a directory to build in; it becomes the slot if nothing is raised, and is removed otherwise."""
    work = target.with_name(f".{target.name}.building")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        _replace(target, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(target: Path, work: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _exclusive(images: Path) -> Iterator[None]:
    """Hold the images directory, made if it is missing; what the system refuses becomes a `PenumbraError`."""
    try:
        images.mkdir(parents=True, exist_ok=True)
        with (images / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise PenumbraError(
            f"{error.filename or images}: cannot write the image: {error.strerror or error}",
            "the images directory must be writable, with about 8 times the size of the GGUF free",
        ) from error
