"""Build a model image from a GGUF.

Steps: read and requantise the weights; measure the operators that the proofs rest on; let ONNX Runtime
optimise the graphs and pack the weights for this CPU; run the calibration text, from which the screen's
rotation and the limits of the checks are made; lay the packed weights out on pages of their own; load the
result as the worker will, and record what it maps and what of that its steps read; compute parity and
digests; write the manifest; put the image in its place.

The same GGUF, ONNX Runtime and CPU features give the same image, to the byte.

All is written to a directory beside the slot that is renamed at the end: an interrupted build leaves the
slot as it was. Builds in one images directory wait for each other.

Outside ``weights.bin``, in the graphs and so in private memory once loaded, not protected by page
digests: the graphs themselves (nodes, attributes such as the RMS epsilon and the attention scale) and
integer constants of at most 32 bytes each (shapes, an axis and an index). ONNX Runtime's own code, heap and
activations are not either.
"""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from fdir import parity
from fdir.pages import PAGE_SIZE, MappedTensor, PageTable
from node.inference import manifest as m
from node.inference.arithmetic import SETTINGS, OperatorError, check_operators, configure
from node.inference.attention import measure_window_step
from node.inference.calibration import calibrate, calibration_text
from node.inference.gguf_source import GgufSource, QuantMatrix
from node.inference.graph import build_trunk
from node.inference.head import ScreenedHead
from node.inference.layout import lay_out
from node.inference.model import load_graph, load_session
from node.inference.operators import measure, products, prove_rows_alike, sum_limit
from node.inference.packing import PackedMatrix
from node.inference.probe import is_read, known_answer, mapped_addresses, run_probes, run_screen, same
from node.inference.screen import Screen, build_screen
from node.inference.screen_bounds import ScreenBounds
from node.inference.slot_files import exclusive, flush, holds, new_slot
from node.inference.tokenizer import Tokenizer, sentencepiece_model
from telemetry.errors import PenumbraError

Progress: TypeAlias = Callable[[str, float], object]
_Run: TypeAlias = Callable[[ort.InferenceSession], list[NDArray[np.float32]]]

