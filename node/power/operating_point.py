"""The operating point: what of the worker the power side can turn between two epochs, without a reload."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class OperatingPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of the board decoding may use.

    Its rate in tokens/s and its draw in watts are properties of a board: `penumbra calibrate` measures them.
    """

    threads: Annotated[int, Meta(ge=1, le=256)]
    """Processor cores that compute."""
    batch: Annotated[int, Meta(ge=1, le=64)]
    """Jobs decoded together at most."""
    duty: Annotated[float, Meta(ge=0.01, le=1)]
    """Share of time the worker may compute (token pacing)."""
    power_mode: Annotated[str, Meta(max_length=64)] | None = None
    """Power mode of the board, by name; None: the one in force."""
