"""Run a fixed text through a trunk when an image is built, and see what sound computation looks like.

The hidden states show the screen in which directions they lie; the residuals of the checked trunk show how
far rounding alone carries them. The text is packaged (`calibration.txt`: prose, code and other languages,
written for this purpose), so the same model gives the same image.

Half of the text, in pieces that alternate, makes the limits; the other half tells how often they are exceeded
without cause.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from node.inference.graph import check_names
from node.inference.manifest import Checks, GemmaShape

_PIECE: Final = 128
"""Tokens of a piece of text, each with a cache of its own."""
_CHUNK: Final = 64
"""Tokens of a prefill."""
_STEPS: Final = 8
"""Tokens at the end of a piece that are fed one by one."""
_MARGIN: Final = 4.0
"""Times the largest sound residual that a limit is (assumed: residuals have a tail the text may not show)."""
_CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Calibration:
    """What a trunk did with the calibration text.

    Parameters
    ----------
    hidden
        float32, shape ``(N, width)``: hidden states of all its positions.
    checks
        Limits of the residuals, and how well they hold.
    """

    hidden: NDArray[np.float32]
    checks: Checks


def calibration_text() -> str:
    """Return the packaged text."""
    return files("node.inference").joinpath("calibration.txt").read_text(encoding="utf-8")


def calibrate(trunk: ort.InferenceSession, shape: GemmaShape, tokens: Sequence[int]) -> Calibration:
    """Run text through a checked trunk.

    Parameters
    ----------
    trunk
        The session.
    shape
        Dimensions of the model.
    tokens
        The text, its first token that which begins every text.
    """
    begin, *rest = tokens
    length = min(_PIECE, shape.context) - 1
    pieces = [[begin, *rest[at : at + length]] for at in range(0, len(rest), length)]
    runs = [run_text(trunk, shape, piece) for piece in pieces]
    hidden = np.concatenate([states for states, _ in runs])
    limits = _MARGIN * np.concatenate([residuals for _, residuals in runs[::2]]).max(axis=0)
    unseen = np.concatenate([residuals for _, residuals in runs[1::2]])
    tripped = int((unseen > limits).any(axis=1).sum())
    return Calibration(
        hidden,
        Checks(
            names=check_names(shape),
            limits=tuple(float(limit) for limit in limits),
            false_positive=rate_bound(tripped, len(unseen)),
            positions=len(unseen),
            tripped=tripped,
        ),
    )


def run_text(
    trunk: ort.InferenceSession, shape: GemmaShape, tokens: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run one text through a checked trunk, most of it in chunks, the end token by token.

    Returns
    -------
    Hidden states, shape ``(len(tokens), width)``, and residuals, shape ``(len(tokens), products)``.
    """
    names = [output.name for output in trunk.get_outputs()]
    room = np.zeros((1, shape.kv_heads, len(tokens), shape.head_dim), np.float32)
    caches = {f"{part}.{layer}": room for layer in range(shape.layers) for part in ("key", "value")}
    hidden, residuals = [], []
    for start, stop in _runs(len(tokens)):
        last, total = np.array([stop - 1], np.int32), np.array(stop, np.int32)
        feed: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array([tokens[start:stop]], np.int64),
            "position_ids": np.arange(start, stop)[np.newaxis],
            "seqlens_k": last,
            "total_sequence_length": total,
            "window_seqlens_k": last,
            "window_total_sequence_length": total,
            **{f"past_{name}": cache for name, cache in caches.items()},
        }
        outputs = dict(zip(names, trunk.run(names, feed), strict=True))
        caches = {name: outputs[f"present_{name}"] for name in caches}
        hidden.append(outputs["hidden"][0])
        residuals.append(outputs["residual"][0])
    return np.concatenate(hidden), np.concatenate(residuals)


def rate_bound(count: int, trials: int) -> float:
    """Return the upper bound, with 95 % confidence, of a rate seen ``count`` times in so many trials.

    Clopper and Pearson, solved by halving: the largest rate at which so few would still come with 5 %.
    """
    if count == trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        at_most = sum(_binomial(number, trials, middle) for number in range(count + 1))
        low, high = (middle, high) if at_most > 1 - _CONFIDENCE else (low, middle)
    return high


def _binomial(number: int, trials: int, rate: float) -> float:
    log_ways = math.lgamma(trials + 1) - math.lgamma(number + 1) - math.lgamma(trials - number + 1)
    return math.exp(log_ways + number * math.log(rate) + (trials - number) * math.log1p(-rate))


def _runs(length: int) -> Iterator[tuple[int, int]]:
    """Yield the first position of each run over a text, and that after its last."""
    steps_from = max(0, length - _STEPS)
    for start in range(0, steps_from, _CHUNK):
        yield start, min(start + _CHUNK, steps_from)
    for start in range(steps_from, length):
        yield start, start + 1
