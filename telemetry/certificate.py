"""The certificate chain of verified decoding, computed in flight and checked on the ground.

    chain[-1] = SHA-256("penumbra certificate 1" | image id | job | prompt tokens)
    chain[n]  = SHA-256(chain[n-1] | epoch n | index of first token | tokens | KV digest)

Integers are 8 bytes big-endian, token ids 4 bytes big-endian, strings UTF-8 with their length before
them. A ground that holds the blocks of a job in order can recompute every link; a token changed,
dropped or moved on its way breaks the chain from there on.

The chain does not cover the bytes of the text (they follow from the tokens, and can be made anew from them),
log-probabilities, nor how a job finished. It holds no secret: it shows faults, it does not stop forgers.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from telemetry.packets import Certificate, Result

CHAIN_BYTES = 32
NO_CERTIFICATE = Certificate(image_id="", epoch=0, kv_digest=bytes(8), chain=bytes(CHAIN_BYTES))
"""Certificate of a closing result that the node made without a worker: no token, so nothing is proven."""
FINISHES = ("length", "eos", "stop", "cancelled", "deadline")
"""How a job can finish, besides `failed: ...`."""
LOGPROB_ROUNDING = 1e-3
"""A log-probability may be above 0 by rounding (estimated: float32 logits of some tens, with room)."""
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
            prompt = block.prompt_tokens or []
            if not _are_tokens(prompt):
                break
            chain = chain_start(image_id, job, prompt)
        if block.first != proven or c.epoch != epoch or c.image_id != image_id:
            break
        if _link(chain, block) != c.chain:
            break
        chain = c.chain
        proven += len(block.tokens)
    return proven


class FindingKind(StrEnum):
    """What can be wrong with the archived results of a job."""

    HEAD = "head"
    """The first block is missing, or the prompt's tokens are not in it alone."""
    GAP = "gap"
    """Tokens are missing before this block."""
    OVERLAP = "overlap"
    """The block begins before the end of the one before: repeated, or moved."""
    EPOCH = "epoch"
    """The block is not the next in number."""
    IMAGE = "image"
    """The block is of another model image than its job, or than those expected."""
    LINK = "link"
    """The block does not continue the chain of the one before."""
    TEXT = "text"
    """The bytes are not those of the tokens."""
    LOGPROBS = "logprobs"
    """Not one log-probability for each token, or one above 0."""
    FINISH = "finish"
    """A finish that does not exist, a block after the last, or one without tokens that is not the last."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a result."""

    kind: FindingKind
    job: str
    first: int
    """Index of the block's first token."""
    text: str
    """What is wrong, in words."""


