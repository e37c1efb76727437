"""Packets about inference: blocks of tokens, with their certificates."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from telemetry.packet_types.base import Count, Packet, Stream


class Certificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Proof that a block of tokens came from memory that was right (design section 5)."""

    image_id: str
    """First 16 hex digits of the SHA-256 of the image manifest."""
    epoch: Count
    """Epoch number within the job, from 0, counting committed epochs only."""
    kv_digest: bytes
    """8 bytes: xxh3_64 chained over the KV row digests of the block, big-endian."""
    chain: bytes
    """32 bytes: SHA-256 over the previous chain value and this block; see `telemetry.certificate`."""


class Result(Packet, frozen=True, kw_only=True):
    """A committed block of tokens of one inference job."""

    stream: ClassVar[Stream] = Stream.RESULT
    type_name: ClassVar[str] = "result"

    job: str
    """Name of the job, from its command."""
    first: Count
    """Index of the block's first token within the generated text, from 0."""
    tokens: list[int]
    """Token ids of the block."""
    text: bytes
    """UTF-8 bytes these tokens add to the text. May end inside a character: join before decoding."""
    certificate: Certificate
    prompt_tokens: list[int] | None = None
    """Token ids of the prompt, in the job's first block only: the chain starts from them."""
    finish: str | None = None
    """None while the job goes on; else `length`, `eos`, `stop`, `cancelled`, `deadline` or `failed: ...`."""
    logprobs: list[float] | None = None
    """Natural logarithm of each token's probability, in order, when the job asked for them."""
