"""The telemetry frame: one packet with its identity, sealed by a CRC-32C.

    msgpack [version, node, boot, stream, seq, t_ns, priority, type, body] | CRC-32C, 4 bytes big-endian

The identity of a record is (node, boot, stream, seq). `body` is a map keyed by field name. The CRC covers
every byte before it and is checked before anything is decoded, so damage is never interpreted.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

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
_MAX_ARRAY_BYTES = MAX_FRAME_BYTES - CRC_BYTES

MAX_BOOT = (1 << 32) - 1
MAX_INT = (1 << 63) - 1
MAX_PRIORITY = 7
MIN_TIME_NS = -MAX_INT - 1

Boot = Annotated[int, Meta(ge=0, le=MAX_BOOT)]
Sequence = Annotated[int, Meta(ge=0, le=MAX_INT)]
MissionTime = Annotated[int, Meta(ge=MIN_TIME_NS, le=MAX_INT)]
Priority = Annotated[int, Meta(ge=0, le=MAX_PRIORITY)]


class FrameError(ValueError):
    """Bytes that are no frame, or a frame whose body is not the packet it says it is."""


class Frame(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A decoded frame. Its body stays msgpack bytes until `packet` is called."""

    # The order is the contract: it is that of the array, and fields are never moved.
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
    body: msgspec.Raw
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
        try:
            packet: Packet = _KINDS[kind].decoder.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FrameError(f"{self.type}: {error}") from error
        return packet


class _Kind(NamedTuple):
    """What is the same in every frame of a packet type."""

    decoder: msgspec.msgpack.Decoder[Any]
    stream: str
    priority: int
    type_name: str


_frame_decoder = msgspec.msgpack.Decoder(Frame)
_encoder = msgspec.msgpack.Encoder()
_KINDS = {
    kind: _Kind(msgspec.msgpack.Decoder(kind), kind.stream.value, PRIORITY[kind.stream], kind.type_name)
    for kind in BY_TYPE.values()
}


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
    decoder, stream, default_priority, type_name = _KINDS[type(packet)]
    if priority is None:
        priority = default_priority
    _check_sender(node, boot, priority)
    if not (isinstance(seq, int) and 0 <= seq <= MAX_INT):
        raise FrameError(f"seq {seq!r}, 0 to {MAX_INT} allowed")
    if not (isinstance(t_ns, int) and MIN_TIME_NS <= t_ns <= MAX_INT):
        raise FrameError(f"t_ns {t_ns!r}, {MIN_TIME_NS} to {MAX_INT} allowed")
    body = _encoder.encode(packet)
    try:
        decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameError(f"{type_name}: {error}") from error
    array = _encoder.encode(
        (FRAME_VERSION, node, boot, stream, seq, t_ns, priority, type_name, msgspec.Raw(body))
    )
    if len(array) > _MAX_ARRAY_BYTES:
        raise FrameError(f"{len(array) + CRC_BYTES} bytes, at most {MAX_FRAME_BYTES} allowed")
    return array + _CRC.pack(crc32c.crc32c(array))


@lru_cache(maxsize=256)
def _check_sender(node: str, boot: int, priority: int) -> None:
    """Raise `FrameError` for what `decode_frame` would refuse: the same for frame after frame."""
    if not (isinstance(boot, int) and 0 <= boot <= MAX_BOOT):
        raise FrameError(f"boot {boot!r}, 0 to {MAX_BOOT} allowed")
    if not (isinstance(priority, int) and 0 <= priority <= MAX_PRIORITY):
        raise FrameError(f"priority {priority!r}, 0 to {MAX_PRIORITY} allowed")
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
    if crc32c.crc32c(array) != int.from_bytes(data[-CRC_BYTES:], "big"):
        raise FrameError("CRC-32C does not match")
    try:
        frame = _frame_decoder.decode(array)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameError(f"not a frame: {error}") from error
    if frame.version != FRAME_VERSION:
        raise FrameError(f"frame version {frame.version}, {FRAME_VERSION} expected")
    if not _is_node_name(frame.node):
        raise FrameError(f"node name {frame.node!r} is not allowed")
    return frame
