"""Verified decoding on a tiny model: strikes at any moment never change the text, and guards are needed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fdir.pages import PAGE_SIZE
from node.inference.arena import ARENA_VERSION, ArenaShape, KvArena
from node.inference.decoder import Decoder, greedy
from node.inference.image import open_session
from node.inference.manifest import image_id, load_manifest
from node.inference.protocol import Block, Strike
from node.inference.verified import BeyondRepair, Mended, VerifiedDecoder
from node.inference.weights import ProtectedWeights
from telemetry.certificate import check_chain
from telemetry.packets import Result

POSITIONS, TOKENS, EPOCH = 96, 40, 8
PROMPT = [2, *range(20, 45)]


class Bench:
    """One image, one arena; decoders come and go as workers do."""

    def __init__(self, image: Path, folder: Path, retries: int = 3, epoch_s: float = 60.0) -> None:
        self.image, self.folder, self.retries, self.epoch_s = image, folder, retries, epoch_s
        self.manifest = load_manifest(image)
        self.shape = self.manifest.shape
        self.strikes: list[Strike] = []
        self.runs = 0
        self.on_run: Callable[[int], None] = lambda run: None
        self.session = open_session(image, 1)
        self.weights = ProtectedWeights(image, self.manifest, 1)
        self.arena = self.open_arena()

    def open_arena(self) -> KvArena:
        shape = ArenaShape(
            version=ARENA_VERSION, image_id=image_id(self.manifest), layers=self.shape.layers,
            kv_heads=self.shape.kv_heads, positions=POSITIONS, head_dim=self.shape.head_dim,
        )  # fmt: skip
        return KvArena(self.folder / "arena", shape)

    def decoder(self, weights: object | None = None) -> VerifiedDecoder:
        return VerifiedDecoder(
            Decoder(self.session, self.shape, self.arena.kv), self.arena,
            self.weights if weights is None else weights,  # type: ignore[arg-type]
            image_id=image_id(self.manifest), block_tokens=EPOCH, epoch_s=self.epoch_s, retries=self.retries,
            eos=-1, text=lambda ids: bytes(i % 256 for i in ids), report=self.strikes.append,
            between=self._between,
        )  # fmt: skip

    def _between(self, seconds: float) -> None:
        self.runs += 1
        self.on_run(self.runs)

    def plain(self) -> list[int]:
        kv = np.zeros_like(self.arena.kv)
        decoder = Decoder(self.session, self.shape, kv)
        tokens = [greedy(decoder.prefill(PROMPT))]
        while len(tokens) < TOKENS:
            tokens.append(greedy(decoder.step(tokens[-1], len(PROMPT) + len(tokens) - 1)))
        return tokens

    def flip_weight(self, rng: random.Random, role: str | None = None, bit: int | None = None) -> int:
        memory = self.weights._memory
        tensors = [t for t in memory.tensors if t.read and not t.sparse and role in {None, t.role}]
        tensor = rng.choice(tensors)
        offset = tensor.offset + rng.randrange(tensor.length)
        view = memory.page_view(offset // PAGE_SIZE)
        view[offset % PAGE_SIZE] ^= 1 << (rng.randrange(8) if bit is None else bit)
        return offset // PAGE_SIZE

    def flip_kv(self, plane: int, position: int, word: int = 3, bit: int = 30) -> None:
        self.arena.kv.view(np.uint32)[plane, position, word] ^= np.uint32(1 << bit)


def _finish(decoder: VerifiedDecoder) -> list[Block]:
    blocks = []
    while decoder.finish is None:
        block = decoder.run_epoch()
        if block is not None:
            blocks.append(block)
    return blocks


def _tokens(blocks: Sequence[Block]) -> list[int]:
    return [token for block in blocks for token in block.tokens]


@pytest.fixture
def bench(tiny_image: Path, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tiny_image, tmp_path)
    yield bench
    del bench.session, bench.weights  # weights can be watched only while one session maps them
    gc.collect()


def test_verified_text_is_the_plain_text_in_certified_blocks(bench: Bench) -> None:
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, TOKENS)
    blocks = _finish(decoder)
    assert _tokens(blocks) == bench.plain()
    assert [len(block.tokens) for block in blocks] == [EPOCH] * (TOKENS // EPOCH)
    assert blocks[-1].finish == "length"
    assert blocks[0].prompt_tokens == PROMPT
    results = [Result(**{f: getattr(block, f) for f in block.__struct_fields__}) for block in blocks]
    assert check_chain(image_id(bench.manifest), "job", results) == TOKENS
    assert bench.strikes == []
    assert decoder.counters.epochs_dirty == 0


def test_how_long_epochs_take_does_not_change_the_blocks(bench: Bench) -> None:
    runs = []
    for number, epoch_s in enumerate((60.0, 0.0)):
        bench.epoch_s = epoch_s
        decoder = bench.decoder()
        decoder.begin("job", PROMPT, TOKENS)
        runs.append(_finish(decoder))
        assert decoder.counters.epochs_clean == (TOKENS // EPOCH, TOKENS)[number]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("stop_after", [10, 11, 12, 13])
def test_a_successor_finishes_a_block_another_began(bench: Bench, stop_after: int) -> None:
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, TOKENS)
    expected = _finish(decoder)
    bench.epoch_s = 0.0
    first = bench.decoder()
    first.begin("job", PROMPT, TOKENS)
    sent = [block for _ in range(stop_after) if (block := first.run_epoch()) is not None]
    second = bench.decoder()
    assert second.resume()
    assert second.generated == stop_after
    assert second.blocks(0) == sent
    assert [*sent, *_finish(second)] == expected


@pytest.mark.parametrize("seed", range(8))
def test_weight_strikes_at_any_moment_leave_the_text_alone(bench: Bench, seed: int) -> None:
    bench.retries = 6
    expected, rng = bench.plain(), random.Random(seed)
    moments = {rng.randrange(1, TOKENS) for _ in range(4)}
    struck: list[int] = []
    bench.on_run = lambda run: struck.append(bench.flip_weight(rng)) if run in moments else None
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, TOKENS)
    assert _tokens(_finish(decoder)) == expected
    bench.on_run = lambda run: None
    decoder.check_idle()
    assert {strike.page for strike in bench.strikes} == set(struck)
    assert all(strike.method == "parity" and strike.recovered_ns is not None for strike in bench.strikes)
    assert bench.weights.check(()) == []


@pytest.mark.parametrize("position", [0, 5, 25, 30])
def test_kv_strikes_are_repaired_from_parity_and_leave_the_text_alone(bench: Bench, position: int) -> None:
    expected = bench.plain()
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, TOKENS)
    first = decoder.run_epoch()
    bench.flip_kv(1, position)
    assert _tokens([first, *_finish(decoder)]) == expected
    (strike,) = bench.strikes
    assert (strike.region, strike.role, strike.page, strike.method) == (
        "kv",
        "v",
        POSITIONS + position,
        "parity",
    )
    assert decoder.counters.tokens_discarded == EPOCH


def test_a_struck_row_of_the_open_epoch_is_written_anew(bench: Bench) -> None:
    expected = bench.plain()
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, TOKENS)
    first = decoder.run_epoch()
    start = bench.runs
    bench.on_run = lambda run: bench.flip_kv(0, len(PROMPT) + EPOCH) if run == start + 4 else None
    assert _tokens([first, *_finish(decoder)]) == expected
    assert [strike.method for strike in bench.strikes] == ["redo"]


def test_two_struck_rows_of_a_group_make_the_cache_anew_with_the_same_text(bench: Bench) -> None:
    expected = bench.plain()
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, TOKENS)
    blocks = [decoder.run_epoch(), decoder.run_epoch()]
    bench.flip_kv(0, 8)
    bench.flip_kv(0, 9)
    assert _tokens([*blocks, *_finish(decoder)]) == expected
    assert [strike.method for strike in bench.strikes] == ["recompute", "recompute"]


def test_without_the_weight_guard_a_strike_does_change_the_text(bench: Bench) -> None:
    """The test above would pass on a model no flip can disturb: show that this one can be."""

    class Blind:
        def check(self, tokens: Collection[int]) -> list[Mended]:
            return []

    rng, changed = random.Random(3), 0
    expected = bench.plain()
    for number in range(10):
        decoder = bench.decoder(Blind())
        decoder.begin(f"job-{number}", PROMPT, TOKENS)
        bench.flip_weight(rng, role="norm", bit=6)
        changed += _tokens(_finish(decoder)) != expected
        bench.weights.check(())
    assert changed > 0


def test_without_the_row_guard_a_strike_does_change_the_text(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.plain()
    monkeypatch.setattr("fdir.rows.RowIntegrity.prove", lambda self: True)
    changed = 0
    for plane in range(bench.arena.shape.planes):
        decoder = bench.decoder()
        decoder.begin(f"job-{plane}", PROMPT, TOKENS)
        first = decoder.run_epoch()
        for position in range(len(PROMPT)):
            bench.flip_kv(plane, position)
        changed += _tokens([first, *_finish(decoder)]) != expected
    assert changed > 0


@pytest.mark.parametrize("stop_after", [0, 3, 9, 12, 25])
def test_a_successor_goes_on_with_the_same_text(bench: Bench, stop_after: int) -> None:
    expected = bench.plain()

    class Killed(Exception):
        pass

    def kill(run: int) -> None:
        if run == stop_after:
            raise Killed

    bench.on_run = kill
    sent: list[Block] = []
    first = bench.decoder()
    first.begin("job", PROMPT, TOKENS)

    def run_until_killed() -> None:
        kill(0)
        while True:
            sent.append(first.run_epoch())

    with pytest.raises(Killed):
        run_until_killed()
    bench.on_run = lambda run: None
    bench.arena.close()
    bench.arena = bench.open_arena()
    second = bench.decoder()
    assert second.resume()
    assert second.generated == len(_tokens(sent))
    assert second.blocks(0) == sent
    assert second.blocks(EPOCH) == sent[1:]
    assert _tokens([*sent, *_finish(second)]) == expected


@pytest.mark.parametrize("rows", [[(0, 3)], [(0, 3), (0, 4)], [(1, 0), (2, 30)]])
def test_a_successor_repairs_what_was_struck_meanwhile(bench: Bench, rows: list[tuple[int, int]]) -> None:
    expected = bench.plain()
    first = bench.decoder()
    first.begin("job", PROMPT, TOKENS)
    sent = [first.run_epoch(), first.run_epoch()]
    for plane, position in rows:
        bench.flip_kv(plane, position)
    second = bench.decoder()
    assert second.resume()
    assert len(bench.strikes) == len(rows)
    assert _tokens([*sent, *_finish(second)]) == expected


def test_a_damaged_record_of_the_job_is_not_gone_on_with(bench: Bench) -> None:
    first = bench.decoder()
    first.begin("job", PROMPT, TOKENS)
    first.run_epoch()
    bench.arena.tokens[len(PROMPT) + 2] ^= 1
    second = bench.decoder()
    assert not second.resume()
    assert second.job == ""
    assert not bench.decoder().resume()


def test_cancel_ends_the_job_at_the_end_of_the_epoch(bench: Bench) -> None:
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, TOKENS)
    decoder.run_epoch()
    block = decoder.run_epoch(lambda: True)
    assert block.finish == decoder.finish == "cancelled"
    assert decoder.generated == 2 * EPOCH


def test_the_end_of_text_token_ends_the_job(bench: Bench) -> None:
    expected = bench.plain()
    decoder = bench.decoder()
    decoder._eos = expected[11]
    decoder.begin("job", PROMPT, TOKENS)
    blocks = _finish(decoder)
    assert blocks[-1].finish == "eos"
    assert _tokens(blocks) == expected[: expected.index(decoder._eos) + 1]


@pytest.mark.parametrize(("prompt", "tokens"), [([], 4), (PROMPT, POSITIONS)])
def test_a_job_that_cannot_fit_is_refused(bench: Bench, prompt: list[int], tokens: int) -> None:
    with pytest.raises(ValueError, match=f"prompt of {len(prompt)} tokens"):
        bench.decoder().begin("job", prompt, tokens)


def test_a_page_nothing_can_restore_ends_in_beyond_repair(bench: Bench) -> None:
    class Rotten:
        def check(self, tokens: Collection[int]) -> list[Mended]:
            return [Mended(7, "head", "none")]

    decoder = bench.decoder(Rotten())
    decoder.begin("job", PROMPT, TOKENS)
    with pytest.raises(BeyondRepair, match="could not be restored"):
        decoder.run_epoch()
    assert bench.strikes[0].recovered_ns is None
    assert decoder.generated == 0


def test_strikes_faster_than_retries_end_in_beyond_repair(bench: Bench) -> None:
    rng = random.Random(1)
    bench.on_run = lambda run: bench.flip_weight(rng) and None
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, TOKENS)
    with pytest.raises(BeyondRepair, match="after 3 retries"):
        decoder.run_epoch()
    assert decoder.generated == 0
    assert decoder.counters.epochs_dirty == 4


def test_blocks_are_messages(bench: Bench) -> None:
    decoder = bench.decoder()
    decoder.begin("job", PROMPT, EPOCH)
    block = decoder.run_epoch()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(block), type=Block) == block
