"""The certificate chain: what left verified decoding cannot be changed, dropped or moved unnoticed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetry.certificate import (
    NO_CERTIFICATE,
    FindingKind,
    JobVerdict,
    chain_next,
    chain_start,
    check_chain,
    verify_results,
)
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


# --- whole archives --------------------------------------------------------------------------------

Change = Callable[[list[Result]], list[Result]]


def text_of(tokens: Sequence[int]) -> bytes:
    return bytes(token % 256 for token in tokens)


def job(name: str, sizes: Sequence[int], finish: str | None = "length", *, seed: int = 0) -> list[Result]:
    """The blocks of a job, as a worker sends them."""
    prompt = [2, seed]
    chain, first, blocks = chain_start(IMAGE, name, prompt), 0, []
    for epoch, size in enumerate(sizes):
        tokens = [(seed + 7 * (first + i)) % 256 for i in range(size)]
        kv = bytes([seed, epoch]) * 4
        chain = chain_next(chain, epoch, first, tokens, kv)
        blocks.append(
            Result(
                job=name,
                first=first,
                tokens=tokens,
                text=text_of(tokens),
                prompt_tokens=prompt if epoch == 0 else None,
                certificate=Certificate(image_id=IMAGE, epoch=epoch, kv_digest=kv, chain=chain),
                finish=finish if epoch == len(sizes) - 1 else None,
                logprobs=[-0.5] * size if seed else None,
            )
        )
        first += size
    return blocks


def kinds(verdict: JobVerdict) -> list[FindingKind]:
    return [finding.kind for finding in verdict.findings]


def test_interleaved_jobs_are_each_proven_whole() -> None:
    jobs = {
        "a": job("a", [3, 3, 1]),
        "b": job("b", [2, 2], "stop", seed=5),
        "open": job("open", [4, 4, 4], None),
        "cancelled": job("cancelled", [3, 0], "cancelled"),
        "never": job("never", [0], "deadline"),
    }
    mixed = [block for turn in zip_longest(*jobs.values()) for block in turn if block is not None]
    mixed += [closing("queued", 0, "cancelled"), closing("open", 12, "failed: x")]
    for order in (mixed, mixed[::-1]):
        verdicts = {v.job: v for v in verify_results(order, image_ids=[IMAGE], text_of=text_of)}
        assert {name: (v.tokens, v.proven, v.finish) for name, v in verdicts.items()} == {
            "a": (7, 7, "length"),
            "b": (4, 4, "stop"),
            "open": (12, 12, "failed: x"),
            "cancelled": (3, 3, "cancelled"),
            "never": (0, 0, "deadline"),
            "queued": (0, 0, "cancelled"),
        }
        assert [f for v in verdicts.values() for f in v.findings] == []
        assert all(v.sound for v in verdicts.values())
        assert {v.image_id for name, v in verdicts.items() if name != "queued"} == {IMAGE}


def closing(name: str, first: int, finish: str) -> Result:
    return Result(job=name, first=first, tokens=[], text=b"", certificate=NO_CERTIFICATE, finish=finish)


def test_a_job_that_goes_on_is_sound_so_far() -> None:
    (verdict,) = verify_results(job("a", [3, 3, 3])[:2])
    assert (verdict.sound, verdict.proven, verdict.finish) == (True, 6, None)


def certified(index: int, **fields: object) -> Change:
    def change(blocks: list[Result]) -> list[Result]:
        certificate = msgspec.structs.replace(blocks[index].certificate, **fields)
        blocks[index] = msgspec.structs.replace(blocks[index], certificate=certificate)
        return blocks

    return change


@pytest.mark.parametrize(
    ("change", "found", "proven"),
    [
        # Every field of a result, of the first, the middle and the last block.
        (_replace(0, first=1), None, 0),
        (_replace(1, first=4), [FindingKind.GAP, FindingKind.OVERLAP], 3),
        (_replace(2, first=5), [FindingKind.OVERLAP], 6),
        (_replace(2, first=99), [FindingKind.GAP], 6),
        (_replace(0, tokens=[9, 9, 9]), [FindingKind.LINK, FindingKind.TEXT], 0),
        (_replace(1, tokens=[]), None, 3),
        (_replace(1, tokens=[-1, 26, 33]), None, 3),
        (_replace(1, tokens=[26, 26, 2**40]), None, 3),
        (_replace(0, text=b"xyz"), [FindingKind.TEXT], 0),
        (_replace(2, text=b""), [FindingKind.TEXT], 6),
        (_replace(0, prompt_tokens=[2, 6]), [FindingKind.LINK], 0),
        (_replace(0, prompt_tokens=None), [FindingKind.HEAD], 0),
        (_replace(0, prompt_tokens=[-1]), [FindingKind.HEAD], 0),
        (_replace(1, prompt_tokens=[2, 5]), [FindingKind.HEAD], 3),
        (_replace(0, finish="length"), [FindingKind.FINISH, FindingKind.FINISH], 3),
        (_replace(2, finish="done"), [FindingKind.FINISH], 6),
        (_replace(2, logprobs=[]), [FindingKind.LOGPROBS], 6),
        (_replace(1, logprobs=[-1.0, 0.5, -1.0]), [FindingKind.LOGPROBS], 3),
        (_replace(1, logprobs=[-1.0, math.nan, -1.0]), [FindingKind.LOGPROBS], 3),
        (_replace(1, logprobs=[-math.inf, -1.0, -1.0]), [FindingKind.LOGPROBS], 3),
        # Every field of its certificate.
        (certified(0, image_id="f" * 16), None, 0),
        (certified(1, image_id="f" * 16), [FindingKind.IMAGE], 3),
        (certified(1, epoch=2), None, 3),
        (certified(2, kv_digest=b"12345678"), [FindingKind.LINK], 6),
        (certified(2, kv_digest=b""), [FindingKind.LINK], 6),
        (certified(1, chain=bytes(32)), [FindingKind.LINK, FindingKind.LINK], 3),
        (certified(2, chain=b""), [FindingKind.LINK], 6),
        # Whole blocks.
        (lambda blocks: blocks[1:], [FindingKind.HEAD], 0),
        (lambda blocks: blocks[2:], [FindingKind.HEAD], 0),
        (lambda blocks: [blocks[0], blocks[2]], [FindingKind.GAP], 3),
        (lambda blocks: [*blocks, blocks[1]], [FindingKind.OVERLAP], 6),
        (lambda blocks: [*blocks, closing("b", 8, "cancelled")], [FindingKind.FINISH], 8),
        (lambda blocks: [*blocks, closing("b", 9, "cancelled")], [FindingKind.FINISH, FindingKind.GAP], 8),
        (
            lambda blocks: [*blocks[:2], msgspec.structs.replace(closing("b", 6, "x"), finish=None)],
            [FindingKind.FINISH],
            6,
        ),
    ],
)
def test_a_change_is_found_where_it_was_made(
    change: Change, found: list[FindingKind] | None, proven: int
) -> None:
    blocks = job("b", [3, 3, 2], "eos", seed=5)
    changed = change(list(blocks))
    assert changed != blocks
    (verdict,) = verify_results(changed, image_ids=[IMAGE], text_of=text_of)
    assert not verdict.sound
    assert verdict.findings
    if found is not None:
        assert kinds(verdict) == found
    assert verdict.proven == proven
    assert check_chain(IMAGE, "b", sorted(changed, key=lambda b: b.first)) >= proven
    assert all(finding.job == "b" and finding.text for finding in verdict.findings)


def test_a_block_given_to_another_job_is_missing_here_and_headless_there() -> None:
    blocks = job("a", [3, 3, 2])
    blocks[1] = msgspec.structs.replace(blocks[1], job="b")
    verdicts = verify_results(blocks)
    assert [(v.job, kinds(v), v.proven) for v in verdicts] == [
        ("a", [FindingKind.GAP], 3),
        ("b", [FindingKind.HEAD], 0),
    ]
    assert "tokens 3 to 5 are missing" in verdicts[0].findings[0].text


def test_what_follows_a_break_is_held_against_what_was_archived_and_proves_nothing() -> None:
    blocks = job("a", [3, 3, 3, 3])
    blocks[1] = msgspec.structs.replace(blocks[1], tokens=[1, 2, 3])
    (verdict,) = verify_results(blocks)
    assert [(f.kind, f.first) for f in verdict.findings] == [(FindingKind.LINK, 3)]
    assert (verdict.tokens, verdict.proven) == (12, 3)


def test_an_image_nobody_expects_is_found_in_every_block() -> None:
    (verdict,) = verify_results(job("a", [3, 3]), image_ids=["f" * 16])
    assert kinds(verdict) == [FindingKind.IMAGE] * 2
    assert verdict.image_id == IMAGE
    assert verify_results(job("a", [3, 3]))[0].sound


def test_what_the_chain_does_not_cover_is_as_documented() -> None:
    blocks = job("b", [3, 2], "eos", seed=5)
    for fields in ({"finish": "length"}, {"logprobs": [-2.0, -2.0]}):
        changed = [blocks[0], msgspec.structs.replace(blocks[1], **fields)]
        assert verify_results(changed)[0].sound
    changed = [blocks[0], msgspec.structs.replace(blocks[1], text=b"x")]
    assert verify_results(changed)[0].sound
    assert not verify_results(changed, text_of=text_of)[0].sound


@given(st.data())
def test_no_flipped_bit_of_a_covered_field_goes_unnoticed(data: st.DataObject) -> None:
    blocks = job("b", [3, 3, 2], None, seed=5)
    index = data.draw(st.integers(0, 2))
    certificate = blocks[index].certificate
    what = data.draw(st.sampled_from(["token", "first", "kv", "chain", "epoch"]))
    bit = data.draw(st.integers(0, 31))
    if what == "token":
        tokens = list(blocks[index].tokens)
        tokens[data.draw(st.integers(0, len(tokens) - 1))] ^= 1 << bit
        blocks[index] = msgspec.structs.replace(blocks[index], tokens=tokens)
    elif what == "first":
        blocks[index] = msgspec.structs.replace(blocks[index], first=blocks[index].first ^ (1 << bit))
    else:
        if what == "epoch":
            changed = msgspec.structs.replace(certificate, epoch=certificate.epoch ^ (1 << bit))
        else:
            name = "chain" if what == "chain" else "kv_digest"
            value = bytearray(getattr(certificate, name))
            value[bit % len(value)] ^= 1 << bit % 8
            changed = msgspec.structs.replace(certificate, **{name: bytes(value)})
        blocks[index] = msgspec.structs.replace(blocks[index], certificate=changed)
    (verdict,) = verify_results(blocks)
    assert not verdict.sound
    assert verdict.proven <= sum((3, 3, 2)[:index])