@dataclass
class JobVerdict:
    """What the archive holds of a job, and what its certificates prove."""

    job: str
    image_id: str = ""
    """Image of its first block; empty when there is no block with tokens."""
    tokens: int = 0
    """Tokens in the archive."""
    proven: int = 0
    """How many of them, from the first, are proven without a break."""
    finish: str | None = None
    """None: the job goes on, or its end is not in the archive."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """True when nothing is wrong, and every token is proven."""
        return not self.findings and self.proven == self.tokens


def verify_results(
    results: Iterable[Result],
    *,
    image_ids: Collection[str] | None = None,
    text_of: Callable[[Sequence[int]], bytes] | None = None,
) -> list[JobVerdict]:
    """Check the archived results of a node, job by job.

    Each block is held against the one before as archived, so that one fault is found once, at its place.

    Parameters
    ----------
    results
        All of them, in any order: the blocks of several jobs come down interleaved.
    image_ids
        Images that may have been used; None: any, but one image for a whole job.
    text_of
        Returns the text of tokens, as bytes; None: texts are not checked.

    Returns
    -------
    list of JobVerdict
        In the order in which the jobs first appear.
    """
    jobs: dict[str, list[Result]] = {}
    for result in results:
        jobs.setdefault(result.job, []).append(result)
    return [_Verifier(job, image_ids, text_of).verify(blocks) for job, blocks in jobs.items()]


class _Verifier:
    """Checks one job."""

    def __init__(
        self,
        job: str,
        image_ids: Collection[str] | None,
        text_of: Callable[[Sequence[int]], bytes] | None,
    ) -> None:
        self._verdict = JobVerdict(job)
        self._image_ids = image_ids
        self._text_of = text_of
        self._chain: bytes | None = None
        """Chain value the next block continues; None when the block that would tell is missing."""
        self._epoch = 0
        self._end = 0
        self._whole = True
        """True while every token so far is proven."""

    def verify(self, blocks: Sequence[Result]) -> JobVerdict:
        ordered = sorted(blocks, key=lambda block: (block.first, block.certificate.epoch))
        for number, block in enumerate(ordered):
            found = len(self._verdict.findings)
            in_place = self._check_place(block, is_head=number == 0)
            if in_place and not _is_closing(block):
                self._check_certificate(block, is_head=number == 0)
            self._check_content(block)
            self._whole = self._whole and len(self._verdict.findings) == found
            self._verdict.tokens += len(block.tokens)
            self._verdict.proven += len(block.tokens) if self._whole else 0
            self._end = max(self._end, block.first + len(block.tokens))
        return self._verdict

    def _check_place(self, block: Result, *, is_head: bool) -> bool:
        """Return False for a block that overlaps the one before: the chain goes on without it."""
        if self._verdict.finish is not None:
            self._find(FindingKind.FINISH, block, f"comes after the end ({self._verdict.finish})")
        if is_head and block.first > 0:
            self._find(FindingKind.HEAD, block, f"the first {block.first} tokens are missing")
        elif block.first > self._end:
            self._find(FindingKind.GAP, block, f"tokens {self._end} to {block.first - 1} are missing")
            self._chain = None
        elif block.first < self._end:
            self._find(FindingKind.OVERLAP, block, f"the block before goes up to token {self._end - 1}")
            return False
        return True

    def _check_certificate(self, block: Result, *, is_head: bool) -> None:
        certificate, verdict = block.certificate, self._verdict
        if is_head:
            verdict.image_id = certificate.image_id
            if block.first == 0:
                prompt = block.prompt_tokens or []
                if block.prompt_tokens is None or not _are_tokens(prompt):
                    self._find(FindingKind.HEAD, block, "the tokens of the prompt are missing, or are none")
                else:
                    self._chain = chain_start(certificate.image_id, block.job, prompt)
        if block.prompt_tokens is not None and block.first > 0:
            self._find(FindingKind.HEAD, block, "holds the tokens of a prompt, as the first block only does")
        if certificate.image_id != verdict.image_id:
            text = f"is of image {certificate.image_id!r}, the job began with {verdict.image_id!r}"
            self._find(FindingKind.IMAGE, block, text)
        elif self._image_ids is not None and certificate.image_id not in self._image_ids:
            text = f"is of image {certificate.image_id!r}, expected: {', '.join(sorted(self._image_ids))}"
            self._find(FindingKind.IMAGE, block, text)
        if self._chain is not None:
            if certificate.epoch != self._epoch:
                text = f"is number {certificate.epoch} of its job, number {self._epoch} was expected"
                self._find(FindingKind.EPOCH, block, text)
            link = _link(self._chain, block)
            if link != certificate.chain:
                self._find(FindingKind.LINK, block, "does not continue the chain")
        self._chain, self._epoch = certificate.chain, certificate.epoch + 1

    def _check_content(self, block: Result) -> None:
        if block.finish is not None:
            self._verdict.finish = block.finish
            if block.finish not in FINISHES and not block.finish.startswith("failed: "):
                self._find(FindingKind.FINISH, block, f"finish {block.finish!r} does not exist")
        elif not block.tokens:
            self._find(FindingKind.FINISH, block, "has no tokens, and is not the last")
        if self._text_of is not None and block.text != self._text_of(block.tokens):
            self._find(FindingKind.TEXT, block, "the text is not that of the tokens")
        if block.logprobs is not None and (
            len(block.logprobs) != len(block.tokens)
            or not all(-math.inf < value <= LOGPROB_ROUNDING for value in block.logprobs)
        ):
            text = f"{len(block.logprobs)} log-probabilities for {len(block.tokens)} tokens, or one above 0"
            self._find(FindingKind.LOGPROBS, block, text)

    def _find(self, kind: FindingKind, block: Result, text: str) -> None:
        self._verdict.findings.append(Finding(kind, self._verdict.job, block.first, text))


def _is_closing(block: Result) -> bool:
    """Return whether the node itself made this result, to end a job that no worker had."""
    return not block.tokens and block.certificate == NO_CERTIFICATE


def _are_tokens(values: Sequence[int]) -> bool:
    return all(0 <= value < 1 << 32 for value in values)


def _link(chain: bytes, block: Result) -> bytes | None:
    """Return the chain value after the block; None when its tokens are none."""
    if not _are_tokens(block.tokens):
        return None
    return chain_next(chain, block.certificate.epoch, block.first, block.tokens, block.certificate.kv_digest)
