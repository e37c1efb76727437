"""Memory errors that ECC has corrected, or could not: EDAC's counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from node.boards.sysfs import Sysfs

CONTROLLERS: Final = "/sys/devices/system/edac/mc/mc[0-9]*"


@dataclass(frozen=True)
class EccCounts:
    """Errors since the driver was first asked. None: no memory controller tells."""

    corrected: int | None
    uncorrected: int | None


class Edac:
    """Counts over all memory controllers.

    A counter that goes backwards was reset (`reset_counters`, a reloaded driver): it begins anew, and what it
    says then is new. A controller that is not there says nothing: the count is unknown, never 0.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._last: dict[tuple[str, str], int] = {}
        self._total: dict[str, int] = {}

    def read(self) -> EccCounts:
        """Return the counts."""
        return EccCounts(self._sum("ce_count"), self._sum("ue_count"))

    def _sum(self, name: str) -> int | None:
        known = False
        for path in self._sysfs.glob(CONTROLLERS):
            now = self._sysfs.number(path / name)
            if now is None or now < 0:
                continue
            known = True
            key = (path.name, name)
            last = self._last.get(key)
            self._last[key] = now
            gained = 0 if last is None else now - last if now >= last else now
            self._total[name] = self._total.get(name, 0) + gained
        return self._total.get(name, 0) if known else None
