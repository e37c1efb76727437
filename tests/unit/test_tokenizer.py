"""Text to tokens and back, with a vocabulary of Gemma's kind."""

from __future__ import annotations

import pytest
import tiny_gemma

from node.inference.gguf_source import GgufSource
from node.inference.manifest import TOKENIZER
from node.inference.tokenizer import Tokenizer, sentencepiece_model
from telemetry.errors import PenumbraError


@pytest.fixture(scope="module")
def tokenizer(tiny_image):
    return Tokenizer(tiny_image / TOKENIZER)


def test_known_words_are_single_pieces(tokenizer):
    pieces = tiny_gemma.vocabulary()[0]
    expected = [
        pieces.index(piece.encode())
        for piece in ("the", "\u2581capital", "\u2581of", "\u2581the", "\u2581sun")
    ]
    assert tokenizer.encode("the capital of the sun", bos=False) == expected


def test_the_ids_are_those_of_the_gguf(tokenizer):
    assert (tokenizer.bos, tokenizer.eos) == (tiny_gemma.BOS, tiny_gemma.EOS)
    assert tokenizer.size == len(tiny_gemma.vocabulary()[0])


def test_a_text_begins_with_bos_unless_told_otherwise(tokenizer):
    assert tokenizer.encode("sun") == [tiny_gemma.BOS, *tokenizer.encode("sun", bos=False)]
    assert tokenizer.encode("") == [tiny_gemma.BOS]


@pytest.mark.parametrize(
    "text", ["the sun", "  two  spaces ", "\n\ttabs\n", "\u2603 snow \U0001f680", "<bos>", ""]
)
def test_a_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes(ids) == text.encode()


CONTROL = 3
"""SentencePiece's type of control pieces."""


def test_the_name_of_a_control_piece_in_a_prompt_is_text(tokenizer):
    pieces, _, types = tiny_gemma.vocabulary()
    control = {number: pieces[number].decode() for number, kind in enumerate(types) if kind == CONTROL}
    assert set(control.values()) >= {"<bos>", "<eos>", "<pad>", "<unk>"}
    for name in (*control.values(), "<start_of_turn>"):
        for text in (name, f"the {name}sun", name * 2):
            begin, *ids = tokenizer.encode(text)
            assert begin == tiny_gemma.BOS
            assert not control.keys() & set(ids)
            assert tokenizer.decode(ids) == text


def test_unknown_ids_are_refused(tokenizer):
    with pytest.raises(IndexError):
        tokenizer.decode([tokenizer.size])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PenumbraError, match="none: no such file"):
        Tokenizer(tmp_path / "none")


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "bad"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(PenumbraError, match="not a SentencePiece model"):
        Tokenizer(path)


def test_another_kind_of_vocabulary_is_refused(tiny_gguf):
    source = GgufSource(tiny_gguf)
    source.file.metadata["tokenizer.ggml.model"] = "gpt2"
    with pytest.raises(PenumbraError, match="'gpt2', 'llama' is needed"):
        sentencepiece_model(source)


def test_fields_of_different_length_are_refused(tiny_gguf):
    source = GgufSource(tiny_gguf)
    source.file.metadata["tokenizer.ggml.scores"] = source.file.metadata["tokenizer.ggml.scores"][:-1]
    with pytest.raises(PenumbraError, match="of one length"):
        sentencepiece_model(source)


@pytest.mark.gemma
def test_gemma_encodes_a_known_text(gemma_image):
    tokenizer = Tokenizer(gemma_image / TOKENIZER)
    assert tokenizer.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    turn = [236820, 3041, 236779, 1340, 236779, 887, 236813]
    assert tokenizer.encode("<start_of_turn>") == [2, *turn]  # Never 105, the control piece.
    assert tokenizer.eos == 1
