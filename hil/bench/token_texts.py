"""Texts that tokenizers are compared on, made at run time: generated strings, and a corpus of mixed text.

Both follow from a seed. The corpus also depends on the standard library of this Python and on the release of
package `faker` (extra `peers`); nothing of it is kept.
"""

from __future__ import annotations

import csv
import io
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from telemetry.errors import PenumbraError

CORPUS_BYTES: Final = 2_000_000
"""Size of the corpus at least, as UTF-8."""
_PYTHON_SHARE: Final = 0.3
"""Of the corpus, sources of the standard library; the other kinds share the rest evenly."""
LOCALES: Final = (
    *("en_US", "de_DE", "fr_FR", "pl_PL", "cs_CZ", "tr_TR", "vi_VN", "ru_RU", "uk_UA", "el_GR", "ka_GE"),
    *("hy_AM", "he_IL", "fa_IR", "ar_AA", "hi_IN", "ne_NP", "bn_BD", "ta_IN", "gu_IN", "or_IN", "th_TH"),
    *("ja_JP", "zh_CN", "zh_TW", "ko_KR"),
)
"""Languages of the corpus, in turn."""
EMOJI: Final = (
    *("\U0001f680", "\U0001f6f0\ufe0f", "\u2600\ufe0f", "\U0001f468\u200d\U0001f469\u200d\U0001f467"),
    *(
        "\U0001f469\U0001f3fd\u200d\U0001f680",
        "\U0001f44d\U0001f3ff",
        "\U0001f1eb\U0001f1f7",
        "#\ufe0f\u20e3",
    ),
    *(
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        "\u2764\ufe0f\u200d\U0001f525",
    ),
)
"""Single code points, and sequences of several: joined, with a skin tone, flags, a key."""
CONTROL_TEXTS: Final = (
    *("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<s>", "</s>", "<start_of_turn>user\n", "<end_of_turn>"),
    *("[multimodal]", "<unused0>", "<unused99>", "<image_soft_token>", "<0x0A>", "<0xFF>", "<|im_end|>"),
)
"""What looks like a control piece, in a text."""
_TAGS: Final = (
    "table",
    "tr",
    "td",
    "th",
    "h1",
    "h6",
    "b",
    "i",
    "u",
    "s",
    "ul",
    "li",
    "strong",
    "blockquote",
    "p",
)
_NO_SPACES: Final = (
    *((0x4E00, 0x9FFF), (0x3041, 0x3096), (0x30A1, 0x30FA), (0xAC00, 0xD7A3), (0x0E01, 0x0E3A)),
    *((0x0E81, 0x0E84), (0x1780, 0x17D3), (0x1000, 0x1049), (0x0F40, 0x0F6C), (0x20000, 0x2A6DF)),
    *((0x0905, 0x0939), (0x0621, 0x064A), (0x05D0, 0x05EA), (0x12A0, 0x1356), (0x0400, 0x045F)),
)
"""First and last code points of blocks of scripts; the first two lines are written without spaces."""
_MARKS: Final = ((0x0300, 0x036F), (0x0610, 0x061A), (0x064B, 0x065F), (0x093A, 0x094F), (0x20D0, 0x20F0))
_SURROGATES: Final = range(0xD800, 0xE000)


def generated(count: int, seed: int, vocabulary: Sequence[str]) -> Iterator[str]:
    """Yield strings of 1 to 8 parts each: what prompts consist of, and what breaks tokenizers.

    Parameters
    ----------
    count
        Strings.
    seed
        They follow from it, and from the vocabulary.
    vocabulary
        Pieces, as text; of these some parts are put together.
    """
    chance = random.Random(seed)  # noqa: S311 - texts, not secrets
    # Any piece with the sign for a space would make most strings ones that need explaining.
    pieces = [piece.replace("\u2581", " ") for piece in vocabulary]
    kinds: dict[Callable[[random.Random], str], int] = {
        lambda chance: " " * chance.randint(1, 70): 4,
        lambda chance: "\n" * chance.randint(1, 40): 2,
        lambda chance: "\t" * chance.randint(1, 40): 2,
        lambda chance: _some(chance, " \n\t\r\v\f\u00a0\u2003\u3000\u200b\ufeff", 12): 3,
        _tag: 3,
        _code: 3,
        _json: 2,
        _row: 2,
        lambda chance: _some(chance, EMOJI, 4): 2,
        lambda chance: _of_block(chance, chance.choice(_NO_SPACES), 20): 4,
        lambda chance: (
            chance.choice("aeoAz \u0627\u0915\u0e01") + _of_block(chance, chance.choice(_MARKS), 6)
        ): 2,
        lambda chance: "".join(_any_character(chance) for _ in range(chance.randint(1, 8))): 3,
        lambda chance: _of_block(chance, (0x20, 0x24F), 12): 2,
        lambda chance: _some(chance, "\x00\x01\x07\x08\x1b\x7f\x85\ufffd\uffff", 4): 2,
        lambda chance: chance.choice(CONTROL_TEXTS): 2,
        lambda chance: _some(chance, pieces, 6): 5,
        lambda chance: "\u2581" * chance.randint(1, 5): 1,
    }
    ways, weights = list(kinds), list(kinds.values())
    for _ in range(count):
        yield "".join(way(chance) for way in chance.choices(ways, weights, k=chance.randint(1, 8)))


