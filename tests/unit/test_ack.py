"""Acknowledgements: pinned bytes, and nothing forged or inconsistent may delete data."""

from __future__ import annotations

import msgpack
import pytest

from telemetry.ack import MAX_GAPS, Ack, AckError, decode_ack, encode_ack
from telemetry.keys import Domain, Key, KeyRing, KeyState
from telemetry.packets import Stream

KEY = Key("ground-1", bytes(range(32)))
RING = KeyRing([KEY])
ACK = Ack(node="sat-1", boot=7, stream=Stream.HOUSEKEEPING, upto=300, gaps=[(3, 5), (17, 17)])
GOLDEN = bytes.fromhex(
    "9701a867726f756e642d31a57361742d3107a2686bcd012c92920305921111952f6c8388f7bcc8056e8b00f36edcbf428c5d"
    "fc6c05d7f4d71c2f2c8ed7a24e"
)


def sign(array: object, key: Key = KEY) -> bytes:
    body = msgpack.packb(array)
    return body + key.mac(Domain.ACK, body)


def test_golden_bytes() -> None:
    assert encode_ack(ACK, KEY) == GOLDEN
    assert decode_ack(GOLDEN, RING) == ACK


def test_ranges() -> None:
    assert list(ACK.ranges()) == [(0, 2), (6, 16), (18, 299)]
    assert list(Ack(node="n", boot=0, stream=Stream.EVENT, upto=0).ranges()) == []
    assert list(Ack(node="n", boot=0, stream=Stream.EVENT, upto=4, gaps=[(0, 3)]).ranges()) == []


@pytest.mark.parametrize("stream", Stream)
def test_every_stream(stream: Stream) -> None:
    ack = Ack(node="n", boot=0, stream=stream, upto=1)
    assert decode_ack(encode_ack(ack, KEY), RING) == ack


@pytest.mark.parametrize(
    "gaps", [[(5, 3)], [(3, 5), (4, 6)], [(3, 5), (6, 7)], [(9, 9), (1, 1)], [(299, 300)], [(-1, 2)]]
)
def test_inconsistent_gaps_are_neither_sent_nor_read(gaps: list[tuple[int, int]]) -> None:
    with pytest.raises(AckError, match="gap"):
        encode_ack(Ack(node="sat-1", boot=7, stream=Stream.EVENT, upto=300, gaps=gaps), KEY)
    with pytest.raises(AckError):
        decode_ack(sign([1, "ground-1", "sat-1", 7, "event", 300, gaps]), RING)


def test_too_many_gaps() -> None:
    gaps = [(2 * i, 2 * i) for i in range(MAX_GAPS + 1)]
    with pytest.raises(AckError, match="at most"):
        encode_ack(Ack(node="n", boot=0, stream=Stream.EVENT, upto=10**6, gaps=gaps), KEY)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no ack"),
        (b"\x00" * 40, "no ack"),
        (sign([2, "ground-1", "n", 0, "event", 1, []]), "version 2"),
        (sign([1, "ground-2", "n", 0, "event", 1, []]), "unknown or not active"),
        (sign([1, "old", "n", 0, "event", 1, []], Key("old", b"o" * 32)), "unknown or not active"),
        (sign([1, "ground-1", "n", 0, "event", 1, []], Key("ground-1", b"f" * 32)), "wrong MAC"),
        (sign([1, "ground-1", "n", 0, "video", 1, []]), "no ack"),
        (sign([1, "ground-1", "n", 0, "event", -1, []]), "no ack"),
        (sign([1, "ground-1", "n", 0, "event", 1]), "no ack"),
        (sign([1, "ground-1", "n", 0, "event", 1, [], 0]), "no ack"),
    ],
)
def test_what_is_rejected(data: bytes, why: str) -> None:
    ring = KeyRing([KEY, Key("old", b"o" * 32, KeyState.RETIRED)])
    with pytest.raises(AckError, match=why):
        decode_ack(data, ring)


def test_a_mac_made_for_a_command_does_not_pass() -> None:
    body = GOLDEN[:-32]
    with pytest.raises(AckError, match="wrong MAC"):
        decode_ack(body + KEY.mac(Domain.COMMAND, body), RING)
