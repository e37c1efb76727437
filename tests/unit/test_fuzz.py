"""Fuzzing of decoders and commands: a short run finds nothing, and what is wrong would be found."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from hil.campaign import fuzz_run
from hil.campaign.fuzz_run import CORPUS, Corpus, FuzzResult, Target, fuzz_decoder, run_fuzz, targets
from hil.campaign.fuzz_seeds import examples
from hil.campaign.hostile import hostile_commands
from hil.campaign.mutations import MUTATIONS, mutate
from hil.campaign.records import SUMMARY
from hil.campaign.report import make_report
from telemetry.authenticator import Authenticator, Redelivered, Rejected
from telemetry.packets import BY_TYPE

KEPT = Path(__file__).parents[1] / "corpus" / "fuzz.msgpack"
EXPECTED = {
    "forged": {"bad_mac"},
    "signed for another purpose": {"bad_mac"},
    "replayed, remembered": {"redelivered"},
    "replayed, forgotten": {"old_sequence"},
    "reordered": {"old_sequence"},
    "far ahead": {"outside_window"},
    "expired": {"expired"},
    "wrong node": {"wrong_node"},
    "wrong node, its topic": {"wrong_node"},
    "wrong topic": {"wrong_topic"},
    "retired key": {"key_retired"},
    "key in standby": {"key_standby"},
    "unknown key": {"unknown_key"},
    "recovery key out of its rights": {"not_permitted"},
    "resync with a key for commands": {"not_permitted"},
}


def test_there_is_a_seed_of_every_packet_type() -> None:
    assert sorted(packet.type_name for packet in examples()) == sorted(BY_TYPE)


def test_each_attack_is_rejected_for_its_own_reason() -> None:
    answers = hostile_commands(200)
    assert {attack: set(told) for attack, told in answers.items()} == EXPECTED
    assert all(sum(told.values()) == 200 for told in answers.values())


def test_a_short_run_finds_nothing_and_is_reported(tmp_path: Path) -> None:
    run_fuzz(tmp_path, inputs=5000, command_inputs=2000, seed=3, say=lambda text, part: None)
    result = msgspec.json.decode((tmp_path / SUMMARY).read_bytes(), type=FuzzResult)
    assert result.findings == 0
    assert result.commands.executed == result.commands.escaped == 0
    for decoder in result.decoders:
        assert decoder.undetected == decoder.escaped == decoder.slow == decoder.flips_accepted == 0
        assert decoder.rejected + decoder.resealed + decoder.unchanged == decoder.inputs
    assert {d.decoder for d in result.decoders} == {"frame", "block", "ack", "flow", "upload", "bus"}
    text = make_report([tmp_path])
    assert "**0 accepted**" in text
    assert "`wrong_topic` 1,000" in text
    assert msgspec.msgpack.decode((tmp_path / CORPUS).read_bytes())


def test_a_decoder_that_looks_at_nothing_is_found_out() -> None:
    corpus = Corpus()
    blind = Target("ack", (b"0123456789",), lambda data: data, (ValueError,))
    result = fuzz_decoder(blind, 200, random.Random(1), corpus)
    assert result.undetected > 150
    assert result.flips_accepted == result.flips == 80
    assert len(corpus.findings) == result.undetected


def test_an_error_that_is_not_the_decoders_own_is_found() -> None:
    def fragile(data: bytes) -> None:
        if data[:1] != b"0":
            raise IndexError("out of range")
        raise ValueError("no")

    corpus = Corpus()
    result = fuzz_decoder(
        Target("bus", (b"0123",), fragile, (ValueError,), guarded=False), 200, random.Random(1), corpus
    )
    assert result.escaped > 10
    assert corpus.findings[0][1] == "IndexError: out of range"


def test_a_slow_decoder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_run, "SLOW_MS", 0.0)
    target = targets()[0]
    assert fuzz_decoder(target, 10, random.Random(1), Corpus()).slow == 10


def test_every_mutation_changes_something_and_stays_small() -> None:
    seeds = [bytes(range(64)), bytes(64)]
    chance = random.Random(2)
    for mutation in MUTATIONS:
        results = set()
        for _ in range(50):
            data = bytearray(seeds[0])
            mutation(data, chance, seeds)
            assert len(data) <= 2 * 64
            results.add(bytes(data))
        assert len(results) > 5, mutation.__name__
    assert len({mutate(seeds, chance) for _ in range(200)}) > 150


def test_the_kept_corpus_is_still_rejected() -> None:
    """One input for each distinct answer of a long run (`penumbra campaign run fuzz`)."""
    by_name = {target.name: target for target in targets()}
    authenticator = Authenticator("penumbra-1", fuzz_run.RING)
    kept = msgspec.msgpack.decode(KEPT.read_bytes())
    assert len(kept) > 50
    for name, answer, data in kept:
        if name == "command":
            verdict = authenticator.check(data, fuzz_run.T0_NS)
            assert isinstance(verdict, (Rejected, Redelivered)), answer
        else:
            with pytest.raises(by_name[name].own):
                by_name[name].decode(data)
