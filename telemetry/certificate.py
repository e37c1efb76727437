"""The certificate chain of verified decoding, computed in flight and checked on the ground.

    chain[-1] = SHA-256("penumbra certificate 1" | image id | job | prompt tokens)
    chain[n]  = SHA-256(chain[n-1] | epoch n | index of first token | tokens | KV digest)

Integers are 8 bytes big-endian, token ids 4 bytes big-endian, strings UTF-8 with their length before
them. A ground that holds the blocks of a job in order can recompute every link; a token changed,
dropped or moved on its way breaks the chain from there on.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

from telemetry.packets import Result

CHAIN_BYTES = 32
_DOMAIN = b"penumbra certificate 1"


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack(">Q", len(raw)) + raw


def _ids(tokens: Sequence[int]) -> bytes:
    return struct.pack(f">Q{len(tokens)}I", len(tokens), *tokens)


def chain_start(image_id: str, job: str, prompt_tokens: Sequence[int]) -> bytes:
    """Return the chain value before the first block of a job (32 bytes)."""
    parts = _DOMAIN + _string(image_id) + _string(job) + _ids(prompt_tokens)
    return hashlib.sha256(parts).digest()


def chain_next(previous: bytes, epoch: int, first: int, tokens: Sequence[int], kv_digest: bytes) -> bytes:
    """Return the chain value after one committed block (32 bytes).

    Parameters
    ----------
    previous
        The value after the block before, 32 bytes.
    epoch, first
        Epoch number and index of the block's first token, both from 0.
    tokens
        Token ids, each 0 to 2**32 - 1.
    kv_digest
        8 bytes, see `telemetry.packets.Certificate`.
    """
    body = struct.pack(">QQ", epoch, first) + _ids(tokens) + kv_digest
    return hashlib.sha256(previous + body).digest()


def check_chain(image_id: str, job: str, blocks: Iterable[Result]) -> int:
    """Return how many tokens at the head of a job are proven by their certificates.

    `blocks` are the results of the job in order of `first`; the first carries the prompt's tokens.
    Counting stops at the first block that is out of place, names another image, or does not continue
    the chain.
    """
    chain = b""
    proven = 0
    for epoch, block in enumerate(blocks):
        c = block.certificate
        if epoch == 0:
            chain = chain_start(image_id, job, block.prompt_tokens or [])
        if block.first != proven or c.epoch != epoch or c.image_id != image_id:
            break
        chain = chain_next(chain, epoch, block.first, block.tokens, c.kv_digest)
        if chain != c.chain:
            break
        proven += len(block.tokens)
    return proven
