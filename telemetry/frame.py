"""The telemetry frame: one packet with its identity, sealed by a CRC-32C.

    msgpack [version, node, boot, stream, seq, t_ns, priority, type, body] | CRC-32C, 4 bytes big-endian

The identity of a record is (node, boot, stream, seq). `body` is a map keyed by field name. The CRC covers
every byte before it and is checked before anything is decoded, so damage is never interpreted.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Annotated, Any

import crc32c
import msgspec
from msgspec import Meta

from telemetry.packets import BY_TYPE, PRIORITY, Packet, Stream
from telemetry.topics import NODE_NAME

FRAME_VERSION = 1
MAX_FRAME_BYTES = 1 << 20
"""Largest frame written or read, bytes (assumed: far above a result block, far below a broker's limit)."""
CRC_BYTES = 4
_CRC = struct.Struct(">I")

MAX_BOOT = (1 << 32) - 1
MAX_INT = (1 << 63) - 1
MAX_PRIORITY = 7

Boot = Annotated[int, Meta(ge=0, le=MAX_BOOT)]
Sequence = Annotated[int, Meta(ge=0, le=MAX_INT)]
MissionTime = Annotated[int, Meta(ge=-MAX_INT - 1, le=MAX_INT)]
Priority = Annotated[int, Meta(ge=0, le=MAX_PRIORITY)]


class FrameError(ValueError):
    """Bytes that are no frame, or a frame whose body is not the packet it says it is."""


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded frame. Its body stays msgpack bytes until `packet` is called."""

    version: int
    node: str
    boot: Boot
    """Boot counter of the node."""
    stream: Stream
    seq: Sequence
    """Gap-free per (node, boot, stream), from 0."""
    t_ns: MissionTime
    """Mission time (UTC) of the packet, ns since 1970."""
    priority: Priority
    """0 is downlinked first."""
    type: str
    """Packet type name; an unknown one is kept, since its identity is sound."""
    body: bytes
    """msgpack map, keyed by field name."""

    def packet(self) -> Packet:
        """Return the body as its typed packet, validated.

        Raises
        ------
        FrameError
            Unknown type, a type that does not travel in this stream, or a body out of its schema.
        """
        try:
            kind = BY_TYPE[self.type]
        except KeyError:
            raise FrameError(f"unknown packet type {self.type!r}") from None
        if kind.stream is not self.stream:
            raise FrameError(f"packet type {self.type!r} in stream {self.stream.value!r}")
        return _decode_body(kind, self.body)


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The array as it travels. Order is the contract: fields are never moved."""

    version: int
    node: str
    boot: Boot
    stream: Stream
    seq: Sequence
    t_ns: MissionTime
    priority: Priority
    type: str
    body: msgspec.Raw


_wire_decoder = msgspec.msgpack.Decoder(_Wire)
_encoder = msgspec.msgpack.Encoder()
_body_decoders: dict[type[Packet], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in BY_TYPE.values()
}


def _decode_body(kind: type[Packet], body: bytes) -> Packet:
    try:
        packet: Packet = _body_decoders[kind].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameError(f"{kind.type_name}: {error}") from error
    return packet


def encode_frame(
    *, node: str, boot: int, seq: int, t_ns: int, packet: Packet, priority: int | None = None
) -> bytes:
    """Return the frame of a packet.

    The packet is checked against its own schema here: one that the ground would refuse must not be
    generated, because it could never be acknowledged and would stay on the node's disk.

    Parameters
    ----------
    node
        Node name, see `telemetry.topics.check_node_name`.
    boot, seq
        Boot counter and sequence number within (boot, stream).
    t_ns
        Mission time (UTC), ns since 1970.
    packet
        Its stream is the stream of the frame.
    priority
        0 (first) to 7; by default the priority of the stream.

    Raises
    ------
    FrameError
        A value out of its range, or a frame over `MAX_FRAME_BYTES`.
    """
    stream = packet.stream
    if priority is None:
        priority = PRIORITY[stream]
    _check_header(node, boot, seq, t_ns, priority)
    body = _encoder.encode(packet)
    _decode_body(type(packet), body)
    array = _encoder.encode(
        (FRAME_VERSION, node, boot, stream, seq, t_ns, priority, packet.type_name, msgspec.Raw(body))
    )
    if len(array) > MAX_FRAME_BYTES - CRC_BYTES:
        raise FrameError(f"{len(array) + CRC_BYTES} bytes, at most {MAX_FRAME_BYTES} allowed")
    return array + _CRC.pack(crc32c.crc32c(array))


def _check_header(node: str, boot: int, seq: int, t_ns: int, priority: int) -> None:
    """Raise `FrameError` for what `decode_frame` would refuse."""
    for name, value, low, high in (
        ("boot", boot, 0, MAX_BOOT),
        ("seq", seq, 0, MAX_INT),
        ("t_ns", t_ns, -MAX_INT - 1, MAX_INT),
        ("priority", priority, 0, MAX_PRIORITY),
    ):
        if not (isinstance(value, int) and low <= value <= high):
            raise FrameError(f"{name} {value!r}, {low} to {high} allowed")
    if not _is_node_name(node):
        raise FrameError(f"node name {node!r} is not allowed")


@lru_cache(maxsize=64)
def _is_node_name(node: str) -> bool:
    return NODE_NAME.fullmatch(node) is not None


def decode_frame(data: bytes) -> Frame:
    """Check the CRC, then decode the frame around its body.

    Raises
    ------
    FrameError
        Too short, too long, wrong CRC, wrong version, or a field out of its type or range.
    """
    if not CRC_BYTES < len(data) <= MAX_FRAME_BYTES:
        raise FrameError(f"{len(data)} bytes, {CRC_BYTES + 1} to {MAX_FRAME_BYTES} allowed")
    array = data[:-CRC_BYTES]
    (expected,) = _CRC.unpack(data[-CRC_BYTES:])
    if crc32c.crc32c(array) != expected:
        raise FrameError("CRC-32C does not match")
    try:
        wire = _wire_decoder.decode(array)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameError(f"not a frame: {error}") from error
    if wire.version != FRAME_VERSION:
        raise FrameError(f"frame version {wire.version}, {FRAME_VERSION} expected")
    if not _is_node_name(wire.node):
        raise FrameError(f"node name {wire.node!r} is not allowed")
    return Frame(
        version=wire.version,
        node=wire.node,
        boot=wire.boot,
        stream=wire.stream,
        seq=wire.seq,
        t_ns=wire.t_ns,
        priority=wire.priority,
        type=wire.type,
        body=bytes(wire.body),
    )
