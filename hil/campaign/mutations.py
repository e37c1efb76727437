"""Damage to messages, as links, memories and strangers do it: bits, bytes, lengths, pieces of others."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

INTERESTING: Final = bytes(
    (0x00, 0x7F, 0x80, 0x90, 0x9F, 0xA0, 0xC0, 0xC4, 0xC6, 0xCA, 0xCF, 0xD9, 0xDC, 0xDF, 0xFF)
)
"""First bytes of every msgpack format, and the ends of ranges."""


def flip_bit(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Flip one bit."""
    at = chance.randrange(8 * len(data))
    data[at >> 3] ^= 1 << (at & 7)


def flip_bits(data: bytearray, chance: random.Random, seeds: Sequence[bytes]) -> None:
    """Flip two to eight bits."""
    for _ in range(chance.randrange(2, 9)):
        flip_bit(data, chance, seeds)


def burst(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Put a run of bytes by chance."""
    at = chance.randrange(len(data))
    length = min(chance.randrange(1, 17), len(data) - at)
    data[at : at + length] = chance.randbytes(length)


def set_byte(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Set one byte to one that means something to msgpack."""
    data[chance.randrange(len(data))] = chance.choice(INTERESTING)


def cut(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Cut the end off."""
    del data[chance.randrange(len(data)) :]


def remove(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Take a piece out."""
    at = chance.randrange(len(data))
    del data[at : at + chance.randrange(1, 17)]


def insert(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Put bytes where none belong."""
    at = chance.randrange(len(data) + 1)
    data[at:at] = chance.randbytes(chance.randrange(1, 17))


def repeat(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Repeat a piece."""
    at = chance.randrange(len(data))
    data[at:at] = data[at : at + chance.randrange(1, 65)]


def splice(data: bytearray, chance: random.Random, seeds: Sequence[bytes]) -> None:
    """Join the begin of one message and the end of another."""
    other = chance.choice(seeds)
    data[chance.randrange(len(data)) :] = other[chance.randrange(len(other)) :]


MUTATIONS: Final[tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...]] = (
    *(flip_bit, flip_bits, burst, set_byte, cut, remove, insert, repeat, splice),
)


def mutate(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Return one of the seeds with one to three mutations; it may be a seed again, by luck."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if data:
            chance.choice(MUTATIONS)(data, chance, seeds)
    return bytes(data)
