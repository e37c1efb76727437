"""`penumbra bench tokens`: differences are found, explained and counted, with a stand-in for llama.cpp."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_gemma
from plain_tokenizer import PlainTokenizer
from typer.testing import CliRunner

from hil.bench import llama, render, token_texts, tokens
from hil.cli import app
from node.inference.gguf_source import GgufSource
from node.inference.manifest import TOKENIZER
from node.inference.tokenizer import SPACE, Tokenizer, sentencepiece_model
from telemetry.errors import PenumbraError

PIECES, SCORES, TYPES = tiny_gemma.vocabulary()
TEXTS = [piece.decode() for piece in PIECES]
CONTROL, NORMAL, USER_DEFINED = 3, 1, 4
MADE_CONTROL = "</td>"


class FakePeer:
    """A tokenizer by the book that, as llama.cpp does, makes one user-defined piece a control piece."""

    def __init__(self, *_: object, made_control: str | None = MADE_CONTROL) -> None:
        kinds = [CONTROL if piece == made_control else kind for piece, kind in zip(TEXTS, TYPES, strict=True)]
        self.plain, self.kinds, self.closed = PlainTokenizer(PIECES, SCORES, kinds), kinds, False

    def encode(self, text: str) -> list[int]:
        return self.plain.encode(text)

    def piece(self, number: int, *, control: bool = False) -> bytes:
        if self.is_control(number) and not control:
            return b""
        return (
            bytes([int(TEXTS[number][3:5], 16)])
            if self.kinds[number] == 6
            else TEXTS[number].replace(SPACE, " ").encode()
        )

    def is_control(self, number: int) -> bool:
        return self.kinds[number] == CONTROL

    def close(self) -> None:
        self.closed = True


class LettersOnly(FakePeer):
    """It cuts out no user-defined piece at all."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.plain = PlainTokenizer(
            PIECES, SCORES, [CONTROL if kind == USER_DEFINED and len(piece) > 1 else kind
                             for piece, kind in zip(TEXTS, TYPES, strict=True)],
        )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_image):
    return Tokenizer(tiny_image / TOKENIZER)


def comparison(tokenizer, peer=None):
    return tokens.Comparison(tokenizer, peer or FakePeer(), TEXTS, TYPES)


def test_equal_ids_are_counted(tokenizer):
    compared = comparison(tokenizer)
    row = compared.encoded("part", ["the sun", "  a   b", "\n\n\t\t<td>x", "", "\u2603\x00"])
    assert (row.part, row.texts, row.equal, row.explained, row.unexplained) == ("part", 5, 5, {}, 0)
    assert row.size_bytes == 7 + 7 + 9 + 0 + 4
    assert row.tokens > 5
    assert compared.differences == []


def test_runs_of_spaces_as_spaces_are_found(tiny_gguf, tmp_path):
    """The fault this bench is for: user-defined pieces looked for as the GGUF spells them."""
    source = GgufSource(tiny_gguf)
    model = sentencepiece_model(source)
    for length in range(2, 8):
        model = model.replace((SPACE * length).encode(), ("~" * length).encode().ljust(3 * length, b"~"))
    (tmp_path / "wrong").write_bytes(model)
    compared = comparison(Tokenizer(tmp_path / "wrong"))
    row = compared.encoded("code", [*(f"x{' ' * length}y" for length in range(2, 8)), "x y"] * 3)
    assert (row.equal, row.explained, row.unexplained) == (3, {}, 18)
    assert len(compared.differences) == 10
    first = compared.differences[0]
    assert (first.part, first.text) == ("code", "  y")
    assert first.peer.startswith(f"[{TEXTS.index('  ')}, ")
    assert first.ours.startswith(f"[{TEXTS.index(SPACE)}, {TEXTS.index(SPACE)}, ")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a\u2581\u2581b", "U+2581"),
        ("a</td>\n", "made a control piece"),
        ("</td></td>", "made a control piece"),
        ("a\u2581 </td>b", "U+2581, made a control piece"),
    ],
)
def test_a_rule_explains_what_it_foresees(tokenizer, text, rule):
    compared = comparison(tokenizer)
    row = compared.encoded("part", [text, "the sun"])
    assert (row.equal, row.explained, row.unexplained) == (1, {rule: 1}, 0)
    assert all(each in tokens.RULES for each in rule.split(", "))
    assert compared.made_control == {MADE_CONTROL: TEXTS.index(MADE_CONTROL)}


@pytest.mark.parametrize("text", ["a\u2581 b", "   </td>", "a  b", "<td></td>"])
def test_the_sign_a_rule_looks_for_does_not_excuse_other_ids(tokenizer, text):
    compared = comparison(tokenizer, LettersOnly())
    row = compared.encoded("part", [text])
    assert (row.equal, row.explained, row.unexplained) == (0, {}, 1)


def test_a_piece_that_no_one_makes_a_control_piece_needs_no_rule(tokenizer):
    compared = comparison(tokenizer, FakePeer(made_control=None))
    assert compared.made_control == {}
    row = compared.encoded("part", ["a</td>b", "a\u2581\u2581b"])
    assert (row.equal, row.explained, row.unexplained) == (1, {"U+2581": 1}, 0)


def test_bytes_that_do_not_come_back_are_a_difference_also_with_equal_ids(tokenizer, monkeypatch):
    compared = comparison(tokenizer)
    monkeypatch.setattr(tokenizer, "token_bytes", lambda ids: b"?")
    row = compared.encoded("part", ["the sun"])
    assert (row.equal, row.unexplained) == (0, 1)
    assert (compared.differences[0].ours, compared.differences[0].peer) == ("b'?'", "b'the sun'")


