"""Fixtures shared by all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import gguf
import hypothesis_profiles  # noqa: F401 - loads the profile of every run
import pytest
from fdir_trace import disable_row
from tiny_gemma import write_tiny_gguf

from fdir.table import PACKAGED
from node.inference.builder import build_image
from node.inference.gguf_source import packaged_gguf
from node.inference.manifest import default_images_dir
from node.inference.slot_files import copy_image

# A shell that starts the tests in the background has them ignore Ctrl-C, and so all they start.
for _each, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_each) is signal.SIG_IGN:
        signal.signal(_each, _handler)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the Gemma architecture. Read only: copy it before changing anything."""
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_images(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An images directory whose slots a and b hold the tiny model. Read only."""
    images = tmp_path_factory.mktemp("images")
    build_image(tiny_gguf, images, "a")
    copy_image(images, "a", "b")
    return images


@pytest.fixture(scope="session")
def tiny_image(tiny_images: Path) -> Path:
    """The image of the tiny model. Read only: copy it before changing anything."""
    return tiny_images / "a"


@pytest.fixture(scope="session")
def gemma_image() -> Path:
    """The image of Gemma 3 270M, built once into the user's cache. Read only."""
    images = default_images_dir()
    return build_image(packaged_gguf(images.parent / "gguf"), images)


@pytest.fixture(scope="session")
def gemma_vocabulary() -> tuple[list[bytes], list[float], list[int]]:
    """Pieces, scores and types of Gemma 3 270M, by package `gguf`, not by our reader."""
    fields = gguf.GGUFReader(packaged_gguf(default_images_dir().parent / "gguf")).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    return (
        [bytes(tokens.parts[place]) for place in tokens.data],
        [float(scores.parts[place][0]) for place in scores.data],
        [int(types.parts[place][0]) for place in types.data],
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fdir-disable",
        metavar="ROW",
        help="disable this row of the fixture `fdir_table`; `own`: the row that the test is for",
    )


@pytest.fixture
def fdir_table(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the packaged FDIR table, with the row of `--fdir-disable` disabled."""
    row = request.config.getoption("--fdir-disable")
    if row == "own":
        mark = request.node.get_closest_marker("fdir")
        assert mark is not None, "a test of a row carries the mark fdir(row)"
        row = mark.args[0]
    text = PACKAGED.read_text(encoding="utf-8")
    path = tmp_path / "fdir-table.toml"
    path.write_text(disable_row(text, row) if row else text, encoding="utf-8")
    return path
