"""What the proofs take for granted of ONNX Runtime's arithmetic, and what a build measured of it.

Matrix products of quantised weights (MatMulNBits, accuracy_level 4) are computed by other kernels on other
CPUs. `node.inference.screen` proves its bound only where a kernel does as it says there: it rounds its input
per block of weights, and errs by few roundings of float32. A batch is equal to each of its rows alone only
where a kernel computes a row in the same way whatever is beside it. `node.inference.operators` measures both
when an image is built, on that machine and at the shapes of that model; an image whose kernels do not hold
to it is not made. `node.inference.attention` measures where windows may begin for the same reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, Protocol

import msgspec

from telemetry.errors import PenumbraError

OPTIONS: Final[dict[str, str]] = {"mlas.disable_kleidiai": "1"}
"""Options of every session that decide how it computes. KleidiAI, which ONNX Runtime takes on aarch64 by
default, rounds the input by whole rows: on the grid of `node.inference.head.quantize_input` it errs by 23,000
to 65,000 roundings of float32 in 4 bits, the other kernels by less than 1 (measured, Cortex-A76 emulated)."""
ENVIRONMENT: Final[dict[str, str]] = {"ORT_GQA_DISABLE_FLASH_ATTENTION": "1"}
"""As `OPTIONS`, for what ONNX Runtime takes from the environment only. Its flash kernel sums over blocks of
keys as long as fit the level 2 cache: 256 positions where that has 2 MiB (measured), 160 for 1.25 MiB
(estimated). Without it a block has 128 (measured at heads of 256: AVX-512, and Cortex-A76 emulated)."""
SETTINGS: Final = dict(sorted((OPTIONS | ENVIRONMENT).items()))
"""What a manifest records of both, by name."""
UNIT: Final = 2.0**-24
"""Largest relative error of one float32 rounding."""
MARGIN: Final = 4.0
"""Times the largest error measured that must still be within what a proof takes for granted (assumed: inputs
of flight may be worse than those tried)."""


class _Settings(Protocol):
    """`onnxruntime.SessionOptions`."""

    def add_session_config_entry(self, name: str, value: str) -> None: ...


def configure(settings: _Settings, options: Mapping[str, str] = OPTIONS) -> None:
    """Give the settings of a session, and this process, what decides how it computes."""
    os.environ.update(ENVIRONMENT)
    for name, value in options.items():
        settings.add_session_config_entry(name, value)


class OperatorError(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was measured of one matrix product."""

    bits: int
    """4 or 8."""
    block: int
    """Columns that share a scale."""
    columns: int
    rows: int
    roundings: float
    """Largest error of a result against float64, in roundings of float32: of 2^-24 times what `magnitude` of
    `node.inference.operators` says."""


def allowed_roundings(blocks: int) -> int:
    """Return the roundings of float32 in a chain that a product over so many blocks may take.

    One a block for its product and sum, one more for the offset of the codes, twice for fused kernels that
    split them, and the last additions.
    """
    return 4 * blocks + 64


def check_operators(operators: tuple[OperatorError, ...], where: str) -> None:
    """Check that every product measured errs as little as the proofs take for granted.

    Parameters
    ----------
    operators
        What was measured.
    where
        What to name in the message: the machine, or a manifest.

    Raises
    ------
    PenumbraError
        One errs by more; names it, its error and what is allowed.
    """
    for each in operators:
        allowed = allowed_roundings(each.columns // each.block) / MARGIN
        # "not <=": no number is within no limit.
        if not each.roundings <= allowed:
            raise PenumbraError(
                f"{where}: the product of {each.bits} bits in blocks of {each.block}, {each.columns} columns "
                f"and {each.rows} rows errs by {each.roundings:.4g} roundings of float32: "
                f"{allowed:.4g} are allowed",
                "this kernel of ONNX Runtime cannot be flown: take another version of it, and report the CPU",
            )
