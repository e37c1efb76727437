"""What every board driver offers."""

from __future__ import annotations

from typing import Annotated, Protocol

import msgspec
from msgspec import Meta


class BoardReading(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the board's own sensors."""

    power_w: float
    """Draw of the whole payload computer, W."""
    board_c: float | None
    """Temperature, degC; None where the board has no sensor (the bus may still know it)."""


class BoardSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[board]` table of a node's configuration."""

    kind: str = "sim"
    """`sim`; `x86` and `jetson` are named in the design and not built yet."""
    idle_w: Annotated[float, Meta(gt=0, le=1000)] = 4.0
    """Draw with no work (assumed: a Jetson Orin NX module idles at 4.6 W), W."""
    core_w: Annotated[float, Meta(gt=0, le=500)] = 4.0
    """Draw each busy core adds (assumed), W."""
    cores: Annotated[int, Meta(ge=1, le=1024)] = 2
    """Cores the worker may keep busy: its threads."""


class Board(Protocol):
    """A board driver. Reads are cheap and never block on the network."""

    @property
    def name(self) -> str:
        """Kind of board, as in the boot report."""

    def range_w(self) -> tuple[float, float]:
        """Return the draw when idle and the most it can be, W."""

    def set_worker(self, pid: int | None) -> None:
        """Tell which process computes now. Boards that meter their own draw ignore it."""

    def read(self) -> BoardReading:
        """Return draw and temperature now."""
