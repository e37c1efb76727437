"""Board drivers: what the payload computer draws, and how warm it is."""

from __future__ import annotations

from node.boards.base import Board, BoardReading, BoardSettings
from node.boards.sim import SimBoard
from telemetry.errors import PenumbraError

__all__ = ["Board", "BoardReading", "BoardSettings", "open_board"]


def open_board(name: str, settings: BoardSettings) -> Board:
    """Open a board driver by name.

    Raises
    ------
    PenumbraError
        No driver of that name, or it is not part of this version.
    """
    if name == "sim":
        return SimBoard(settings)
    if name in {"x86", "jetson"}:
        raise PenumbraError(
            f"[board] kind {name!r}: this version has no driver for that board, 'sim' is allowed",
            "set kind = 'sim'; its draw follows the worker's real CPU time",
        )
    raise PenumbraError(f"[board] kind {name!r}: unknown, 'sim' is allowed", "set kind = 'sim'")
