"""Memory errors that ECC has corrected, or could not: EDAC's counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.boards.liveness import Liveness
from node.boards.sysfs import Sysfs

CONTROLLERS: Final = "/sys/devices/system/edac/mc/mc[0-9]*"
SIGNS: Final = ("seconds_since_reset", "ce_count", "ue_count")
"""Files of a controller of which at least one changes while it is alive."""
STILL_S: Final = 5.0
"""Time after which a controller none of whose files has changed is taken as dead, s (assumed; the kernel
computes `seconds_since_reset` at each reading, so it changes every second)."""


@dataclass(frozen=True)
class EccCounts:
    """Errors since the driver was first asked. None: no memory controller, or one that gives no count."""

    corrected: int | None
    uncorrected: int | None


class Edac:
    """Counts over all memory controllers.

    A counter that goes backwards was reset (`reset_counters`, a reloaded driver): it begins anew, and what it
    says then is new. A controller that is not there says nothing: the count is unknown, never 0. A count may
    stay the same for ever, so `seconds_since_reset` shows that a controller is alive; where nothing of one
    moves, the count of the board is unknown too.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._last: dict[tuple[str, str], int] = {}
        self._total: dict[str, int] = {}
        self._liveness = Liveness(STILL_S)
        self.still: tuple[str, ...] = ()
        """Controllers that stand still, as of the last reading."""

    def read(self, now_s: float) -> EccCounts:
        """Return the counts at a physical time, s, monotonic."""
        controllers = self._sysfs.glob(CONTROLLERS)
        self.still = tuple(f"EDAC {path.name}" for path in controllers if self._stands_still(path, now_s))
        corrected, uncorrected = self._sum(controllers, "ce_count"), self._sum(controllers, "ue_count")
        return EccCounts(None, None) if self.still else EccCounts(corrected, uncorrected)

    def _stands_still(self, path: Path, now_s: float) -> bool:
        values = tuple(self._sysfs.text(path / name) for name in SIGNS)
        return self._liveness.stands_still(path.name, values, now_s)

    def _sum(self, controllers: Sequence[Path], name: str) -> int | None:
        known = bool(controllers)
        for path in controllers:
            now = self._sysfs.number(path / name)
            if now is None or now < 0:
                known = False
                continue
            key = (path.name, name)
            last = self._last.get(key)
            self._last[key] = now
            gained = 0 if last is None else now - last if now >= last else now
            self._total[name] = self._total.get(name, 0) + gained
        return self._total.get(name, 0) if known else None
