"""The supervisor's scrub: code of both processes, configuration and tables, a little at a time, always.

Reading and mending run in a thread of their own; what was found is told in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from fdir.code_manifest import CodeManifest
from fdir.guarded import GuardedTable
from fdir.regions import Evidence, Found, Kind, RegionScrubber, RegionStatus
from fdir.segments import ProcessCode

_log = logging.getLogger(__name__)

SUPERVISOR_CODE: Final = "supervisor.code"
WORKER_CODE: Final = "worker.code"
"""Names of the regions of code."""
ROW_OF_KIND: Final = {Kind.CODE: "memory.segments", Kind.TABLE: "memory.tables"}
"""FDIR row that damage is reported under, by kind of region."""

OnDamage: TypeAlias = Callable[[str, str, Evidence, bool], None]


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
        Called in the event loop with a sentence worth an event: manifest made anew, software changed, a
        region or file that cannot be read, a check out of turn that is done.
    budget_s
        Time a cycle may take, s.
    period_s
        Time between the end of a cycle and the start of the next, s.
    """

    def __init__(
        self,
        manifest_path: Path,
        *,
        on_damage: OnDamage,
        on_note: Callable[[str], None] = lambda _: None,
        budget_s: float = 0.01,
        period_s: float = 0.5,
    ) -> None:
        self._manifest_path = manifest_path
        self._on_damage = on_damage
        self._on_note = on_note
        self._period_s = period_s
        self._regions = RegionScrubber(budget_s)
        self._manifest: CodeManifest | None = None
        self._notes: list[str] = []
        """Written by the thread while a cycle runs, taken by the loop when it is done."""
        self._code: dict[str, ProcessCode] = {}
        self._wanted: dict[str, tuple[str, int | None]] = {SUPERVISOR_CODE: ("supervisor", None)}
        """Code to be watched, which the thread has not opened yet: what the process is called, its id."""
        self._unwanted: list[str] = []
        self._told_uncovered: set[str] = set()
        self._save_failed = False
        self._started_s = time.monotonic()
        self._hurry = asyncio.Event()

    def protect(
        self, name: str, encode: Callable[[], bytes], restore: Callable[[bytes], None] | None = None
    ) -> None:
        """Watch a table: `encode` gives the bytes of the values in use, `restore` puts such in use again.

        Both run in the scrub's thread. The bytes are held in two copies. Without `restore`, damage to the
        values in use is beyond repair.

        Raises
        ------
        ValueError
            There is a region of that name.
        """
        self._regions.add(GuardedTable(name, encode, restore))

    def watch_worker(self, pid: int | None) -> None:
        """Watch the code of a worker from the next cycle on; None when there is none."""
        self._unwanted.append(WORKER_CODE)
        self._wanted.pop(WORKER_CODE, None)
        if pid is not None:
            self._wanted[WORKER_CODE] = ("worker", pid)

    def set_enabled(self, region: str | None, enabled: bool) -> None:
        """Switch a region, or with None the whole scrub.

        Raises
        ------
        PenumbraError
            There is no such region.
        """
        self._regions.set_enabled(region, enabled)

    def scrub_now(self, region: str) -> None:
        """Check a region whole, out of turn; also one that is switched off. A note tells when it is done.

        Raises
        ------
        PenumbraError
            There is no such region, or another one is being checked out of turn.
        """
        self._regions.check_now(region)
        self._hurry.set()

    def recompute(self, region: str) -> None:
        """Take what a region holds now for its baseline, after a legitimate change (a table was loaded).

        Raises
        ------
        PenumbraError
            There is no such region.
        """
        self._regions.recompute(region)

    def status(self) -> ScrubStatus:
        """Return the read-out."""
        ended_s = self._regions.pass_ended_s
        return ScrubStatus(
            enabled=self._regions.enabled,
            passes=self._regions.passes,
            pass_s=self._regions.pass_s,
            pass_age_s=time.monotonic() - (self._started_s if ended_s is None else ended_s),
            regions=self._regions.status(),
        )

    async def run(self) -> None:
        """Scrub until cancelled; the thread has ended when this returns, at most one cycle later."""
        loop = asyncio.get_running_loop()
        executor = ThreadPoolExecutor(1, "penumbra-scrub")
        try:
            while True:
                cycle = loop.run_in_executor(executor, self._cycle)
                try:
                    found = await asyncio.shield(cycle)
                except asyncio.CancelledError:
                    await asyncio.wait({cycle})  # bounded by the budget
                    raise
                self._tell(found)
                try:
                    await asyncio.wait_for(self._hurry.wait(), self._period_s)
                except TimeoutError:
                    continue
                self._hurry.clear()
        finally:
            executor.shutdown(wait=True)
            self._regions.close()

    def _cycle(self) -> Found:
        """Run in the thread: open and close what is to be watched, check, keep the manifest."""
        self._follow_processes()
        found = self._regions.cycle()
        manifest = self._manifest
        if manifest is not None and manifest.news and self._regions.passes:
            self._save(manifest)
        for region in self._code.values():
            for path, reason in region.uncovered.items():
                if path not in self._told_uncovered:
                    self._told_uncovered.add(path)
                    self._notes.append(f"code of {path} is not watched: {reason}")
        return found

    def _follow_processes(self) -> None:
        if self._manifest is None:
            self._manifest = CodeManifest(self._manifest_path, self._notes.append)
        while self._unwanted:
            name = self._unwanted.pop()
            if self._code.pop(name, None) is not None:
                self._regions.remove(name)
        for name, (process, pid) in list(self._wanted.items()):
            self._wanted.pop(name, None)
            try:
                region = ProcessCode(name, process, pid, self._manifest)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended already; who watches processes tells
            except OSError as error:
                self._notes.append(f"code of the {process} is not watched: {error.strerror}")
                continue
            self._code[name] = region
            self._regions.add(region)

    def _save(self, manifest: CodeManifest) -> None:
        try:
            manifest.save()
            self._save_failed = False
        except OSError as error:
            if not self._save_failed:
                self._notes.append(f"{self._manifest_path}: cannot be written: {error.strerror}")
            self._save_failed = True

    def _tell(self, found: Found) -> None:
        notes, self._notes[:] = self._notes[:], []
        for text in notes:
            self._on_note(text)
        for name, reason in found.errors:
            if name != WORKER_CODE or not reason.endswith("has ended"):
                self._on_note(f"memory region {name} cannot be read: {reason}")
        for damage in found.damages:
            evidence: Evidence = {"region": damage.region, "method": damage.method, **damage.evidence}
            self._on_damage(damage.region, ROW_OF_KIND[damage.kind], evidence, damage.repaired)
        for done in found.done:
            result = done.error or f"{done.miscompares} damaged, {done.repaired} repaired"
            self._on_note(f"memory region {done.region} checked: {result}")