BUILDER_VERSION: Final = 11
"""Raised whenever a step changes what it writes."""
MIN_CONTEXT: Final = 64
"""Positions the probes need."""
DEFAULT_CONTEXT: Final = 4096
"""Positions an image can address, if the model has as many: rotary tables for 4,096 are 8 MB, for 32,768
they are 64."""
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
    context: int | None = None,
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
        Positions the image can address, 64 to what the model was trained for; None for `DEFAULT_CONTEXT`, or
        the model's own limit if that is less.
    progress
        Called with the name of a stage and the part of the whole build that is done, 0 to 1.

    Returns
    -------
    The slot's directory.

    Raises
    ------
    PenumbraError
        The GGUF cannot be used, `context` is out of range, or the directory cannot be written.
    """
    target = images / slot
    with exclusive(images):
        progress("read", 0.0)
        build = _Build(GgufSource(gguf), context)
        if not force and build.is_done(target):
            progress("up to date", 1.0)
        else:
            with new_slot(target) as work:
                build.run(work, progress)
            progress("done", 1.0)
    return target


@dataclass(frozen=True)
class _Packed:
    """A graph whose weights ONNX Runtime has packed, and what it computes on the probes."""

    optimised: Path
    run: _Run
    expected: list[NDArray[np.float32]]


class _Build:
    """One build: what it is made of, and its steps."""

    def __init__(self, source: GgufSource, context: int | None) -> None:
        self.source = source
        limit = source.shape.context
        if context is not None and not MIN_CONTEXT <= context <= limit:
            raise PenumbraError(
                f"{source.path}: a context of {context} was asked for, the model was trained for {limit}",
                f"ask for {MIN_CONTEXT} to {limit}",
            )
        positions = min(DEFAULT_CONTEXT, limit) if context is None else context
        self.shape = msgspec.structs.replace(source.shape, context=positions)
        self.gguf_sha256 = source.sha256()
        self.cpu = m.cpu_fingerprint()

    def is_done(self, image: Path) -> bool:
        """Tell whether a slot holds what this build would make."""
        try:
            found = m.load_manifest(image)
        except PenumbraError:
            return False
        return (
            holds(image, found)
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
        (work / m.TOKENIZER).write_bytes(sentencepiece_model(self.source))
        progress("quantise", 0.03)
        plain = build_trunk(self.source, self.shape, checked=False)
        operators = self._measure(*plain, alike=True)
        window_step = measure_window_step(self.shape)
        packed = {m.TRUNK: self._pack(raw / m.TRUNK, *plain, self._run_trunk)}
        del plain
        progress("pack", 0.2)
        checked = build_trunk(self.source, self.shape, checked=True)
        packed[m.CHECKED_TRUNK] = self._pack(raw / m.CHECKED_TRUNK, *checked, self._run_trunk)
        del checked
        progress("calibrate", 0.3)
        text = Tokenizer(work / m.TOKENIZER).encode(calibration_text())
        checked_trunk = load_session(packed[m.CHECKED_TRUNK].optimised, os.cpu_count() or 1)
        prove_rows_alike(checked_trunk, self.shape)
        found = calibrate(checked_trunk, self.shape, text)
        del checked_trunk
        progress("screen", 0.4)
        tied = not self.source.has(f"{m.TABLE}.weight")
        name = m.EMBEDDING if tied else m.TABLE
        table = self.source.matrix(f"{name}.weight", self.shape.vocab, self.shape.width)
        screen = build_screen(table, found.hidden)
        own: dict[str, NDArray[np.generic]] = {m.ROTATION: screen.rotation}
        if not tied:
            own |= dict(zip((f"{name}.weight", f"{name}.scale"), (table.codes, table.scales), strict=True))
        of_screen = self._measure(screen.model, screen.tensors, alike=False)
        packed[m.SCREEN] = self._pack(raw / m.SCREEN, screen.model, screen.tensors, run_screen)
        bounds = self._bounds(screen, table, packed[m.SCREEN].optimised, found.hidden, of_screen)
        progress("lay out", 0.5)
        tensors, rebuilt = lay_out(
            {graph: each.optimised for graph, each in packed.items()},
            own,
            work / m.WEIGHTS,
            self.shape,
            lambda part: progress("lay out", 0.5 + 0.15 * part),
        )
        shutil.rmtree(raw)
        progress("probe", 0.65)
        mapped, answers = self._probe(work, tensors, rebuilt, packed)
        progress("parity", 0.75)
        pages = _protect(work, mapped, lambda part: progress("parity", 0.75 + 0.2 * part))
        progress("write", 0.95)
        names = {tensor.name for tensor in mapped}
        self._write_manifest(
            work,
            pages,
            tensors=tuple(mapped),
            originals=tuple(tensor for tensor in tensors if tensor.name not in names),
            rebuilt=rebuilt,
            known_answers=answers,
            operators=operators + of_screen,
            window_step=window_step,
            screen=bounds,
            checks=found.checks,
        )
        flush(work)

    def _measure(
        self, model: onnx.ModelProto, tensors: Mapping[str, NDArray[np.generic]], *, alike: bool
    ) -> tuple[OperatorError, ...]:
        """Measure the matrix products of a graph; one that errs too much ends the build."""
        found = tuple(measure(product, alike=alike) for product in products(model, tensors))
        check_operators(found, f"this machine ({self.cpu}, onnxruntime {ort.__version__})")
        return found

    @staticmethod
    def _bounds(
        screen: Screen,
        table: QuantMatrix,
        optimised: Path,
        hidden: NDArray[np.float32],
        operators: tuple[OperatorError, ...],
    ) -> ScreenBounds:
        """Return the bounds of a screen with the limit that its sum keeps to on this machine."""
        session = load_session(optimised, os.cpu_count() or 1)
        codes = table.codes.reshape(*table.scales.shape, -1)
        head = ScreenedHead(session, codes, table.scales, screen.rotation, screen.bounds)
        limit = sum_limit(head, screen, table, hidden, operators)
        return msgspec.structs.replace(screen.bounds, sum_limit=limit)

    def _pack(
        self, raw: Path, model: onnx.ModelProto, tensors: Mapping[str, NDArray[np.generic]], run: _Run
    ) -> _Packed:
        """Let ONNX Runtime optimise a graph and pack its weights."""
        raw.mkdir()
        _write_raw(model, tensors, raw)
        optimised = raw / "packed.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimised)
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", "packed.bin"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", str(_INLINE_BYTES)),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(key, value)
        configure(options)
        session = ort.InferenceSession(str(raw / "raw.onnx"), options, providers=["CPUExecutionProvider"])
        (raw / "raw.bin").unlink()
        return _Packed(optimised, run, run(session))

    def _run_trunk(self, session: ort.InferenceSession) -> list[NDArray[np.float32]]:
        return run_probes(session, self.shape)

    def _probe(
        self,
        work: Path,
        tensors: list[MappedTensor],
        rebuilt: Mapping[str, tuple[PackedMatrix, ...]],
        packed: Mapping[str, _Packed],
    ) -> tuple[list[MappedTensor], dict[str, str]]:
        """Load each graph as the worker will; return what sessions and loader map, and the known answers.

        Scales are packed along with the weights, so a step should not read separate ones, if there are any;
        whether that is so is tried, not assumed.
        """
        mapped = {tensor.name: tensor for tensor in tensors if not tensor.mapped_by}
        loaded = {graph: load_graph(work / graph, 1, tensors, rebuilt[graph]) for graph in packed}
        answers = {
            trunk: known_answer(loaded[trunk][0], loaded[m.SCREEN][0], self.shape)
            for trunk in (m.TRUNK, m.CHECKED_TRUNK)
        }
        del loaded
        for graph, each in packed.items():
            gc.collect()
            session, kept = load_graph(work / graph, 1, tensors, rebuilt[graph])
            if not same(each.run(session), each.expected):
                raise PenumbraError(
                    f"{work / graph}: the finished graph does not compute what it was packed from does",
                    f"this is a fault of the builder with onnxruntime {ort.__version__}: report it",
                )
            places = mapped_addresses(work / m.WEIGHTS, tensors)
            mine = [tensor for tensor in tensors if places[tensor.name]]
            scales = [(places[tensor.name][0], tensor.length) for tensor in mine if tensor.role == "scale"]
            read = bool(scales) and is_read(partial(each.run, session), scales, each.expected)
            del session, kept
            for tensor in mine:
                mapped[tensor.name] = msgspec.structs.replace(tensor, read=read or tensor.role != "scale")
        return [mapped[tensor.name] for tensor in tensors if tensor.name in mapped], answers

    def _write_manifest(self, work: Path, pages: PageTable, **found: Any) -> None:
        files = [name for name in m.FILES if name != m.MANIFEST]
        manifest = m.Manifest(
            format=m.FORMAT_VERSION,
            builder=BUILDER_VERSION,
            model=self.source.model_name,
            gguf_sha256=self.gguf_sha256,
            onnxruntime=ort.__version__,
            cpu=self.cpu,
            options=SETTINGS,
            page_size=PAGE_SIZE,
            shape=self.shape,
            bos=self.source.bos,
            eos=self.source.eos,
            sizes={name: (work / name).stat().st_size for name in files},
            sha256={
                name: hashlib.sha256((work / name).read_bytes()).hexdigest()
                for name in (*m.GRAPHS, m.TOKENIZER, m.DIGESTS)
            },
            weight_pages=len(pages.pages),
            parity_pages=len(pages.parity),
            parity_data=parity.DATA_PAGES,
            parity_extra=parity.PARITY_PAGES,
            **found,
        )
        (work / m.MANIFEST).write_bytes(m.encode_manifest(manifest))


def _write_raw(model: onnx.ModelProto, tensors: Mapping[str, NDArray[np.generic]], raw: Path) -> None:
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
