"""What every board driver offers."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from node.power.operating_point import OperatingPoint
from telemetry.errors import PenumbraError

State = Literal["ok", "missing", "denied", "bad"]


class BoardReading(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the board's own sensors. None: unknown, never 0."""

    power_w: float | None
    """Draw of the whole payload computer, W."""
    board_c: float | None
    """Temperature of die or board, degC; None where the board has no sensor (the bus may still know it)."""
    clock_ghz: float | None = None
    """Mean clock of the cores, GHz."""
    ecc_corrected: int | None = None
    """Memory errors that ECC corrected since the driver was opened."""
    ecc_uncorrected: int | None = None
    """Memory errors it could not."""
    still: tuple[str, ...] = ()
    """Sensors that stand still: their files can be read, but nobody updates them. Their value is unknown."""


class BoardSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[board]` table of a node's configuration."""

    kind: Literal["sim", "x86", "jetson"] = "sim"
    """`sim` computes its draw from the worker's CPU time; the others read their own meters."""
    idle_w: Annotated[float, Meta(gt=0, le=1000)] = 4.0
    """Draw with no work (assumed: a Jetson Orin NX module idles at 4.6 W), W."""
    core_w: Annotated[float, Meta(gt=0, le=500)] = 4.0
    """Draw each busy core adds (assumed), W."""
    cores: Annotated[int, Meta(ge=1, le=1024)] = 2
    """Cores the worker may keep busy: its threads."""
    other_w: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """Draw of the board that its meter does not see (x86: all but the processor packages; assumed), W."""
    sysfs_root: Annotated[str, Meta(min_length=1, max_length=4096)] = "/"
    """Directory that stands for `/` when `/sys` and `/etc` are read."""
    cgroup: Annotated[str, Meta(max_length=4096)] = ""
    """x86: control group (version 2) of the worker, whose `cpu.max` is held at its threads; empty: none."""
    power_mode: Annotated[str, Meta(max_length=64)] = ""
    """Jetson: power mode, by name, that is set when the node starts; empty: the one in force."""

    def range_w(self) -> tuple[float, float]:
        """Return the draw when idle, and with every core busy, W."""
        return self.idle_w, self.draw_w(self.cores)

    def draw_w(self, cpu_share: float) -> float:
        """Return the draw at a CPU time of the worker by physical time (1 = one core), W."""
        return self.idle_w + self.core_w * cpu_share


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What a board offers, or does not, as `penumbra node --probe` tells it."""

    what: str
    state: State
    detail: str
    """The value, or the file that gave none."""
    mend: str = ""
    """How to get it."""


def refuse_power_mode(board: str, point: OperatingPoint) -> None:
    """Refuse a point that names a power mode, on a board that has none.

    Raises
    ------
    PenumbraError
        It names one.
    """
    if point.power_mode is not None:
        raise PenumbraError(
            f"power mode {point.power_mode!r}: board {board!r} has no power modes", "name none"
        )


class Board(Protocol):
    """A board driver. Reads are cheap and never block on the network."""

    @property
    def name(self) -> str:
        """Kind of board, as in the boot report."""

    @property
    def identity(self) -> str:
        """Which board this is: a profile measured on another one is refused."""

    measures: bool
    """Whether its draw comes from a meter."""

    def power_mode(self) -> str | None:
        """Return the name of the power mode in force; None on boards without, and when it cannot be told."""

    def range_w(self) -> tuple[float, float]:
        """Return the draw when idle and the most it can be, W, as configured."""

    def draw_w(self, cpu_share: float) -> float:
        """Return the draw, as configured, at a CPU time of the worker by physical time, W."""

    def set_worker(self, pid: int | None) -> None:
        """Tell which process computes now. Boards that meter their own draw ignore it."""

    def operate(self, point: OperatingPoint) -> None:
        """Hold the board to an operating point, beyond what the worker does by itself. May take seconds.

        Raises
        ------
        PenumbraError
            The board does not take it.
        """

    def read(self) -> BoardReading:
        """Return draw and temperature now."""

    def probe(self) -> list[Offer]:
        """Return what the board offers, what is missing, and how to get it."""
