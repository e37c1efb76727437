"""Packets about what is stored and moved: ledger, products."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from telemetry.packet_types.base import Count, Packet, Stream


class StreamLedger(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Account of one (boot, stream)."""

    boot: Count
    """Boot counter of the records."""
    stream: Stream
    generated: Count
    """Records ever stored durably, or dropped at once by policy."""
    acked: Count
    """Records the ground's archive has acknowledged."""
    stored: Count
    """Records on the node's disk."""
    dropped: dict[str, int]
    """Records dropped by policy, by reason."""


class Ledger(Packet, frozen=True, kw_only=True):
    """generated = acked + stored + dropped, for every boot and stream, before this packet itself."""

    stream: ClassVar[Stream] = Stream.LEDGER
    type_name: ClassVar[str] = "ledger"

    streams: list[StreamLedger]


ProductId = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z", description="1 to 64 of a-z, 0-9, '.', '_', '-'")
]


class ProductPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of a memory dump."""

    first_byte: Annotated[int, Meta(ge=0, description="byte")]
    """Where it begins within the product."""
    size_bytes: Annotated[int, Meta(ge=0, description="byte")]
    file: str
    """File it is mapped from."""
    offset: Annotated[int, Meta(ge=0, description="byte")]
    """Where it begins in that file."""


class Product(Packet, frozen=True, kw_only=True):
    """Head of a large product: sent before its chunks, and all that is needed to verify the whole."""

    stream: ClassVar[Stream] = Stream.PRODUCT
    type_name: ClassVar[str] = "product"

    product: ProductId
    """Names the product in its chunks; used once."""
    kind: str
    """`memory_dump` or `file`."""
    name: str
    """What it holds: name of the memory region, or of the file."""
    first_byte: Annotated[int, Meta(ge=0, description="byte")] = 0
    """Where it begins within the region."""
    parts: list[ProductPart] = []
    """Where its bytes come from, in order, for a region that is mapped from files."""
    size_bytes: Annotated[int, Meta(ge=0, description="byte")]
    chunk_bytes: Annotated[int, Meta(ge=1, description="byte")]
    """Size of every chunk but the last."""
    sha256: str
    """SHA-256 of the whole, hexadecimal."""


class ProductChunk(Packet, frozen=True, kw_only=True):
    """A piece of a product."""

    stream: ClassVar[Stream] = Stream.PRODUCT
    type_name: ClassVar[str] = "product_chunk"

    product: ProductId
    index: Count
    """Number of the chunk, from 0: it begins at `index * chunk_bytes`."""
    data: bytes
