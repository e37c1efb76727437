"""Faults as data: the list drawn before the flight, the record of each strike, and what became of it.

The list is drawn from a seed alone, so that a flight can be flown again against the same faults. A fault
names *fractions*, not addresses: where in memory it lands is known only when it does, and is recorded then.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np

from telemetry.fdir_merge import both_ends
from telemetry.packets import FdirReport, Outcome

PROOF_BOUND_S = 15.0
"""Longest time from one proof to the next while a worker lives, s (assumed: 32 tokens at a duty of a few
per cent). A strike this long before the end of the watch has been through a proof."""


class Target(StrEnum):
    """Memory a flip may be aimed at."""

    WEIGHTS = "weights"
    KV = "kv"


class Fate(StrEnum):
    """What became of a strike."""

    REPAIRED = "repaired"
    """Detected, and whole again in the same worker."""
    DETECTED = "detected"
    """Detected, not whole again in that worker: a later level of recovery had to act."""
    MASKED = "masked"
    """Never reported, and it could not matter: the memory was given up, or was no longer in use."""
    MISSED = "missed"
    """Never reported, although the memory was in use."""


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One planned bit flip."""

    index: int
    at_s: float
    """Mission time after the start of the flight, s."""
    target: Target
    where: float
    """Position in the target's memory, 0 to 1 (1 excluded): uniform over bits."""


