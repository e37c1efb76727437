"""Wire: what goes in comes out, any msgpack client reads it, and no damage is ever read."""

from __future__ import annotations

import msgpack
import msgspec
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from telemetry import topics
from telemetry.ack import AckError, decode_ack, encode_ack
from telemetry.commands import parse_arguments
from telemetry.envelope import encode_command, open_command, read_envelope
from telemetry.frame import FrameError, decode_frame, encode_frame
from telemetry.keys import Domain, Key, KeyRing
from telemetry.packets import BY_TYPE, PRIORITY, Event, Severity

KEY = Key("ground-1", bytes(range(32)))
RING = KeyRing([KEY])


def plain(packet: msgspec.Struct) -> object:
    """Return a packet as dicts, lists and scalars, with bytes left as bytes."""
    return as_lists(msgspec.to_builtins(packet, builtin_types=(bytes,)))


def as_lists(value: object) -> object:
    """Return a value with every tuple as a list, as msgpack has it."""
    if isinstance(value, dict):
        return {key: as_lists(each) for key, each in value.items()}
    return [as_lists(each) for each in value] if isinstance(value, (list, tuple)) else value


def test_every_packet_type_has_a_strategy() -> None:
    assert strategies.PACKETS.keys() == BY_TYPE.keys()


@pytest.mark.parametrize("name", BY_TYPE)
@given(data=st.data())
def test_frame_round_trip(name: str, data: st.DataObject) -> None:
    packet = data.draw(strategies.PACKETS[name])
    node, boot = data.draw(strategies.node_names), data.draw(strategies.boots)
    seq, t_ns = data.draw(strategies.sequences), data.draw(strategies.times_ns)
    encoded = encode_frame(node=node, boot=boot, seq=seq, t_ns=t_ns, packet=packet)
    frame = decode_frame(encoded)
    assert frame.packet() == packet
    assert type(frame.packet()) is BY_TYPE[name]
    stream = packet.stream
    assert (frame.node, frame.boot, frame.stream, frame.seq, frame.t_ns) == (node, boot, stream, seq, t_ns)
    array = msgpack.unpackb(encoded[:-4], strict_map_key=False)
    assert array == [1, node, boot, stream.value, seq, t_ns, PRIORITY[stream], name, plain(packet)]


@given(packet=strategies.packets, priority=st.integers(0, 7))
def test_priority_can_be_set(packet: strategies.p.Packet, priority: int) -> None:
    frame = decode_frame(encode_frame(node="n", boot=0, seq=0, t_ns=0, packet=packet, priority=priority))
    assert frame.priority == priority


def test_every_single_bit_flip_of_a_frame_is_rejected() -> None:
    packet = Event(severity=Severity.HIGH, name="worker.restarted", text="after silence", evidence={"n": 3})
    frame = encode_frame(node="sat-1", boot=7, seq=300, t_ns=10**18, packet=packet)
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode_frame(bytes(flipped))


@given(strategies.packets, st.data())
def test_up_to_three_flips_of_any_frame_are_rejected(
    packet: strategies.p.Packet, data: st.DataObject
) -> None:
    # CRC-32C detects every 3-bit error of frames up to 2 GiB.
    frame = encode_frame(node="sat-1", boot=7, seq=300, t_ns=10**18, packet=packet)
    bits = data.draw(st.sets(st.integers(0, 8 * len(frame) - 1), min_size=1, max_size=3))
    flipped = bytearray(frame)
    for bit in bits:
        flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError, match="CRC"):
        decode_frame(bytes(flipped))


@given(st.binary(max_size=300))
def test_garbage_is_no_frame_and_no_acknowledgement(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(data)
    with pytest.raises(AckError):
        decode_ack(data, RING)


@given(strategies.acks())
def test_acknowledgement_round_trip(ack: strategies.Ack) -> None:
    encoded = encode_ack(ack, KEY)
    assert decode_ack(encoded, RING) == ack
    array = msgpack.unpackb(encoded[:-32])
    gaps = [list(gap) for gap in ack.gaps]
    assert array == [1, "ground-1", ack.node, ack.boot, ack.stream.value, ack.upto, gaps]
    covered = sum(last - first + 1 for first, last in ack.ranges())
    assert covered == ack.upto - sum(last - first + 1 for first, last in ack.gaps)


@given(strategies.acks(), st.data())
def test_no_flipped_bit_of_an_acknowledgement_passes(ack: strategies.Ack, data: st.DataObject) -> None:
    encoded = bytearray(encode_ack(ack, KEY))
    bit = data.draw(st.integers(0, 8 * len(encoded) - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(AckError):
        decode_ack(bytes(encoded), RING)


@given(strategies.commands("ground-1"))
def test_command_round_trip(command: strategies.Command) -> None:
    encoded = encode_command(command, RING)
    envelope = read_envelope(encoded)
    assert envelope.open(KEY, topics.tc(command.node)) == command == open_command(encoded, RING)
    assert envelope.open(KEY, topics.ack(command.node)) is None
    signed = topics.tc(command.node).encode() + b"\0" + envelope.signed
    assert not KEY.verify(Domain.ACK, signed, envelope.proof)
    assert msgpack.unpackb(envelope.signed) == list(msgspec.structs.astuple(command))
    sealed = encode_command(command, RING, sealed=True)
    assert open_command(sealed, RING) == command
    parsed = parse_arguments(command.name, command.args)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(parsed)) == command.args
