"""`penumbra bench`: figures taken right, on stand-ins and the tiny model; what is said without the peer."""

from __future__ import annotations

import builtins
import json
import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import tiny_gemma
from typer.testing import CliRunner

from hil.bench import bars, fresh, inference, llama, render
from hil.bench import perplexity as p
from hil.bench.engine import PlainEngine, VerifiedEngine, open_contenders, prompt, token_bytes
from hil.bench.inference import Parts, Plan, Record, run_costs, run_rounds
from hil.bench.machine import MemoryReader, describe_machine, peak_bytes
from hil.bench.reference_gemma import ReferenceGemma
from hil.bench.stats import paired_cost, ratio, spread
from hil.cli import app
from node.inference.manifest import TOKENIZER
from node.inference.model import open_model
from node.inference.tokenizer import Tokenizer
from node.inference.verified import Policy
from telemetry import figures as f
from telemetry.errors import PenumbraError
from telemetry.summary import write_json

TINY_PLAN = Plan(runs=2, triples=2, steps={1: 6, 8: 4}, prefill_tokens=100, starts=1, epoch_s=0.004)


# Statistics.


def test_ratios_are_taken_run_by_run():
    """The machine halves its speed in the second run: the ratio does not care."""
    assert ratio([10, 5, 11], [5, 2.5, 5]) == f.Spread(median=2, min=2, max=2.2)


def test_a_paired_cost_sees_through_drift():
    drift = np.linspace(1, 3, 41)
    cost = paired_cost(drift * 1.02, drift)
    assert cost.median == pytest.approx(2)
    assert cost.low95 == pytest.approx(2)
    assert cost.high95 == pytest.approx(2)
    assert cost.pairs == 41


def test_the_interval_of_noisy_pairs_holds_the_truth_and_is_the_same_each_time():
    random = np.random.default_rng(1)
    without = 1 + 0.1 * random.random(60)
    with_ = without * 1.03 * (1 + 0.05 * random.standard_normal(60))
    cost = paired_cost(with_, without)
    assert cost.min < cost.low95 < 3 < cost.high95 < cost.max
    assert cost == paired_cost(with_, without)


def test_one_pair_gives_no_interval():
    with pytest.raises(ValueError, match="1 pairs"):
        paired_cost([1.0], [1.0])


# Stand-ins.


class Fake:
    """A contender of known speed, that keeps a diary."""

    def __init__(self, name: str, step_s: float, diary: list[str]) -> None:
        self.name, self.step_s, self.diary, self.batch = name, step_s, diary, 0

    def begin(self, batch: int) -> None:
        assert self.batch == 0, "the run before was not ended"
        self.batch = batch

    def decode(self, steps: int) -> tuple[int, float]:
        self.diary.append(f"{self.name}/{self.batch}")
        return steps * self.batch, steps * self.step_s

    def end(self) -> None:
        self.batch = 0

    def prefill(self, prompt: Sequence[int]) -> float:
        self.diary.append(f"{self.name}/prefill {len(prompt)}")
        return self.step_s * 100

    def parts(self) -> Parts:
        return Parts(scan_ms=10.0, epoch_tokens=50, step_ms=10.0, digest_us=20.0)


def stand_ins(diary: list[str], peer: bool = True) -> dict[inference.Name, Fake]:
    speeds: dict[inference.Name, float] = {"off": 0.010, "on": 0.0102, "checked": 0.0104}
    if peer:
        speeds["llama.cpp"] = 0.0153
    return {name: Fake(name, step_s, diary) for name, step_s in speeds.items()}


def rounds(plan: Plan, fakes: dict[inference.Name, Fake]) -> Record:
    reader = MemoryReader(1 << 22, 2)
    record = run_rounds(
        plan, {**fakes}, fakes["on"], reader=reader, vocab=300, progress=lambda text, part: None
    )
    reader.close()
    return record


