from __future__ import annotations

import msgspec
import pytest

from fdir.voting import Triplicate, Unvoted, Voted, decode3, encode3


def struck(blob: bytes, *bits: int) -> bytes:
    damaged = bytearray(blob)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_whole_copies_give_the_value_and_no_repair() -> None:
    assert decode3(encode3(b"boot 7")) == Voted(b"boot 7", repaired=False)
    assert decode3(encode3(b"")) == Voted(b"", repaired=False)


@pytest.mark.parametrize("copy", [0, 1, 2])
def test_every_single_flip_of_a_copy_is_outvoted(copy: int) -> None:
    blob = encode3(b"\x00\x01\xff")
    copy_bits = len(blob) * 8 // 3
    for bit in range(copy * copy_bits, (copy + 1) * copy_bits):
        assert decode3(struck(blob, bit)) == Voted(b"\x00\x01\xff", repaired=True)


def test_one_sound_copy_is_enough() -> None:
    blob = bytearray(encode3(b"safe"))
    size = len(blob) // 3
    blob[:size] = bytes(size)
    blob[size : 2 * size] = b"\xff" * size
    assert decode3(bytes(blob)) == Voted(b"safe", repaired=True)


def test_damage_in_all_three_is_mended_where_no_bit_is_struck_twice() -> None:
    blob = encode3(b"sequence")
    size_bits = len(blob) * 8 // 3
    damaged = struck(blob, 12, size_bits + 30, 2 * size_bits + 50)
    assert decode3(damaged) == Voted(b"sequence", repaired=True)


def test_a_bit_struck_in_two_copies_and_damage_in_the_third_is_refused_not_guessed() -> None:
    blob = encode3(b"sequence")
    size_bits = len(blob) * 8 // 3
    with pytest.raises(Unvoted, match="all three copies are damaged"):
        decode3(struck(blob, 12, size_bits + 12, 2 * size_bits + 50))


def test_sound_copies_that_contradict_each_other_need_the_third_to_decide() -> None:
    old, new = encode3(b"old"), encode3(b"new")
    size = len(old) // 3
    assert decode3(old[:size] + new[:size] + new[:size]) == Voted(b"new", repaired=True)
    # The third is damaged, and still decides bit by bit.
    assert decode3(old[:size] + new[:size] + struck(new[:size], 20)) == Voted(b"new", repaired=True)
    with pytest.raises(Unvoted, match="2 sound copies contradict"):
        decode3(old[:size] + new[:size] + bytes(size))
    with pytest.raises(Unvoted, match="3 sound copies contradict"):
        decode3(old[:size] + new[:size] + encode3(b"odd")[:size])


@pytest.mark.parametrize("blob", [b"", bytes(12), bytes(15), bytes(16), b"\x33" * 15, encode3(b"cut")[:-1]])
def test_what_are_not_three_copies_is_refused(blob: bytes) -> None:
    with pytest.raises(Unvoted):
        decode3(blob)


class Counters(msgspec.Struct, frozen=True):
    boot: int
    resets: tuple[int, ...]


def test_a_triplicate_holds_votes_mends_and_counts() -> None:
    told: list[tuple[str, int]] = []
    held = Triplicate("counters", Counters(3, (1, 2)), Counters, lambda name, n: told.append((name, n)))
    assert held.get() == Counters(3, (1, 2))
    assert (held.repairs, told) == (0, [])

    for number, copy in enumerate(held.buffers(), start=1):
        copy[2] ^= 0x10
        assert held.get() == Counters(3, (1, 2))
        assert held.repairs == number
        # Mended in place: the next strike finds three sound copies again.
        assert len({bytes(c) for c in held.buffers()}) == 1
    assert told == [("counters", 1)] * 3

    held.set(Counters(4, ()))
    assert held.get() == Counters(4, ())
    assert held.repairs == 3


def test_the_copies_of_a_triplicate_are_three_separate_buffers() -> None:
    first, second, third = Triplicate("key", b"secret", bytes).buffers()
    first[3] ^= 1
    assert second == third != first


def test_a_triplicate_beyond_a_vote_says_which_value_is_lost() -> None:
    held = Triplicate("mode", "safe", str)
    for copy in held.buffers():
        copy[2] ^= 1
    with pytest.raises(Unvoted, match="mode: all three copies are damaged"):
        held.get()
    held.set("nominal")
    assert held.get() == "nominal"

    held.buffers()[1].clear()
    assert held.get() == "nominal"
    assert held.repairs == 1

    held.buffers()[1].clear()
    held.buffers()[0][2] ^= 1
    held.buffers()[2][2] ^= 1
    with pytest.raises(Unvoted, match="mode: the copies differ in length"):
        held.get()


def test_a_value_of_another_kind_is_refused_and_the_one_before_stays() -> None:
    held = Triplicate("boot", 7, int)
    with pytest.raises(msgspec.ValidationError):
        held.set("seven")  # type: ignore[arg-type]
    assert held.get() == 7
