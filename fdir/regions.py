"""Regions of memory that are checked in turn, within a time budget, and mended where they can be.

The shape is that of cFS CS: named regions, enabled each and together, baselines, one region out of turn on
order, counters of passes and miscompares; with a budget of time, not of bytes, and with repair.

`fdir.region_book` decides what is checked next and counts; `RegionScrubber` reads what it says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

from fdir.region_book import (
    Action,
    Added,
    Check,
    Checked,
    CheckNow,
    Event,
    NowDone,
    Refresh,
    Refreshed,
    RegionBook,
    Removed,
    SetEnabled,
    Tick,
    Unreadable,
)
from telemetry.errors import PenumbraError

Evidence: TypeAlias = dict[str, str | int | float | bool | None]


class Kind(StrEnum):
    """What a region holds."""

    CODE = "code"
    """Instructions and constants of a process, mapped from files."""
    TABLE = "table"
    """Configuration or a table, as the values in use."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch of a region found different from its baseline.

    Parameters
    ----------
    region
        Name of the region.
    kind
        Its kind.
    repaired
        Whether it is whole again: read again after the repair, and compared.
    method
        Where the right bytes came from: `file`, `copy`, or `none`.
    evidence
        Where it is and what differs, for a report.
    """

    region: str
    kind: Kind
    repaired: bool
    method: str
    evidence: Evidence


class Region(Protocol):
    """A named region, read and mended in pieces, by one thread at a time."""

    @property
    def name(self) -> str:
        """Name; ground commands use it, never an address."""

    @property
    def kind(self) -> Kind:
        """What it holds."""

    @property
    def size(self) -> int:
        """Bytes that the last `refresh` found to check."""

    def refresh(self) -> int:
        """Notice what has legitimately come and gone, before a pass; return the number of pieces.

        Raises
        ------
        OSError
            It cannot be read.
        """

    def check(self, piece: int) -> list[Damage]:
        """Compare a piece with the baseline, and mend what differs.

        Raises
        ------
        OSError
            It cannot be read.
        """

    def recompute(self) -> None:
        """Take the present contents for the baseline, after a legitimate change."""

    def close(self) -> None:
        """Let go of what it holds open."""


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """Read-out of a region."""

    name: str
    kind: Kind
    enabled: bool
    size: int
    """Bytes checked in a pass."""
    passes: int
    """Full passes since it was added."""
    pass_s: float | None
    """Time from the start to the end of the last full pass, s; None before the first is done."""
    pass_work_s: float | None
    """Part of it in which something was read, s."""
    miscompares: int
    """Damaged stretches found."""
    repaired: int
    """Those of them that were mended."""
    error: str
    """Why it could not be read last time; empty if it could."""


@dataclass(slots=True)
class Found:
    """What a cycle brought."""

    damages: list[Damage] = field(default_factory=list)
    done: list[NowDone] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)
    """Regions that could not be read, and why: told once, until they can be again."""


class RegionScrubber:
    """Regions, and the book that says which is read when. `cycle` runs in one thread, the rest in any.

    Parameters
    ----------
    budget_s
        Time a cycle may take, s.
    clock
        Monotonic clock, s.
    """

    def __init__(self, budget_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._book = RegionBook(budget_s)
        self._clock = clock
        self._regions: dict[str, Region] = {}
        self._gone: list[Region] = []
        self._unfinished: list[NowDone] = []
        self._told: dict[str, str] = {}
        self._lock = threading.Lock()
        """Held while the book is used, never while something is read."""

    @property
    def enabled(self) -> bool:
        """Whether the scrub as a whole is on."""
        return self._book.enabled

    @property
    def passes(self) -> int:
        """Passes over all enabled regions."""
        return self._book.passes

    @property
    def pass_s(self) -> float | None:
        """Time the last pass over all took, s; None before the first is done."""
        return self._book.pass_s

    @property
    def pass_ended_s(self) -> float | None:
        """When it ended, by the clock; None before."""
        return self._book.pass_ended_s

    def add(self, region: Region) -> None:
        """Add a region behind the others.

        Raises
        ------
        ValueError
            There is one of that name.
        """
        with self._lock:
            self._book.handle(Added(region.name), self._clock())
            self._regions[region.name] = region

    def remove(self, name: str) -> None:
        """Take a region away; it is closed by the next cycle.

        Raises
        ------
        PenumbraError
            There is no such region.
        """
        unfinished = self._handle(Removed(name))
        with self._lock:
            self._unfinished += [action for action in unfinished if isinstance(action, NowDone)]
            self._gone.append(self._regions.pop(name))
            self._told.pop(name, None)

    def set_enabled(self, region: str | None, enabled: bool) -> None:
        """Switch a region, or with None the whole scrub.

        Raises
        ------
        PenumbraError
            There is no such region.
        """
        self._handle(SetEnabled(region, enabled))

    def check_now(self, region: str) -> None:
        """Check a region whole, before all others, also one that is switched off; `Found.done` tells.

        Raises
        ------
        PenumbraError
            There is no such region, or another one is being checked out of turn.
        """
        self._handle(CheckNow(region))

    def recompute(self, region: str) -> None:
        """Take what a region holds for its baseline.

        Raises
        ------
        PenumbraError
            There is no such region.
        """
        with self._lock:
            found = self._regions.get(region)
        if found is None:
            raise PenumbraError(f"memory scrub: no region {region}; there are {', '.join(self._regions)}")
        found.recompute()

    def cycle(self) -> Found:
        """Check for as long as the budget lasts."""
        self._close_gone()
        with self._lock:
            found, self._unfinished = Found(done=self._unfinished), []
            actions = self._book.handle(Tick(), self._clock())
        while actions:
            work: Refresh | Check | None = None
            for action in actions:
                if isinstance(action, NowDone):
                    found.done.append(action)
                else:
                    work = action
            if work is None:
                break
            answer = self._do(work, found)
            with self._lock:
                actions = self._book.handle(answer, self._clock())
        self._close_gone()
        return found

    def status(self) -> tuple[RegionStatus, ...]:
        """Return the read-out of every region."""
        with self._lock:
            entries = [(self._regions[name], self._book.entry(name)) for name in self._book.regions]
            return tuple(
                RegionStatus(
                    name=region.name, kind=region.kind, enabled=entry.enabled, size=region.size,
                    passes=entry.passes, pass_s=entry.pass_s, pass_work_s=entry.pass_work_s,
                    miscompares=entry.miscompares, repaired=entry.repaired, error=entry.error,
                )
                for region, entry in entries
            )  # fmt: skip

    def close(self) -> None:
        """Close all regions; call it when no cycle runs."""
        for name in self._book.regions:
            self.remove(name)
        self._close_gone()

    def _do(self, work: Refresh | Check, found: Found) -> Refreshed | Checked | Unreadable:
        name, started_s = work.region, self._clock()
        region = self._regions.get(name)
        try:
            if region is None:
                return Unreadable(name, 0.0, "the region is gone")
            if isinstance(work, Refresh):
                pieces = region.refresh()
                self._told.pop(name, None)
                return Refreshed(name, pieces, self._clock() - started_s)
            damages = region.check(work.piece)
        except OSError as error:
            reason = error.strerror or str(error)
            if self._told.get(name) != reason and name in self._regions:
                self._told[name] = reason
                found.errors.append((name, reason))
            return Unreadable(name, self._clock() - started_s, reason)
        found.damages += damages
        repaired = sum(damage.repaired for damage in damages)
        return Checked(name, work.piece, self._clock() - started_s, len(damages), repaired)

    def _handle(self, event: Event) -> list[Action]:
        with self._lock:
            try:
                return self._book.handle(event, self._clock())
            except ValueError as error:
                raise PenumbraError(f"memory scrub: {error}") from None

    def _close_gone(self) -> None:
        while self._gone:
            self._gone.pop().close()