def test_contenders_take_turns_in_alternating_order():
    diary: list[str] = []
    rounds(TINY_PLAN, stand_ins(diary))
    first, second = diary[: len(diary) // 2], diary[len(diary) // 2 :]
    assert first[:4] == ["off/1", "on/1", "checked/1", "llama.cpp/1"]
    assert second[:4] == first[3::-1]
    assert first[-3:] == ["off/prefill 100", "on/prefill 100", "llama.cpp/prefill 100"]
    assert second[-3:] == first[:-4:-1]


def test_ratios_and_rows_follow_from_the_rounds():
    record = rounds(TINY_PLAN, stand_ins([]))
    found = inference.ratios(record, token_bytes=10_000_000)
    assert found.decode1_vs_llama is not None
    assert found.decode1_vs_llama.median == pytest.approx(1.5)
    assert found.decode8_vs_decode1.median == pytest.approx(8)
    assert found.prefill512_vs_llama is not None
    assert found.prefill512_vs_llama.median == pytest.approx(1.5)
    floor = inference.memory_floor(record, 10_000_000)
    assert found.floor_share.max == pytest.approx(floor.floor_ms.max / 10.2)
    assert floor.share_off.max == pytest.approx(floor.floor_ms.max / 10)
    rows = inference.decode_rows(record)
    assert [(row.batch, row.contender) for row in rows] == [
        (batch, name) for batch in (1, 8) for name in ("off", "on", "checked", "llama.cpp")
    ]
    assert rows[1].step_ms.median == pytest.approx(10.2)
    assert inference.cost_parts(record).cost_pct.median == pytest.approx(2.2)


def test_without_the_peer_its_ratios_are_null():
    found = inference.ratios(rounds(TINY_PLAN, stand_ins([], peer=False)), token_bytes=1)
    assert found.decode1_vs_llama is found.decode8_vs_llama is found.prefill512_vs_llama is None
    assert found.decode8_vs_decode1.median == pytest.approx(8)


def test_costs_come_from_triples_whose_order_rotates():
    diary: list[str] = []
    costs = run_costs(Plan(triples=3, steps={1: 5}), {**stand_ins(diary)}, lambda text, part: None)
    assert costs.verified.median == pytest.approx(2)
    assert costs.checks.median == pytest.approx(0.2 / 10.2 * 100)
    assert [line.split("/")[0] for line in diary] == [
        "off", "on", "checked", "on", "checked", "off", "checked", "off", "on",
    ]  # fmt: skip


# Bars.


def test_bars_have_three_outcomes_and_know_which_way_is_better():
    def one(value: float) -> f.Spread:
        return spread([value])

    def cost(value: float) -> f.PairedCost:
        return f.PairedCost(median=value, min=0, max=9, low95=0, high95=9, pairs=9)

    found = bars.judge(
        f.BenchRatios(
            decode1_vs_llama=one(1.15), decode8_vs_decode1=one(3.39), decode8_vs_llama=None,
            prefill512_vs_llama=one(1.7), floor_share=one(0.9),
        ),
        f.BenchCosts(verified=cost(1.5), checks=cost(4.1)),
        one(0.4),
    )  # fmt: skip
    assert [bar.verdict for bar in found] == [
        "passed", "falls short", "not measured", "stretch", "passed", "passed", "falls short", "stretch",
    ]  # fmt: skip


# The machine.


def test_memory_is_read_and_the_machine_described():
    reader = MemoryReader(1 << 24, 2)
    assert set(reader.gb_s()) == set(MemoryReader.WAYS)
    assert all(0.05 < rate < 1000 for rate in reader.gb_s().values())
    reader.close()
    machine = describe_machine(2, peers=False, load_before=0.5)
    assert machine.cores >= 1
    assert machine.llama_cpp_python is None
    assert machine.load_before == 0.5
    assert 1e6 < peak_bytes() < machine.memory_bytes


# The tiny model.


def test_the_engines_decode_the_same_tokens_with_and_without_proof(tiny_image):
    model = open_model(tiny_image, 1)
    with PlainEngine(model, 3) as plain:
        plain.begin(2)
        assert plain.decode(9)[0] == 18
        last = list(plain._tokens)
        plain.end()
        assert plain.prefill(prompt(0)) > 0
    with VerifiedEngine(model, 1, 3, Policy(epoch_s=0.004)) as verified:
        verified.begin(2)
        tokens, taken_s = verified.decode(20)
        assert tokens >= 40
        assert taken_s > 0
        texts = [verified._batch.sequence(job) for job in verified._jobs]
        # 10 steps and the first token: the plain engine's last one is the eleventh.
        assert [text.generated[10] for text in texts if text is not None] == last
        verified.end()
        assert verified._batch.active == []
        assert verified.prefill(list(range(4, 104))) > 0
        verified.begin(1)
        verified.decode(6)
        parts = verified.parts()
        assert min(parts.scan_ms, parts.step_ms, parts.digest_us) > 0
        assert parts.cost_pct > 0
        verified.end()


def test_a_run_longer_than_the_arena_is_an_error_not_a_wait(tiny_image):
    with VerifiedEngine(open_model(tiny_image, 1), 1, 2, Policy(epoch_s=0.004)) as verified:
        verified.begin(1)
        with pytest.raises(RuntimeError, match="all texts have ended"):
            verified.decode(1000)


def test_a_token_reads_every_whole_tensor_and_no_table(tiny_image):
    manifest = open_model(tiny_image, 1).manifest
    sizes = [tensor.length for tensor in manifest.mapped(False) if not tensor.rows]
    assert token_bytes(manifest) == sum(sizes) > 0


def test_both_models_of_the_stand_are_of_one_image_and_leave_nothing(tiny_image):
    before = sorted(path.name for path in tiny_image.parent.iterdir())
    with open_contenders(tiny_image, None, 1, TINY_PLAN) as stand:
        assert [*stand.contenders] == ["off", "on", "checked"]
        stand.warm(2)
    assert sorted(path.name for path in tiny_image.parent.iterdir()) == before


def test_the_whole_bench_without_a_peer(tiny_image, tiny_gguf, tmp_path):
    result = inference.run_inference(tiny_image, tiny_gguf, TINY_PLAN, threads=1, peers=False, quick=True)
    assert result.ratios.decode1_vs_llama is None
    assert [bar.verdict for bar in result.bars if bar.name.endswith("parallel sequences")] == ["not measured"]
    assert {start.contender for start in result.starts} == {"penumbra"}
    assert set(result.starts[0].peak_bytes) == {"1", "8"}
    assert len(result.windows) == 7
    assert all(window.time_us.min > 0 for window in result.windows)
    assert result.load_to_first_token_s == result.starts[0].first_token_s
    write_json(tmp_path / "bench.json", result)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert {"ratios", "cost_pct", "load_to_first_token_s"} <= set(content)
    assert set(content["ratios"]) == {
        "decode1_vs_llama", "decode8_vs_decode1", "decode8_vs_llama", "prefill512_vs_llama", "floor_share",
    }  # fmt: skip
    assert {"median", "min", "max"} <= set(content["cost_pct"]["verified"])
    page = render.inference(result, "penumbra bench inference --no-peers")
    assert "`penumbra bench inference --no-peers`" in page
    assert "not measured (no peer)" in page
    assert "not for quoting" in page
    assert "None" not in page
    assert "nan" not in page


def test_a_fresh_process_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(PenumbraError, match=r"a fresh process of penumbra failed: .*manifest"):
        fresh.measure_starts(tmp_path, None, 1, 1)


# Perplexity.


def test_scores_are_those_of_the_definition():
    logits = np.random.default_rng(2).standard_normal((10, 40)).astype(np.float32) * 3
    ids = np.random.default_rng(3).integers(0, 40, 10).tolist()
    kept = logits.copy()
    found = p.score([logits[:4], logits[4:8], logits[8:]], ids)
    assert np.array_equal(logits, kept)
    chances = np.exp(kept.astype(np.float64))
    chances /= chances.sum(axis=1, keepdims=True)
    expected = [-math.log(chances[at, ids[at + 1]]) for at in range(9)]
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    order = np.argsort(-kept, axis=1)
    assert np.array_equal(found.first, order[:, 0])
    assert np.array_equal(found.second, order[:, 1])
    rows = np.arange(10)
    assert found.gap == pytest.approx(kept[rows, order[:, 0]] - kept[rows, order[:, 1]])


def test_of_equal_logits_the_lower_id_is_first():
    found = p.score([np.array([[1, 5, 5, 0]], np.float32)], [0])
    assert (found.first[0], found.second[0], found.gap[0]) == (1, 2, 0)


def test_disagreement_looks_at_the_lead():
    truth = p.Scores(np.ones(3), np.array([1, 2, 3]), np.array([4, 5, 6]), np.array([0.05, 1, 2], np.float32))
    other = p.Scores(np.ones(3), np.array([4, 2, 3]), np.array([1, 5, 6]), truth.gap)
    assert other.agreement(truth) == pytest.approx(2 / 3)
    assert other.agreement(truth, 0.1) == 1
    found = p.disagreement("penumbra", other, truth)
    assert (found.positions, found.second_choice) == (1, 1)
    assert found.gap_max == pytest.approx(0.05)
    assert p.disagreement("penumbra", truth, truth).gap_max is None


def test_the_trunk_reads_a_text_as_the_reference_does(tiny_image, tiny_gguf):
    ids = [int(number) for number in np.random.default_rng(6).integers(4, 300, 150)]
    model, reference = open_model(tiny_image, 1), ReferenceGemma(tiny_gguf)
    hidden = p.trunk_hidden(model, ids)
    truth = p.score(reference.logits(reference.hidden(ids)), ids)
    found = p.score(reference.logits(hidden), ids)
    assert found.agreement(truth) > 0.9
    assert found.perplexity == pytest.approx(truth.perplexity, rel=0.02)
    exact = p.score(reference.logits(p.trunk_hidden(p.float_trunk(tiny_gguf, model), ids)), ids)
    assert exact.agreement(truth) >= found.agreement(truth)
    assert exact.perplexity == pytest.approx(truth.perplexity, rel=0.005)
    equal, error = p.flown_head(model.head, hidden[:20], reference.head)
    assert equal == 20
    assert error < 0.5


def test_a_text_shorter_than_wanted_is_refused(tiny_image):
    tokenizer = Tokenizer(tiny_image / TOKENIZER)
    assert len(p.fixed_tokens(tokenizer, 100)) == 100
    with pytest.raises(PenumbraError, match="are wanted"):
        p.fixed_tokens(tokenizer, 10**6)


def test_the_fixed_text_is_plain_english_of_some_length():
    text = p.fixed_text()
    assert text.isascii()
    assert 17_000 < len(text) < 20_000


# The peer, and the commands.


def test_without_the_peer_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name: str, *arguments: object) -> object:
        if name.startswith("llama_cpp"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PenumbraError, match="not installed") as raised:
        llama.require_peer()
    assert "pip install 'penumbra-node[peers]'" in str(raised.value)
    assert "--no-peers" in str(raised.value)


