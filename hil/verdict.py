"""The verdict: from the facts of a flight to checks that passed, failed, or could not be judged. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hil.faults import Fate, StrikeFate
from hil.record import FlightRecord, JobFact, PlantSample
from telemetry.summary import Check, Flips, Power, Recovery, Summary, Telemetry, Tokens

ALLOWED_BLOCKS = 1
"""Blocks that may follow a strike before its detection: the one whose proof had passed the page already."""


def summarize(record: FlightRecord) -> Summary:
    """Judge a flight, and sum it up.

    A check that the flight gave no ground to judge is None (inconclusive), never passed. An interrupted
    flight is not failed for what it had no time to do.
    """
    tokens = _tokens(record.jobs, record.tokens_discarded)
    flips = _flips(record.fates)
    recovery = _recovery(record.fates)
    power = _power(record, tokens.released)
    ledger = record.ledger
    checks = [
        _flight(record),
        _reference(record.jobs, tokens),
        _unverified(record.jobs, tokens),
        *_flip_checks(record, flips),
        _recovery_check(recovery),
        _watts(record, power),
        _floor(record, power),
        _forecast(record),
        _contacts(record),
        *_ledger(record),
        _overhead(record),
        *_processes(record),
    ]
    return Summary(
        scenario=record.scenario,
        seed=record.seed,
        speed=record.speed,
        wall_s=record.wall_s,
        orbit_s=record.flown_s,
        eclipse_s=record.eclipse_s,
        tokens=tokens,
        flips=flips,
        recovery_ms=recovery,
        power=power,
        telemetry=Telemetry(
            generated=ledger.generated,
            acked=ledger.acked,
            stored=ledger.stored,
            dropped=ledger.dropped,
            lost=ledger.lost,
        ),
        protection_overhead_pct=None if record.overhead is None else record.overhead.median_pct,
        verdict=checks,
    )


def exit_code(summary: Summary, interrupted: bool) -> int:
    """Return the exit code of the command: 1 when a check failed, 130 when interrupted, else 0."""
    if summary.passed() is False:
        return 1
    return 130 if interrupted else 0


def matches(job: JobFact) -> bool | None:
    """Return whether what was released of a job is what the fault-free run says, None without such a run."""
    if job.reference is None or not job.tokens:
        return None
    return job.tokens == job.reference and job.text == job.reference_text


def _tokens(jobs: Sequence[JobFact], discarded: int) -> Tokens:
    matched = [match for job in jobs if (match := matches(job)) is not None]
    unknown = any(job.tokens and job.reference is None for job in jobs)
    return Tokens(
        released=sum(len(job.tokens) for job in jobs),
        discarded=discarded,
        unverified_released=sum(len(job.tokens) - job.proven for job in jobs),
        reference_match=all(matched) if matched and not (unknown and all(matched)) else None,
    )


def _flips(fates: Sequence[StrikeFate]) -> Flips:
    count = Counter(fate.fate for fate in fates)
    return Flips(
        injected=len(fates),
        by_target=dict(Counter(fate.strike.target.value for fate in fates)),
        detected=count[Fate.DETECTED] + count[Fate.REPAIRED],
        repaired=count[Fate.REPAIRED],
        masked=count[Fate.MASKED],
        missed=count[Fate.MISSED],
    )


def _recovery(fates: Sequence[StrikeFate]) -> Recovery:
    times = [f.repair_ms for f in fates if f.fate is Fate.REPAIRED and f.repair_ms is not None]
    if not times:
        return Recovery(p50=None, p99=None, max=None)
    # Nearest rank: with few samples the 99th percentile is the largest, not something between two.
    p50, p99 = (float(np.percentile(times, q, method="inverted_cdf")) for q in (50, 99))
    return Recovery(p50=p50, p99=p99, max=max(times))


def _power(record: FlightRecord, released: int) -> Power:
    sun = [s.load_w for s in record.plant if s.sunlit >= 1.0]
    dark = [s.load_w for s in record.plant if s.sunlit < 1.0]
    both = sun + dark
    # Physical time: the bench speeds up the orbit, not the board that computes.
    joule = float(np.mean(both)) * record.wall_s if both else 0.0
    return Power(
        soc_min=min((s.soc for s in record.plant), default=1.0),
        soc_floor=record.limits.soc_floor,
        floor_violation_s=floor_violation_s(record.plant, record.limits.soc_floor),
        watts_sun_mean=float(np.mean(sun)) if sun else None,
        watts_eclipse_mean=float(np.mean(dark)) if dark else None,
        joule_per_token=joule / released if released and both else None,
    )


def floor_violation_s(samples: Sequence[PlantSample], soc_floor: float) -> float:
    """Return the mission time the battery spent under its floor, s: a sample stands until the next."""
    return sum(now.t_s - before.t_s for before, now in pairwise(samples) if before.soc < soc_floor)


def _flight(record: FlightRecord) -> Check:
    return Check(
        name="flight_complete",
        ok=None if record.interrupted else record.flown_s >= record.planned_s,
        measured=round(record.flown_s, 1),
        limit=round(record.planned_s, 1),
        text="mission time flown, s" + (" (interrupted)" if record.interrupted else ""),
    )


def _reference(jobs: Sequence[JobFact], tokens: Tokens) -> Check:
    wrong = [job.job for job in jobs if matches(job) is False]
    compared = sum(matches(job) is not None for job in jobs)
    text = f"text of {compared} jobs is byte for byte that of a fault-free run"
    if wrong:
        text += f"; it differs in {', '.join(wrong)}"
    elif tokens.reference_match is None:
        text += "; nothing to compare" if not tokens.released else "; not every job could be compared"
    return Check(
        name="reference_match",
        ok=tokens.reference_match,
        measured=tokens.reference_match,
        limit=True,
        text=text,
    )


def _unverified(jobs: Sequence[JobFact], tokens: Tokens) -> Check:
    findings = [f"{job.job}, {finding}" for job in jobs for finding in job.findings]
    return Check(
        name="unverified_released",
        ok=tokens.unverified_released == 0 if tokens.released else None,
        measured=tokens.unverified_released,
        limit=0,
        text=f"tokens released without a valid certificate, of {tokens.released}"
        + (f": {'; '.join(findings[:3])}" if findings else ""),
    )


def _flip_checks(record: FlightRecord, flips: Flips) -> list[Check]:
    enough = flips.injected >= record.limits.min_flips
    late = sum(fate.commits_before_detection > ALLOWED_BLOCKS for fate in record.fates)
    judged = flips.injected - flips.masked
    explained = sum(h.name in {"kill_worker", "stop_worker"} for h in record.process_faults)
    restarts = max(0, record.worker_restarts - explained)
    masked = f" ({flips.masked} more hit memory that was given up before a proof)" if flips.masked else ""
    return [
        Check(
            name="flips_injected",
            ok=True if enough else None if record.interrupted else False,
            measured=flips.injected,
            limit=record.limits.min_flips,
            text="bit flips landed in protected live memory, at least",
        ),
        Check(
            name="flips_detected",
            ok=flips.missed == 0 and late == 0 if judged else None,
            measured=flips.detected,
            limit=judged,
            text=f"flips detected before tokens they could touch were released: {flips.missed} missed, "
            f"{late} late{masked}",
        ),
        Check(
            name="flips_repaired",
            ok=flips.repaired == judged and restarts == 0 if judged else None,
            measured=flips.repaired,
            limit=judged,
            text="flips repaired in the running worker; "
            f"worker restarts that no process fault explains: {restarts}",
        ),
    ]


def _recovery_check(recovery: Recovery) -> Check:
    return Check(
        name="recovery_time",
        ok=None if recovery.p99 is None else True,
        measured=recovery.p99,
        limit=None,
        text="p99 from strike to repair, ms (reported)",
    )


def _watts(record: FlightRecord, power: Power) -> Check:
    sun, dark = power.watts_sun_mean, power.watts_eclipse_mean
    ok = None if sun is None or dark is None else dark < sun
    return Check(
        name="eclipse_watts",
        ok=None if record.interrupted and ok is False else ok,
        measured=None if dark is None else round(dark, 3),
        limit=None if sun is None else round(sun, 3),
        text="mean draw in eclipse below that in sunlight, W",
    )


def _floor(record: FlightRecord, power: Power) -> Check:
    return Check(
        name="soc_floor",
        ok=power.floor_violation_s <= record.limits.floor_violation_s
        and (power.soc_min >= power.soc_floor or record.limits.floor_violation_s > 0)
        if record.plant
        else None,
        measured=round(power.soc_min, 4),
        limit=power.soc_floor,
        text=f"lowest state of charge; {power.floor_violation_s:.0f} s under the floor, "
        f"{record.limits.floor_violation_s:.0f} s allowed",
    )


def _forecast(record: FlightRecord) -> Check:
    worst = max((abs(error.error_s) for error in record.forecast), default=None)
    limit = record.limits.eclipse_forecast_error_s
    return Check(
        name="eclipse_forecast",
        ok=None if worst is None else worst <= limit,
        measured=None if worst is None else round(worst, 3),
        limit=limit,
        text=f"largest error of {len(record.forecast)} forecasts of the umbra's entry, s",
    )


def _contacts(record: FlightRecord) -> Check:
    begun = sum(contact.start_s < record.flown_s for contact in record.contacts)
    enough = begun >= record.limits.min_contacts
    return Check(
        name="contacts",
        ok=True if enough else None if record.interrupted else False,
        measured=begun,
        limit=record.limits.min_contacts,
        text="contacts with the ground, at least",
    )


def _ledger(record: FlightRecord) -> list[Check]:
    ledger = record.ledger
    accounted = ledger.acked + ledger.stored + ledger.dropped
    some = ledger.generated > 0
    balanced = ledger.generated == accounted and ledger.consistent
    return [
        Check(
            name="ledger_lost",
            ok=ledger.lost == 0 if some else None,
            measured=ledger.lost,
            limit=0,
            text=f"records lost, of {ledger.generated} generated",
        ),
        Check(
            name="ledger_balanced",
            ok=balanced if some else None,
            measured=accounted,
            limit=ledger.generated,
            text="acked + stored + dropped = generated, for node and ground"
            + (f": {'; '.join(ledger.problems[:3])}" if ledger.problems else ""),
        ),
    ]


def _overhead(record: FlightRecord) -> Check:
    overhead = record.overhead
    text = "slow-down of decoding by its verification, % (reported)"
    if overhead is not None:
        text += (
            f"; {overhead.pairs} pairs of {overhead.tokens} tokens: "
            f"{overhead.min_pct:.1f} to {overhead.max_pct:.1f}"
        )
        if overhead.min_pct < 0 < overhead.max_pct:
            text += ": the pairs do not rule out 0"
    return Check(
        name="protection_overhead",
        ok=None if overhead is None else True,
        measured=None if overhead is None else round(overhead.median_pct, 2),
        limit=None,
        text=text,
    )


def _processes(record: FlightRecord) -> list[Check]:
    """Ordered stop; and for each process fault, that service went on after it."""
    clean = record.stopped_how == "exit code 0" and record.orphans_killed == 0
    # A process that is told to stop before it can listen just ends: that says nothing about its ordered stop.
    still_starting = record.interrupted and not record.housekeeping and record.orphans_killed == 0
    checks = [
        Check(
            name="ordered_stop",
            ok=clean or (None if still_starting else False),
            measured=record.stopped_how,
            limit="exit code 0",
            text=f"the node stopped in order; {record.orphans_killed} processes outlived it",
        )
    ]
    for fault in record.process_faults:
        before = [h.packet.tokens_released for h in record.housekeeping if h.t_s <= fault.t_s]
        after = [h.packet.tokens_released for h in record.housekeeping if h.t_s > fault.t_s]
        went_on = bool(after) and max(after) > max(before, default=0)
        checks.append(
            Check(
                name=f"recovered_{fault.name}",
                ok=went_on or (None if record.interrupted else False),
                measured=max(after, default=0),
                limit=max(before, default=0),
                text=f"tokens released go on after {fault.name} at {fault.t_s:.0f} s, above",
            )
        )
    return checks
