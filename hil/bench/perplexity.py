"""`penumbra bench perplexity`: how the image predicts a fixed text, beside the reference and llama.cpp.

All read the same tokens and are judged by the exact logits after every one of them. Ours come from the
trunk's hidden states and the head's table; the head as it flies (screen, then rescoring) runs over the
first positions too, to see that it finds the same tokens. The trunk runs twice: as flown, and with its
matrix products in float32, which tells what rounding activations to 8 bits does from what the graph does.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from hil.bench.llama import LlamaPeer
from hil.bench.machine import describe_machine, load_average
from hil.bench.reference_gemma import ReferenceGemma
from node.inference.gguf_source import GgufSource
from node.inference.graph import build_trunk
from node.inference.head import ScreenedHead
from node.inference.manifest import TOKENIZER, image_id
from node.inference.model import Model, open_model
from node.inference.tokenizer import Tokenizer
from telemetry.errors import PenumbraError
from telemetry.figures import BenchPerplexity, Disagreement, PerplexityRow

TOKENS: Final = 4000
"""Length of the fixed text, its opening token included."""
HEAD_POSITIONS: Final = 256
CLEAR_LEAD: Final = 0.1
"""Nats by which a first choice is called clear: 11 % more probable than the second."""
_CHUNK: Final = 64
"""Tokens a run of the trunk takes: PREFILL_CHUNK of the worker."""
_STRIP: Final = 128
"""Positions whose logits are held at once: 134 MB at 262,144 of them."""

Floats = NDArray[np.float32]
Other = Literal["penumbra", "penumbra float32", "llama.cpp"]


@dataclass(frozen=True)
class Scores:
    """How one implementation sees a text of n tokens.

    Parameters
    ----------
    loss
        float64, shape ``(n - 1,)``: minus the logarithm of the probability of each next token.
    first, second
        int64, shape ``(n,)``: the most probable token after each position, and the one after that.
    gap
        float32, shape ``(n,)``: logit of the first minus that of the second.
    """

    loss: NDArray[np.float64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    gap: Floats

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return float(np.exp(self.loss.mean()))

    def agreement(self, truth: Scores, lead: float = 0.0) -> float:
        """Return the share of positions with the same most probable token, 0 to 1.

        Parameters
        ----------
        truth
            The other one.
        lead
            Only positions where its first choice leads its second by so many nats or more.
        """
        clear = truth.gap >= lead
        return float((self.first == truth.first)[clear].mean())


def fixed_text() -> str:
    """Return the English text all figures are taken on, written for this project."""
    return (files("hil.bench") / "english.txt").read_text("utf-8")


def fixed_tokens(tokenizer: Tokenizer, count: int = TOKENS) -> list[int]:
    """Return its first tokens, `bos` first.

    Raises
    ------
    PenumbraError
        The text is shorter than that with this tokenizer.
    """
    ids = tokenizer.encode(fixed_text())
    if len(ids) < count:
        raise PenumbraError(f"the fixed text has {len(ids)} tokens with this tokenizer, {count} are wanted")
    return ids[:count]


def score(strips: Iterable[Floats], ids: Sequence[int]) -> Scores:
    """Judge logits.

    Parameters
    ----------
    strips
        Logits after each token of `ids`, in order, some positions at a time; shape ``(positions, vocab)``.
        Writable; left as they are.
    ids
        The text.
    """
    loss: list[NDArray[np.float64]] = []
    first, second, gap = [], [], []
    at = 0
    for logits in strips:
        rows = np.arange(len(logits))
        first.append(logits.argmax(axis=1))
        top = logits[rows, first[-1]]
        logits[rows, first[-1]] = -np.inf
        second.append(logits.argmax(axis=1))
        gap.append(top - logits[rows, second[-1]])
        logits[rows, first[-1]] = top
        total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
        following = np.asarray(ids[at + 1 : at + 1 + len(logits)], np.int64)
        known = rows[: len(following)]
        loss.append(total[known] - logits[known, following])
        at += len(logits)
    return Scores(np.concatenate(loss), np.concatenate(first), np.concatenate(second), np.concatenate(gap))


def trunk_hidden(model: Model, ids: Sequence[int]) -> Floats:
    """Run the trunk over a text in chunks, as the worker reads a prompt; return all hidden states.

    The caches are in ordinary memory with room for the whole text in every layer, so this shows what the
    graph computes, not what the arena keeps. Shape ``(len(ids), width)``.
    """
    shape = model.shape
    room = (1, shape.kv_heads, len(ids), shape.head_dim)
    names = [f"{part}.{layer}" for layer in range(shape.layers) for part in ("key", "value")]
    caches = {name: np.zeros(room, np.float32) for name in names}
    outputs = ["hidden", *(f"present_{name}" for name in names)]
    found = []
    for start in range(0, len(ids), _CHUNK):
        chunk = np.asarray(ids[start : start + _CHUNK], np.int64)[None]
        stop = start + chunk.shape[1]
        last, total = np.array([stop - 1], np.int32), np.array(stop, np.int32)
        feed: dict[str, NDArray[np.generic]] = {
            "input_ids": chunk,
            "position_ids": np.arange(start, stop, dtype=np.int64)[None],
            "seqlens_k": last,
            "total_sequence_length": total,
            "window_seqlens_k": last,
            "window_total_sequence_length": total,
            **{f"past_{name}": cache for name, cache in caches.items()},
        }
        hidden, *present = model.trunk.run(outputs, feed)
        caches = dict(zip(names, present, strict=True))
        found.append(hidden[0])
    return np.concatenate(found)


def float_trunk(gguf: Path, model: Model) -> Model:
    """Return the model with the trunk it was built from, whose matrix products do not round their input.

    Nothing is packed: it is some times slower.
    """
    graph, tensors = build_trunk(GgufSource(gguf), model.shape, checked=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    graph.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in tensors.items())
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return replace(model, trunk=session)


def llama_strips(peer: LlamaPeer, ids: Sequence[int]) -> Iterator[Floats]:
    """Yield llama.cpp's logits over a text."""
    context = peer.context(1, len(ids), _STRIP)
    try:
        for start in range(0, len(ids), _STRIP):
            yield context.all_logits(ids[start : start + _STRIP], start)
    finally:
        context.close()


