"""Voting on redundant sensors: which value of several to believe, and which sensor to believe no more.

Pure. A reading brings the values of all sets of one channel; each is looked at alone (finite, in range,
fresh, moving), then against the others. What fails is out of the vote at once, and back only after several
sound readings in a row. Where two sets disagree and nothing tells which one lies, there is no value: a guess
would be believed by whoever plans with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

Evidence = dict[str, str | int | float | bool | None]


class Why(StrEnum):
    """Why a sensor was rejected."""

    NAN = "nan"
    """No number: NaN, infinite, or nothing where there was a value before."""
    RANGE = "range"
    """A value the quantity cannot have."""
    SPIKE = "spike"
    """A step faster than the quantity can change."""
    STUCK = "stuck"
    """The same to the last bit while all other sets move."""
    STALE = "stale"
    """No new sample for too long."""
    OUTVOTED = "outvoted"
    """Against the majority."""


class Source(StrEnum):
    """Where a value comes from."""

    VOTED = "voted"
    """Two or more sets that agree."""
    SINGLE = "single"
    """One set: nothing to compare it with."""
    ESTIMATED = "estimated"
    """No sensor: computed from other quantities."""
    NONE = "none"


@dataclass(frozen=True)
class ChannelSpec:
    """One quantity, measured by several sets of sensors. Limits are per channel, and all assumed.

    Raises
    ------
    ValueError
        Limits out of order, or a count or time that is not positive.
    """

    name: str
    low: float
    """Least value the quantity can have, in its unit."""
    high: float
    """Greatest value, in its unit."""
    tolerance: float
    """Largest difference of a sound sensor to the vote, in the unit, not counting `relative`."""
    relative: float = 0.0
    """Further difference, as a share of the vote's magnitude."""
    max_rate_per_s: float = math.inf
    """Fastest change of the quantity, unit a second of the readings' time; inf: it can jump."""
    stuck_samples: int = 25
    """Identical samples in a row that tell of a stuck sensor, if the others moved meanwhile."""
    restore_samples: int = 10
    """Sound samples in a row until a rejected sensor votes again."""
    stale_after_s: float = 3.0
    """Age of its last sample at which a sensor is stale, s of physical time."""
    lost_after_s: float = 3.0
    """Age of the last vote at which the channel is lost, s of physical time."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"{self.name}: low {self.low:g} must be below high {self.high:g}")
        if not (self.tolerance > 0 and self.relative >= 0 and self.max_rate_per_s > 0):
            raise ValueError(f"{self.name}: tolerance, max_rate_per_s above 0, relative 0 or more, allowed")
        if self.stuck_samples < 2 or self.restore_samples < 1:
            raise ValueError(f"{self.name}: stuck_samples 2 or more, restore_samples 1 or more, allowed")
        if not (self.stale_after_s > 0 and self.lost_after_s > 0):
            raise ValueError(f"{self.name}: stale_after_s and lost_after_s above 0 allowed")

    def agree(self, value: float, vote: float) -> bool:
        """Return whether a value is within the tolerance of the vote."""
        return abs(value - vote) <= self.tolerance + self.relative * abs(vote)


@dataclass(frozen=True)
class Reading:
    """Event: what all sets of a channel say now."""

    channel: str
    values: tuple[float | None, ...]
    """By set. None: no value."""
    t_s: float | None = None
    """When they were sampled, s, on the clock `max_rate_per_s` is meant on; None: `now_s`."""
    fresh: tuple[bool, ...] = ()
    """By set, whether it was sampled since the last reading; sets not named were."""
    refused: tuple[Why | None, ...] = ()
    """By set, why there is no value, if a decoder has judged it already."""


@dataclass(frozen=True)
class Tick:
    """Event: time has passed."""


@dataclass(frozen=True)
class Rejected:
    """Action: report that a set of a channel is not believed any more."""

    channel: str
    sensor_set: int
    why: Why
    evidence: Evidence


@dataclass(frozen=True)
class Restored:
    """Action: report that a set votes again."""

    channel: str
    sensor_set: int


@dataclass(frozen=True)
class Lost:
    """Action: report that the channel has no usable value."""

    channel: str
    evidence: Evidence


@dataclass(frozen=True)
class Regained:
    """Action: report that a lost channel has a value again."""

    channel: str


SensorAction = Rejected | Restored | Lost | Regained


@dataclass(frozen=True)
class Voted:
    """What to believe of a channel."""

    value: float | None
    source: Source
    age_s: float
    """Since the vote, s of physical time; 0 if there never was one."""


@dataclass
class _Set:
    """One sensor of a channel."""

    rejected: Why | None = None
    good: int = 0
    """Sound readings in a row since it was rejected."""
    value: float | None = None
    """Last value in range."""
    value_t_s: float = 0.0
    seen_s: float = 0.0
    run: int = 0
    """Samples in a row with the same value."""
    changes: int = 0
    marks: tuple[int, ...] = ()
    """`changes` of all sets when this one last changed."""


@dataclass
class _Channel:
    spec: ChannelSpec
    sets: list[_Set] = field(default_factory=list)
    value: float | None = None
    source: Source = Source.NONE
    voted_s: float | None = None
    """Time of the last vote, or of the first reading if there was none yet."""
    lost: bool = False


class SensorVoter:
    """Vote on every channel. No clock, no I/O.

    Parameters
    ----------
    specs
        The channels.

    Raises
    ------
    ValueError
        Two channels have one name; in `handle` and `value`: an unknown channel.
    """

    def __init__(self, specs: Iterable[ChannelSpec]) -> None:
        self._channels: dict[str, _Channel] = {}
        for spec in specs:
            if spec.name in self._channels:
                raise ValueError(f"channel {spec.name!r} is specified twice")
            self._channels[spec.name] = _Channel(spec)

    def handle(self, event: Reading | Tick, now_s: float) -> list[SensorAction]:
        """Take an event at `now_s` (monotonic, s); return what is to be reported."""
        match event:
            case Reading():
                channel = self._channel(event.channel)
                return [*self._read(channel, event, now_s), *_watch(channel, now_s)]
            case Tick():
                return [action for channel in self._channels.values() for action in _watch(channel, now_s)]

    def value(self, name: str, now_s: float) -> Voted:
        """Return what to believe of a channel at `now_s`; None when the last vote is too old."""
        channel = self._channel(name)
        if channel.value is None or channel.voted_s is None:
            return Voted(None, Source.NONE, 0.0)
        age_s = now_s - channel.voted_s
        if age_s > channel.spec.lost_after_s:
            return Voted(None, Source.NONE, age_s)
        return Voted(channel.value, channel.source, age_s)

    def rejected(self, name: str) -> dict[int, Why]:
        """Return the sets of a channel that do not vote now, and why."""
        sets = enumerate(self._channel(name).sets)
        return {number: each.rejected for number, each in sets if each.rejected is not None}

    def _channel(self, name: str) -> _Channel:
        try:
            return self._channels[name]
        except KeyError:
            raise ValueError(f"unknown channel {name!r}; known: {', '.join(self._channels)}") from None

    def _read(self, channel: _Channel, reading: Reading, now_s: float) -> list[SensorAction]:
        spec, sets = channel.spec, channel.sets
        if channel.voted_s is None:
            channel.voted_s = now_s
        t_s = now_s if reading.t_s is None else reading.t_s
        while len(sets) < len(reading.values):
            sets.append(_Set(seen_s=now_s))
        faults, steps = _look(channel, reading, t_s, now_s)
        sound = {
            number: each.value
            for number, each in enumerate(sets)
            if faults[number] is None and each.value is not None and _brings(reading, number)
        }
        voting = {n: v for n, v in sound.items() if sets[n].rejected is None}
        vote, out = _vote(spec, voting, steps)
        reference = vote
        if reference is None:
            # Rejected sets do not vote, but a majority with them tells which of them may come back.
            reference, _ = _vote(spec, sound, set())
        actions: list[SensorAction] = []
        for number, each in enumerate(sets):
            why = faults[number] or out.get(number)
            if why is not None:
                each.good = 0
                if each.rejected is None:
                    each.rejected = why
                    evidence = _evidence(reading, number, vote)
                    actions.append(Rejected(spec.name, number, why, evidence))
            elif each.rejected is not None and number in sound:
                agrees = spec.agree(sound[number], reference) if reference is not None else len(sound) == 1
                each.good = each.good + 1 if agrees and number not in steps else 0
                if each.good >= spec.restore_samples:
                    each.rejected, each.good = None, 0
                    actions.append(Restored(spec.name, number))
        if vote is not None:
            channel.value, channel.voted_s = vote, now_s
            channel.source = Source.VOTED if len(voting) - len(out) > 1 else Source.SINGLE
            if channel.lost:
                channel.lost = False
                actions.append(Regained(spec.name))
        return actions


def _brings(reading: Reading, number: int) -> bool:
    """Return whether a reading brings a value of this set."""
    return number < len(reading.values) and reading.values[number] is not None


def _look(channel: _Channel, reading: Reading, t_s: float, now_s: float) -> tuple[list[Why | None], set[int]]:
    """Look at each set alone; return its fault, and the sets that stepped faster than the quantity can."""
    spec, sets = channel.spec, channel.sets
    faults: list[Why | None] = []
    steps: set[int] = set()
    changed: list[int] = []
    for number, each in enumerate(sets):
        value = reading.values[number] if number < len(reading.values) else None
        fresh = reading.fresh[number] if number < len(reading.fresh) else True
        refused = reading.refused[number] if number < len(reading.refused) else None
        if refused is not None:
            fault: Why | None = refused
        elif value is None:
            # A set that never gave a value is not fitted; one that is missing in a reading may be late.
            missing = number < len(reading.values)
            fault = Why.NAN if missing and each.value is not None else None
        else:
            fault = _impossible(spec, value)
        if fault is None and value is not None and fresh:
            stepped = _take(spec, each, value, t_s, now_s)
            if each.run == 1:
                changed.append(number)
            if stepped:
                steps.add(number)
        if fault is None and each.value is not None and now_s - each.seen_s > spec.stale_after_s:
            fault = Why.STALE
        faults.append(fault)
    for number in changed:
        sets[number].marks = tuple(each.changes for each in sets)
    for number in range(len(sets)):
        if faults[number] is None and _is_stuck(channel, number, faults):
            faults[number] = Why.STUCK
    return faults, steps


def _take(spec: ChannelSpec, each: _Set, value: float, t_s: float, now_s: float) -> bool:
    """Keep a new sample; return whether it is a step faster than the quantity can change."""
    stepped = False
    if value == each.value:
        each.run += 1
    else:
        if each.value is not None:
            allowed = spec.tolerance + spec.max_rate_per_s * max(0.0, t_s - each.value_t_s)
            stepped = abs(value - each.value) > allowed
        each.run = 1
        each.changes += 1
    each.value, each.value_t_s, each.seen_s = value, t_s, now_s
    return stepped


def _impossible(spec: ChannelSpec, value: float) -> Why | None:
    if not math.isfinite(value):
        return Why.NAN
    return None if spec.low <= value <= spec.high else Why.RANGE


def _is_stuck(channel: _Channel, number: int, faults: Sequence[Why | None]) -> bool:
    spec, each = channel.spec, channel.sets[number]
    # At an end of the range a sound sensor stands still: a full battery, an array in the dark.
    if each.run < spec.stuck_samples or each.value in {spec.low, spec.high}:
        return False
    others = [
        other.changes - mark
        for index, (other, mark) in enumerate(zip(channel.sets, each.marks, strict=False))
        if index != number and other.rejected is None and faults[index] is None and other.value is not None
    ]
    # All of them: one noisy sensor beside coarse ones does not make those stuck.
    return bool(others) and min(others) >= spec.stuck_samples // 2


def _vote(
    spec: ChannelSpec, voting: dict[int, float], steps: set[int]
) -> tuple[float | None, dict[int, Why]]:
    """Return the vote, None where there is none, and who is out, and why."""
    out: dict[int, Why] = {}
    left = dict(voting)
    while left:
        middle = statistics.median(left.values())
        inside = {n: v for n, v in left.items() if spec.agree(v, middle)}
        alone = len(left) == 1
        if 2 * len(inside) > len(left) and (len(inside) > 1 or (alone and not steps & left.keys())):
            outside = left.keys() - inside.keys()
            out |= {n: Why.SPIKE if n in steps else Why.OUTVOTED for n in outside}
            return statistics.median(inside.values()), out
        # No majority. A set that stepped faster than the quantity can is the one that lies.
        stepped = steps & left.keys()
        if not stepped:
            return None, out
        if len(stepped) == len(left) and not alone:
            return None, out  # all of them: nothing tells which
        out |= dict.fromkeys(stepped, Why.SPIKE)
        left = {n: v for n, v in left.items() if n not in stepped}
    return None, out


def _evidence(reading: Reading, number: int, vote: float | None) -> Evidence:
    evidence: Evidence = {"vote": vote}
    for index, value in enumerate(reading.values):
        finite = value is not None and math.isfinite(value)
        evidence[f"set{index}"] = value if finite else None
    evidence["sensor_set"] = number
    return evidence


def _watch(channel: _Channel, now_s: float) -> list[SensorAction]:
    if channel.lost or channel.voted_s is None or now_s - channel.voted_s <= channel.spec.lost_after_s:
        return []
    channel.lost = True
    out = {f"set{n}": s.rejected.value for n, s in enumerate(channel.sets) if s.rejected is not None}
    return [Lost(channel.spec.name, {"silent_s": now_s - channel.voted_s, **out})]
