"""What became of a strike on the memory a worker decodes from: the watch that decides it. Pure.

A strike counts when an epoch used the memory it hit: every epoch reads the weights whole, but only those rows
of embedding and rotary tables that it fed, and only KV rows of its jobs. The first proof that began after the
strike, in an epoch that used the memory, has to find it. Found by then: no token was released that the strike
could have touched. Found later: tokens of one epoch at least were released from struck memory (`LATE`).
A strike that lands while a proof runs may be behind it already, and is left to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec
import numpy as np

from hil.campaign.strata import BY_ROW, Strata, Stratum
from node.inference.protocol import Strike as Report

HEARD_NS: Final = 150_000_000
"""Longest time from the beginning of a proof to the bench's look at the arena, ns (assumed: no epoch that is
decoded whole is shorter). Later, the arena may be an epoch ahead, and nothing is judged by it."""
PATIENCE_EPOCHS: Final = 4
"""Epochs that use struck memory without finding it, after which it counts as missed."""
UNUSED_EPOCHS: Final = 40
"""Epochs after which a strike on rows that none of them used is taken back."""


class Fate(StrEnum):
    """What became of a strike."""

    REPAIRED = "repaired"
    """Found by the first proof that had to, and mended in place."""
    REDONE = "redone"
    """Found by the first proof that had to; the row was of the open epoch, or computed anew."""
    LATE = "late"
    """Found, but only after tokens of an epoch that used the memory had been released."""
    MISSED = "missed"
    """Never found, although epochs used the memory."""
    GAVE_UP = "gave_up"
    """The worker gave up, or died, while the strike was open: the next level of recovery had to act."""
    UNUSED = "unused"
    """Does not count, and is drawn again: no epoch used the memory as struck, for it ended or was written
    anew before; or one of which it is not known what it used did not find it."""


COUNTED: Final = frozenset(Fate) - {Fate.UNUSED}
FOUND: Final = frozenset({Fate.REPAIRED, Fate.REDONE, Fate.LATE})
UNDETECTED: Final = frozenset({Fate.LATE, Fate.MISSED})
"""Against the bar: tokens may have been released from struck memory."""


@dataclass(frozen=True)
class Trial:
    """One planned strike: a function of seed, number and attempt."""

    index: int
    attempt: int
    stratum: Stratum
    where: float
    """Fraction of the memory's bits, 0 to 1."""
    moment: float
    """Fraction of an epoch, 0 to 1."""
    pick: float
    """Chooses job and row, 0 to 1."""
    kind: float
    """Chooses among committed and open rows of the KV cache, 0 to 1."""


def draw(seed: int, index: int, attempt: int, strata: Strata) -> Trial:
    """Return trial `index`: the strata take turns."""
    rng = np.random.default_rng([seed, 0x57121, index, attempt])
    where, moment, pick, kind = rng.random(4).tolist()
    return Trial(index, attempt, strata.here[index % len(strata.here)], where, moment, pick, kind)


class StrikeRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A strike and its fate."""

    index: int
    attempt: int
    stratum: Stratum
    fate: Fate
    method: str
    """How it was mended; empty when it was not."""
    t_ns: int
    """CLOCK_REALTIME just before the write, ns."""
    page: int
    """Page of weights.bin, or position of a KV row."""
    role: str
    """Role of the tensor, or bank of the row."""
    tensor: str
    byte: int
    """In the page or row."""
    bit: int
    before: int
    after: int
    job: str = ""
    open_row: bool = False
    """KV: the row was of the epoch under way."""
    in_proof: bool = False
    """It landed while a proof ran, and that proof did not see it."""
    epochs: int = 0
    """Epochs completed between strike and finding."""
    detect_ms: float | None = None
    """Strike to the proof that found it, ms; 0 when the proof had begun already."""
    repair_ms: float | None = None
    """That proof's stamp to memory whole, as the worker reports it, ms."""
    whole_ms: float | None = None
    """Strike to memory whole, ms."""


@dataclass(frozen=True)
class JobRows:
    """A job's rows in the arena, as of an epoch's end."""

    positions: int
    base: int
    active: bool
    prompt: int = 0
    """Tokens of its prompt."""
    generated: int = 0
    """Tokens committed after it."""


