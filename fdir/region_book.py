"""What region of memory is checked next, and what came of it: the books of `fdir.regions`.

Bounded work: a cycle ends with the piece that used up its budget, and the next goes on after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

# Events of the book.


@dataclass(frozen=True, slots=True)
class Added:
    """There is a new region, behind the others."""

    region: str


@dataclass(frozen=True, slots=True)
class Removed:
    """A region is gone; work on it that is under way may still be told."""

    region: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A cycle begins: a new budget."""


@dataclass(frozen=True, slots=True)
class Refreshed:
    """`Refresh` was done."""

    region: str
    pieces: int
    took_s: float


@dataclass(frozen=True, slots=True)
class Checked:
    """`Check` was done."""

    region: str
    piece: int
    took_s: float
    miscompares: int = 0
    repaired: int = 0


@dataclass(frozen=True, slots=True)
class Unreadable:
    """`Refresh` or `Check` could not be done: the region is left for this pass."""

    region: str
    took_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class SetEnabled:
    """Switch a region; with None the whole scrub, which leaves the switches of the regions alone."""

    region: str | None
    enabled: bool


@dataclass(frozen=True, slots=True)
class CheckNow:
    """Check a region whole, before all others, whether it is enabled or not."""

    region: str


Event: TypeAlias = Added | Removed | Tick | Refreshed | Checked | Unreadable | SetEnabled | CheckNow


# Its actions.


@dataclass(frozen=True, slots=True)
class Refresh:
    """Begin a pass over a region; tell `Refreshed` or `Unreadable`."""

    region: str


@dataclass(frozen=True, slots=True)
class Check:
    """Check a piece; tell `Checked` or `Unreadable`."""

    region: str
    piece: int


@dataclass(frozen=True, slots=True)
class NowDone:
    """The region that was to be checked out of turn is: how many stretches were damaged, and how many are."""

    region: str
    miscompares: int
    repaired: int
    error: str


Action: TypeAlias = Refresh | Check | NowDone


@dataclass(slots=True)
class Entry:
    """What is known of a region."""

    enabled: bool = True
    passes: int = 0
    started_s: float | None = None
    work_s: float = 0.0
    pass_s: float | None = None
    pass_work_s: float | None = None
    miscompares: int = 0
    repaired: int = 0
    error: str = ""


@dataclass(slots=True)
class _Walk:
    """Where a pass over one region is."""

    region: str
    pieces: int = -1
    """-1 until it is refreshed."""
    next: int = 0
    miscompares: int = 0
    repaired: int = 0


