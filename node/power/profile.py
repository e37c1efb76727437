"""Operating points of this board, as `penumbra calibrate` measured them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from node.boards import Board
from node.power.curve import PowerCurve, Setting
from node.power.operating_point import OperatingPoint
from telemetry.errors import PenumbraError
from telemetry.figures import Calibration

AGAIN: Final = "write it on this board with: penumbra calibrate --json PATH"


def load_calibration(path: Path) -> Calibration:
    """Return what `penumbra calibrate --json` wrote.

    Raises
    ------
    PenumbraError
        The file cannot be read, or is no such file.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise PenumbraError(f"{path}: cannot be read: {error.strerror}", AGAIN) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PenumbraError(f"{path}: no calibration: {error}", AGAIN) from None


def load_profile(path: Path, board: Board, *, threads: int, batch: int) -> PowerCurve:
    """Return tokens/s by watts from what `penumbra calibrate --json` wrote.

    Points beyond the threads and the batch of this node are left out: it cannot go there.

    On a board that measures its draw the watts are those measured. On one that computes it from CPU time they
    follow from the CPU time measured, by the same formula.

    Raises
    ------
    PenumbraError
        The file cannot be read, is no calibration, was made on another board, or has no point of use here.
    """
    found = load_calibration(path)
    if (found.board, found.identity) != (board.name, board.identity):
        raise PenumbraError(
            f"{path}: measured on board {found.board!r} ({found.identity}), this is {board.name!r}"
            f" ({board.identity})",
            AGAIN,
        )
    idle_w, _ = board.range_w()
    settings = []
    for each in found.points:
        if each.duty < 1.0 or each.threads > threads or each.batch > batch:
            continue
        power_w = each.power_w if board.measures else board.draw_w(each.cpu_share)
        if power_w is not None:
            point = OperatingPoint(
                threads=each.threads, batch=each.batch, duty=1.0, power_mode=each.power_mode
            )
            settings.append(Setting(point, power_w, each.tokens_s))
    measured_idle_w = idle_w if found.idle_w is None else found.idle_w
    try:
        return PowerCurve(measured_idle_w, settings)
    except ValueError as error:
        raise PenumbraError(
            f"{path}: of up to {threads} threads and {batch} jobs together, {error}", AGAIN
        ) from None