def test_pieces_are_decoded_alone(tokenizer):
    compared = comparison(tokenizer)
    row = compared.decoded("alone", enumerate(TEXTS))
    assert (row.texts, row.equal, row.explained, row.unexplained) == (
        len(TEXTS), len(TEXTS) - 2, {"not printed": 2}, 0,
    )  # fmt: skip


def test_a_piece_that_decodes_otherwise_is_found(tokenizer):
    peer = FakePeer()
    peer.piece = lambda number, *, control=False: b"other"
    compared = comparison(tokenizer, peer)
    row = compared.decoded("alone", [(TEXTS.index("the"), "the"), (tiny_gemma.UNKNOWN, "<unk>")])
    assert (row.equal, row.explained, row.unexplained) == (0, {}, 2)
    assert compared.differences[0].peer == "b'other'"


# The texts.


def test_generated_strings_follow_from_the_seed():
    found = list(token_texts.generated(3000, 7, TEXTS))
    assert found == list(token_texts.generated(3000, 7, TEXTS))
    assert found != list(token_texts.generated(3000, 8, TEXTS))
    assert found[:10] == list(token_texts.generated(10, 7, TEXTS))
    joined = "".join(found)
    joined.encode()  # no surrogates
    for part in (
        " " * 40,
        "\n" * 32,
        "\t" * 31,
        "\u200d",
        "\x00",
        "<bos>",
        "</s>",
        "</td>",
        '": [',
        "\u2581\u2581",
    ):
        assert part in joined, part
    assert any("\u4e00" <= character <= "\u9fff" for character in joined)
    assert any(character > "\U000e0000" for character in joined)
    assert sum("\u2581" in text for text in found) < len(found) / 5


def test_the_corpus_is_mixed_and_follows_from_the_seed(monkeypatch):
    pytest.importorskip("faker", reason="the corpus is made by faker, extra `peers`")
    monkeypatch.setattr(token_texts, "LOCALES", ("en_US", "ja_JP", "zh_CN", "th_TH", "ko_KR", "hi_IN"))
    found = token_texts.corpus(1, 200_000)
    assert list(found) == ["Python", "prose", "Markdown tables", "JSON", "CSV"]
    assert 200_000 <= sum(len(text.encode()) for text in found.values()) < 600_000
    assert found == token_texts.corpus(1, 200_000)
    assert found["prose"] != token_texts.corpus(2, 200_000)["prose"]
    assert "import " in found["Python"]
    for kind in ("prose", "Markdown tables", "JSON", "CSV"):
        for first, last in ("\u4e00\u9fff", "\u3041\u3096", "\u0e01\u0e3a", "\uac00\ud7a3", "\u0905\u0939"):
            assert any(first <= each <= last for each in found[kind]), (kind, first)
    assert "| --- | --- |" in found["Markdown tables"]


def test_without_faker_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faker", None)
    with pytest.raises(PenumbraError, match="faker, which is not installed") as raised:
        token_texts.corpus(1, 1000)
    assert "penumbra-node[peers]" in str(raised.value)


# The command.


def run(tiny_gguf, tmp_path, monkeypatch, peer):
    made = []
    monkeypatch.setattr(tokens, "LlamaVocab", lambda path: made.append(peer()) or made[0])
    monkeypatch.setattr(
        tokens, "corpus", lambda seed: {"Python": "def f():\n    pass\n", "prose": "x" * 4001}
    )
    arguments = ["bench", "tokens", "--strings", "200", "--gguf", str(tiny_gguf)]
    arguments += ["--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")]
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert made[0].closed
    return done.exit_code, json.loads((tmp_path / "t.json").read_text()), (tmp_path / "t.md").read_text()


def test_no_unexplained_difference_is_exit_code_0(tiny_gguf, tmp_path, monkeypatch):
    code, content, page = run(tiny_gguf, tmp_path, monkeypatch, FakePeer)
    assert code == 0
    assert content["unexplained"] == 0
    assert content["differences"] == []
    assert [row["texts"] for row in content["rows"]] == [4 * len(tiny_gemma.RUNS), 200, 3, 4, len(TEXTS)]
    assert all(
        row["texts"] == row["equal"] + sum(row["explained"].values()) + row["unexplained"]
        for row in content["rows"]
    )
    assert content["corpus_bytes"] == {"Python": 18, "prose": 4001}
    assert content["rows"][0]["explained"] == {"made a control piece": 4}
    assert "## Unexplained differences: 0" in page
    assert f"`</td>` (id {TEXTS.index('</td>')})" in page
    assert "None" not in page


def test_an_unexplained_difference_is_exit_code_1_and_shown(tiny_gguf, tmp_path, monkeypatch):
    code, content, page = run(tiny_gguf, tmp_path, monkeypatch, LettersOnly)
    assert code == 1
    assert content["unexplained"] > 40
    assert len(content["differences"]) == 10
    assert f"## Unexplained differences: {content['unexplained']}" in page
    assert "The first 10, from the place on where they differ" in page


def test_any_text_is_one_cell_of_a_table():
    assert render.code("a|b\n\u2581`") == "`` 'a\\x7cb\\n\\u2581`' ``"


def test_without_the_peer_the_extra_is_named(tiny_gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(PenumbraError, match="llama-cpp-python") as raised:
        llama.LlamaVocab(tiny_gguf)
    assert "penumbra-node[peers]" in str(raised.value)