def corpus(seed: int, size_bytes: int = CORPUS_BYTES) -> dict[str, str]:
    """Return mixed text by kind: Python, prose, Markdown tables, JSON and CSV in many languages, with emoji.

    Raises
    ------
    PenumbraError
        Package `faker` is not installed, or this Python has no sources.
    """
    try:
        from faker import Faker  # noqa: PLC0415
    except ImportError:
        raise PenumbraError(
            "the corpus is made with package faker, which is not installed",
            "pip install 'penumbra-node[peers]'",
        ) from None
    python = _filled(_sources(seed), int(size_bytes * _PYTHON_SHARE))
    found = {"Python": python}
    writers: dict[str, Callable[[Any, random.Random], str]] = {
        "prose": _prose,
        "Markdown tables": _markdown,
        "JSON": lambda fake, chance: (
            json.dumps(
                _records(fake, chance),
                ensure_ascii=chance.random() < 0.2,
                indent=chance.choice((None, 2, 4, "\t")),
            )
            + "\n"
        ),
        "CSV": _csv,
    }
    share = (size_bytes - len(python.encode())) // len(writers)
    for number, (kind, write) in enumerate(writers.items()):
        fakes = [Faker(locale) for locale in LOCALES]
        for place, fake in enumerate(fakes):
            fake.seed_instance(f"{seed} {number} {place}")
        chance = random.Random(f"{seed} {kind}")  # noqa: S311 - texts, not secrets
        found[kind] = _filled((write(fake, chance) for fake in cycle(fakes)), share)
    return found


def _filled(texts: Iterable[str], size_bytes: int) -> str:
    """Join texts until they have so many bytes, or somewhat more."""
    taken, size = [], 0
    for text in texts:
        taken.append(text)
        size += len(text.encode())
        if size >= size_bytes:
            break
    return "".join(taken)


def _sources(seed: int) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    if not paths:
        raise PenumbraError(
            f"{root}: no Python sources there", "use a Python whose standard library is installed as files"
        )
    random.Random(seed).shuffle(paths)  # noqa: S311 - order of texts
    for path in paths:
        try:
            yield path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):  # tests of Python have files in other encodings
            continue


def _prose(fake: Any, chance: random.Random) -> str:
    # Some locales have no words for paragraphs: names and places are then in the script of the language.
    parts = [
        fake.paragraph(nb_sentences=6),
        fake.name(),
        fake.address(),
        fake.company(),
        fake.job(),
        fake.city(),
    ]
    chance.shuffle(parts)
    joint = chance.choice((" ", ". ", ", ", "\n", "\n\n    ", f" {chance.choice(EMOJI)} "))
    return joint.join(parts) + "\n\n"


def _records(fake: Any, chance: random.Random) -> list[dict[str, object]]:
    return [
        {
            "name": fake.name(),
            "address": fake.address(),
            "company": fake.company(),
            "mail": fake.email(),
            "note": f"{fake.sentence()} {chance.choice(EMOJI)}",
            "value": round(chance.gauss(0, 1000), chance.randint(0, 6)),
            "flags": [chance.random() < 0.5, None, chance.randint(0, 10**6)],
        }
        for _ in range(chance.randint(1, 6))
    ]


def _markdown(fake: Any, chance: random.Random) -> str:
    rows = [[str(value).replace("\n", "<br>") for value in row.values()] for row in _records(fake, chance)]
    width = chance.choice((0, 12, 30))
    lines = [[fake.city() for _ in rows[0]], ["---"] * len(rows[0]), *rows]
    return "".join("| " + " | ".join(cell.ljust(width) for cell in line) + " |\n" for line in lines) + "\n"


def _csv(fake: Any, chance: random.Random) -> str:
    to = io.StringIO()
    rows = _records(fake, chance)
    writer = csv.DictWriter(
        to, list(rows[0]), delimiter=chance.choice(",;\t"), lineterminator=chance.choice(("\n", "\r\n"))
    )
    writer.writeheader()
    writer.writerows(rows)
    return to.getvalue()


def _some(chance: random.Random, parts: Sequence[str], most: int) -> str:
    return "".join(chance.choices(parts, k=chance.randint(1, most)))


def _of_block(chance: random.Random, block: tuple[int, int], most: int) -> str:
    return "".join(chr(chance.randint(*block)) for _ in range(chance.randint(1, most)))


def _any_character(chance: random.Random) -> str:
    code = chance.randint(0, chance.choice((0xFFFF, 0x10FFFF)))
    return "\ufffd" if code in _SURROGATES else chr(code)


def _word(chance: random.Random) -> str:
    return _some(chance, "aeiourstlnmpdkXYZ_0123456789", 8)


def _tag(chance: random.Random) -> str:
    tag = f"{chance.choice(('<', '</', '< '))}{chance.choice(_TAGS)}{chance.choice(('>', ' >', '/>', ''))}"
    return tag * chance.randint(1, 3)


def _code(chance: random.Random) -> str:
    indent = chance.choice(("    ", "  ", "\t"))
    lines = [
        indent * chance.randint(0, 8)
        + _word(chance)
        + chance.choice((" = ", "(", ": ", " += ", "['", " -> "))
        + str(chance.randint(-99, 10**9))
        + chance.choice((")", ";", " # ", "  // ", " {"))
        for _ in range(chance.randint(1, 4))
    ]
    return chance.choice(("\n", "\r\n", "\n\n\n")).join(lines)


def _json(chance: random.Random) -> str:
    found = {_word(chance): [chance.random(), _word(chance), None] for _ in range(chance.randint(1, 3))}
    return json.dumps(found, indent=chance.choice((None, 1, 2, 4, 8)))


def _row(chance: random.Random) -> str:
    cells = (_word(chance).ljust(chance.randint(0, 20)) for _ in range(chance.randint(1, 5)))
    return "|" + "|".join(cells) + chance.choice(("|\n", "|", "\t|\n|---|\n"))
