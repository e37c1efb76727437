"""The verdict: one row for every way a check can pass, fail, or not be judged."""

from __future__ import annotations

import msgspec
import pytest

from hil.faults import Fate
from hil.record import FlightRecord, ForecastError, Happening, Limits, OverheadFact
from hil.verdict import exit_code, floor_violation_s, matches, summarize
from telemetry.summary import Check, Summary
from tests.flight_records import ORBIT_S, fate, fates, housekeeping, job, ledger, plant_sample, record

NAMES = {
    "flight_complete", "reference_match", "unverified_released", "flips_injected", "flips_detected",
    "flips_repaired", "recovery_time", "eclipse_watts", "soc_floor", "eclipse_forecast", "contacts",
    "ledger_lost", "ledger_balanced", "protection_overhead", "ordered_stop",
}  # fmt: skip


def check(summary: Summary, name: str) -> Check:
    (found,) = [c for c in summary.verdict if c.name == name]
    return found


def change(rec: FlightRecord, **changes: object) -> FlightRecord:
    return msgspec.structs.replace(rec, **changes)


def limits(**changes: object) -> Limits:
    return msgspec.structs.replace(record().limits, **changes)


def test_a_good_flight_passes_every_check() -> None:
    summary = summarize(record())
    assert {c.name for c in summary.verdict} == NAMES
    assert [c for c in summary.verdict if c.ok is not True] == []
    assert summary.passed() is True
    assert exit_code(summary, interrupted=False) == 0


def test_figures() -> None:
    summary = summarize(record())
    assert (summary.scenario, summary.seed, summary.speed) == ("default", 7, 60.0)
    assert (summary.wall_s, summary.orbit_s, summary.eclipse_s) == (92.7, ORBIT_S, 2100.0)
    assert summary.tokens.released == 136
    assert summary.tokens.discarded == 64
    assert summary.flips.injected == summary.flips.detected == summary.flips.repaired == 40
    assert summary.flips.by_target == {"kv": 14, "weights": 26}
    assert summary.power.watts_sun_mean == 9.0
    assert summary.power.watts_eclipse_mean == 6.0
    assert summary.power.soc_floor == 0.55
    assert summary.telemetry.generated == 400
    assert summary.protection_overhead_pct == 3.4
    joule = summary.power.joule_per_token
    assert joule is not None
    # Physical energy: the mean draw over 92.7 s of computing, whatever the speed of the mission clock.
    assert 6 * 92.7 / 136 < joule < 9 * 92.7 / 136


@pytest.mark.parametrize(
    ("name", "ok", "changes"),
    [
        ("flight_complete", False, {"flown_s": ORBIT_S - 100}),
        ("flight_complete", None, {"flown_s": ORBIT_S - 100, "interrupted": True}),
        ("reference_match", False, {"jobs": [job(reference=[1] * 96)]}),
        ("reference_match", False, {"jobs": [job(reference_text=b"other")]}),
        ("reference_match", False, {"jobs": [job(), job("b", reference=[1] * 96)]}),
        ("reference_match", False, {"jobs": [job(reference=list(range(100, 190)))]}),
        ("reference_match", None, {"jobs": [job(reference=None)]}),
        ("reference_match", None, {"jobs": [job(), job("b", reference=None)]}),
        ("reference_match", None, {"jobs": []}),
        ("unverified_released", False, {"jobs": [job(proven=95)]}),
        ("unverified_released", None, {"jobs": []}),
        ("flips_injected", False, {"fates": fates(29)}),
        ("flips_injected", True, {"fates": fates(30)}),
        ("flips_injected", None, {"fates": fates(29), "interrupted": True}),
        ("flips_detected", False, {"fates": [fate(1, fate=Fate.MISSED)]}),
        ("flips_detected", False, {"fates": [fate(1, commits_before_detection=2)]}),
        ("flips_detected", True, {"fates": [fate(1, commits_before_detection=1), fate(2, fate=Fate.MASKED)]}),
        ("flips_detected", None, {"fates": [fate(1, fate=Fate.MASKED)]}),
        ("flips_detected", None, {"fates": []}),
        ("flips_repaired", False, {"fates": [fate(1), fate(2, fate=Fate.DETECTED, repair_ms=None)]}),
        ("flips_repaired", False, {"worker_restarts": 1}),
        (
            "flips_repaired",
            True,
            {
                "worker_restarts": 1,
                "process_faults": [Happening(t_s=9.0, source="bench", name="kill_worker", text="")],
            },
        ),
        (
            "flips_repaired",
            False,
            {
                "worker_restarts": 1,
                "process_faults": [Happening(t_s=9.0, source="bench", name="kill_node", text="")],
            },
        ),
        ("flips_repaired", None, {"fates": []}),
        ("recovery_time", None, {"fates": []}),
        ("eclipse_watts", None, {"plant": [plant_sample(0.0), plant_sample(10.0)]}),
        ("eclipse_watts", None, {"plant": []}),
        ("soc_floor", False, {"plant": [plant_sample(0.0, 0.549), plant_sample(10.0)]}),
        (
            "soc_floor",
            True,
            {
                "plant": [plant_sample(0.0, 0.549), plant_sample(10.0)],
                "limits": limits(floor_violation_s=60.0),
            },
        ),
        (
            "soc_floor",
            False,
            {
                "plant": [plant_sample(0.0, 0.549), plant_sample(61.0)],
                "limits": limits(floor_violation_s=60.0),
            },
        ),
        ("soc_floor", None, {"plant": []}),
        ("eclipse_forecast", False, {"forecast": [ForecastError(t_s=0, entry_s=9, error_s=-5.01)]}),
        ("eclipse_forecast", True, {"forecast": [ForecastError(t_s=0, entry_s=9, error_s=5.0)]}),
        ("eclipse_forecast", None, {"forecast": []}),
        ("contacts", False, {"contacts": []}),
        ("contacts", None, {"contacts": [], "interrupted": True}),
        ("contacts", False, {"flown_s": 50.0}),
        ("ledger_lost", False, {"ledger": ledger(lost=1)}),
        ("ledger_lost", None, {"ledger": ledger(generated=0, acked=0, stored=0, dropped=0)}),
        ("ledger_balanced", False, {"ledger": ledger(acked=361)}),
        ("ledger_balanced", False, {"ledger": ledger(consistent=False, problems=["boot 1 hk: 1 lost"])}),
        ("ledger_balanced", None, {"ledger": ledger(generated=0, acked=0, stored=0, dropped=0)}),
        ("protection_overhead", None, {"overhead": None}),
        ("ordered_stop", False, {"stopped_how": "killed by SIGKILL"}),
        ("ordered_stop", False, {"orphans_killed": 1}),
        ("ordered_stop", False, {"stopped_how": "killed by SIGTERM", "interrupted": True}),
        (
            "ordered_stop",
            None,
            {"stopped_how": "killed by SIGTERM", "interrupted": True, "housekeeping": []},
        ),
        (
            "ordered_stop",
            False,
            {
                "stopped_how": "killed by SIGTERM",
                "interrupted": True,
                "housekeeping": [],
                "orphans_killed": 1,
            },
        ),
    ],
)
def test_truth_table(name: str, ok: bool | None, changes: dict[str, object]) -> None:
    summary = summarize(record(**changes))
    assert check(summary, name).ok is ok
    if ok is False:
        assert summary.passed() is False
        assert exit_code(summary, interrupted=False) == 1


