"""`penumbra bench tokens`: ids of our tokenizer beside those of llama.cpp, from the same GGUF.

The tokenizer is the one thing all other comparisons share: reference, llama.cpp and perplexity are fed its
ids. So it is compared with one that shares no code with it. Every difference is counted. It is explained only
if `RULES` foresee exactly our ids from those that llama.cpp gives; all others are unexplained.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Final, Protocol

from hil.bench.llama import LlamaVocab
from hil.bench.machine import describe_machine, load_average
from hil.bench.token_texts import LOCALES, corpus, generated
from node.inference.gguf_source import GgufSource
from node.inference.tokenizer import SPACE, USER_DEFINED_TYPE, Tokenizer, sentencepiece_model, vocabulary
from telemetry.figures import BenchTokens, TokenDifference, TokensRow

STRINGS: Final = 100_000
PIECE_CHARACTERS: Final = 2000
"""Length of the pieces the corpus is compared in, beside lines."""
_SHOWN: Final = 10
"""Unexplained differences that are kept; all are counted."""
_SHOWN_IDS: Final = 12
_SHOWN_CHARACTERS: Final = 80

DECODED: Final = "every piece, decoded alone"
SPACE_SIGN: Final = "U+2581"
MADE_CONTROL: Final = "made a control piece"
NOT_PRINTED: Final = "not printed"
RULES: Final = {
    SPACE_SIGN: "The text holds U+2581. SentencePiece takes it for a space; llama.cpp does not cut it as "
    "one. Ids are equal once it is replaced by a space.",
    MADE_CONTROL: "The text holds a piece that is user-defined in the GGUF and that llama.cpp makes a "
    "control piece because of its name (`</s>`). It is one id for us, letters for llama.cpp. Ids are "
    "equal on both sides of it.",
    NOT_PRINTED: "llama.cpp prints control pieces only on request, also `<unk>` and those it makes control "
    "pieces; we print these two as their names. On request llama.cpp prints the same bytes.",
}
"""What explains a difference, by the name it is counted under."""


class Peer(Protocol):
    """A tokenizer to compare with."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; what looks like a control piece is text."""
        ...

    def piece(self, number: int, *, control: bool = False) -> bytes:
        """Return the bytes of an id; control pieces print nothing unless `control`."""
        ...

    def is_control(self, number: int) -> bool:
        """Whether it takes the id for a control piece."""
        ...


