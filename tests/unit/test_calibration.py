"""What sound computation looks like: limits from one half of a text, judged on the other."""

from __future__ import annotations

import numpy as np
import pytest

from node.inference.calibration import calibrate, calibration_text, rate_bound, run_text
from node.inference.graph import check_names
from node.inference.manifest import TOKENIZER
from node.inference.model import Model, open_model
from node.inference.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tiny_image) -> Model:
    return open_model(tiny_image, 1, checked=True)


@pytest.fixture(scope="module")
def tokens(tiny_image) -> list[int]:
    return Tokenizer(tiny_image / TOKENIZER).encode(calibration_text())


def test_the_text_is_packaged_and_long_enough():
    text = calibration_text()
    assert len(text) > 6000
    assert any(ord(character) > 0x0400 for character in text)


def test_an_image_holds_what_calibration_finds(model, tokens):
    found = calibrate(model.trunk, model.shape, tokens)
    assert found.checks == model.manifest.checks
    assert found.checks.names == check_names(model.shape)
    assert found.checks.tripped == 0
    assert min(found.checks.limits) > 0
    assert found.hidden.shape[1] == model.shape.width
    assert len(found.hidden) > found.checks.positions > 0.4 * len(found.hidden)


def test_threads_do_not_change_what_is_found(tokens, tiny_image):
    two = open_model(tiny_image, 2, checked=True)
    one = open_model(tiny_image, 1, checked=True)
    first, second = (run_text(each.trunk, each.shape, tokens[:80]) for each in (one, two))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("length", [1, 8, 9, 100])
def test_a_text_is_run_whole_whatever_its_length(model, tokens, length):
    hidden, residuals = run_text(model.trunk, model.shape, tokens[:length])
    assert hidden.shape == (length, model.shape.width)
    assert residuals.shape == (length, len(check_names(model.shape)))


def test_the_bound_of_a_rate_is_that_of_clopper_and_pearson():
    assert rate_bound(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-9)
    assert rate_bound(3, 100) == pytest.approx(0.075712, rel=1e-3)
    assert rate_bound(10, 10) == pytest.approx(1.0)
