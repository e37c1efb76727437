"""The screen: its parts, its bound, and the arithmetic of the operator it rests on."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from node.inference.arithmetic import MARGIN, OPTIONS, UNIT, allowed_roundings
from node.inference.gguf_source import QuantMatrix
from node.inference.head import quantize_input
from node.inference.screen import build_screen, split_width
from telemetry.errors import PenumbraError
from tests.small_screen import small_head, small_table

BATCHES = (1, 2, 3, 4, 5, 8, 9)


def product(
    bits: int, block: int, codes: NDArray[np.int64], scales: NDArray[np.float32], x: NDArray[np.float32]
) -> NDArray[np.float32]:
    """MatMulNBits at accuracy_level 4. Codes, shape (N, blocks, block), count from 0."""
    packed = codes if bits == 8 else codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    rows, length = len(codes), x.shape[1]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=length,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    body = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", length])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", rows])],
        [
            helper.make_tensor(
                "w", TensorProto.UINT8, packed.shape, packed.astype(np.uint8).tobytes(), raw=True
            ),
            helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=10)
    settings = ort.SessionOptions()
    for name, value in OPTIONS.items():
        settings.add_session_config_entry(name, value)
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("kind", ["random", "extreme", "one sign"])
@pytest.mark.parametrize(("bits", "block", "length"), [(8, 32, 64), (4, 32, 96), (4, 64, 576)])
def test_operator_computes_on_the_grid(bits: int, block: int, length: int, kind: str) -> None:
    rng = np.random.default_rng(bits * length)
    top, blocks = 2**bits, length // block
    codes = rng.integers(0, top, (64, blocks, block))
    if kind == "extreme":
        codes = rng.choice([0, top - 1], codes.shape)
    elif kind == "one sign":
        codes[:] = top - 1
    scales = rng.uniform(0.1, 1, (64, blocks)).astype(np.float32)
    weights = ((codes - top // 2) * scales.astype(np.float64)[:, :, None]).reshape(64, length)
    for batch in BATCHES:
        values = rng.standard_normal((batch, length)) * np.repeat(np.geomspace(1, 50, blocks), block)
        if kind != "random":
            values = np.abs(values) if kind == "one sign" else np.sign(values)
        x = np.empty((batch, length), np.float32)
        quantize_input(values, block, x)
        magnitude = 2 * top * float(scales.max()) * np.abs(x).sum(axis=1, dtype=np.float64)
        error = np.abs(product(bits, block, codes, scales, x) - x.astype(np.float64) @ weights.T)
        assert (error <= allowed_roundings(blocks) / MARGIN * UNIT * magnitude[:, None]).all()


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (4, 32), (4, 64)])
def test_operator_sums_integers_exactly(bits: int, block: int) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 2**bits, (128, 1, block))
    codes[0], codes[1] = 0, 2**bits - 1
    numbers = rng.integers(-127, 128, (9, block))
    numbers[:, 0] = 127
    numbers[0] = 127
    x = numbers.astype(np.float32) / 16
    expected = (numbers @ (codes[:, 0] - 2 ** (bits - 1)).T) / 16
    for batch in BATCHES:
        got = product(bits, block, codes, np.ones((128, 1), np.float32), x[:batch])
        np.testing.assert_array_equal(got, expected[:batch])


@pytest.mark.parametrize(
    ("width", "split"),
    [
        (64, (32, 32, 32)),
        (96, (32, 64, 64)),
        (128, (64, 64, 64)),
        (640, (64, 576, 64)),
        (1152, (128, 1024, 64)),
        (2560, (256, 2304, 64)),
        (3840, (384, 3456, 64)),
        (5376, (512, 4864, 64)),
    ],
)
def test_split_of_width(width: int, split: tuple[int, int, int]) -> None:
    assert split_width(width) == split


@pytest.mark.parametrize("width", [0, 32, 72, 650])
def test_width_that_cannot_be_split(width: int) -> None:
    with pytest.raises(PenumbraError, match=f"embedding_length is {width}; it must be a multiple of 32"):
        split_width(width)


@pytest.mark.parametrize(("vocab", "width", "block"), [(640, 128, 32), (321, 64, 32), (352, 96, 16)])
def test_bound_is_over_every_logit(vocab: int, width: int, block: int) -> None:
    small = small_head(vocab, width, block)
    head, rng = small.head, np.random.default_rng(5)
    states = np.concatenate((small.hidden[:4], rng.standard_normal((4, width)).astype(np.float32)))
    run = head._run(len(states))
    norms, slack = head._feed(run, states)
    small.session.run_with_iobinding(run.binding)
    for state, norm, added, bound in zip(states, norms, slack, run.bound, strict=True):
        limit = norm * (bound.astype(np.float64) + added)
        logits = small.logits(state)
        assert (logits <= limit).all()
        assert (logits >= limit - 2 * norm * (small.screen.tensors["screen.row_bound"] + added)).all()


def test_bounds_are_a_small_part_of_a_row() -> None:
    small = small_head()
    assert small.screen.bounds.row_bound < 0.15 * small.screen.bounds.low_norm


def test_sums_are_what_they_must_be() -> None:
    small = small_head()
    run = small.head._run(8)
    small.head._feed(run, small.hidden[:8])
    small.session.run_with_iobinding(run.binding)
    difference = run.bound.sum(axis=1, dtype=np.float64) - run.expected[:, 0]
    assert np.abs(difference).max() < 0.5 * small.screen.bounds.sum_limit
    grouped = run.bound.reshape(8, -1, small.screen.bounds.group)
    np.testing.assert_array_equal(grouped.max(axis=2), run.peak)


def test_same_bytes_for_the_same_input() -> None:
    table, hidden = small_table(320, 64, 32, 1), small_head(width=64).hidden
    one, other = build_screen(table, hidden), build_screen(table, hidden)
    assert one.bounds == other.bounds
    assert one.rotation.tobytes() == other.rotation.tobytes()
    assert one.model.SerializeToString(deterministic=True) == other.model.SerializeToString(
        deterministic=True
    )
    assert {name: value.tobytes() for name, value in one.tensors.items()} == {
        name: value.tobytes() for name, value in other.tensors.items()
    }


@pytest.mark.parametrize("hidden", [np.zeros((1, 64), np.float32), np.eye(1, 64, dtype=np.float32)])
def test_poor_calibration_states_do_no_harm(hidden: NDArray[np.float32]) -> None:
    screen = build_screen(small_table(320, 64, 32, 1), hidden)
    assert all(np.isfinite(value).all() for value in (screen.rotation, *screen.tensors.values()))


def test_table_of_zeros() -> None:
    table = QuantMatrix(np.full((64, 64), 128, np.uint8), np.zeros((64, 2), np.float32))
    screen = build_screen(table, small_head(width=64).hidden)
    assert np.isfinite(screen.rotation).all()


def test_input_on_the_grid() -> None:
    rng = np.random.default_rng(11)
    values = rng.standard_normal((5, 128)) * np.geomspace(1e-20, 1e3, 128)
    values[1] = 0
    values[2, :64] = 1e-40
    out = np.empty((5, 128), np.float32)
    quantize_input(values, 64, out)
    blocks = out.reshape(5, 2, 64)
    largest = np.abs(blocks).max(axis=2)
    scale = largest / np.float32(127)
    np.testing.assert_array_equal(scale * np.float32(127), largest)
    codes = blocks / np.where(scale > 0, scale, 1)[:, :, None]
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert not out[1].any()
    assert not out[2, :64].any()
    error = np.abs(out - values).reshape(5, 2, 64).max(axis=2)
    assert (error <= scale / 2 * 1.001 + 1e-38).all()
