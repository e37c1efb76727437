"""Fault lists repeat from their seed; every strike is answered, masked for a reason, or missed."""

from __future__ import annotations

import math

import msgspec
import pytest

from hil.faults import PROOF_BOUND_S, Commit, Fate, Strike, Target, attribute, draw_faults
from telemetry.fdir_merge import merged
from telemetry.packets import FdirReport, Level, Outcome

MS = 1_000_000


def strike(t_ms: float = 100.0, target: Target = Target.WEIGHTS, **fields: object) -> Strike:
    kv: dict[str, object] = {"job": "a", "bank": "global", "role": "k"} if target is Target.KV else {}
    defaults: dict[str, object] = {"page": 7, "role": "head"} | kv
    return Strike(
        index=0, target=target, pid=42, t_ns=int(t_ms * MS), address=0x1000, tensor="t", byte=3, bit=1,
        before=0, after=2, **defaults | fields,
    )  # type: ignore[arg-type]  # fmt: skip


def report(
    detected_ms: float,
    recovered_ms: float | None,
    *,
    region: str = "weights",
    page: int | None = 7,
    outcome: Outcome = Outcome.REPAIRED,
    **evidence: str,
) -> FdirReport:
    return FdirReport(
        monitor=f"{region}.digest", level=Level.IN_WORKER_REPAIR, outcome=outcome, action="parity",
        detected_ns=int(detected_ms * MS), region=region, page=page,
        role=evidence.pop("bank", "global") if region == "kv" else "head", evidence=evidence,
        recovered_ns=None if recovered_ms is None else int(recovered_ms * MS),
    )  # type: ignore[arg-type]  # fmt: skip


def commits(*times_ms: float, job: str = "a", seat: int = 0, **last_fields: object) -> list[Commit]:
    """Epochs of job `a`, one at each time; the last with `last_fields`."""
    *early, last = [
        Commit(t_ns=int(t * MS), serial=n, job=job, generated=32 * n, finish=None, seat=seat)
        for n, t in enumerate(times_ms)
    ]
    return [*early, msgspec.structs.replace(last, **last_fields)]


def in_time(*lists: list[Commit]) -> list[Commit]:
    """What several seats did, in order of time."""
    return sorted((commit for one in lists for commit in one), key=lambda commit: (commit.t_ns, commit.seat))


def test_same_seed_same_list() -> None:
    args = {"rate_hz": 0.05, "duration_s": 5000.0, "kv_share": 0.3}
    assert draw_faults(1, **args) == draw_faults(1, **args)
    assert draw_faults(1, **args) != draw_faults(2, **args)


def test_list_is_poisson_ordered_in_range_and_of_both_targets() -> None:
    faults = draw_faults(3, rate_hz=0.2, duration_s=5000.0, kv_share=0.3, start_s=60.0)
    assert abs(len(faults) - 1000) < 6 * math.sqrt(1000)
    assert [f.index for f in faults] == list(range(len(faults)))
    times = [f.at_s for f in faults]
    assert times == sorted(times)
    assert times[0] >= 60.0
    assert times[-1] <= 5060.0
    assert all(0 <= f.where < 1 for f in faults)
    kv = sum(f.target is Target.KV for f in faults) / len(faults)
    assert 0.2 < kv < 0.4


def test_no_rate_no_faults() -> None:
    assert draw_faults(1, rate_hz=0.0, duration_s=100.0, kv_share=0.5) == []


@pytest.mark.parametrize(
    ("rate", "duration", "share"), [(-1, 1, 0.5), (math.nan, 1, 0.5), (1, -1, 0.5), (1, 1, 1.5), (1, 1, -0.1)]
)
def test_impossible_process(rate: float, duration: float, share: float) -> None:
    with pytest.raises(ValueError, match="fault process"):
        draw_faults(1, rate_hz=rate, duration_s=duration, kv_share=share)


def only(strikes, reports, **extra):  # type: ignore[no-untyped-def]
    args = {"commits": [], "worker_deaths": {}, "end_ns": 100_000 * MS} | extra
    fates = attribute(strikes, reports, **args)
    assert len(fates) == len(strikes)
    return fates[0] if len(fates) == 1 else fates


def test_repaired_with_latencies() -> None:
    fate = only([strike(100)], [report(350, 352)], commits=commits(50, 120, 600))
    assert fate.fate is Fate.REPAIRED
    assert fate.reason == "weights.digest"
    assert fate.detect_ms == 250
    assert fate.repair_ms == 252
    assert fate.commits_before_detection == 1  # its proof had passed the page already


