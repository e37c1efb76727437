"""What a build measures of matrix products, and that it refuses what the proofs do not allow."""

from __future__ import annotations

import math
import platform
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from small_screen import small_head

from node.inference import operators
from node.inference.arithmetic import MARGIN, UNIT, OperatorError, allowed_roundings, check_operators
from node.inference.builder import build_image
from node.inference.gguf_source import GgufSource
from node.inference.graph import build_trunk
from node.inference.manifest import TRUNK, load_manifest
from node.inference.model import open_model
from node.inference.operators import Product, measure, products, prove_rows_alike, sum_limit
from telemetry.errors import PenumbraError


def product(bits: int, rows: int = 40, columns: int = 128, block: int = 32) -> Product:
    numbers = np.random.default_rng(5)
    codes = numbers.integers(0, 256, (rows, columns // block, block * bits // 8), dtype=np.uint8)
    # Scales of both signs, as Q6_K has them, and a row of zeros, as the last of a checksum.
    scales = (numbers.random((rows, columns // block)) - 0.3).astype(np.float32)
    scales[3] = 0
    return Product(bits, block, codes, scales)


def error(*, roundings: float, bits: int = 8) -> OperatorError:
    """What is measured of a product of the screen of `small_head()`."""
    block, columns = (32, 64) if bits == 8 else (64, 64)
    return OperatorError(bits=bits, block=block, columns=columns, rows=640, roundings=roundings)


@pytest.mark.parametrize(("bits", "block"), [(8, 16), (8, 32), (4, 32), (4, 64)])
def test_products_of_this_machine_are_within_what_the_proofs_allow(bits, block):
    found = measure(product(bits, block=block), alike=bits == 8)
    assert (found.bits, found.block, found.rows, found.columns) == (bits, block, 40, 128)
    check_operators((found,), "here")
    assert found.roundings > 0


def test_the_products_of_a_graph_are_found_once_a_shape(tiny_gguf):
    source = GgufSource(tiny_gguf)
    found = products(*build_trunk(source, source.shape, checked=True))
    shapes = [(each.bits, each.columns, each.rows) for each in found]
    assert len(set(shapes)) == len(shapes) == 4
    assert all(each.codes.nbytes == each.rows * each.columns for each in found)


def test_input_rounded_by_whole_rows_is_refused(monkeypatch):
    """As KleidiAI does: one scale for all blocks."""
    results = operators._results

    def by_rows(model, inputs, *args):
        scale = np.abs(inputs).max(axis=1, keepdims=True) / 127
        return results(model, (np.rint(inputs / scale) * scale).astype(np.float32), *args)

    monkeypatch.setattr(operators, "_results", by_rows)
    found = measure(product(4), alike=False)
    assert found.roundings > 1000
    with pytest.raises(
        PenumbraError, match="here: the product of 4 bits in blocks of 32, 128 columns and 40 rows"
    ):
        check_operators((found,), "here")


@pytest.mark.skipif(platform.machine() != "aarch64", reason="KleidiAI is there on aarch64 only")
def test_kleidiai_is_refused():
    found = measure(product(4), alike=False, options={})
    with pytest.raises(PenumbraError, match="are allowed"):
        check_operators((found,), "here")


@pytest.mark.parametrize("roundings", [math.nan, math.inf, allowed_roundings(4) / MARGIN * 1.001])
def test_what_errs_too_much_is_refused_with_the_figure(roundings):
    one = OperatorError(bits=8, block=32, columns=128, rows=4, roundings=roundings)
    with pytest.raises(PenumbraError, match=r"errs by .*: 20 are allowed"):
        check_operators((one,), "here")
    check_operators((msgspec.structs.replace(one, roundings=20.0),), "here")


def test_a_build_ends_where_an_operator_errs_too_much(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "_error", lambda *_: 1e6)
    with pytest.raises(PenumbraError, match=r"this machine .* errs by 1e\+06 roundings"):
        build_image(tiny_gguf, tmp_path)
    assert not (tmp_path / "a").exists()


class _Unsteady:
    """A session whose rows depend on how many there are."""

    def __init__(self, session):
        self._session = session

    def get_outputs(self):
        return self._session.get_outputs()

    def run(self, names, feed):
        first, *others = self._session.run(names, feed)
        return [np.nextafter(first, np.float32(9)) if len(first) == 4 else first, *others]


def test_rows_that_depend_on_the_batch_are_refused(tiny_image):
    model = open_model(tiny_image, 1)
    prove_rows_alike(model.trunk, model.shape)
    with pytest.raises(
        PenumbraError, match="hidden of a trunk differs between 4 rows together and one alone"
    ):
        prove_rows_alike(_Unsteady(model.trunk), model.shape)


def test_a_product_whose_rows_depend_on_the_batch_is_refused(monkeypatch):
    results = operators._results

    def unsteady(*args):
        found = results(*args)
        found.batches[1][0, 0] += 1
        return found

    monkeypatch.setattr(operators, "_results", unsteady)
    measure(product(8), alike=False)
    with pytest.raises(PenumbraError, match="differs between 3 rows together and each of them alone"):
        measure(product(8), alike=True)


def test_the_limit_of_the_sum_grows_with_what_is_measured():
    small = small_head()
    own = replace(small.screen, bounds=msgspec.structs.replace(small.screen.bounds, sum_limit=1e-6))
    args = (own, small.table, small.hidden, [error(roundings=0.9)])
    assert sum_limit(small.head, *args) >= 1e-6

    class Coarse:
        def sum_errors(self, hidden):
            return np.full(len(hidden), 0.5)

    assert sum_limit(Coarse(), *args) == MARGIN * 0.5


class _Exact:
    def sum_errors(self, hidden):
        return np.zeros(len(hidden))


def test_the_limit_of_the_sum_allows_for_rows_that_err_alike():
    """They do for about one state in a hundred where a kernel sums in float32, as on a Cortex-A76."""
    small = small_head()
    own = replace(small.screen, bounds=msgspec.structs.replace(small.screen.bounds, sum_limit=1e-6))
    args = (own, small.table, small.hidden)
    assert sum_limit(_Exact(), *args, [error(roundings=1.0)]) == 1e-6
    limits = [sum_limit(_Exact(), *args, [error(roundings=each)]) for each in (2.0, 7.0)]
    # No state of norm 1 has a larger sum of magnitudes over all rows.
    scales = small.screen.tensors["screen.high.scale"].astype(np.float64)
    states = np.random.default_rng(4).standard_normal((500, small.screen.bounds.high))
    states[0] = np.repeat(scales.sum(axis=0), 32)
    sizes = np.abs(states / np.linalg.norm(states, axis=1, keepdims=True)).reshape(500, -1, 32).sum(axis=2)
    rows = operators.magnitude(sizes, scales, 8).sum(axis=1).max()
    assert limits == pytest.approx([UNIT * rows, 6 * UNIT * rows])
    # Every product of the screen has its part; that of 4 bits has other scales.
    both = [error(roundings=2.0), error(bits=4, roundings=2.0)]
    assert sum_limit(_Exact(), *args, both) > limits[0]


@pytest.mark.parametrize("shape", [(640, 128, 32), (321, 64, 32), (352, 96, 16)])
def test_no_sound_state_is_over_the_limit_of_the_sum(shape):
    small = small_head(*shape)
    width = shape[1]
    numbers = np.random.default_rng(6)
    few = np.zeros((400, width))
    for state in few:
        state[numbers.integers(0, width, 3)] = 1
    states = [small.hidden, few, small.table.to_float(), numbers.standard_normal((400, width))]
    worst = max(
        small.head.sum_errors(part).max()
        for each in states
        for part in np.array_split(each.astype(np.float32), len(each) // 8)
    )
    assert worst < small.screen.bounds.sum_limit


def test_the_manifest_has_what_was_measured(tiny_image):
    manifest = load_manifest(tiny_image)
    assert {(each.bits, each.rows) for each in manifest.operators} >= {
        (8, manifest.shape.vocab),
        (4, manifest.shape.vocab),
    }
    assert manifest.options
    assert (tiny_image / TRUNK).exists()
