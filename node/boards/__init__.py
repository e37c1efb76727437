"""Board drivers: what the payload computer draws, and how warm it is."""

from __future__ import annotations

from node.boards.base import Board, BoardReading, BoardSettings, Offer
from node.boards.jetson import JetsonBoard
from node.boards.sim import SimBoard
from node.boards.x86 import X86Board

__all__ = ["Board", "BoardReading", "BoardSettings", "Offer", "open_board"]


def open_board(settings: BoardSettings, *, for_flight: bool = True) -> Board:
    """Open the driver of a board.

    Parameters
    ----------
    settings
        The `[board]` table.
    for_flight
        True: a board whose draw cannot be measured is refused. False: it may be looked at all the same.

    Raises
    ------
    PenumbraError
        The draw cannot be measured, or the power mode asked for cannot be put in force.
    """
    if settings.kind == "sim":
        return SimBoard(settings)
    board = X86Board(settings) if settings.kind == "x86" else JetsonBoard(settings)
    if for_flight:
        board.require_meter()
    return board
