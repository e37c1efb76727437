"""The worker's weights: every mapped page is proven in a bounded time, and what can mend a bad one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fdir.golden import PAGE_SIZE, read_golden
from fdir.pages import WeightMemory
from node.inference import weights as module
from node.inference.manifest import DIGESTS, PARITY, WEIGHTS, load_manifest
from node.inference.model import open_model
from node.inference.proof import BeyondRepair, Mended, Proof
from node.inference.protocol import Strike
from node.inference.weights import ProtectedWeights


class Slot:
    """Slot a of two, loaded, with its weights watched."""

    def __init__(self, images: Path, folder: Path) -> None:
        self.images = Path(shutil.copytree(images, folder / "images"))
        self.image = self.images / "a"
        self.manifest = load_manifest(self.image)
        self.model = open_model(self.image, 1)
        self.weights = ProtectedWeights(self.image, self.manifest, 1)

    @property
    def memory(self) -> WeightMemory:
        return self.weights._memory

    def strike(self, page: int, at: int = 9) -> None:
        self.memory.page_view(page)[at] ^= 4

    def strike_file(self, slot: str, name: str, page: int) -> None:
        with (self.images / slot / name).open("r+b") as file:
            file.seek(page * PAGE_SIZE + 77)
            byte = file.read(1)[0]
            file.seek(page * PAGE_SIZE + 77)
            file.write(bytes([byte ^ 1]))

    def live_page(self) -> int:
        return next(t.first_page for t in self.memory.tensors if t.role == "attn_qkv")

    def is_whole(self) -> bool:
        return not self.memory.scan_blocks(range(self.memory.block_count))

    def strike_beyond_parity(self) -> list[int]:
        """Strike three pages of a parity group, in memory and on the disk of the slot."""
        groups = self.weights._parity.groups
        pages = [page for page in range(0, len(self.memory.table.pages), groups) if self.memory.holds(page)][
            :3
        ]
        for page in pages:
            self.strike(page)
            self.strike_file("a", WEIGHTS, page)
        return pages

    def prove_all(self) -> list[Mended]:
        """Check until the scrub has gone round once from here."""
        found = list(self.weights.check(()))
        for _ in range(self.memory.block_count):
            found += self.weights.check(())
        return found


@pytest.fixture
def slot(tiny_images: Path, tmp_path: Path) -> Iterator[Slot]:
    slot = Slot(tiny_images, tmp_path)
    yield slot
    slot.weights._pool.shutdown()


def test_every_mapped_page_is_proven_within_a_pass_with_no_job(slot):
    by_row = [t for t in slot.memory.tensors if t.rows or not t.read]
    assert by_row
    for tensor in by_row:
        for page in {tensor.first_page, tensor.first_page + tensor.page_count - 1}:
            slot.strike(page)
            assert Mended(page, tensor.role, "parity") in slot.prove_all()
            assert slot.is_whole()
    covered = sum(len(block.view) for block in slot.memory._blocks)
    assert covered == sum(t.page_count for t in slot.manifest.mapped(False)) * PAGE_SIZE
    proven = {*slot.memory.live_blocks, *slot.weights._turn}
    assert proven == set(range(slot.memory.block_count))


@pytest.mark.parametrize("tokens", [(), (5,)])
def test_a_pass_ends_and_is_told_idle_and_busy(slot, tokens):
    assert slot.weights.scrub_pass_s is None
    for _ in range(len(slot.weights._turn) + 1):
        slot.weights.check(tokens)
    assert slot.weights.scrub_pass_s is not None
    assert slot.weights.scrub_pass_s > 0


def test_the_time_budget_sets_how_much_is_proven_in_turn_and_one_block_is_least(slot):
    slot.weights._turn = range(100, 200)
    slot.weights._block_s = 1e-4
    assert slot.weights._scrub_slice(0.00105) == range(100, 110)
    assert slot.weights._scrub_slice(0.00425) == range(110, 152)
    slot.weights._block_s = 60.0
    assert slot.weights._scrub_slice(0.001) == range(152, 153)
    slot.weights._block_s = 1e-9
    assert slot.weights._scrub_slice(0.001) == range(153, 200)
    assert slot.weights._scrub_slice(0.001) == range(100, 200)
    assert module.IDLE_SCRUB_S > module.SCRUB_S


def test_what_parity_and_file_have_lost_comes_from_the_other_slot_and_mends_the_file(slot):
    pages = slot.strike_beyond_parity()
    rows = {page: slot.memory.tensor_of(page).role for page in pages}
    found = slot.prove_all()
    assert sorted(mended.page for mended in found) == pages
    assert {(m.method, m.file_mended) for m in found} <= {("other_slot", True), ("parity", None)}
    assert ("other_slot", True) in {(m.method, m.file_mended) for m in found}
    assert {m.page: m.role for m in found} == rows
    assert slot.is_whole()
    for mended in found:
        if mended.method == "other_slot":
            content = read_golden(slot.image / WEIGHTS, mended.page * PAGE_SIZE, PAGE_SIZE)
            assert slot.memory.table.page_is_good(mended.page, content)


def test_the_strike_says_whether_the_file_was_mended_and_a_disk_that_refuses_costs_no_repair(
    slot, monkeypatch
):
    monkeypatch.setattr("fdir.parity.write_golden", lambda *_: False)
    page = slot.live_page()
    monkeypatch.setattr(slot.weights._parity, "restore", lambda *_: {})
    slot.strike(page)
    slot.strike_file("a", WEIGHTS, page)
    strikes: list[Strike] = []
    proof = Proof(slot.weights, strikes.append)
    proof.of_weights()
    (strike,) = strikes
    assert (strike.page, strike.method, strike.evidence) == (page, "other_slot", {"file_mended": False})
    assert strike.recovered_ns is not None
    assert slot.is_whole()


def test_the_other_slot_is_not_believed_where_it_is_damaged_or_another_model(slot, monkeypatch):
    monkeypatch.setattr(slot.weights._parity, "restore", lambda *_: {})
    page = slot.live_page()
    slot.strike(page)
    slot.strike_file("a", WEIGHTS, page)
    slot.strike_file("b", WEIGHTS, page)
    with pytest.raises(BeyondRepair, match="the other slot"):
        Proof(slot.weights, lambda _: None).of_weights()
    assert not slot.is_whole()


def test_without_another_slot_there_is_none_to_look_into(tiny_image, tmp_path):
    image = Path(shutil.copytree(tiny_image, tmp_path / "image"))
    model = open_model(image, 1)
    weights = ProtectedWeights(image, model.manifest, 1)
    assert weights._spares == []
    weights._pool.shutdown()


def test_a_struck_digest_is_no_damage_to_a_sound_page(slot):
    page = slot.live_page()
    slot.memory.table.pages[page] ^= np.uint64(1 << 40)
    (embed,) = [t for t in slot.memory.tensors if t.role == "embed" and t.rows][:1]
    slot.memory.table.pages[embed.first_page] ^= np.uint64(2)
    before = slot.memory.page_view(embed.first_page).copy()
    assert slot.weights.check((0,)) == [Mended(min(page, embed.first_page), "digests", "golden")]
    assert np.array_equal(slot.memory.page_view(embed.first_page), before)
    assert slot.weights.check((0,)) == []
    slot.strike(page)
    assert slot.weights.check(()) == [Mended(page, "attn_qkv", "parity")]


def test_struck_digests_come_from_the_other_slot_when_the_own_file_is_bad(slot):
    (embed,) = [t for t in slot.memory.tensors if t.role == "embed" and t.rows][:1]
    slot.memory.table.pages[embed.first_page] ^= np.uint64(2)
    slot.strike_file("a", DIGESTS, 0)
    assert slot.weights.check((0,)) == [Mended(embed.first_page, "digests", "golden")]
    assert slot.weights.check((0,)) == []


def test_digests_that_cannot_be_read_anew_leave_a_bad_page(slot):
    (embed,) = [t for t in slot.memory.tensors if t.role == "embed" and t.rows][:1]
    slot.memory.table.pages[embed.first_page] ^= np.uint64(2)
    slot.strike_file("a", DIGESTS, 0)
    (slot.images / "b" / DIGESTS).unlink()
    assert slot.weights.check((0,)) == [Mended(embed.first_page, "embed", "none")]


def test_struck_parity_digests_are_read_anew_before_parity_is_needed(slot):
    slot.memory.table.parity[:] ^= np.uint64(1)
    page = slot.live_page()
    slot.strike(page)
    for image in ("a", "b"):
        slot.strike_file(image, WEIGHTS, page)
    assert slot.weights.check(()) == [Mended(0, "digests", "golden"), Mended(page, "attn_qkv", "parity")]
    assert (slot.images / "a" / PARITY).exists()
