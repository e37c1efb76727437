"""Products out of the archive: their chunks put together and proven, or what is missing of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass

from telemetry.archive import Archive
from telemetry.packets import Product, ProductChunk


@dataclass(frozen=True)
class Assembled:
    """A product as far as the archive has it."""

    head: Product
    missing: tuple[tuple[int, int], ...]
    """Ranges (first, last) of chunks that are not there, both included."""
    content: bytes | None
    """The whole, if nothing is missing and its SHA-256 is the one of the head."""

    @property
    def state(self) -> str:
        """`whole`, `incomplete` or `damaged`."""
        return "incomplete" if self.missing else "damaged" if self.content is None else "whole"


def products(archive: Archive, node: str) -> list[Assembled]:
    """Return every product of a node whose head is archived, in the order of their heads."""
    chunks: dict[str, dict[int, bytes]] = defaultdict(dict)
    for _, chunk in archive.packets(node, ProductChunk):
        chunks[chunk.product][chunk.index] = chunk.data
    heads = {head.product: head for _, head in archive.packets(node, Product)}
    return [_assemble(head, chunks.get(name, {})) for name, head in heads.items()]


def _assemble(head: Product, chunks: dict[int, bytes]) -> Assembled:
    count = -(-head.size_bytes // head.chunk_bytes)
    missing: list[tuple[int, int]] = []
    for index in range(count):
        if index in chunks:
            continue
        if missing and missing[-1][1] == index - 1:
            missing[-1] = (missing[-1][0], index)
        else:
            missing.append((index, index))
    if missing:
        return Assembled(head, tuple(missing), None)
    content = b"".join(chunks[index] for index in range(count))
    sound = len(content) == head.size_bytes and hashlib.sha256(content).hexdigest() == head.sha256
    return Assembled(head, (), content if sound else None)
