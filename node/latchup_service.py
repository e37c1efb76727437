"""Latch-up detection on the readings of the power loop: draw that load, clocks and heat do not explain."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fdir.latchup import (
    CurrentModel,
    DrawSample,
    LatchupCleared,
    LatchupDetector,
    LatchupSuspected,
    QuietWanted,
)
from node.boards import BoardReading
from node.findings import Find, Finding
from node.power.cpu_share import CpuShare
from node.power.profile import AGAIN, load_calibration
from node.recorder import Recorder
from telemetry.errors import PenumbraError
from telemetry.figures import CurrentProfile
from telemetry.packets import Severity

FORGET_S = 30.0
"""Time after which a suspicion that stayed is found anew, s (assumed: longer than the bus takes to act)."""


def load_profile(path: Path) -> CurrentProfile:
    """Return the current profile in what `penumbra calibrate --json` wrote.

    Raises
    ------
    PenumbraError
        The file cannot be read, is no such file, or its board gave no profile.
    """
    calibration = load_calibration(path)
    if calibration.current is None:
        raise PenumbraError(f"{path}: current is null: its board gave too few samples to fit", AGAIN)
    return calibration.current


class LatchupService:
    """Judges each reading of the board.

    Parameters
    ----------
    profile
        Model of the expected draw, see `penumbra calibrate`; None: there is none, and nothing is judged.
    worker_pid
        Returns the process whose load explains draw.
    find
        Takes what is found.
    recorder
        For events.
    on_quiet
        Called with a time, s, in which the load is to rest.

    Raises
    ------
    PenumbraError
        The profile cannot be used.
    """

    def __init__(
        self,
        profile: Path | None,
        *,
        worker_pid: Callable[[], int | None],
        find: Find,
        recorder: Recorder,
        on_quiet: Callable[[float], None],
    ) -> None:
        self.residual_w: float | None = None
        """Draw that is not explained, at the last reading, W; None without a model."""
        self._detector = None if profile is None else LatchupDetector(CurrentModel(load_profile(profile)))
        self._worker_pid = worker_pid
        self._find = find
        self._recorder = recorder
        self._on_quiet = on_quiet
        self._share = CpuShare()
        self._suspected_s = 0.0

    def take(self, reading: BoardReading, board_c: float | None) -> None:
        """Judge a reading, several times a second."""
        detector, now_s = self._detector, time.monotonic()
        share = self._share.sample(self._worker_pid())
        if detector is None or share is None:
            return
        if reading.power_w is None:
            return
        sample = DrawSample(reading.power_w, share, reading.clock_ghz, board_c)
        expected_w = detector.model.expected_w(sample)
        self.residual_w = None if expected_w is None else reading.power_w - expected_w
        if detector.suspected and now_s - self._suspected_s > FORGET_S:
            detector.reset()
        for action in detector.handle(sample, now_s):
            match action:
                case LatchupSuspected(evidence):
                    self._suspected_s = now_s
                    reason = "the board draws more than its load explains"
                    self._find(Finding("board.latchup", reason, evidence))
                case LatchupCleared(evidence):
                    text = "the draw is explained again"
                    self._recorder.event(Severity.LOW, "latchup.cleared", text, evidence)
                case QuietWanted(for_s, _):
                    self._on_quiet(for_s)
