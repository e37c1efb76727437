"""Token ids of prompts are those of llama.cpp, on the vocabulary of Gemma; where llama.cpp is installed."""

from __future__ import annotations

import pytest
import strategies
from hypothesis import given

from hil.bench.llama import LlamaVocab
from hil.bench.tokens import Comparison
from node.inference.gguf_source import GgufSource, packaged_gguf
from node.inference.manifest import default_images_dir
from telemetry.errors import PenumbraError

pytestmark = pytest.mark.gemma


@pytest.fixture(scope="module")
def compared():
    gguf = packaged_gguf(default_images_dir().parent / "gguf")
    try:
        peer = LlamaVocab(gguf)
    except PenumbraError as error:
        pytest.skip(f"no llama.cpp to compare with: {error}")
    yield Comparison.of(GgufSource(gguf), peer)
    peer.close()


@given(text=strategies.prompts())
def test_ids_are_those_of_llama_cpp_or_explained(compared, text):
    row = compared.encoded("prompt", [text])
    assert row.unexplained == 0, compared.differences[-1]


def test_the_one_piece_llama_cpp_sees_otherwise(compared):
    assert compared.made_control == {"</s>": 212}
