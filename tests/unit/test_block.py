"""Blocks: what goes in comes out; what is damaged or lies is refused; what does not pay is not made."""

from __future__ import annotations

import struct
import zlib

import crc32c
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetry.block import MAX_FRAMES, MAX_RAW_BYTES, BlockError, decode_block, encode_block
from telemetry.frame import encode_frame
from telemetry.packets import Event, Severity


def frames(count: int) -> list[bytes]:
    event = Event(severity=Severity.INFO, name="worker.restarted", text="again")
    return [encode_frame(node="sat-1", boot=1, seq=seq, t_ns=seq, packet=event) for seq in range(count)]


def seal(array: list[object]) -> bytes:
    body = msgspec.msgpack.encode(array)
    return body + struct.pack(">I", crc32c.crc32c(body))


def test_a_block_of_records_of_one_kind_is_a_small_part_of_them() -> None:
    many = frames(100)
    block = encode_block(many)
    assert block is not None
    assert decode_block(block) == many
    assert len(block) < sum(map(len, many)) / 3


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=40))
def test_round_trip(many: list[bytes]) -> None:
    repeated = many * 10
    block = encode_block(repeated)
    assert block is None or decode_block(block) == repeated


def test_what_does_not_compress_is_not_made_a_block() -> None:
    assert encode_block([np.random.default_rng(number).bytes(1000) for number in range(20)]) is None


@pytest.mark.parametrize("many", [[], [b"x"] * (MAX_FRAMES + 1), [b"x" * MAX_RAW_BYTES]])
def test_what_a_reader_would_refuse_is_not_made(many: list[bytes]) -> None:
    with pytest.raises(BlockError):
        encode_block(many)


def test_every_flip_of_a_bit_is_found() -> None:
    block = encode_block(frames(10))
    assert block is not None
    for bit in range(8 * len(block)):
        flipped = bytearray(block)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlockError):
            decode_block(bytes(flipped))


RAW = msgspec.msgpack.encode([b"frame"])


@pytest.mark.parametrize(
    ("array", "why"),
    [
        ([2, 1, len(RAW), zlib.compress(RAW)], "version"),
        ([1, 2, len(RAW), zlib.compress(RAW)], "holds 1"),
        ([1, 1, len(RAW) - 1, zlib.compress(RAW)], "something else"),
        ([1, 1, len(RAW) + 1, zlib.compress(RAW)], "something else"),
        ([1, 1, len(RAW), zlib.compress(RAW) + b"x"], "something else"),
        ([1, 1, len(RAW), zlib.compress(RAW)[:-6]], "something else"),
        ([1, 1, len(RAW), b"no zlib"], "not a block"),
        ([1, 1, 3, zlib.compress(b"\xc1\xc1\xc1")], "not a block"),
        ([1, 0, len(RAW), zlib.compress(RAW)], "not a block"),
        ([1, 1, MAX_RAW_BYTES + 1, zlib.compress(b"0" * (MAX_RAW_BYTES + 1))], "not a block"),
        ([1, 1], "not a block"),
    ],
)
def test_a_block_that_lies_about_itself_is_refused(array: list[object], why: str) -> None:
    with pytest.raises(BlockError, match=why):
        decode_block(seal(array))


@pytest.mark.parametrize("data", [b"", b"\x00" * 4, b"\x00" * 9])
def test_what_is_no_block_is_refused(data: bytes) -> None:
    with pytest.raises(BlockError):
        decode_block(data)