class Strike(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bit flip that landed, as the injector saw it."""

    index: int
    target: Target
    pid: int
    """Worker whose memory was struck."""
    t_ns: int
    """CLOCK_REALTIME just before the write, ns: comparable with the `detected_ns` of FDIR reports."""
    address: int
    page: int
    """Page of weights.bin, or position of a KV row: as in FDIR reports."""
    role: str
    """Of the tensor: as in the manifest; `k` or `v` of a KV row."""
    tensor: str
    byte: int
    """Offset in the page (weights) or in the row (KV)."""
    bit: int
    before: int
    after: int
    """The byte, before and after; they differ in one bit."""
    deferred_s: float = 0.0
    """Physical time the fault waited for memory to strike (worker loading, no job), s."""
    job: str = ""
    """KV only: the job whose row was struck."""
    seat: int | None = None
    """KV only: where the job sat."""
    bank: str = ""
    """KV only: `global` or `window`."""
    layer: int | None = None
    """KV only: layer of the model."""
    head: int | None = None
    """KV only: head of keys and values."""
    moved: bool = False
    """KV only: the seat's rows were being moved as the flip landed, so it may have hit what they left."""


class StrikeFate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A strike and its fate."""

    strike: Strike
    fate: Fate
    reason: str
    """The monitor that reported it, or why it was masked or missed."""
    detect_ms: float | None = None
    """Strike to detection, ms."""
    repair_ms: float | None = None
    """Strike to repair, ms."""
    commits_before_detection: int = 0
    """Blocks of tokens committed between strike and detection. One may be: its proof had passed the page
    already. More would mean that tokens were released from memory known to be struck."""


class Commit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A state of a seat of the KV arena, seen from outside when it changed."""

    t_ns: int
    """CLOCK_REALTIME when it was first seen, ns."""
    serial: int
    job: str
    """Empty: the seat is free."""
    generated: int
    finish: str | None
    seat: int = 0
    base: int = 0
    """First position of the window rows."""
    parked: bool = False


def draw_faults(
    seed: int, *, rate_hz: float, duration_s: float, kv_share: float, start_s: float = 0.0
) -> list[Fault]:
    """Draw a Poisson process of bit flips.

    Parameters
    ----------
    seed
        Same seed and same arguments, same list.
    rate_hz
        Mean flips a second of mission time, 0 or more.
    duration_s, start_s
        Faults lie in the `duration_s` of mission time that begin `start_s` after the flight's start, s.
    kv_share
        Share of the flips aimed at the KV cache, 0 to 1; the rest are aimed at the weights.

    Raises
    ------
    ValueError
        An argument is out of range.
    """
    if not (rate_hz >= 0 and math.isfinite(rate_hz) and duration_s >= 0 and 0 <= kv_share <= 1):
        raise ValueError(f"fault process: rate {rate_hz}/s, {duration_s} s, KV share {kv_share}")
    rng = np.random.default_rng([seed, 0xF1195])
    count = int(rng.poisson(rate_hz * duration_s))
    times = np.sort(rng.uniform(start_s, start_s + duration_s, count))
    kv = rng.uniform(size=count) < kv_share
    where = rng.uniform(size=count)
    return [
        Fault(
            index=i,
            at_s=float(times[i]),
            target=Target.KV if kv[i] else Target.WEIGHTS,
            where=float(where[i]),
        )
        for i in range(count)
    ]


def save_faults(faults: Sequence[Fault], path: Path) -> None:
    """Write a fault list as JSON, so that the same faults can be told, and struck, again."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(faults), indent=1) + b"\n")


def attribute(
    strikes: Iterable[Strike],
    reports: Sequence[FdirReport],
    *,
    commits: Sequence[Commit],
    worker_deaths: dict[int, int],
    end_ns: int,
    proof_bound_s: float = PROOF_BOUND_S,
) -> list[StrikeFate]:
    """Match each strike with the FDIR report that answers it.

    The answer to a strike is the first report on its page (for a KV row: its job, bank and position) that was
    repaired, or made, after it landed, and before the memory was given up. A strike without an answer is
    *masked* when its memory was given up before a proof must have seen it (the worker died, its job ended,
    was parked or begun again, its row left the window, the watch ended), else *missed*.

    Parameters
    ----------
    strikes, reports
        In any order. Only reports with a `region` count. A merged one answers for its two ends.
    commits
        States of the arena's seats in order of time; those of one look have the same time.
    worker_deaths
        For each worker that died, its pid and when it was seen dead, CLOCK_REALTIME ns.
    end_ns
        End of the watch, CLOCK_REALTIME ns.
    proof_bound_s
        Longest time from one proof to the next, s.
    """
    by_page: defaultdict[tuple[str, int], list[FdirReport]] = defaultdict(list)
    merged = [report for report in reports if report.first is not None and report.count > 2]
    ends = (end for report in reports for end in both_ends(report))
    for report in sorted(ends, key=lambda r: r.detected_ns):
        if report.region and report.page is not None:
            by_page[report.region, report.page].append(report)
    fates = []
    for strike in sorted(strikes, key=lambda s: s.t_ns):
        gone_ns, why_gone = _given_up(strike, commits, worker_deaths, end_ns)
        answers = [
            report
            for report in by_page[strike.target.value, strike.page]
            if _same_row(strike, report)
            and strike.t_ns <= (report.recovered_ns or report.detected_ns)
            and report.detected_ns <= gone_ns
        ]
        if answers:
            # Rows that are computed anew are told twice: when they are found, and when they are whole again.
            told = [report for report in answers if report.detected_ns == answers[0].detected_ns]
            fates.append(_answered(strike, next(filter(_whole, told), answers[0]), commits))
        else:
            fate = _unanswered(strike, commits, gone_ns, why_gone, proof_bound_s)
            among = sum(report.count - 2 for report in merged if _may_be_within(strike, report))
            if among:
                reason = f"{fate.reason}; or one of {among} findings without their pages, in merged reports"
                fate = msgspec.structs.replace(fate, reason=reason)
            fates.append(fate)
    return fates


def epochs_between(commits: Iterable[Commit], start_ns: int, end_ns: int, job: str | None = None) -> int:
    """Count the commits of tokens of a job in a stretch of time, both ends excluded.

    Without `job`, those of the job that has the most: jobs that are decoded together commit together.
    """
    generated: dict[str, int] = {}
    grown: Counter[str] = Counter()
    for commit in commits:
        if commit.generated > generated.get(commit.job, 0) and start_ns < commit.t_ns < end_ns:
            grown[commit.job] += 1
        generated[commit.job] = commit.generated
    return max(grown.values(), default=0) if job is None else grown[job]


def _same_row(strike: Strike, report: FdirReport) -> bool:
    """Tell whether a report on the same position is about the row that was struck. Jobs may change seats."""
    if strike.target is not Target.KV:
        return True
    return report.role == strike.bank and report.evidence.get("job", strike.job) == strike.job


def _may_be_within(strike: Strike, report: FdirReport) -> bool:
    """Tell whether a merged report may hold the answer to a strike between its first and its last finding."""
    return report.region == strike.target.value and strike.t_ns <= report.detected_ns


def _given_up(
    strike: Strike, commits: Sequence[Commit], worker_deaths: dict[int, int], end_ns: int
) -> tuple[int, str]:
    """Return when the struck memory went out of use, and why."""
    if strike.target is Target.WEIGHTS:
        if strike.pid in worker_deaths:
            return worker_deaths[strike.pid], "its worker died, and the memory with it"
        return end_ns, "the watch ended"
    return min(
        ((t_ns, why) for t_ns, why in _row_ends(strike, commits) if t_ns > strike.t_ns),
        default=(end_ns, "the watch ended"),
    )


def _row_ends(strike: Strike, commits: Sequence[Commit]) -> Iterator[tuple[int, str]]:
    """Yield when a KV row may have gone out of use, and why. Rows outlive the worker, but not their job."""
    generated, held_by, held, left_ns = 0, dict[int, str](), False, None
    for t_ns, look in groupby(commits, lambda commit: commit.t_ns):
        for commit in look:
            held_by[commit.seat] = commit.job
            if commit.job != strike.job:
                continue
            if commit.finish is not None:
                yield t_ns, "its job ended, and the row is not read again"
            if commit.generated < generated:
                yield t_ns, "its job began again, and the row was written anew"
            if strike.bank == "window" and commit.base > strike.page:
                yield t_ns, "its row left the window, and is not read again"
            generated = commit.generated
        # While two jobs change places neither has a seat: only a job that does not come back has ended.
        was_held, held = held, strike.job in held_by.values()
        if held:
            left_ns = None
        elif was_held:
            left_ns = t_ns
    if left_ns is not None:
        yield left_ns, "its job ended, and the row is not read again"


def _whole(report: FdirReport) -> bool:
    return report.recovered_ns is not None and report.outcome in {Outcome.REPAIRED, Outcome.REDONE}


def _answered(strike: Strike, report: FdirReport, commits: Sequence[Commit]) -> StrikeFate:
    recovered_ns = report.recovered_ns
    return StrikeFate(
        strike=strike,
        fate=Fate.REPAIRED if _whole(report) else Fate.DETECTED,
        reason=report.monitor,
        detect_ms=max(0.0, (report.detected_ns - strike.t_ns) / 1e6),
        repair_ms=None if recovered_ns is None else max(0.0, (recovered_ns - strike.t_ns) / 1e6),
        commits_before_detection=_commits_since(strike, commits, report.detected_ns),
    )


def _unanswered(
    strike: Strike, commits: Sequence[Commit], gone_ns: int, why_gone: str, proof_bound_s: float
) -> StrikeFate:
    if strike.target is Target.KV:
        last = next((commit for commit in reversed(commits) if commit.job == strike.job), None)
        if last is not None and last.parked and strike.t_ns < last.t_ns < gone_ns:
            gone_ns, why_gone = last.t_ns, "its job was parked, and its rows wait for their next proof"
    blocks = _commits_since(strike, commits, gone_ns + 1)
    # One block may follow: its proof can have passed the page before the strike landed.
    missed = blocks > 1 or gone_ns - strike.t_ns > proof_bound_s * 1e9
    if missed and strike.moved:
        missed, why_gone = False, "it landed while its seat was being moved, maybe in what the rows had left,"
    return StrikeFate(
        strike=strike,
        fate=Fate.MISSED if missed else Fate.MASKED,
        reason=f"never reported, though {blocks} blocks followed" if missed else f"{why_gone} before a proof",
        commits_before_detection=blocks,
    )


def _commits_since(strike: Strike, commits: Sequence[Commit], end_ns: int) -> int:
    job = strike.job if strike.target is Target.KV else None
    return epochs_between(commits, strike.t_ns, end_ns, job)