class Comparison:
    """Compares part by part, counts every difference, and explains what a rule explains.

    Parameters
    ----------
    tokenizer
        Ours.
    peer
        The other.
    pieces
        Texts of the vocabulary, by id.
    types
        Their types in the GGUF, by id.
    """

    def __init__(self, tokenizer: Tokenizer, peer: Peer, pieces: Sequence[str], types: Sequence[int]) -> None:
        self._ours, self._peer = tokenizer, peer
        self.pieces = pieces
        self.user_defined = [
            piece for piece, kind in zip(pieces, types, strict=True) if kind == USER_DEFINED_TYPE
        ]
        self.made_control = {
            piece: number
            for number, (piece, kind) in enumerate(zip(pieces, types, strict=True))
            if kind == USER_DEFINED_TYPE and peer.is_control(number)
        }
        """Ids of the user-defined pieces that the peer makes control pieces, by text."""
        self._cut = re.compile("(" + "|".join(map(re.escape, self.made_control)) + ")")
        self.differences: list[TokenDifference] = []
        """The first unexplained ones."""

    @classmethod
    def of(cls, source: GgufSource, peer: Peer) -> Comparison:
        """Return the comparison of the tokenizer that an image of a model is given."""
        pieces, _, types = vocabulary(source)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "tokenizer.model"
            path.write_bytes(sentencepiece_model(source))
            return cls(Tokenizer(path), peer, [piece.decode() for piece in pieces], types)

    def encoded(self, part: str, texts: Iterable[str]) -> TokensRow:
        """Compare the ids of texts; ours must also give back the bytes of each."""
        tally = _Tally(part)
        for text in texts:
            ours, theirs = self._ours.encode(text, bos=False), self._peer.encode(text)
            tally.add(text, len(ours))
            back, right = self._ours.token_bytes(ours), text.replace(SPACE, " ").encode()
            if back != right:
                self._unexplained(tally, text, repr(back), repr(right))
            elif ours != theirs and (rule := self.explanation(text, ours)):
                tally.explained[rule] += 1
            elif ours != theirs:
                at = next(at for at, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
                rest = self._ours.token_bytes(ours[at:]).decode(errors="replace")
                kept = slice(at, at + _SHOWN_IDS)
                self._unexplained(tally, rest, str(ours[kept]), str(theirs[kept]))
        return tally.row()

    def decoded(self, part: str, pieces: Iterable[tuple[int, str]]) -> TokensRow:
        """Compare the bytes of single ids."""
        tally = _Tally(part)
        for number, piece in pieces:
            tally.add(piece, 1)
            ours, theirs = self._ours.token_bytes([number]), self._peer.piece(number)
            if ours == theirs:
                continue
            if (
                self._peer.is_control(number)
                and not theirs
                and ours == self._peer.piece(number, control=True)
            ):
                tally.explained[NOT_PRINTED] += 1
            else:
                self._unexplained(tally, f"{number}: {piece}", repr(ours), repr(theirs))
        return tally.row()

    def explanation(self, text: str, ours: Sequence[int]) -> str | None:
        """Return the rules that foresee our ids of a text from those of the peer; None if none do."""
        rules = []
        if SPACE in text:
            rules.append(SPACE_SIGN)
            text = text.replace(SPACE, " ")
        parts = self._cut.split(text) if self.made_control else [text]
        if len(parts) > 1:
            rules.append(MADE_CONTROL)
        foreseen = [
            number
            for part in parts
            for number in (
                [self.made_control[part]] if part in self.made_control else self._peer.encode(part)
            )
        ]
        return ", ".join(rules) if rules and foreseen == list(ours) else None

    def _unexplained(self, tally: _Tally, text: str, ours: str, theirs: str) -> None:
        tally.unexplained += 1
        if len(self.differences) < _SHOWN:
            short = (each[:_SHOWN_CHARACTERS] for each in (text, ours, theirs))
            self.differences.append(TokenDifference(tally.part, *short))


class _Tally:
    """Counts of one part."""

    def __init__(self, part: str) -> None:
        self.part, self.count, self.size, self.tokens, self.unexplained = part, 0, 0, 0, 0
        self.explained: Counter[str] = Counter()
        self._started = time.perf_counter()

    def add(self, text: str, tokens: int) -> None:
        self.count += 1
        self.size += len(text.encode())
        self.tokens += tokens

    def row(self) -> TokensRow:
        return TokensRow(
            part=self.part,
            texts=self.count,
            size_bytes=self.size,
            tokens=self.tokens,
            equal=self.count - self.explained.total() - self.unexplained,
            explained=dict(self.explained),
            unexplained=self.unexplained,
            wall_s=time.perf_counter() - self._started,
        )


def run_tokens(gguf: Path, *, strings: int, seed: int, progress: Callable[[str], None]) -> BenchTokens:
    """Compare our tokenizer with that of llama.cpp on a GGUF.

    Parameters
    ----------
    gguf
        The model both read.
    strings
        Strings to generate.
    seed
        Strings and corpus follow from it.
    progress
        Called with what is done next.

    Raises
    ------
    PenumbraError
        The file holds no such vocabulary, or the extra `peers` is not installed.
    """
    started, load_before = time.perf_counter(), load_average()
    source = GgufSource(gguf)
    peer = LlamaVocab(gguf)
    try:
        compared = Comparison.of(source, peer)
        progress("making the corpus")
        texts = corpus(seed)
        rows = []
        for part, of_part in _parts(
            compared.user_defined, texts, generated(strings, seed, compared.pieces)
        ).items():
            progress(part)
            rows.append(compared.encoded(part, of_part))
        progress(DECODED)
        rows.append(compared.decoded(DECODED, enumerate(compared.pieces)))
    finally:
        peer.close()
    return BenchTokens(
        machine=describe_machine(1, peers=True, load_before=load_before),
        model=source.model_name,
        gguf_sha256=source.sha256(),
        seed=seed,
        faker=_faker_version(),
        locales=list(LOCALES),
        corpus_bytes={kind: len(text.encode()) for kind, text in texts.items()},
        corpus_sha256=hashlib.sha256("".join(texts.values()).encode()).hexdigest(),
        rows=rows,
        rules=RULES,
        made_control=compared.made_control,
        unexplained=sum(row.unexplained for row in rows),
        differences=compared.differences,
        wall_s=time.perf_counter() - started,
    )


def _parts(
    user_defined: Sequence[str], texts: Mapping[str, str], strings: Iterator[str]
) -> dict[str, Iterable[str]]:
    """Return the texts of each part, by its name."""
    forms = ("{0}", "{0}{0}", "a{0}b", "x\n{0}y")
    return {
        "user-defined pieces: alone, doubled, between letters, in a new line": (
            form.format(piece) for piece in user_defined for form in forms
        ),
        "generated strings": strings,
        "corpus, by line": (line for text in texts.values() for line in text.splitlines(keepends=True)),
        f"corpus, by {PIECE_CHARACTERS:,} characters": (
            text[at : at + PIECE_CHARACTERS]
            for text in texts.values()
            for at in range(0, len(text), PIECE_CHARACTERS)
        ),
    }


def _faker_version() -> str | None:
    try:
        return version("faker")
    except PackageNotFoundError:
        return None
