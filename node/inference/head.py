"""The head: the largest logits of a hidden state, exact and proven to be the largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from node.inference.screen_bounds import ScreenBounds


class HeadFault(Exception):
    """A logit outside its proven bounds, or no number: memory or arithmetic failed. The epoch is dirty."""


@dataclass(frozen=True)
class Candidates:
    """The largest logits of one hidden state.

    Parameters
    ----------
    ids
        int64, shape ``(n,)``, n >= k: token ids by falling logit, the lower id first where two are equal.
        The first k are the k largest of the vocabulary.
    logits
        float32, shape ``(n,)``: exact logits of `ids`.
    rows
        int64, shape ``(m,)``, ascending: rows of the table that were read.
    log_total
        Logarithm of the sum of the exponentials of all logits of the vocabulary; None if not asked for.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    rows: NDArray[np.int64]
    log_total: float | None = None


class ScreenedHead:
    """Runs the screen, then computes exactly what it does not rule out.

    Parameters
    ----------
    session
        A session of ``screen.onnx``.
    codes
        uint8, shape ``(vocab, blocks, block)``: the head's weights are ``(codes - 128) * scales``.
    scales
        float32, shape ``(vocab, blocks)``.
    rotation
        float64, shape ``(width, width)``: tensor ``screen.rotation``.
    bounds
        From the manifest.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        rotation: NDArray[np.float64],
        bounds: ScreenBounds,
    ) -> None:
        raise NotImplementedError

    def top(
        self, hidden: NDArray[np.float32], k: Sequence[int], totals: Sequence[bool] | None = None
    ) -> list[Candidates]:
        """Return the largest logits of each hidden state.

        Parameters
        ----------
        hidden
            float32, shape ``(B, width)``.
        k
            How many of each are to be proven, 1 to vocab; B numbers.
        totals
            Which need `Candidates.log_total`; B flags, None for none.

        Raises
        ------
        HeadFault
            See there.
        """
        raise NotImplementedError

    def exact(self, hidden: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the exact logits of some rows of the table.

        Each is a function of its row and of `hidden` only, to the bit, whatever is computed beside it.

        Parameters
        ----------
        hidden
            float32, shape ``(width,)``.
        rows
            int64, shape ``(n,)``.
        """
        raise NotImplementedError
