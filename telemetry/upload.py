"""A chunk of an upload: a piece of a model image or table on its way up.

    msgpack [version, key id, node, sha256, index, data] | HMAC-SHA-256, 32 bytes

`sha256`, 32 bytes, is that of the whole: a chunk of one upload, played again, fits no other. Chunks need no
numbers against replay and may come in any order: the same one twice changes nothing. Which are missing is
asked for by command, and so is what becomes of the whole.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from telemetry.commands import MAX_CHUNK_BYTES, ChunkIndex
from telemetry.keys import Domain, Key, KeyRing
from telemetry.signed import SignedError, open_signed, sign

UPLOAD_VERSION = 1


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of the whole."""

    node: str
    sha256: bytes
    """Of the whole, 32 bytes."""
    index: int
    """From 0; it begins at `index * chunk_bytes`."""
    data: bytes


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    key_id: str
    node: str
    sha256: Annotated[bytes, Meta(min_length=32, max_length=32)]
    index: ChunkIndex
    data: Annotated[bytes, Meta(min_length=1, max_length=MAX_CHUNK_BYTES)]


_decoder = msgspec.msgpack.Decoder(_Wire)


def encode_chunk(chunk: Chunk, key: Key) -> bytes:
    """Return the chunk signed with `key`."""
    wire = _Wire(UPLOAD_VERSION, key.id, chunk.node, chunk.sha256, chunk.index, chunk.data)
    return sign(wire, key, Domain.UPLOAD)


def decode_chunk(data: bytes, ring: KeyRing, node: str) -> Chunk:
    """Authenticate and decode. Raises `SignedError`, also for a chunk that is for another node."""
    wire = open_signed(data, _decoder, UPLOAD_VERSION, ring, Domain.UPLOAD)
    if wire.node != node:
        raise SignedError(f"for node {wire.node[:40]!r}")
    return Chunk(node=wire.node, sha256=wire.sha256, index=wire.index, data=wire.data)
