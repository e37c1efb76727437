"""Text to tokens and back, with a vocabulary of Gemma's kind."""

from __future__ import annotations

import pytest
import strategies
import tiny_gemma
from hypothesis import given
from plain_tokenizer import USER_DEFINED, PlainTokenizer

from node.inference.gguf_source import GgufSource
from node.inference.manifest import TOKENIZER
from node.inference.sampling import StopMatcher
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


@pytest.fixture(scope="module")
def plain():
    return PlainTokenizer(*tiny_gemma.vocabulary())


def test_runs_of_spaces_are_single_pieces(tokenizer):
    pieces = tiny_gemma.vocabulary()[0]
    a, b, c = (pieces.index(letter) for letter in (b"a", b"b", b"c"))
    expected = [a, pieces.index(b"  "), b, pieces.index(b"    "), c]
    assert tokenizer.encode("a  b    c", bos=False) == expected


@pytest.mark.parametrize("run", tiny_gemma.RUNS)
@pytest.mark.parametrize("form", ["{0}", "{0}{0}", "a{0}b", " {0}the sun", "{0}\u2603{0}"])
def test_every_run_is_its_piece_both_ways(tokenizer, plain, run, form):
    text = form.format(run)
    ids = tokenizer.encode(text, bos=False)
    assert ids == plain.encode(text)
    assert tokenizer.token_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


@given(strategies.prompts())
def test_ids_are_those_of_a_tokenizer_by_the_book(tokenizer, plain, text):
    ids = tokenizer.encode(text, bos=False)
    assert ids == plain.encode(text)
    assert tokenizer.token_bytes(ids) == text.encode()


def test_the_sign_for_a_space_is_a_space(tokenizer):
    assert tokenizer.encode("a\u2581\u2581b") == tokenizer.encode("a  b")


@pytest.mark.parametrize("stop", ["  ", "\n\n", "b  ", "  c", "\n\t", " \n", "<td>", "d>a"])
def test_stop_strings_are_found_inside_and_across_runs(tokenizer, stop):
    text = "a  b    c\n\n\t\t<td>a \n</td>"
    matcher = StopMatcher((stop,))
    ended_after = next(
        (
            number
            for number, token in enumerate(tokenizer.encode(text, bos=False))
            if matcher.feed(tokenizer.token_bytes([token]))
        ),
        None,
    )
    end = text.index(stop) + len(stop)
    assert ended_after is not None
    ids = tokenizer.encode(text, bos=False)
    assert (
        len(tokenizer.token_bytes(ids[:ended_after]))
        < end
        <= len(tokenizer.token_bytes(ids[: ended_after + 1]))
    )


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


@pytest.fixture(scope="module")
def gemma(gemma_image):
    return Tokenizer(gemma_image / TOKENIZER)


@pytest.mark.gemma
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a  b and    c", [2, 236746, 138, 236763, 532, 140, 236755]),
        ("   x", [2, 139, 236781]),
    ],
)
def test_gemma_encodes_runs_of_spaces(gemma, text, ids):
    """Ids of llama.cpp 0.3.36 (the Python binding's version)."""
    assert gemma.encode(text) == ids


@pytest.mark.gemma
@pytest.mark.timeout(600)  # the vocabulary is read by another reader, piece by piece
def test_gemma_agrees_with_a_tokenizer_by_the_book(gemma, gemma_vocabulary):
    plain = PlainTokenizer(*gemma_vocabulary)
    runs = [piece for piece, kind in zip(plain.pieces, plain.types, strict=True) if kind == USER_DEFINED]
    assert len(runs) > 150
    for piece in runs:
        for text in (
            piece.decode(),
            piece.decode() * 2,
            f"a{piece.decode()}b",
            f"def f():\n{piece.decode()}x = 1",
        ):
            ids = gemma.encode(text, bos=False)
            assert ids == plain.encode(text), text
            assert gemma.token_bytes(ids) == text.encode()
