"""The certificate chain: what left verified decoding cannot be changed, dropped or moved unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from telemetry.certificate import chain_next, chain_start, check_chain
from telemetry.packets import Certificate, Result

IMAGE, JOB, PROMPT = "0123456789abcdef", "job-1", [2, 818, 5279]


def _blocks() -> list[Result]:
    chain, first, blocks = chain_start(IMAGE, JOB, PROMPT), 0, []
    for epoch, tokens in enumerate([[10, 11, 12], [13], [14, 15]]):
        kv = bytes([epoch]) * 8
        chain = chain_next(chain, epoch, first, tokens, kv)
        blocks.append(
            Result(
                job=JOB, first=first, tokens=tokens, text=b"", prompt_tokens=PROMPT if epoch == 0 else None,
                certificate=Certificate(image_id=IMAGE, epoch=epoch, kv_digest=kv, chain=chain),
            )
        )  # fmt: skip
        first += len(tokens)
    return blocks


def test_a_whole_chain_proves_every_token() -> None:
    assert check_chain(IMAGE, JOB, _blocks()) == 6


def test_the_wire_value_is_pinned() -> None:
    assert chain_start(IMAGE, JOB, PROMPT).hex() == (
        "06ab752ec6c6ec72be42fb7215c13fda21ac2d5ec0247f32a607ad3c954d50e5"
    )


def _replace(index: int, **fields: object) -> Callable[[list[Result]], list[Result]]:
    def change(blocks: list[Result]) -> list[Result]:
        blocks[index] = msgspec.structs.replace(blocks[index], **fields)
        return blocks

    return change


@pytest.mark.parametrize(
    ("change", "proven"),
    [
        (_replace(1, tokens=[99]), 3),
        (_replace(0, tokens=[10, 12, 11]), 0),
        (_replace(0, prompt_tokens=[2, 818]), 0),
        (_replace(0, prompt_tokens=None), 0),
        (_replace(2, first=5), 4),
        (lambda blocks: blocks[:1] + blocks[2:], 3),
        (lambda blocks: [blocks[1], blocks[0], blocks[2]], 0),
        (lambda blocks: [blocks[0], blocks[0], *blocks[1:]], 3),
    ],
)
def test_a_change_ends_the_proof_where_it_was_made(
    change: Callable[[list[Result]], list[Result]], proven: int
) -> None:
    assert check_chain(IMAGE, JOB, change(_blocks())) == proven


def test_another_image_or_job_proves_nothing() -> None:
    assert check_chain("f" * 16, JOB, _blocks()) == 0
    assert check_chain(IMAGE, "job-2", _blocks()) == 0


def test_two_blocks_in_one_do_not_equal_two() -> None:
    one = chain_next(chain_start(IMAGE, JOB, PROMPT), 0, 0, [10, 11], b"k" * 8)
    two = chain_next(chain_next(chain_start(IMAGE, JOB, PROMPT), 0, 0, [10], b"k" * 8), 1, 1, [11], b"k" * 8)
    assert one != two
