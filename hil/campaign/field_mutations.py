"""Single fields of a message set to another type or value, all others as they were.

A message is taken apart into plain maps and lists. Each node of that tree is a field; so is what stands for
the message itself. One that is taken out, and one that nobody knows, count as mutations too.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

Way = tuple[str | int, ...]
ABSENT: Final = object()
"""Stands for a field that is taken out."""
UNKNOWN: Final = "no_such_field"


def _deep(levels: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(levels):
        inner = [inner]
    return inner


FIXED: Final[tuple[object, ...]] = (
    *(ABSENT, None, True, False),
    *(0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, 0.5, -1.0, 5e-324, 1e-308, 1e-9, 1e17, 1e300, -1e300, math.nan, math.inf, -math.inf),
    *("", "x", "0", "1e300", "\0", "\u00a0", "\U0001f6f0", "x" * 69, "x" * 20_000),
    *(b"", b"\x00" * 32, b"\xff" * 20_000),
    *(
        [],
        [0],
        [None],
        [[]],
        ["x"] * 1000,
        [{}],
        {},
        {"a": 1},
        {1: 2, "a": 3},
        {"a": {"b": [{}]}},
        {"a": {1: 2, "b": 3}},
    ),
    *(_deep(400),),
)
"""Tried on each field before values by chance."""


@dataclass(frozen=True)
class Mutation:
    """One field set to one value."""

    path: str
    """As `windows[].end_ns`; empty for the message itself."""
    tree: Any


def paths(tree: Any, at: Way = ()) -> Iterator[Way]:
    """Yield the way to every node of a message, the message itself first."""
    yield at
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from paths(value, (*at, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from paths(value, (*at, index))


def name_of(path: Way) -> str:
    """Return a path as text; elements of one list share a name, but for those of the message itself."""
    head = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[:1])
    rest = "".join("[]" if isinstance(part, int) else f".{part}" for part in path[1:])
    return (head + rest).removeprefix(".")


def put(tree: Any, path: Way, value: object) -> Any:
    """Return a copy of a message with one node replaced, or taken out."""
    if not path:
        return None if value is ABSENT else value
    first, rest = path[0], path[1:]
    copied: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        copied[first] = put(copied[first], rest, value)
    elif value is ABSENT:
        del copied[first]
    else:
        copied[first] = value
    return copied


def by_chance(old: object, chance: random.Random) -> object:
    """Return a value near to or far from the old one, or of another type."""
    kind = chance.randrange(6)
    if kind == 0:
        return chance.getrandbits(chance.randrange(1, 65)) - chance.choice((0, 2**63)) * chance.getrandbits(1)
    if kind == 1:
        return struct.unpack("<d", chance.randbytes(8))[0]
    if kind == 2:
        return 10.0 ** chance.uniform(-320, 308) * chance.choice((-1, 1))
    if kind == 3:
        return "".join(chr(chance.choice((chance.randrange(32, 127), chance.randrange(0xD7FF)))) for _ in
                       range(chance.randrange(1, 80)))  # fmt: skip
    if isinstance(old, bool) or not isinstance(old, int | float):
        return _other_text(old, chance)
    return _other_number(old, chance)


def _other_number(old: float, chance: random.Random) -> object:
    scaled = old * chance.choice((-1.0, 0.0, 1 - 1e-9, 0.5, 2.0, 10.0, 1e3, 1e9))
    return chance.choice((scaled, str(old), [old], float(old), int(min(max(scaled, -(2.0**62)), 2.0**62))))


def _other_text(old: object, chance: random.Random) -> object:
    if not isinstance(old, str) or not old:
        return chance.choice(("", [old], {"x": old}, 0, str(old)[:1000]))
    at = chance.randrange(len(old))
    letter = chance.choice(("", " ", "9", "-", ".", "\u00e9", "Z", old[at] * 2))
    return chance.choice((old[:at] + letter + old[at + 1 :], old[:at], old.lower(), old[::-1], [old]))


def value_for(old: object, number: int, chance: random.Random) -> object:
    """Return the value of the `number`-th mutation of a field: the fixed ones first."""
    return FIXED[number] if number < len(FIXED) else by_chance(old, chance)


def mutations(tree: Any, count: int, chance: random.Random) -> Iterator[Mutation]:
    """Yield so many mutations of a message, each field in turn, and an unknown field now and then."""
    known = list(paths(tree))
    number = 0
    while count > 0:
        for path in known[:count]:
            old = tree
            for part in path:
                old = old[part]
            yield Mutation(name_of(path), put(tree, path, value_for(old, number, chance)))
        count -= len(known)
        number += 1
        maps = [path for path in known if isinstance(_at(tree, path), dict)]
        if maps and count > 0:
            path = chance.choice(maps)
            count -= 1
            yield Mutation(name_of((*path, UNKNOWN)), put(tree, path, {**_at(tree, path), UNKNOWN: number}))


def _at(tree: Any, path: Way) -> Any:
    for part in path:
        tree = tree[part]
    return tree
