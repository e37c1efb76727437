"""What the manifest says of a screen: its dimensions, and the norms its bound is made of."""

from __future__ import annotations

import msgspec


class ScreenBounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Dimensions of a screen, and the figures its proof needs. Norms are Euclidean and rounded up.

    The screen rotates a hidden state, and keeps the first `high` of the rotated dimensions in 8 bits, the
    other `low` in 4 bits.
    """

    high: int
    low: int
    high_block: int
    """Dimensions that share a scale."""
    low_block: int
    group: int
    """Consecutive rows whose largest bound the graph returns."""
    high_norm: float
    """Largest norm of a row of the 8-bit part, as quantised."""
    low_norm: float
    """Largest norm of a row of the 4-bit part, as quantised."""
    high_scale: float
    """Largest scale of the 8-bit part."""
    low_scale: float
    """Largest scale of the 4-bit part."""
    row_norm: float
    """Largest norm of a row of the table."""
    row_bound: float
    """Largest row bound, in units of the norm of the rotated hidden state."""
    skew: float
    """What the rotation and its inverse miss of 1 together (Frobenius norm), rounding included."""
    sum_limit: float
    """Allowed difference between the sum of all bounds and what it must be, in the units of `row_bound`; the
    head adds a share of the sum."""
