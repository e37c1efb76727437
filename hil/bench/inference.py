"""`penumbra bench inference`: decoding and prefill, ours and llama.cpp's, in interleaved runs.

In each round every contender has its turn at every batch size, in an order that alternates from round to
round, so that a slow minute of the machine falls on all of them. Ratios are taken within a round. What
protection costs is smaller than such a machine's noise from one second to the next, so it has runs
of its own: many short ones of one sequence, in triples of `off`, `on` and `checked` whose order rotates.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np

from hil.bench import bars
from hil.bench.fresh import measure_starts
from hil.bench.machine import MemoryReader, describe_machine, load_average
from hil.bench.stats import paired_cost, ratio, spread
from telemetry.figures import (
    BenchCosts,
    BenchInference,
    BenchRatios,
    CostParts,
    DecodeRow,
    MemoryFloor,
    PrefillRow,
    Spread,
)

Name = Literal["off", "on", "checked", "llama.cpp"]
PrefillName = Literal["off", "on", "llama.cpp"]
Progress = Callable[[str, float], None]

PREFILL_TOKENS: Final = 512
_READS: Final = 3
"""Times the memory is read in each round; the fastest way of them counts."""
_WARM_STEPS: Final = 4


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Parameters
    ----------
    runs
        Rounds, 1 or more.
    triples
        Triples of short runs for the costs, 2 or more.
    steps
        Steps a run decodes at least, by batch size. 1 and 8 must be among the sizes.
    prefill_tokens
        Length of the long prompt.
    starts
        Fresh processes of each contender.
    epoch_s
        Longest epoch, s: the worker's own default.
    """

    runs: int = 7
    triples: int = 40
    steps: dict[int, int] = field(default_factory=lambda: {1: 48, 2: 48, 4: 48, 8: 32, 16: 24})
    prefill_tokens: int = PREFILL_TOKENS
    starts: int = 7
    epoch_s: float = 2.0

    @classmethod
    def quick(cls) -> Plan:
        """Return a plan for a look: about a minute and a half."""
        return cls(runs=2, triples=6, steps={1: 32, 2: 16, 4: 16, 8: 16, 16: 8}, starts=2)


class Contender(Protocol):
    """One way to run the model."""

    def begin(self, batch: int) -> None:
        """Take up so many sequences, their prompts read and a step or two decoded."""

    def decode(self, steps: int) -> tuple[int, float]:
        """Decode at least so many steps; return tokens of all sequences, and the time they took, s."""

    def end(self) -> None:
        """Drop the sequences."""

    def prefill(self, prompt: Sequence[int]) -> float:
        """Read a prompt never seen before, up to the first token; return the time, s."""


class Verified(Contender, Protocol):
    """A contender that proves what it decodes."""

    def parts(self) -> Parts:
        """Return what the epochs of the last `decode` took."""


@dataclass(frozen=True)
class Parts:
    """Where the time of verified decoding goes, one sequence, medians over some epochs."""

    scan_ms: float
    epoch_tokens: float
    step_ms: float
    digest_us: float

    @property
    def cost_pct(self) -> float:
        """Return the cost these parts add up to, percent of the time of bare steps."""
        return (self.scan_ms / self.epoch_tokens + self.digest_us / 1e3) / self.step_ms * 100