@dataclass(frozen=True)
class Epoch:
    """An epoch that was committed."""

    end_ns: int
    """CLOCK_REALTIME when its end was heard, ns."""
    proof_ns: int
    """When its last proof began."""
    dirty: int
    """Attempts that had to be decoded again."""
    before: Mapping[str, JobRows]
    after: Mapping[str, JobRows]
    prefilled: int | None = None
    """Prompt tokens the worker has read in it; None: all of its new jobs."""
    committed: int | None = None
    """Tokens the worker has committed in it; None: those of `after`."""

    @property
    def is_sure(self) -> bool:
        """Whether `after` is of this epoch: looked at soon, and with as many tokens as were committed.

        An epoch may be a single step when a job has ended, so being soon is not enough.
        """
        tokens = sum(
            rows.generated - (self.before[job].generated if job in self.before else 0)
            for job, rows in self.after.items()
        )
        soon = self.end_ns - self.proof_ns <= HEARD_NS
        return soon and (self.committed is None or tokens == self.committed)

    def fed(self) -> dict[str, range]:
        """Return the positions that each job certainly fed.

        Rows of a prompt that begins like another one are copied, not computed. Where some were, only the last
        position of a new job's prompt is certain: it makes the first logits.
        """
        new = [rows for job, rows in self.after.items() if job not in self.before]
        whole = sum(min(rows.prompt, rows.positions) for rows in new)
        shared = self.prefilled is not None and self.prefilled < whole
        found = {}
        for job, rows in self.after.items():
            begun = max(0, rows.prompt - 1) if shared else 0
            first = self.before[job].positions if job in self.before else begun
            found[job] = range(first if first <= rows.positions else begun, rows.positions)
        return found


@dataclass
class Landed:
    """A strike that is not settled yet."""

    trial: Trial
    t_ns: int
    page: int
    role: str
    tensor: str
    byte: int
    bit: int
    before: int
    after: int
    address: int
    job: str = ""
    open_row: bool = False
    """KV: it was of the epoch under way, if it was written in that epoch already (see `Watch.on_epoch`)."""
    base: int = 0
    """KV: first position its bank held."""
    place: tuple[int, int] = (0, 0)
    """KV: seat and plane of the row."""
    epochs: int = 0
    used: int = 0
    """Epochs that used the memory and should have found it."""
    in_proof: bool = False
    doubtful: bool = False
    """An epoch may have used it without finding it: nobody can tell."""
    report: Report | None = field(default=None, repr=False)
    """The report that found it, while it is not whole yet."""

    @property
    def key(self) -> tuple[str, ...]:
        """What a report on it names."""
        if self.trial.stratum is Stratum.KV:
            return "kv", self.job, self.role, str(self.page)
        return "weights", str(self.page)

    def fate_when_found(self, report: Report) -> Fate:
        """Return the fate of a strike that a report has found, and whole again."""
        if self.used:
            return Fate.LATE
        if self.doubtful:
            return Fate.UNUSED
        return Fate.REDONE if report.method in {"redo", "recompute"} else Fate.REPAIRED

    def record(self, fate: Fate, report: Report | None = None) -> StrikeRecord:
        """Return the strike with its fate."""
        detect_ms = repair_ms = whole_ms = None
        if report is not None:
            detect_ms = max(0.0, (report.detected_ns - self.t_ns) / 1e6)
            if report.recovered_ns is not None:
                repair_ms = (report.recovered_ns - report.detected_ns) / 1e6
                whole_ms = (report.recovered_ns - self.t_ns) / 1e6
        return StrikeRecord(
            index=self.trial.index, attempt=self.trial.attempt, stratum=self.trial.stratum, fate=fate,
            method="" if report is None else report.method, t_ns=self.t_ns, page=self.page, role=self.role,
            tensor=self.tensor, byte=self.byte, bit=self.bit, before=self.before, after=self.after,
            job=self.job, open_row=self.open_row, in_proof=self.in_proof, epochs=self.epochs,
            detect_ms=detect_ms, repair_ms=repair_ms, whole_ms=whole_ms,
        )  # fmt: skip