@pytest.mark.parametrize("outcome", [o for o in Outcome if o not in {Outcome.REPAIRED, Outcome.REDONE}])
def test_detected_but_not_repaired_in_place(outcome: Outcome) -> None:
    fate = only([strike(100)], [report(350, None, outcome=outcome)])
    assert fate.fate is Fate.DETECTED
    assert fate.repair_ms is None


def test_rows_computed_anew_are_told_twice_and_repaired_once() -> None:
    row = strike(100, Target.KV)
    found = report(350, None, region="kv", outcome=Outcome.STARTED, job="a")
    whole = report(350, 900, region="kv", outcome=Outcome.REDONE, job="a")
    seen = commits(50, 120, 600, 1000)
    assert only([row], [found], commits=seen).fate is Fate.DETECTED
    fate = only([row], [found, whole], commits=seen)
    assert (fate.fate, fate.detect_ms, fate.repair_ms) == (Fate.REPAIRED, 250, 800)


def test_report_of_another_page_region_or_time_is_no_answer() -> None:
    others = [
        report(350, 352, page=8),
        report(350, 352, region="kv"),
        report(50, 60),
        report(350, 352, region=""),
        report(350, 352, page=None),
    ]
    assert only([strike(100)], others).fate is Fate.MISSED


def test_strike_between_detection_and_repair_goes_with_the_repair() -> None:
    assert only([strike(351)], [report(350, 352)]).fate is Fate.REPAIRED


def test_one_repair_answers_every_strike_on_its_page() -> None:
    fates = only([strike(100), strike(200)], [report(350, 352)])
    assert [f.fate for f in fates] == [Fate.REPAIRED] * 2
    assert [f.detect_ms for f in fates] == [250, 150]


def test_second_strike_on_a_page_needs_its_own_report() -> None:
    fates = only([strike(100), strike(400)], [report(350, 352)])
    assert [f.fate for f in fates] == [Fate.REPAIRED, Fate.MISSED]


def test_weights_missed_when_blocks_kept_coming() -> None:
    fate = only([strike(100)], [], commits=commits(50, 120, 600), end_ns=700 * MS)
    assert fate.fate is Fate.MISSED
    assert fate.commits_before_detection == 2


def test_weights_masked_by_the_death_of_the_worker() -> None:
    deaths = {42: 200 * MS}
    fate = only([strike(100)], [], commits=commits(50, 120, 600), worker_deaths=deaths)
    assert fate.fate is Fate.MASKED
    assert "worker died" in fate.reason
    # A page struck again in the next worker is not the answer to the first strike.
    assert only([strike(100)], [report(900, 901)], worker_deaths=deaths).fate is Fate.MASKED
    # The death of some other worker explains nothing.
    other = {43: 200 * MS}
    assert only([strike(100)], [], commits=commits(50, 120, 600), worker_deaths=other).fate is Fate.MISSED


def test_weights_masked_only_by_an_end_soon_after() -> None:
    soon = int((100 + PROOF_BOUND_S * 1e3 - 1) * MS)
    assert only([strike(100)], [], end_ns=soon).fate is Fate.MASKED
    assert only([strike(100)], [], end_ns=soon + 2 * MS).fate is Fate.MISSED
    # On a slow board a proof may take longer.
    assert only([strike(100)], [], end_ns=soon + 2 * MS, proof_bound_s=30.0).fate is Fate.MASKED


def test_kv_row_outlives_the_worker() -> None:
    fate = only(
        [strike(100, Target.KV)],
        [report(5000, 5001, region="kv")],
        worker_deaths={42: 200 * MS},
        commits=commits(50),
    )
    assert fate.fate is Fate.REPAIRED


def test_kv_masked_when_its_job_ends_at_the_proof_under_way() -> None:
    row = strike(100, Target.KV)
    assert only([row], [], commits=commits(50, 120, finish="eos")).fate is Fate.MASKED
    assert only([row], [], commits=commits(50) + commits(120, job="b")).fate is Fate.MASKED
    assert only([row], [], commits=commits(50, 120, 600, finish="eos")).fate is Fate.MISSED


def test_kv_report_after_the_job_ended_is_not_its_answer() -> None:
    later = report(900, 901, region="kv")
    row = strike(100, Target.KV)
    assert only([row], [later], commits=commits(50, 120, finish="eos")).fate is Fate.MASKED


def test_a_new_job_counts_as_a_block_once_it_has_tokens() -> None:
    begun = Commit(t_ns=150 * MS, serial=9, job="b", generated=0, finish=None)
    first = Commit(t_ns=200 * MS, serial=10, job="b", generated=32, finish=None)
    fate = only([strike(100)], [report(350, 351)], commits=[*commits(50), begun, first])
    assert fate.commits_before_detection == 1


