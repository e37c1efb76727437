"""Voted copies under random damage: the value comes back, or the vote is refused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fdir.voting import Triplicate, Unvoted, decode3, encode3


@given(st.binary(max_size=64), st.integers(0, 2), st.data())
def test_whatever_happens_to_two_copies_the_sound_third_wins(
    value: bytes, sound: int, data: st.DataObject
) -> None:
    blob = encode3(value)
    size = len(blob) // 3
    copies = [blob[:size]] * 3
    for i in range(3):
        if i != sound:
            # Bursts of at most 32 bits are what a CRC-32 finds without fail.
            at = data.draw(st.integers(0, size - 4))
            burst = data.draw(st.binary(min_size=4, max_size=4))
            struck = bytearray(copies[i])
            struck[at : at + 4] = bytes(a ^ b for a, b in zip(struck[at : at + 4], burst, strict=True))
            copies[i] = bytes(struck)
    voted = decode3(b"".join(copies))
    assert voted.value == value
    assert voted.repaired == (b"".join(copies) != blob)


@given(st.binary(max_size=32), st.sets(st.integers(0, 37 * 8 - 1), max_size=12), st.data())
def test_scattered_flips_are_outvoted_while_no_bit_is_struck_twice(
    value: bytes, bits: set[int], data: st.DataObject
) -> None:
    blob = bytearray(encode3(value))
    size_bits = len(blob) * 8 // 3
    struck = {bit % size_bits for bit in bits}
    for bit in struck:
        copy = data.draw(st.integers(0, 2))
        position = copy * size_bits + bit
        blob[position // 8] ^= 1 << position % 8
    assert decode3(bytes(blob)).value == value


@given(st.binary(max_size=16), st.lists(st.integers(0, 63 * 8 - 1), max_size=40))
def test_heavy_damage_is_never_guessed_at(value: bytes, bits: list[int]) -> None:
    blob = bytearray(encode3(value))
    for bit in bits:
        position = bit % (len(blob) * 8)
        blob[position // 8] ^= 1 << position % 8
    try:
        voted = decode3(bytes(blob))
    except Unvoted:
        return
    assert voted.value == value


@given(st.lists(st.one_of(st.integers(-1 << 62, 1 << 62), st.tuples(st.integers(0, 2), st.integers(0, 99)))))
def test_a_triplicate_reads_back_what_was_set_whatever_strikes_one_copy_at_a_time(
    steps: list[int | tuple[int, int]],
) -> None:
    held = Triplicate("counter", 0, int)
    expected = strikes = 0
    for step in steps:
        if isinstance(step, int):
            expected = step
            held.set(step)
        else:
            copy, bit = step
            buffer = held.buffers()[copy]
            buffer[bit // 8 % len(buffer)] ^= 1 << bit % 8
            strikes += 1
        assert held.get() == expected
        assert held.repairs == strikes