def disagreement(contender: Other, found: Scores, reference: Scores) -> Disagreement:
    """Look at the positions whose most probable token is not the reference's."""
    other = np.flatnonzero(found.first != reference.first)
    gaps = reference.gap[other]
    return Disagreement(
        contender=contender,
        positions=len(other),
        gap_median=float(np.median(gaps)) if len(other) else None,
        gap_max=float(gaps.max()) if len(other) else None,
        gap_all=float(np.median(reference.gap)),
        second_choice=int((found.first[other] == reference.second[other]).sum()),
    )


def flown_head(head: ScreenedHead, hidden: Floats, table: Floats) -> tuple[int, float]:
    """Hold the head as it flies against all exact logits.

    Returns
    -------
    Positions whose first candidate is the largest logit, and the largest error of ``log_total``.
    """
    equal, error = 0, 0.0
    for start in range(0, len(hidden), 8):
        part = hidden[start : start + 8]
        exact = part @ table.T
        top = exact.max(axis=1)
        totals = top + np.log(np.exp(exact - top[:, None]).sum(axis=1, dtype=np.float64))
        candidates = head.top(part, [1] * len(part), [True] * len(part))
        for found, logits, total in zip(candidates, exact, totals, strict=True):
            if found.log_total is None:
                raise RuntimeError("the head gave no log_total though it was asked for")
            equal += int(found.ids[0]) == int(logits.argmax())
            error = max(error, abs(found.log_total - float(total)))
    return equal, error


def run_perplexity(image: Path, gguf: Path, *, threads: int, peers: bool, tokens: int) -> BenchPerplexity:
    """Run all contenders over the fixed text.

    Parameters
    ----------
    image
        Directory of the image slot.
    gguf
        The file it was built from.
    threads
        Threads of ONNX Runtime and llama.cpp; numpy takes what its BLAS takes.
    peers
        Whether llama.cpp takes part.
    tokens
        Length of the text, 2 to `TOKENS`.

    Raises
    ------
    PenumbraError
        The image cannot be loaded, or the peer is wanted and not installed.
    """
    load_before = load_average()
    peer = LlamaPeer(gguf, threads) if peers else None
    model = open_model(image, threads)
    ids = fixed_tokens(Tokenizer(image / TOKENIZER), tokens)
    reference = ReferenceGemma(gguf)

    scores: dict[Other | Literal["reference"], tuple[Scores, float]] = {}
    started = time.perf_counter()
    scores["reference"] = score(reference.logits(reference.hidden(ids)), ids), time.perf_counter() - started
    started = time.perf_counter()
    hidden = trunk_hidden(model, ids)
    scores["penumbra"] = score(reference.logits(hidden), ids), time.perf_counter() - started
    started = time.perf_counter()
    exact = trunk_hidden(float_trunk(gguf, model), ids)
    scores["penumbra float32"] = score(reference.logits(exact), ids), time.perf_counter() - started
    if peer is not None:
        started = time.perf_counter()
        scores["llama.cpp"] = score(llama_strips(peer, ids), ids), time.perf_counter() - started
        peer.close()
    equal, error = flown_head(model.head, hidden[:HEAD_POSITIONS], reference.head)

    truth = scores["reference"][0]
    others: list[Other] = ["penumbra", "penumbra float32"]
    if "llama.cpp" in scores:
        others.append("llama.cpp")
    rows = [
        PerplexityRow(
            contender=name,
            perplexity=found.perplexity,
            against_reference_pct=(
                None if found is truth else (found.perplexity / truth.perplexity - 1) * 100
            ),
            agreement_pct=None if found is truth else found.agreement(truth) * 100,
            clear_agreement_pct=None if found is truth else found.agreement(truth, CLEAR_LEAD) * 100,
            wall_s=wall_s,
        )
        for name, (found, wall_s) in scores.items()
    ]
    against_llama = None
    if "llama.cpp" in scores:
        ours, theirs = scores["penumbra"][0].perplexity, scores["llama.cpp"][0].perplexity
        against_llama = (ours / theirs - 1) * 100
    return BenchPerplexity(
        machine=describe_machine(threads, peers=peers, load_before=load_before),
        model=model.manifest.model,
        image_id=image_id(model.manifest),
        gguf_sha256=model.manifest.gguf_sha256,
        tokens=len(ids),
        text_sha256=hashlib.sha256(fixed_text().encode()).hexdigest(),
        rows=rows,
        disagreements=[disagreement(name, scores[name][0], truth) for name in others],
        against_llama_pct=against_llama,
        head_top1_equal=equal,
        head_positions=min(HEAD_POSITIONS, len(ids)),
        head_log_total_error=error,
    )