@dataclass
class Record:
    """What the rounds gave, one entry a round."""

    rates: dict[tuple[Name, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Tokens/s by contender and batch size."""
    prefill_s: dict[PrefillName, list[float]] = field(default_factory=lambda: defaultdict(list))
    read_gb_s: list[float] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)


def run_rounds(
    plan: Plan,
    contenders: dict[Name, Contender],
    verified: Verified,
    *,
    reader: MemoryReader,
    vocab: int,
    progress: Progress,
) -> Record:
    """Run the rounds.

    Parameters
    ----------
    plan
        How much.
    contenders
        By name; `verified` is the one named `on`.
    verified
        Asked for its parts after its run of one sequence.
    reader
        Measures the memory's bandwidth once a round.
    vocab
        Prompts are random ids from 100 to here: no prefix of one is ever in another.
    progress
        Called with what is done now and the fraction done.
    """
    record, ids = Record(), np.random.default_rng(0)
    prefillers: list[PrefillName] = [n for n in ("off", "on", "llama.cpp") if n in contenders]
    for number in range(plan.runs):
        turn = 1 if number % 2 == 0 else -1
        for batch, steps in plan.steps.items():
            progress(f"round {number + 1} of {plan.runs}, {batch} together", number / plan.runs)
            for name in [*contenders][::turn]:
                contender = contenders[name]
                contender.begin(batch)
                tokens, taken_s = contender.decode(steps)
                record.rates[name, batch].append(tokens / taken_s)
                if name == "on" and batch == 1:
                    record.parts.append(verified.parts())
                contender.end()
        for prefiller in prefillers[::turn]:
            prompt = ids.integers(100, vocab, plan.prefill_tokens).tolist()
            record.prefill_s[prefiller].append(contenders[prefiller].prefill(prompt))
        best = max(((rate, way) for _ in range(_READS) for way, rate in reader.gb_s().items()))
        record.read_gb_s.append(best[0])
        record.ways.append(best[1])
    return record


def run_costs(plan: Plan, contenders: dict[Name, Contender], progress: Progress) -> BenchCosts:
    """Run the triples; see the module's first lines."""
    names: list[Name] = ["off", "on", "checked"]
    per_token: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(plan.triples):
        progress(f"cost of protection, triple {number + 1} of {plan.triples}", number / plan.triples)
        shift = number % 3
        for name in names[shift:] + names[:shift]:
            contender = contenders[name]
            contender.begin(1)
            tokens, taken_s = contender.decode(plan.steps[1])
            per_token[name].append(taken_s / tokens)
            contender.end()
    return BenchCosts(
        verified=paired_cost(per_token["on"], per_token["off"]),
        checks=paired_cost(per_token["checked"], per_token["on"]),
    )


def ratios(record: Record, token_bytes: int) -> BenchRatios:
    """Return the ratios the bars are set on; null where there is no peer."""
    rates = record.rates
    one, eight = rates["on", 1], rates["on", 8]
    peer = ("llama.cpp", 1) in rates
    return BenchRatios(
        decode1_vs_llama=ratio(one, rates["llama.cpp", 1]) if peer else None,
        decode8_vs_decode1=ratio(eight, one),
        decode8_vs_llama=ratio(eight, rates["llama.cpp", 8]) if peer else None,
        prefill512_vs_llama=(ratio(record.prefill_s["llama.cpp"], record.prefill_s["on"]) if peer else None),
        floor_share=spread(_floor_share(record, one, token_bytes)),
    )


def memory_floor(record: Record, token_bytes: int) -> MemoryFloor:
    """Return the bandwidth and the floor it implies for one token of one sequence."""
    return MemoryFloor(
        read_gb_s=spread(record.read_gb_s),
        method=f"{statistics.mode(record.ways)}, the faster of {' and '.join(MemoryReader.WAYS)}",
        token_bytes=token_bytes,
        floor_ms=spread([token_bytes / gb_s / 1e6 for gb_s in record.read_gb_s]),
        share_off=spread(_floor_share(record, record.rates["off", 1], token_bytes)),
    )


def cost_parts(record: Record) -> CostParts:
    """Return the parts of the cost over the rounds."""

    def over(figure: Callable[[Parts], float]) -> Spread:
        return spread([figure(parts) for parts in record.parts])

    return CostParts(
        scan_ms=over(lambda parts: parts.scan_ms),
        epoch_tokens=over(lambda parts: parts.epoch_tokens),
        step_ms=over(lambda parts: parts.step_ms),
        digest_us=over(lambda parts: parts.digest_us),
        cost_pct=over(lambda parts: parts.cost_pct),
    )


def decode_rows(record: Record) -> list[DecodeRow]:
    """Return the table of decoding, by batch size and contender."""
    return [
        DecodeRow(
            contender=name,
            batch=batch,
            tokens_s=spread(rates),
            step_ms=spread([batch / rate * 1e3 for rate in rates]),
        )
        for (name, batch), rates in sorted(record.rates.items(), key=lambda item: item[0][1])
    ]


def prefill_rows(record: Record, tokens: int) -> list[PrefillRow]:
    """Return the table of prefill."""
    return [
        PrefillRow(contender=name, tokens=tokens, time_ms=spread([taken * 1e3 for taken in times]))
        for name, times in record.prefill_s.items()
    ]


def run_inference(
    image: Path,
    gguf: Path,
    plan: Plan,
    *,
    threads: int,
    peers: bool,
    quick: bool,
    progress: Progress = lambda text, fraction: None,
) -> BenchInference:
    """Run the whole bench.

    Parameters
    ----------
    image
        Directory of the image slot.
    gguf
        The file it was built from, for the peer.
    plan
        How much.
    threads
        Threads each contender computes with.
    peers
        Whether llama.cpp takes part.
    quick
        Noted in the result.
    progress
        Called with what is done now and the fraction of that part.

    Raises
    ------
    PenumbraError
        The image cannot be loaded, shared memory is short, or the peer is wanted and not installed.
    """
    from hil.bench.engine import open_contenders  # noqa: PLC0415

    load_before, started = load_average(), time.monotonic()
    starts = measure_starts(image, gguf if peers else None, threads, plan.starts, progress)
    with open_contenders(image, gguf if peers else None, threads, plan) as stand:
        stand.warm(_WARM_STEPS)
        reader = MemoryReader(stand.token_bytes, threads)
        record = run_rounds(
            plan, stand.contenders, stand.verified, reader=reader, vocab=stand.vocab, progress=progress
        )
        reader.close()
        costs = run_costs(plan, stand.contenders, progress)
        windows = stand.windows()
        token_bytes, manifest, identity = stand.token_bytes, stand.manifest, stand.image_id
    found = ratios(record, token_bytes)
    first_token_s = starts[0].first_token_s
    return BenchInference(
        machine=describe_machine(threads, peers=peers, load_before=load_before),
        model=manifest.model,
        image_id=identity,
        gguf_sha256=manifest.gguf_sha256,
        runs=plan.runs,
        quick=quick,
        ratios=found,
        cost_pct=costs,
        load_to_first_token_s=first_token_s,
        cost_parts=cost_parts(record),
        decode=decode_rows(record),
        prefill=prefill_rows(record, plan.prefill_tokens),
        memory=memory_floor(record, token_bytes),
        starts=starts,
        windows=windows,
        bars=bars.judge(found, costs, first_token_s),
        wall_s=time.monotonic() - started,
    )


def _floor_share(record: Record, rates: Sequence[float], token_bytes: int) -> list[float]:
    return [token_bytes / (gb_s * 1e9) * rate for gb_s, rate in zip(record.read_gb_s, rates, strict=True)]
