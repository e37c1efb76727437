"""Faults as data: the list drawn before the flight, the record of each strike, and what became of it.

The list is drawn from a seed alone, so that a flight can be flown again against the same faults. A fault
names *fractions*, not addresses: where in memory it lands is known only when it does, and is recorded then.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

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
    """Detected, and whole again in place."""
    DETECTED = "detected"
    """Detected, not repaired in place: a later level of recovery had to act."""
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
    """Page of weights.bin, or plane * positions + position of a KV row: as in FDIR reports."""
    role: str
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
    """A state of the KV arena, seen from outside when it changed."""

    t_ns: int
    """CLOCK_REALTIME when it was first seen, ns."""
    serial: int
    job: str
    generated: int
    finish: str | None


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
    reports: Iterable[FdirReport],
    *,
    commits: Sequence[Commit],
    worker_deaths: dict[int, int],
    end_ns: int,
) -> list[StrikeFate]:
    """Match each strike with the FDIR report that answers it.

    The answer to a strike is the first report on its page that was repaired, or made, after it landed, and
    before the memory was given up. A strike without an answer is *masked* when its memory was given up
    before a proof must have seen it (the worker died, its job ended, the watch ended), else *missed*.

    Parameters
    ----------
    strikes, reports
        In any order. Only reports with a `region` count.
    commits
        States of the arena in order of time.
    worker_deaths
        For each worker that died, its pid and when it was seen dead, CLOCK_REALTIME ns.
    end_ns
        End of the watch, CLOCK_REALTIME ns.
    """
    by_page: defaultdict[tuple[str, int], list[FdirReport]] = defaultdict(list)
    for report in sorted(reports, key=lambda r: r.detected_ns):
        if report.region and report.page is not None:
            by_page[report.region, report.page].append(report)
    fates = []
    for strike in sorted(strikes, key=lambda s: s.t_ns):
        gone_ns, why_gone = _given_up(strike, commits, worker_deaths, end_ns)
        answer = next(
            (
                report
                for report in by_page[strike.target.value, strike.page]
                if strike.t_ns <= (report.recovered_ns or report.detected_ns)
                and report.detected_ns <= gone_ns
            ),
            None,
        )
        if answer is not None:
            fates.append(_answered(strike, answer, commits))
        else:
            fates.append(_unanswered(strike, commits, gone_ns, why_gone))
    return fates


def _given_up(
    strike: Strike, commits: Sequence[Commit], worker_deaths: dict[int, int], end_ns: int
) -> tuple[int, str]:
    """Return when the struck memory went out of use, and why."""
    if strike.target is Target.WEIGHTS:
        if strike.pid in worker_deaths:
            return worker_deaths[strike.pid], "its worker died, and the memory with it"
    else:
        # Rows outlive the worker, but not their job.
        for commit in commits:
            if commit.t_ns > strike.t_ns and (commit.job != strike.job or commit.finish is not None):
                return commit.t_ns, "its job ended, and the row is not read again"
    return end_ns, "the watch ended"


def _answered(strike: Strike, report: FdirReport, commits: Sequence[Commit]) -> StrikeFate:
    recovered_ns = report.recovered_ns
    whole = recovered_ns is not None and report.outcome in {Outcome.REPAIRED, Outcome.REDONE}
    return StrikeFate(
        strike=strike,
        fate=Fate.REPAIRED if whole else Fate.DETECTED,
        reason=report.monitor,
        detect_ms=max(0.0, (report.detected_ns - strike.t_ns) / 1e6),
        repair_ms=None if recovered_ns is None else max(0.0, (recovered_ns - strike.t_ns) / 1e6),
        commits_before_detection=_blocks_between(commits, strike.t_ns, report.detected_ns),
    )


def _unanswered(strike: Strike, commits: Sequence[Commit], gone_ns: int, why_gone: str) -> StrikeFate:
    blocks = _blocks_between(commits, strike.t_ns, gone_ns + 1)
    # One block may follow: its proof can have passed the page before the strike landed.
    missed = blocks > 1 or gone_ns - strike.t_ns > PROOF_BOUND_S * 1e9
    return StrikeFate(
        strike=strike,
        fate=Fate.MISSED if missed else Fate.MASKED,
        reason=f"never reported, though {blocks} blocks followed" if missed else f"{why_gone} before a proof",
        commits_before_detection=blocks,
    )


def _blocks_between(commits: Sequence[Commit], start_ns: int, end_ns: int) -> int:
    """Count the blocks of tokens committed in a stretch of time, both ends excluded."""
    grown = 0
    for before, now in pairwise(commits):
        since = before.generated if before.job == now.job else 0
        if now.generated > since and start_ns < now.t_ns < end_ns:
            grown += 1
    return grown
