"""The supervisor's scrub: code of both processes, configuration and tables, a little at a time, all the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fdir.regions import RegionStatus

ROW_OF_KIND = {"code": "memory.segments", "table": "memory.tables"}
"""FDIR row a damage is reported under, by kind of region."""


@dataclass(frozen=True)
class ScrubStatus:
    """Read-out of the whole scrub."""

    enabled: bool
    passes: int
    """Passes over all enabled regions."""
    pass_s: float | None
    """Time the last one took, s; None before the first is done."""
    pass_age_s: float
    """Time since the end of the last one (or since start), s."""
    regions: tuple[RegionStatus, ...]


class Scrubber:
    """Check regions in turn, in a thread of its own, at a low duty.

    Parameters
    ----------
    manifest_path
        File of the code manifest; written when it is missing.
    on_damage
        Called in the event loop with (region, row id, evidence, repaired) for each damage.
    on_note
        Called in the event loop with a sentence worth an event: manifest written anew, software changed, a
        region that cannot be read.
    budget_s
        Time a cycle may take, s.
    period_s
        Time between the starts of cycles, s.
    """

    def __init__(
        self,
        manifest_path: Path,
        *,
        on_damage: Callable[[str, str, dict[str, str | int | float | bool | None], bool], None],
        on_note: Callable[[str], None] = lambda _: None,
        budget_s: float = 0.01,
        period_s: float = 0.5,
    ) -> None:
        raise NotImplementedError

    def protect(
        self, name: str, encode: Callable[[], bytes], restore: Callable[[bytes], None] | None = None
    ) -> None:
        """Watch a table: `encode` gives the bytes of the values in use, `restore` puts sound bytes in use again.

        The bytes are held in two copies. Without `restore`, damage to the values in use is beyond repair.
        """
        raise NotImplementedError

    def watch_worker(self, pid: int | None) -> None:
        """Watch the code of a worker from now on; None when there is none."""
        raise NotImplementedError

    def set_enabled(self, region: str | None, enabled: bool) -> None:
        """Switch a region, or with None the whole scrub."""
        raise NotImplementedError

    def scrub_now(self, region: str) -> None:
        """Check a region whole, out of turn; also one that is switched off.

        Raises
        ------
        PenumbraError
            There is no such region, or another one is being checked out of turn.
        """
        raise NotImplementedError

    def recompute(self, region: str) -> None:
        """Take what a region holds now for its baseline, after a legitimate change (a table was loaded)."""
        raise NotImplementedError

    def status(self) -> ScrubStatus:
        """Return the read-out."""
        raise NotImplementedError

    async def run(self) -> None:
        """Scrub until cancelled; the thread ends with it."""
        raise NotImplementedError
