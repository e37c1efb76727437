"""The screen: a small graph that bounds every logit from above. Building it; `node.inference.head` runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from node.inference.screen_bounds import ScreenBounds

if TYPE_CHECKING:
    from node.inference.gguf_source import QuantMatrix


@dataclass(frozen=True)
class Screen:
    """A built screen.

    Parameters
    ----------
    model
        ``screen.onnx`` without its initialisers. Inputs ``high`` and ``low``, outputs ``bound`` and ``peak``.
    tensors
        Its initialisers by name (``screen.high.weight`` and so on).
    rotation
        float64, shape ``(width, width)``: tensor ``screen.rotation`` of the image, which the graph does
        not use, `ScreenedHead` does.
    bounds
        For the manifest.
    """

    model: onnx.ModelProto
    tensors: dict[str, NDArray[np.generic]]
    rotation: NDArray[np.float64]
    bounds: ScreenBounds


def build_screen(table: QuantMatrix, hidden: NDArray[np.float32]) -> Screen:
    """Build the screen of a head.

    Parameters
    ----------
    table
        The head's weights, shape ``(vocab, width)``; width a multiple of 32.
    hidden
        Hidden states of calibration text, float32, shape ``(N, width)``, N >= 1. They decide how well the
        screen separates, never whether it is right.

    Returns
    -------
    The same bytes for the same input.
    """
    raise NotImplementedError
