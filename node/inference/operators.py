"""Measure the matrix products of a graph against float64, when an image is built.

Each is run by itself, with the weights of the image, on inputs on the grid of
`node.inference.head.quantize_input`, some of them with outliers as activations have them. In a trunk, rows of
a batch and numbers of threads must give the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from node.inference.arithmetic import MARGIN, OPTIONS, UNIT, OperatorError, configure
from node.inference.gguf_source import QuantMatrix
from node.inference.head import ScreenedHead, quantize_input
from node.inference.manifest import GemmaShape
from node.inference.screen import Screen
from telemetry.errors import PenumbraError

OPERATOR: Final = "MatMulNBits"
BATCHES: Final = (2, 3, 4, 5, 8)
"""Rows together: kernels take one, two or four at a time; a worker decodes up to eight."""
PREFILL_ROWS: Final = 64
"""Rows of a chunk of a prompt; they need not be equal to steps, but must be as exact."""
THREADS: Final = (1, 3)
_REFERENCE_ROWS: Final = 8
_STEPS: Final = 6
_STATES: Final = 48
"""States of each kind that the limit of the sum is measured on."""
_CHUNK: Final = 8192
"""Rows of weights held in float64 at a time."""
_Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Product:
    """One matrix product of a graph.

    Parameters
    ----------
    bits, block
        Of its weights.
    codes
        uint8, shape ``(rows, blocks, bytes of a block)``.
    scales
        float32, shape ``(rows, blocks)``.
    """

    bits: int
    block: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return len(self.codes)

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return int(self.codes.shape[1]) * self.block


def products(model: onnx.ModelProto, tensors: Mapping[str, NDArray[np.generic]]) -> list[Product]:
    """Return the matrix products of a graph, the first of each shape.

    Parameters
    ----------
    model
        The graph, not optimised.
    tensors
        Its initialisers.
    """
    found: dict[tuple[int, int, int, int], Product] = {}
    for node in model.graph.node:
        if node.op_type == OPERATOR:
            given = {each.name: each.i for each in node.attribute}
            codes, scales = (np.asarray(tensors[name]) for name in node.input[1:3])
            shape = (given["bits"], given["block_size"], given["K"], given["N"])
            product = Product(given["bits"], given["block_size"], codes, scales.reshape(given["N"], -1))
            found.setdefault(shape, product)
    return list(found.values())


def measure(product: Product, *, alike: bool, options: Mapping[str, str] = OPTIONS) -> OperatorError:
    """Run a product on grid inputs and return its largest error.

    Parameters
    ----------
    product
        The product.
    alike
        Whether a row's result must be the same to the bit whatever is computed beside it, on any number of
        threads: so in a trunk. What a screen bounds is computed exactly afterwards.
    options
        Of the sessions.

    Raises
    ------
    PenumbraError
        It must be, and is not.
    """
    inputs = _inputs(product)
    model = _graph(product)
    one, *others = (_results(model, inputs, threads, options) for threads in THREADS)
    for batch in one.batches if alike else ():
        if batch.tobytes() != one.alone[: len(batch)].tobytes():
            raise _not_alike(product, f"{len(batch)} rows together", "each of them alone")
    for threads, other in zip(THREADS[1:], others, strict=True) if alike else ():
        if [each.tobytes() for each in one.all()] != [each.tobytes() for each in other.all()]:
            raise _not_alike(product, f"{threads} threads", "one thread")
    worst = max(_error(product, inputs[: len(rows)], rows) for rows in (one.alone, one.chunk))
    return OperatorError(
        bits=product.bits,
        block=product.block,
        columns=product.columns,
        rows=product.rows,
        roundings=worst,
    )


def prove_rows_alike(trunk: ort.InferenceSession, shape: GemmaShape) -> None:
    """Check that a step of a batch computes each row as if it were alone, to the bit.

    Parameters
    ----------
    trunk
        Session of a trunk, see `node.inference.graph`.
    shape
        Its dimensions.

    Raises
    ------
    PenumbraError
        A row differs.
    """
    tokens = np.random.default_rng(1).integers(0, shape.vocab, (_REFERENCE_ROWS, _STEPS))
    alone = [_steps(trunk, shape, tokens[row : row + 1]) for row in range(_REFERENCE_ROWS)]
    for batch in BATCHES:
        together = _steps(trunk, shape, tokens[:batch])
        for row in range(batch):
            for name, value in together.items():
                if value[row].tobytes() != alone[row][name][0].tobytes():
                    raise _unsound(f"{name} of a trunk differs between {batch} rows together and one alone")


def sum_limit(
    head: ScreenedHead,
    screen: Screen,
    table: QuantMatrix,
    hidden: NDArray[np.float32],
    operators: Iterable[OperatorError],
) -> float:
    """Return the limit on the error of the sum of all bounds that sound computing stays below.

    Parameters
    ----------
    head
        Runs the packed screen.
    screen
        As it was built; its own limit is the least that is returned.
    table
        The head's weights.
    hidden
        Hidden states of calibration text.
    operators
        What was measured of the products of the screen.

    Returns
    -------
    `MARGIN` times the largest error measured, over states of text, of noise, and such as provoke rounding:
    along the column sums and along rows of the table. Not less than `_correlated` says: of the states that
    make rows err alike, none may be among those tried.
    """
    weights = np.concatenate([screen.tensors[f"screen.{part}.sum"][:, 0] for part in ("high", "low")])
    along_sums = np.linalg.solve(screen.rotation.T, weights.astype(np.float64))
    numbers = np.random.default_rng(2)
    states = np.concatenate((
        hidden[:: max(1, len(hidden) // _STATES)],
        numbers.standard_normal((_STATES, table.codes.shape[1])),
        [along_sums, -along_sums],
        table.head(_STATES // 2).to_float(),
    )).astype(np.float32)  # fmt: skip
    worst = max(float(head.sum_errors(part).max()) for part in np.array_split(states, -(-len(states) // 8)))
    return max(screen.bounds.sum_limit, MARGIN * worst, sum(_correlated(screen, each) for each in operators))


def _correlated(screen: Screen, operator: OperatorError) -> float:
    """Return the error of the sum of all bounds when a product of the screen errs alike in every row.

    A kernel that sums integers errs by less than one rounding, in another way in every row: that cancels, and
    the screen's own limit allows for it. One that sums in float32 errs by more, and for about one state in a
    hundred in the same way in all rows: by up to a quarter of its largest error, the sum then being off by a
    hundred times the median (measured, Cortex-A76 emulated, tables of 321 to 640 rows).
    """
    part = "high" if operator.bits == 8 else "low"
    of_rows = float(np.linalg.norm(screen.tensors[f"screen.{part}.scale"].sum(axis=0, dtype=np.float64)))
    # By Cauchy-Schwarz, no state of norm 1 has larger magnitudes.
    largest = magnitude(np.full((1, 1), math.sqrt(operator.block)), np.full((1, 1), of_rows), operator.bits)
    return max(0.0, operator.roundings - 1) * UNIT * float(largest[0, 0])


def _steps(
    trunk: ort.InferenceSession, shape: GemmaShape, tokens: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Feed tokens one by one from empty caches; return hidden states and caches after the last."""
    names = [output.name for output in trunk.get_outputs()]
    batch, steps = tokens.shape
    room = np.zeros((batch, shape.kv_heads, steps, shape.head_dim), np.float32)
    caches = {f"{part}.{layer}": room for layer in range(shape.layers) for part in ("key", "value")}
    outputs: dict[str, NDArray[np.float32]] = {}
    for step in range(steps):
        last, total = np.full(batch, step, np.int32), np.array(step + 1, np.int32)
        feed: dict[str, NDArray[np.generic]] = {
            "input_ids": tokens[:, step : step + 1],
            "position_ids": np.full((batch, 1), step),
            "seqlens_k": last,
            "total_sequence_length": total,
            "window_seqlens_k": last,
            "window_total_sequence_length": total,
            **{f"past_{name}": cache for name, cache in caches.items()},
        }
        outputs = dict(zip(names, trunk.run(names, feed), strict=True))
        caches = {name: outputs[f"present_{name}"] for name in caches}
    return outputs