class RegionBook:
    """What is checked next, and what came of it. Pure: no reading, no clock.

    Of `Refresh` and `Check` at most one is under way at any time.

    Parameters
    ----------
    budget_s
        Time a cycle may take, s; the piece that exceeds it is the last.

    Attributes
    ----------
    enabled
        Whether the scrub as a whole is on; a region ordered by `CheckNow` is checked all the same.
    passes
        Passes over all enabled regions.
    pass_s
        Time the last of them took, s; None before the first is done.
    pass_ended_s
        When it ended; None before.
    """

    def __init__(self, budget_s: float) -> None:
        if not budget_s > 0:
            raise ValueError(f"budget_s {budget_s} must be above 0")
        self.enabled = True
        self.passes = 0
        self.pass_s: float | None = None
        self.pass_ended_s: float | None = None
        self._budget_s = budget_s
        self._used_s = 0.0
        self._pass_started_s: float | None = None
        self._pass_regions = 0
        """Regions whose turn in this pass is over."""
        self._entries: dict[str, Entry] = {}
        self._turn: list[str] = []
        """Regions still to come in this pass over all."""
        self._walk: _Walk | None = None
        self._now: _Walk | None = None
        self._under_way: tuple[_Walk, Refresh | Check] | None = None

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of all regions, in order."""
        return tuple(self._entries)

    @property
    def checking_now(self) -> str | None:
        """The region that is being checked out of turn."""
        return None if self._now is None else self._now.region

    def entry(self, region: str) -> Entry:
        """Return the counters of a region.

        Raises
        ------
        KeyError
            There is no such region.
        """
        return self._entries[region]

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take in an event; return what to do, in order.

        Parameters
        ----------
        event
            What happened.
        now_s
            Monotonic time, s.

        Raises
        ------
        ValueError
            The event cannot happen now: a region twice, an unknown one, a second one out of turn, or an
            answer to what was not asked.
        """
        match event:
            case Added(region):
                if region in self._entries:
                    raise ValueError(f"region {region} is there already")
                self._entries[region] = Entry()
            case Removed(region):
                return self._remove(region)
            case SetEnabled(None, enabled):
                self.enabled = enabled
            case SetEnabled(str(region), enabled):
                self._known(region).enabled = enabled
            case CheckNow(region):
                self._known(region)
                if self._now is not None:
                    raise ValueError(f"region {self._now.region} is being checked out of turn: wait for it")
                self._now = _Walk(region)
            case Tick():
                self._used_s = 0.0
                return [] if self._under_way else self._next(now_s)
            case Refreshed() | Checked() | Unreadable():
                return self._answered(event, now_s)
        return []

    def _known(self, region: str) -> Entry:
        if region not in self._entries:
            raise ValueError(f"no region {region}; there are {', '.join(self._entries) or 'none'}")
        return self._entries[region]

    def _remove(self, region: str) -> list[Action]:
        self._known(region)
        del self._entries[region]
        self._turn = [name for name in self._turn if name != region]
        if self._walk is not None and self._walk.region == region:
            self._walk = None
        if self._now is not None and self._now.region == region:
            walk, self._now = self._now, None
            return [NowDone(region, walk.miscompares, walk.repaired, "the region is gone")]
        return []

    def _answered(self, event: Refreshed | Checked | Unreadable, now_s: float) -> list[Action]:
        if self._under_way is None:
            raise ValueError(f"{event} answers nothing")
        walk, asked = self._under_way
        same_piece = getattr(event, "piece", None) == getattr(asked, "piece", None)
        if asked.region != event.region or not (same_piece or isinstance(event, Unreadable)):
            raise ValueError(f"{event} answers {asked}")
        self._under_way = None
        self._used_s += event.took_s
        done: list[Action] = []
        if walk is self._now or walk is self._walk:  # else its region was removed meanwhile
            done = self._account(self._entries[walk.region], walk, event, now_s)
        return done + (self._next(now_s) if self._used_s < self._budget_s else [])

    def _account(
        self, entry: Entry, walk: _Walk, event: Refreshed | Checked | Unreadable, now_s: float
    ) -> list[Action]:
        in_turn = walk is self._walk
        if in_turn:
            entry.work_s += event.took_s
        match event:
            case Unreadable(reason=reason):
                entry.error = reason
                return self._leave(walk, reason)
            case Refreshed(pieces=pieces):
                entry.error = ""
                walk.pieces = pieces
            case Checked(miscompares=miscompares, repaired=repaired):
                walk.next += 1
                walk.miscompares += miscompares
                walk.repaired += repaired
                entry.miscompares += miscompares
                entry.repaired += repaired
        if walk.next < walk.pieces:
            return []
        if in_turn and entry.started_s is not None:
            entry.passes += 1
            entry.pass_s, entry.pass_work_s = now_s - entry.started_s, entry.work_s
        return self._leave(walk, "")

    def _leave(self, walk: _Walk, error: str) -> list[Action]:
        if walk is self._walk:
            self._walk = None
            self._pass_regions += 1
            return []
        self._now = None
        return [NowDone(walk.region, walk.miscompares, walk.repaired, error)]

    def _next(self, now_s: float) -> list[Action]:
        """Choose what is done next, and note that it is under way."""
        walk = self._now or self._in_turn(now_s)
        if walk is None:
            return []
        work = Refresh(walk.region) if walk.pieces < 0 else Check(walk.region, walk.next)
        self._under_way = walk, work
        return [work]

    def _in_turn(self, now_s: float) -> _Walk | None:
        if not self.enabled:
            return None
        if self._walk is not None and not self._entries[self._walk.region].enabled:
            self._walk = None  # a pass that was cut short does not count
        while self._walk is None:
            if not self._turn:
                if self._pass_started_s is not None:
                    if self._pass_regions:
                        self.passes += 1
                        self.pass_s, self.pass_ended_s = now_s - self._pass_started_s, now_s
                    self._pass_started_s = None
                    return None  # one pass a cycle at most: where there is little to check, checking rests
                self._turn = [name for name, entry in self._entries.items() if entry.enabled]
                if not self._turn:
                    return None
                self._pass_started_s, self._pass_regions = now_s, 0
            region = self._turn.pop(0)
            entry = self._entries[region]
            if entry.enabled:
                entry.started_s, entry.work_s = now_s, 0.0
                self._walk = _Walk(region)
        return self._walk
