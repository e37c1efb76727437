"""Where windows may begin: measured of the operator, and refused where nothing holds."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fdir.rows import GROUP
from node.inference import attention
from node.inference.attention import LARGEST_STEP, measure_window_step
from node.inference.gguf_source import GgufSource
from node.inference.manifest import GemmaShape, load_manifest
from node.inference.model import open_model
from telemetry.errors import PenumbraError


@pytest.fixture
def shape(tiny_gguf: Path) -> GemmaShape:
    return msgspec.structs.replace(GgufSource(tiny_gguf).shape, head_dim=64)


def test_sums_in_blocks_of_keys_are_found(shape: GemmaShape) -> None:
    trial = attention._Trial(shape)
    step = measure_window_step(shape)
    assert step in {GROUP << n for n in range(8)}
    assert trial.holds(step)
    assert trial.holds(2 * step)
    assert step == GROUP or not trial.holds(step // 2)


def test_a_manifest_says_what_its_machine_measured(tiny_image: Path) -> None:
    manifest = load_manifest(tiny_image)
    assert manifest.window_step == measure_window_step(manifest.shape) <= LARGEST_STEP


def test_no_session_is_made_with_kernels_whose_sums_hang_on_the_cache(
    tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", "0")
    open_model(tiny_image, 1)
    assert os.environ["ORT_GQA_DISABLE_FLASH_ATTENTION"] == "1"


class Operator:
    """Stands for a session whose result is `what` the lengths and rows make of it."""

    def __init__(self, what) -> None:
        self.what = what

    def run(self, names, given):
        return [np.array(self.what(int(given["total"]), given["query"].shape[1]))]


def test_a_kernel_that_sees_where_a_window_begins_is_refused(
    shape: GemmaShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_session", lambda *_: Operator(lambda total, rows: total))
    with pytest.raises(PenumbraError, match="differs with the begin of the window") as error:
        measure_window_step(shape)
    assert "another version" in error.value.mend


@pytest.mark.parametrize("rows", [1, 64])
def test_blocks_are_found_in_steps_and_in_chunks(
    shape: GemmaShape, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    def of_blocks(total: int, count: int) -> int:
        return total % 128 if count == rows else 0

    monkeypatch.setattr(attention, "_session", lambda *_: Operator(of_blocks))
    assert measure_window_step(shape) == 128


def test_threads_that_change_the_result_are_refused(
    shape: GemmaShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_session", lambda _, threads: Operator(lambda *_: threads))
    with pytest.raises(PenumbraError, match="3 threads and one"):
        measure_window_step(shape)
