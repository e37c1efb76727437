"""What `penumbra ground` and `penumbra products` leave behind for machines: the fields of their JSON."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, description="count")]


class CommandEnd(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a command ended."""

    name: str
    """Name of the command."""
    command_seq: int
    """Sequence number it was sent with."""
    ok: bool
    code: str
    """As in its verification."""
    reason: str


class GroundReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a station did from its start to its end."""

    node: str
    archived: Count
    """Frames that came down and are new in the archive."""
    duplicates: Count
    """Frames that had been archived already."""
    garbage: Count
    """Messages under the node's topics that are no frame of it."""
    failures: Count
    """Lines of the input that could not be executed, or whose command failed; one more if the broker was
    never reached."""
    commands: list[CommandEnd]
    """Commands that ended, in this order; those of uploads, too."""


class ProductState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A product in the archive."""

    product: str
    name: str
    """What it holds: name of the memory region, or of the file."""
    first_byte: Count
    size_bytes: Annotated[int, Meta(ge=0, description="byte")]
    sha256: str
    state: str
    """`whole`, `incomplete` or `damaged`: all chunks are there, and their SHA-256 is not that of the head."""
    missing: list[tuple[int, int]]
    """Ranges (first, last) of chunks that are not there, both included."""
    file: str | None
    """Where it was written to; null unless it is whole."""


class ProductsReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What products an archive holds."""

    node: str
    products: list[ProductState]