class Watch:
    """Decides the fate of strikes from what the worker tells, in the order in which it tells it.

    Parameters
    ----------
    strata
        Of the image.
    token_at
        Gives the token a job feeds at a position.
    byte_now
        Gives the byte that was struck, where its row lies now; None when it cannot be read.

    Attributes
    ----------
    open
        Strikes that landed and are not settled.
    unexplained
        Reports on memory that nobody struck: false alarms, or damage done by something else.
    """

    def __init__(
        self,
        strata: Strata,
        token_at: Callable[[str, int], int],
        byte_now: Callable[[Landed], int | None] = lambda _: None,
    ) -> None:
        self.open: list[Landed] = []
        self.unexplained: list[Report] = []
        self._strata = strata
        self._token_at = token_at
        self._byte_now = byte_now

    def is_free(self, stratum: Stratum, page: int, job: str = "") -> bool:
        """Tell whether a strike there could be told apart, and mended, beside those that are open.

        One page a parity group, and one position a group of eight rows of a job.
        """
        for other in self.open:
            if (stratum is Stratum.KV) != (other.trial.stratum is Stratum.KV):
                continue
            if stratum is not Stratum.KV and (page - other.page) % self._strata.groups == 0:
                return False
            if stratum is Stratum.KV and job == other.job and page // 8 == other.page // 8:
                return False
        return True

    def land(self, strike: Landed) -> None:
        """Take note of a strike."""
        self.open.append(strike)

    def on_report(self, report: Report) -> list[StrikeRecord]:
        """Take a report of damage; return what it settles."""
        key: tuple[str, ...] = (report.region, str(report.page))
        if report.region == "kv":
            key = ("kv", str(report.evidence.get("job")), report.role, str(report.page))
        for strike in self.open:
            if strike.key != key or strike.t_ns > (report.recovered_ns or report.detected_ns):
                continue
            if report.recovered_ns is None:
                strike.report = report
                return []
            self.open.remove(strike)
            return [strike.record(strike.fate_when_found(report), report)]
        self.unexplained.append(report)
        return []

    def on_epoch(self, epoch: Epoch) -> list[StrikeRecord]:
        """Take the end of an epoch; return what it settles."""
        if not epoch.is_sure:
            return self._on_unsure(epoch)
        settled = []
        fed = epoch.fed()
        tokens = {self._token_at(job, at) for job, positions in fed.items() for at in positions}
        places = {at for positions in fed.values() for at in positions}
        for strike in list(self.open):
            if strike.t_ns > epoch.end_ns:
                continue
            fate = self._judge(strike, epoch, tokens, places)
            if fate is not None:
                self.open.remove(strike)
                settled.append(strike.record(fate, strike.report))
        return settled

    def _on_unsure(self, epoch: Epoch) -> list[StrikeRecord]:
        """Take an epoch of which it is not known what rows it used."""
        settled = []
        for strike in list(self.open):
            if strike.t_ns >= epoch.proof_ns or strike.report is not None:
                continue
            if strike.trial.stratum in BY_ROW or strike.trial.stratum is Stratum.KV:
                # It may have used the row: whoever finds the strike now may be late, or not.
                strike.doubtful = True
                continue
            strike.epochs += 1
            strike.used += 1
            if strike.used >= PATIENCE_EPOCHS:
                self.open.remove(strike)
                settled.append(strike.record(Fate.MISSED))
        return settled

    def on_end(self) -> list[StrikeRecord]:
        """Take the unordered end of the worker; return all that was open."""
        settled = [strike.record(Fate.GAVE_UP, strike.report) for strike in self.open]
        self.open.clear()
        return settled

    def withdraw(self, strike: Landed) -> StrikeRecord:
        """Give up a strike that was taken back."""
        self.open.remove(strike)
        return strike.record(Fate.UNUSED)

    def stale(self) -> list[Landed]:
        """Return strikes to take back: rows that no epoch has used for long."""
        return [s for s in self.open if s.epochs >= UNUSED_EPOCHS and not s.used and s.report is None]

    def _judge(self, strike: Landed, epoch: Epoch, tokens: set[int], places: set[int]) -> Fate | None:
        """Return the fate of a strike that no report has settled, None while it is open."""
        strike.epochs += 1
        if strike.report is not None:  # found, and being computed anew: only its job's end can settle it
            rows = epoch.after.get(strike.job)
            return Fate.UNUSED if rows is None or not rows.active else None
        if not self._uses(strike, epoch, tokens, places):
            gone = strike.trial.stratum is Stratum.KV
            return (Fate.MISSED if strike.used else Fate.UNUSED) if gone else None
        if strike.epochs == 1 and self._is_elsewhere(strike, epoch):
            return Fate.UNUSED
        if strike.t_ns >= epoch.proof_ns:
            strike.in_proof = True
            return None
        strike.used += 1
        return Fate.MISSED if strike.used >= PATIENCE_EPOCHS else None

    def _is_elsewhere(self, strike: Landed, epoch: Epoch) -> bool:
        """Whether the strike of a row may not have hit the row that the epoch used.

        The row of an epoch under way may only have been written after the strike: what lay there was left
        over. An epoch decoded once writes each row once, so what is not there any more was there before. And
        rows move down when their window slides: what they leave behind is nobody's, and a moved row that is
        struck has the flip where it lies now.
        """
        if strike.trial.stratum is not Stratum.KV:
            return False
        slid = strike.role == "window" and epoch.after[strike.job].base != strike.base
        if strike.open_row and epoch.dirty:
            return True
        return (strike.open_row or slid) and self._byte_now(strike) not in {None, strike.after}

    def _uses(self, strike: Landed, epoch: Epoch, tokens: set[int], places: set[int]) -> bool:
        match strike.trial.stratum:
            case Stratum.EMBEDDING:
                return strike.page in self._strata.pages_of_rows(Stratum.EMBEDDING, tokens)
            case Stratum.ROPE:
                return strike.page in self._strata.pages_of_rows(Stratum.ROPE, places)
            case Stratum.KV:
                before, after = epoch.before.get(strike.job), epoch.after.get(strike.job)
                if before is None or after is None or not before.active:
                    return False
                if strike.role == "window" and strike.page < after.base:
                    return False
                return strike.page < after.positions
            case _:
                return True
