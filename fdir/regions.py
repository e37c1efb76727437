"""Regions of memory that are checked in turn, within a time budget, and mended where they can be.

The shape is that of cFS CS: named regions, enabled each and together, baselines, one region out of turn on order,
counters of passes and miscompares; with a budget of time, not of bytes, and with repair.

`RegionBook` decides what is checked next and counts; `RegionScrubber` reads, compares and mends.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Kind(StrEnum):
    """What a region holds."""

    CODE = "code"
    """Instructions of a process, mapped from files."""
    TABLE = "table"
    """Configuration or a table, as the values in use."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch of a region found different from its baseline.

    Parameters
    ----------
    region
        Name of the region.
    kind
        Its kind.
    repaired
        Whether it is whole again: read again after the repair, and compared.
    method
        Where the right bytes came from: `file`, `copy`, or `none`.
    evidence
        Where it is and what differs, for a report.
    """

    region: str
    kind: Kind
    repaired: bool
    method: str
    evidence: dict[str, str | int | float | bool | None]


class Region(Protocol):
    """A named region, read and mended in pieces. Not thread-safe: one thread at a time."""

    name: str
    kind: Kind

    @property
    def pieces(self) -> int:
        """Number of pieces; it may change when a pass begins."""

    @property
    def size(self) -> int:
        """Bytes."""

    def refresh(self) -> None:
        """Called before each pass: notice what has legitimately come and gone (libraries loaded since)."""

    def check(self, piece: int) -> list[Damage]:
        """Compare a piece with the baseline, and mend what differs.

        Raises
        ------
        OSError
            It cannot be read.
        """

    def recompute(self) -> None:
        """Take the present contents for the baseline, after a legitimate change."""


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """Read-out of a region."""

    name: str
    kind: Kind
    enabled: bool
    size: int
    """Bytes."""
    passes: int
    """Full passes since it was added."""
    pass_s: float | None
    """Time from the start to the end of the last full pass, s; None before the first is done."""
    pass_work_s: float | None
    """Part of it that was spent on reading, s."""
    miscompares: int
    """Damaged stretches found."""
    repaired: int
    """Those of them that were mended."""
    error: str
    """Why it could not be read last time; empty if it could."""