def test_draw_that_does_not_fall_in_eclipse_fails() -> None:
    rec = record()
    flat = [msgspec.structs.replace(s, load_w=7.0) for s in rec.plant]
    assert check(summarize(change(rec, plant=flat)), "eclipse_watts").ok is False
    assert check(summarize(change(rec, plant=flat, interrupted=True)), "eclipse_watts").ok is None


@pytest.mark.parametrize("kind", ["kill_node", "kill_worker", "stop_worker"])
def test_service_must_go_on_after_each_process_fault(kind: str) -> None:
    happened = Happening(t_s=1000.0, source="bench", name=kind, text="")
    hk = [housekeeping(900.0, 50, 1), housekeeping(1100.0, 50, 1)]
    stuck = record(process_faults=[happened], housekeeping=hk)
    assert check(summarize(stuck), f"recovered_{kind}").ok is False
    assert check(summarize(change(stuck, interrupted=True)), f"recovered_{kind}").ok is None
    on = change(stuck, housekeeping=[*hk, housekeeping(1200.0, 51, 1)])
    assert check(summarize(on), f"recovered_{kind}").ok is True


def test_recovery_times_are_nearest_rank_and_of_repaired_flips_only() -> None:
    times = [fate(i, repair_ms=float(i)) for i in range(1, 101)]
    recovery = summarize(record(fates=[*times, fate(0, fate=Fate.DETECTED, repair_ms=9e9)])).recovery_ms
    assert (recovery.p50, recovery.p99, recovery.max) == (50.0, 99.0, 100.0)
    few = summarize(record(fates=times[:3])).recovery_ms
    assert (few.p50, few.p99) == (2.0, 3.0)


def test_inconclusive_is_no_failure_and_interruption_has_its_own_code() -> None:
    summary = summarize(record(overhead=None))
    assert summary.passed() is None
    assert exit_code(summary, interrupted=False) == 0
    assert exit_code(summary, interrupted=True) == 130
    assert exit_code(summarize(record(ledger=ledger(lost=1))), interrupted=True) == 1


def test_masked_and_missed_are_counted_apart() -> None:
    flips = summarize(record(fates=[fate(0), fate(1, fate=Fate.MASKED), fate(2, fate=Fate.MISSED)])).flips
    assert (flips.injected, flips.detected, flips.repaired, flips.masked, flips.missed) == (3, 1, 1, 1, 1)


def test_floor_violation_counts_time_not_samples() -> None:
    samples = [
        plant_sample(0.0, 0.6),
        plant_sample(10.0, 0.5),
        plant_sample(15.0, 0.5),
        plant_sample(40.0, 0.7),
    ]
    assert floor_violation_s(samples, 0.55) == 30.0
    assert floor_violation_s([], 0.55) == 0.0


def test_overhead_that_may_be_nothing_says_so() -> None:
    noisy = OverheadFact(median_pct=-1.0, min_pct=-9.0, max_pct=4.0, pairs=5, tokens=96)
    assert "rule out 0" in check(summarize(record(overhead=noisy)), "protection_overhead").text
    assert "rule out 0" not in check(summarize(record()), "protection_overhead").text


def test_job_without_tokens_matches_nothing() -> None:
    assert matches(job(tokens=0)) is None
    assert matches(job()) is True


def test_what_is_wrong_with_a_certificate_is_told() -> None:
    broken = job(proven=24, findings=["token 24: does not continue the chain"])
    found = check(summarize(record(jobs=[job("job-000"), broken])), "unverified_released")
    assert found.ok is False
    assert found.text.endswith("of 192: job-001, token 24: does not continue the chain")