def _inputs(product: Product) -> NDArray[np.float32]:
    """Return inputs on the grid, shape ``(PREFILL_ROWS, columns)``; every second one has outliers."""
    numbers = np.random.default_rng(0)
    values = numbers.standard_normal((PREFILL_ROWS, product.columns))
    values[1::2] *= np.exp(1.5 * numbers.standard_normal((PREFILL_ROWS // 2, product.columns)))
    inputs = np.empty(values.shape, np.float32)
    quantize_input(values, product.block, inputs)
    return inputs


@dataclass(frozen=True)
class _Results:
    alone: NDArray[np.float32]
    """The first inputs, each by itself."""
    batches: list[NDArray[np.float32]]
    """The same in batches."""
    chunk: NDArray[np.float32]
    """The same as part of a chunk of a prompt."""

    def all(self) -> list[NDArray[np.float32]]:
        return [self.alone, *self.batches, self.chunk]


def _results(model: bytes, inputs: NDArray[np.float32], threads: int, options: Mapping[str, str]) -> _Results:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    configure(settings, options)
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    def run(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = session.run(None, {"x": rows})[0]
        return result

    first = inputs[:_REFERENCE_ROWS]
    return _Results(
        alone=np.concatenate([run(first[row : row + 1]) for row in range(_REFERENCE_ROWS)]),
        batches=[run(first[:batch]) for batch in BATCHES],
        chunk=run(inputs)[:_REFERENCE_ROWS],
    )


def _graph(product: Product) -> bytes:
    node = helper.make_node(
        OPERATOR,
        ["x", "weight", "scale"],
        ["y"],
        domain="com.microsoft",
        K=product.columns,
        N=product.rows,
        bits=product.bits,
        block_size=product.block,
        accuracy_level=4,
    )
    weights = [
        numpy_helper.from_array(product.codes, "weight"),
        numpy_helper.from_array(product.scales, "scale"),
    ]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", product.columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", product.rows])],
        weights,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    serialised: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return serialised


def _error(product: Product, inputs: NDArray[np.float32], results: NDArray[np.float32]) -> float:
    """Return the largest error of results, in roundings."""
    exact = inputs.astype(np.float64)
    sizes = np.abs(exact).reshape(len(exact), -1, product.block).sum(axis=2)
    worst = 0.0
    for rows, weights, scales in _float_rows(product):
        error = np.abs(results[:, rows] - exact @ weights.T)
        allowed = UNIT * magnitude(sizes, scales, product.bits)
        worst = max(worst, float((error / np.maximum(allowed, np.finfo(np.float64).tiny)).max()))
    return worst


def magnitude(sizes: _Reals, scales: _Reals, bits: int) -> _Reals:
    """Return the sum of magnitudes that roundings of a product are relative to: codes with their offset.

    Parameters
    ----------
    sizes
        Sum of the magnitudes of the input over each block, shape ``(B, blocks)``.
    scales
        Of the weights, shape ``(rows, blocks)``.
    bits
        Of the weights.

    Returns
    -------
    Shape ``(B, rows)``.
    """
    total: _Reals = 2.0 * 2**bits * (sizes @ np.abs(scales).T)
    return total


def _float_rows(product: Product) -> Iterator[tuple[slice, _Reals, _Reals]]:
    """Yield the weights some rows at a time: which, the weights, their scales; float64."""
    for first in range(0, product.rows, _CHUNK):
        rows = slice(first, min(first + _CHUNK, product.rows))
        codes, scales = product.codes[rows], product.scales[rows].astype(np.float64)
        if product.bits == 4:
            codes = np.stack((codes & np.uint8(15), codes >> np.uint8(4)), axis=-1).reshape(
                len(codes), -1, product.block
            )
        weights = (codes.astype(np.float64) - 2 ** (product.bits - 1)) * scales[:, :, np.newaxis]
        yield rows, weights.reshape(len(codes), -1), scales


def _not_alike(product: Product, one: str, other: str) -> PenumbraError:
    return _unsound(
        f"the product of {product.bits} bits in blocks of {product.block}, {product.columns} columns, "
        f"{product.rows} rows differs between {one} and {other}"
    )


def _unsound(what: str) -> PenumbraError:
    return PenumbraError(
        f"{what}, with onnxruntime {ort.__version__}",
        "texts of a batch would differ from the same texts alone: take another version, and report the CPU",
    )