def test_the_bench_loads_no_peer_unless_asked():
    script = "import sys, hil.cli, hil.bench.engine; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_another_gguf_than_the_image_was_built_from_is_refused(tiny_images, tmp_path):
    other = tiny_gemma.write_tiny_gguf(tmp_path / "other.gguf", seed=8)
    done = CliRunner().invoke(
        app, ["bench", "inference", "--no-peers", "--images", str(tiny_images), "--gguf", str(other)]
    )
    assert isinstance(done.exception, PenumbraError)
    assert "was not built from" in str(done.exception)


def test_perplexity_on_the_command_line(tiny_images, tiny_gguf, tmp_path):
    arguments = ["bench", "perplexity", "--no-peers", "--tokens", "200", "--threads", "1"]
    arguments += ["--images", str(tiny_images), "--gguf", str(tiny_gguf)]
    arguments += ["--json", str(tmp_path / "p.json"), "--markdown", str(tmp_path / "p.md")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    content = json.loads((tmp_path / "p.json").read_text())
    assert [row["contender"] for row in content["rows"]] == ["reference", "penumbra", "penumbra float32"]
    assert content["rows"][0]["against_reference_pct"] is None
    assert content["against_llama_pct"] is None
    assert content["tokens"] == 200
    assert content["head_top1_equal"] == content["head_positions"] == 200
    assert "| penumbra |" in (tmp_path / "p.md").read_text()


def test_an_unwritable_page_is_refused(tiny_images, tiny_gguf, tmp_path):
    arguments = ["bench", "perplexity", "--no-peers", "--tokens", "64", "--threads", "1"]
    arguments += ["--images", str(tiny_images), "--gguf", str(tiny_gguf)]
    done = CliRunner().invoke(app, [*arguments, "--markdown", str(tmp_path / "none" / "p.md")])
    assert isinstance(done.exception, PenumbraError)
    assert "cannot be written" in str(done.exception)