def test_kv_report_must_be_about_the_same_job_and_bank() -> None:
    row = strike(100, Target.KV, job="a", bank="window")
    others = [
        report(350, 351, region="kv", bank="global", job="a"),
        report(350, 351, region="kv", bank="window", job="b"),
        report(350, 351, region="kv", bank="window", job="a", page=8),
    ]
    assert only([row], others).fate is Fate.MISSED
    mine = report(350, 351, region="kv", bank="window", job="a", seat="3")
    assert only([row], [*others, mine]).fate is Fate.REPAIRED


def test_jobs_that_commit_together_count_as_one_epoch() -> None:
    both = in_time(commits(50, 120, 600), commits(51, 121, 601, job="b", seat=1))
    assert only([strike(100)], [report(350, 351)], commits=both).commits_before_detection == 1
    assert only([strike(100)], [report(700, 701)], commits=both).commits_before_detection == 2
    row = strike(100, Target.KV, job="b")
    seen = in_time(commits(50, 120, 200, 300, 600), commits(51, 301, job="b", seat=1))
    answer = report(350, 351, region="kv", job="b")
    assert only([row], [answer], commits=seen).commits_before_detection == 1


def test_a_job_that_changes_its_seat_has_not_ended() -> None:
    here = commits(50)
    away = [Commit(t_ns=150 * MS, serial=9, job="", generated=0, finish=None)]
    there = [Commit(t_ns=200 * MS, serial=3, job="a", generated=0, finish=None, seat=1)]
    row = strike(100, Target.KV)
    answer = report(400, 401, region="kv", job="a")
    assert only([row], [answer], commits=[*here, *away, *there]).fate is Fate.REPAIRED
    gone = only([row], [answer], commits=[*here, *away])
    assert gone.fate is Fate.MASKED
    assert "job ended" in gone.reason


def test_a_row_that_left_the_window_is_not_read_again() -> None:
    seen = commits(50, 120, base=8)
    assert "left the window" in only([strike(100, Target.KV, bank="window")], [], commits=seen).reason
    assert only([strike(100, Target.KV, bank="window", page=8)], [], commits=seen).fate is Fate.MISSED
    assert only([strike(100, Target.KV, bank="global")], [], commits=seen).fate is Fate.MISSED


def test_a_job_that_began_again_has_new_rows() -> None:
    seen = [*commits(50, 90), *commits(150, 200, 300, 400)]
    fate = only([strike(100, Target.KV)], [], commits=seen)
    assert fate.fate is Fate.MASKED
    assert "began again" in fate.reason


def test_rows_of_a_parked_job_wait_for_their_proof() -> None:
    seen = commits(50, 120, parked=True)
    fate = only([strike(100, Target.KV)], [], commits=seen)
    assert fate.fate is Fate.MASKED
    assert "parked" in fate.reason
    resumed = [msgspec.structs.replace(seen[-1], t_ns=500 * MS, parked=False)]
    answer = report(600, 601, region="kv", job="a")
    assert only([strike(100, Target.KV)], [answer], commits=[*seen, *resumed]).fate is Fate.REPAIRED
    assert only([strike(100, Target.KV)], [], commits=[*seen, *resumed]).fate is Fate.MISSED
    struck_later = strike(300, Target.KV)
    assert only([struck_later], [], commits=seen).fate is Fate.MISSED


def test_a_flip_into_rows_on_the_move_is_not_held_against_the_proof() -> None:
    row = strike(100, Target.KV, moved=True)
    fate = only([row], [], commits=commits(50, 120, 600))
    assert fate.fate is Fate.MASKED
    assert "moved" in fate.reason
    assert only([row], [report(350, 351, region="kv")], commits=commits(50, 120, 600)).fate is Fate.REPAIRED


def test_a_merged_report_answers_for_its_ends_and_says_what_else_may_be_in_it() -> None:
    told = [
        msgspec.structs.replace(report(10 * n, 10 * n + 1, page=n), covers=[(1, n, n)]) for n in (1, 2, 3)
    ]
    struck = [strike(10 * n - 1, page=n, role="head") for n in (1, 2, 3)]
    fates = attribute(
        struck,
        [merged(told)],
        commits=commits(5, 15, 25, 35),
        worker_deaths={},
        end_ns=int(100e9),
    )
    assert [fate.fate for fate in fates] == [Fate.REPAIRED, Fate.MISSED, Fate.REPAIRED]
    assert [fate.detect_ms for fate in fates] == [1.0, None, 1.0]
    assert "one of 1 findings without their pages" in fates[1].reason
