"""Many frames in one message, compressed: the bulk downlink of a backlog.

    msgpack [version, frames, size, data] | CRC-32C, 4 bytes big-endian

`data` is a zlib stream of a msgpack array of `frames` frames, `size` bytes long. Records of one kind share
all their field names, so a block of housekeeping is a small part of its frames. Each frame keeps its own CRC
and identity: a block adds nothing that the archive must know, and may be cut anew at any time.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Annotated

import crc32c
import msgspec
from msgspec import Meta

from telemetry import topics

BLOCK_VERSION = 1
MAX_RAW_BYTES = 1 << 20
"""Most bytes of frames in a block: bounds what a reader unpacks, byte (assumed)."""
MAX_FRAMES = 1024
PAYS = 0.9
"""A block is sent if it is at most this share of its frames (assumed)."""
LEVEL = 1
"""Effort of zlib: on msgpack maps the highest gains a tenth more and takes ten times as long (measured)."""
_CRC = struct.Struct(">I")


class BlockError(ValueError):
    """Bytes that are no block."""


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    frames: Annotated[int, Meta(ge=1, le=MAX_FRAMES)]
    size: Annotated[int, Meta(ge=1, le=MAX_RAW_BYTES)]
    data: bytes


_encoder = msgspec.msgpack.Encoder()
_wire_decoder = msgspec.msgpack.Decoder(_Wire)
_frames_decoder = msgspec.msgpack.Decoder(list[bytes])


def encode_block(frames: Sequence[bytes]) -> bytes | None:
    """Return the block of some frames, or None when it does not pay to send it instead of them.

    Raises
    ------
    BlockError
        No frame, more than `MAX_FRAMES`, or more than `MAX_RAW_BYTES` together.
    """
    raw = _encoder.encode(list(frames))
    if not 1 <= len(frames) <= MAX_FRAMES or len(raw) > MAX_RAW_BYTES:
        raise BlockError(f"{len(frames)} frames of {len(raw)} bytes: too many for a block, or none")
    data = zlib.compress(raw, LEVEL)
    if len(data) > PAYS * len(raw):
        return None
    array = _encoder.encode(_Wire(BLOCK_VERSION, len(frames), len(raw), data))
    return array + _CRC.pack(crc32c.crc32c(array))


def frames_in(topic: str, payload: bytes) -> list[bytes]:
    """Return the frames of a telemetry message, block or not. They are not looked into.

    Raises
    ------
    BlockError
        The topic is that of blocks, and the payload is none.
    """
    return decode_block(payload) if topics.is_block(topic) else [payload]


def decode_block(block: bytes) -> list[bytes]:
    """Return the frames of a block. They are not looked into.

    Raises
    ------
    BlockError
        Wrong CRC, shape or version, or not what its head says. It never unpacks more than the head allows.
    """
    array, crc = block[: -_CRC.size], block[-_CRC.size :]
    if not array or _CRC.pack(crc32c.crc32c(array)) != crc:
        raise BlockError("CRC-32C does not match")
    try:
        wire = _wire_decoder.decode(array)
        if wire.version != BLOCK_VERSION:
            raise BlockError(f"block version {wire.version}, {BLOCK_VERSION} expected")
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(wire.data, wire.size + 1)
        if len(raw) != wire.size or not unpacker.eof or unpacker.unused_data:
            raise BlockError(f"a block of {wire.size} bytes unpacks to something else")
        frames = _frames_decoder.decode(raw)
    except (msgspec.DecodeError, zlib.error) as error:
        raise BlockError(f"not a block: {error}") from None
    if len(frames) != wire.frames:
        raise BlockError(f"a block of {wire.frames} frames holds {len(frames)}")
    return frames
