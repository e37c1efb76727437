"""What boards with a meter of their own have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from node.boards.base import BoardReading, BoardSettings, Offer
from node.boards.cpu import Clocks
from node.boards.edac import Edac
from node.boards.sysfs import Sysfs


class MeteredBoard:
    """Clocks and memory errors, and what follows from the settings.

    Parameters
    ----------
    settings
        The `[board]` table.
    clock
        Physical time, s, monotonic.
    """

    measures = True

    def __init__(self, settings: BoardSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._sysfs = Sysfs(Path(settings.sysfs_root))
        self._clocks = Clocks(self._sysfs)
        self._edac = Edac(self._sysfs)

    def range_w(self) -> tuple[float, float]:
        """Return the draw when idle and the most it can be, W, as configured."""
        return self._settings.range_w()

    def draw_w(self, cpu_share: float) -> float:
        """Return the draw, as configured, at a CPU time of the worker by physical time, W."""
        return self._settings.draw_w(cpu_share)

    def set_worker(self, pid: int | None) -> None:
        """Do nothing: the meter sees the board, whoever computes."""

    def _reading(self, metered_w: float | None, die_c: float | None, still: Sequence[str]) -> BoardReading:
        """Return a reading of the meter and the die, with what else the board gives.

        Parameters
        ----------
        metered_w, die_c
            Draw, W, and temperature of the die, degC; None when unknown.
        still
            Sensors among them that stand still.
        """
        ecc = self._edac.read(self._clock())
        return BoardReading(
            power_w=None if metered_w is None else metered_w + self._settings.other_w,
            board_c=die_c,
            clock_ghz=self._clocks.mean_ghz(),
            ecc_corrected=ecc.corrected,
            ecc_uncorrected=ecc.uncorrected,
            still=(*still, *self._edac.still),
        )

    def _probe_common(self) -> list[Offer]:
        return [self._probe_clocks(), self._probe_ecc()]

    def _probe_clocks(self) -> Offer:
        ghz = self._clocks.mean_ghz()
        if ghz is None:
            detail = "/sys/devices/system/cpu/cpu*/cpufreq"
            return Offer(what="clocks", state="missing", detail=detail, mend="none in most virtual machines")
        return Offer(what="clocks", state="ok", detail=f"{len(self._clocks.cores())} cores, {ghz:.2f} GHz")

    def _probe_ecc(self) -> Offer:
        counts = self._edac.read(self._clock())
        if counts.corrected is None and counts.uncorrected is None:
            return Offer(
                what="ECC counters",
                state="missing",
                detail="/sys/devices/system/edac/mc",
                mend="load the controller's EDAC driver; memory without ECC has none: unknown, not 0",
            )
        detail = f"corrected {counts.corrected}, uncorrected {counts.uncorrected} since now"
        return Offer(what="ECC counters", state="ok", detail=detail)
