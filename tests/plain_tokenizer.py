"""A tokenizer by the book, for tests: the vocabulary of a GGUF, no code of ours and none of SentencePiece.

User-defined pieces are cut out first, the longest at each place. What is left is merged pair by pair, that of
the highest score first, the leftmost of equals. Characters that are no piece become their bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

NORMAL, USER_DEFINED, BYTE = 1, 4, 6


@dataclass
class PlainTokenizer:
    """Pieces, scores and types as a GGUF has them."""

    pieces: list[bytes]
    scores: list[float]
    types: list[int]
    normal: dict[str, int] = field(init=False)
    byte_ids: dict[int, int] = field(init=False)
    runs: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        text = [piece.decode() for piece in self.pieces]
        of_type = {
            kind: {text[number]: number for number, each in enumerate(self.types) if each == kind}
            for kind in (NORMAL, USER_DEFINED, BYTE)
        }
        self.normal, self.runs = of_type[NORMAL], of_type[USER_DEFINED]
        self.byte_ids = {int(piece[3:5], 16): number for piece, number in of_type[BYTE].items()}
        longest_first = sorted(self.runs, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without U+2581, which stands for a space in SentencePiece."""
        ids: list[int] = []
        for part in self._cut.split(text):
            ids += [self.runs[part]] if part in self.runs else self._merged(part.replace(" ", "\u2581"))
        return ids

    def _merged(self, text: str) -> list[int]:
        parts = list(text)
        while True:
            pairs = [
                (-self.scores[self.normal[pair]], place)
                for place, pair in enumerate(map("".join, pairwise(parts)))
                if pair in self.normal
            ]
            if not pairs:
                break
            place = min(pairs)[1]
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
        found: list[int] = []
        for part in parts:
            found += [self.normal[part]] if part in self.normal else map(self.byte_ids.get, part.encode())
        return found
