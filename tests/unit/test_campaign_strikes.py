"""The judge of a campaign of strikes: what it must call undetected, it does."""

from __future__ import annotations

import errno
import math
import subprocess
import sys

import msgspec
import pytest

from hil.campaign.records import Header, Records, read_lines
from hil.campaign.report import make_report
from hil.campaign.statistics import clopper_pearson, percentiles, proven_at_least
from hil.campaign.strata import Strata, Stratum
from hil.campaign.strikes import (
    PATIENCE_EPOCHS,
    Epoch,
    Fate,
    JobRows,
    Landed,
    StrikeRecord,
    Trial,
    Watch,
    draw,
)
from node.inference.manifest import load_manifest
from node.inference.protocol import Strike
from telemetry.errors import PenumbraError

MS = 1_000_000


@pytest.fixture
def strata(tiny_image):
    return Strata(load_manifest(tiny_image))


@pytest.fixture
def watch(strata):
    return Watch(strata, lambda job, position: position)


def landed(
    stratum=Stratum.WEIGHTS, *, t_ms=0, page=5, job="", role="ffn_down", open_row=False, index=0, base=0
):
    return Landed(
        trial=Trial(index, 0, stratum, 0.5, 0.5, 0.5, 0.9), t_ns=t_ms * MS, page=page, role=role, tensor="t",
        byte=1, bit=2, before=0, after=4, address=4096, job=job, open_row=open_row,
        base=base,
    )  # fmt: skip


def report(page=5, *, at_ms=100, whole_ms=104, region="weights", method="parity", role="ffn_down", job=None):
    recovered_ns = None if whole_ms is None else whole_ms * MS
    return Strike(
        region=region, page=page, role=role, method=method, detected_ns=at_ms * MS, recovered_ns=recovered_ns,
        evidence={} if job is None else {"job": job},
    )  # fmt: skip


def epoch(end_ms, *, before=None, after=None, dirty=0):
    return Epoch(end_ms * MS, (end_ms - 20) * MS, dirty, before or {}, after or {})


def test_a_strike_found_by_the_next_proof_is_repaired_with_its_times(watch):
    watch.land(landed())
    (record,) = watch.on_report(report())
    assert (record.fate, record.method) == (Fate.REPAIRED, "parity")
    assert (record.detect_ms, record.repair_ms, record.whole_ms) == (100.0, 4.0, 104.0)
    assert watch.open == []
    assert watch.unexplained == []


def test_control_a_strike_that_no_proof_finds_is_missed(watch):
    watch.land(landed())
    settled = [r for n in range(PATIENCE_EPOCHS) for r in watch.on_epoch(epoch(200 * (n + 1)))]
    assert [r.fate for r in settled] == [Fate.MISSED]


def test_control_a_strike_found_only_after_an_epoch_was_released_is_late(watch):
    watch.land(landed())
    assert watch.on_epoch(epoch(200)) == []
    (record,) = watch.on_report(report(at_ms=300, whole_ms=301))
    assert record.fate is Fate.LATE


def test_a_strike_during_a_proof_is_left_to_the_next_one(watch):
    watch.land(landed(t_ms=190))
    assert watch.on_epoch(epoch(200)) == []
    (record,) = watch.on_report(report(at_ms=300, whole_ms=301))
    assert (record.fate, record.in_proof) == (Fate.REPAIRED, True)
    watch.land(landed(t_ms=390))
    assert watch.on_epoch(epoch(400)) == []
    assert watch.on_epoch(epoch(600)) == []
    (record,) = watch.on_report(report(at_ms=700, whole_ms=701))
    assert record.fate is Fate.LATE


def test_control_a_report_on_another_page_does_not_settle_a_strike(watch):
    watch.land(landed(page=5))
    assert watch.on_report(report(page=6)) == []
    assert [r.page for r in watch.unexplained] == [6]
    assert len(watch.open) == 1


def unsure(proof_ms):
    return Epoch((proof_ms + 900) * MS, proof_ms * MS, 0, {}, {})


def test_after_an_epoch_of_unknown_rows_a_strike_on_rows_counts_no_more(watch):
    watch.land(landed(Stratum.ROPE, page=20, role="rope"))
    assert watch.on_epoch(unsure(100)) == []
    (record,) = watch.on_report(report(20, at_ms=300, whole_ms=301))
    assert record.fate is Fate.UNUSED
    watch.land(landed(Stratum.ROPE, page=20, role="rope", t_ms=400))
    (record,) = watch.on_report(report(20, at_ms=500, whole_ms=501))
    assert record.fate is Fate.REPAIRED


def test_control_what_every_epoch_reads_is_late_after_an_epoch_of_unknown_rows_too(watch):
    watch.land(landed())
    assert watch.on_epoch(unsure(100)) == []
    (record,) = watch.on_report(report(at_ms=300, whole_ms=301))
    assert record.fate is Fate.LATE
    watch.land(landed(t_ms=400))
    settled = [r for n in range(PATIENCE_EPOCHS) for r in watch.on_epoch(unsure(500 + 1000 * n))]
    assert [r.fate for r in settled] == [Fate.MISSED]


def test_rows_of_a_shared_prompt_are_not_counted_as_fed(watch, strata):
    after = {"j": JobRows(60, 0, True, 50)}
    assert Epoch(0, 0, 0, {}, after, 50).fed() == {"j": range(60)}
    assert Epoch(0, 0, 0, {}, after, 8).fed() == {"j": range(49, 60)}
    assert Epoch(0, 0, 0, {"j": JobRows(55, 0, True, 50)}, after, 0).fed() == {"j": range(55, 60)}


@pytest.mark.parametrize(("now", "fate"), [(0, Fate.UNUSED), (4, Fate.MISSED), (None, Fate.MISSED)])
def test_a_strike_on_what_a_sliding_window_left_behind_hit_no_row(strata, now, fate):
    watch = Watch(strata, lambda job, position: position, lambda strike: now)
    watch.land(landed(Stratum.KV, page=520, job="j", role="window"))
    before, after = {"j": JobRows(540, 0, True)}, {"j": JobRows(548, 24, True)}
    settled = list(watch.on_epoch(epoch(200, before=before, after=after)))
    for n in range(2, PATIENCE_EPOCHS + 1):
        settled += watch.on_epoch(epoch(200 * n, before=after, after=after))
    assert [r.fate for r in settled] == [fate]


@pytest.mark.parametrize(("now", "fate"), [(4, None), (9, Fate.UNUSED)])
def test_an_open_row_written_only_after_the_strike_was_not_used(strata, now, fate):
    watch = Watch(strata, lambda job, position: position, lambda strike: now)
    watch.land(landed(Stratum.KV, page=50, job="j", role="global", open_row=True))
    found = watch.on_epoch(epoch(200, before={"j": JobRows(50, 0, True)}, after={"j": JobRows(60, 0, True)}))
    assert [r.fate for r in found] == ([] if fate is None else [fate])


def test_an_epoch_heard_of_too_late_judges_nothing(watch):
    watch.land(landed())
    late = Epoch(900 * MS, 600 * MS, 0, {}, {})
    assert not late.is_sure
    row = landed(Stratum.ROPE, page=20, role="rope")
    watch.open[:] = [row]
    assert [watch.on_epoch(late) for _ in range(9)] == [[]] * 9
    assert (row.used, row.doubtful) == (0, True)


@pytest.mark.parametrize(("committed", "sure"), [(None, True), (14, True), (9, False), (20, False)])
def test_an_arena_that_is_an_epoch_ahead_or_has_lost_a_job_judges_nothing(committed, sure):
    before = {"j": JobRows(50, 0, True, 40, 11), "gone": JobRows(9, 0, True, 8, 2)}
    after = {"j": JobRows(60, 0, True, 40, 21), "new": JobRows(11, 0, True, 8, 4)}
    assert Epoch(0, 0, 0, before, after, 8, committed).is_sure is sure


def test_a_report_from_before_the_strike_is_not_on_it(watch):
    watch.land(landed(t_ms=500))
    assert watch.on_report(report(at_ms=100, whole_ms=104)) == []
    assert len(watch.open) == 1


def test_rows_of_a_job_count_while_an_epoch_reads_them(watch):
    rows = {"j": JobRows(50, 0, True)}
    watch.land(landed(Stratum.KV, page=20, job="j", role="global"))
    assert watch.on_epoch(epoch(200, before=rows, after={"j": JobRows(60, 0, True)})) == []
    settled = watch.on_epoch(epoch(400, before={"j": JobRows(60, 0, True)}, after={}))
    assert [r.fate for r in settled] == [Fate.MISSED], "an epoch used the row, and nobody found the strike"
    watch.land(landed(Stratum.KV, page=20, job="j", role="global", t_ms=450))
    assert [r.fate for r in watch.on_epoch(epoch(600, before={}, after={}))] == [Fate.UNUSED]


def test_rows_computed_anew_are_settled_by_the_second_report(watch):
    watch.land(landed(Stratum.KV, page=20, job="j", role="global"))
    first = report(20, region="kv", role="global", method="recompute", whole_ms=None, job="j")
    assert watch.on_report(first) == []
    (record,) = watch.on_report(msgspec.structs.replace(first, recovered_ns=150 * MS))
    assert (record.fate, record.repair_ms) == (Fate.REDONE, 50.0)


def test_what_is_open_when_the_worker_ends_is_given_up(watch):
    watch.land(landed())
    assert [r.fate for r in watch.on_end()] == [Fate.GAVE_UP]
    assert watch.open == []


def test_embedding_rows_count_only_when_their_token_is_fed(watch, strata):
    (page, *_) = strata.pages_of_rows(Stratum.EMBEDDING, [300])
    watch.land(landed(Stratum.EMBEDDING, page=page))
    far = {"j": JobRows(3, 0, True)}
    assert page not in strata.pages_of_rows(Stratum.EMBEDDING, range(3))
    for n in range(10):
        assert watch.on_epoch(epoch(200 * (n + 1), before=far, after=far)) == []
    assert watch.open[0].used == 0
    fed = epoch(9000, before={"j": JobRows(299, 0, True)}, after={"j": JobRows(302, 0, True)})
    watch.on_epoch(fed)
    assert watch.open[0].used == 1


def test_strikes_that_could_not_be_told_apart_are_not_fired(watch, strata):
    watch.land(landed(page=5))
    assert not watch.is_free(Stratum.SCALES, 5)
    assert not watch.is_free(Stratum.WEIGHTS, 5 + strata.groups)
    assert watch.is_free(Stratum.WEIGHTS, 6)
    assert watch.is_free(Stratum.KV, 5, "j")


def test_every_stratum_has_bits_and_each_draw_is_a_function_of_its_number(strata):
    assert set(strata.here) == set(Stratum)
    for number, stratum in enumerate(strata.here):
        trial = draw(3, number, 0, strata)
        assert (trial, trial.stratum) == (draw(3, number, 0, strata), stratum)
        assert trial != draw(3, number, 1, strata) != draw(4, number, 1, strata)
        if stratum is not Stratum.KV:
            site = strata.locate(stratum, trial.where)
            last = strata.locate(stratum, 1 - 1e-12)
            assert site.tensor.offset <= site.offset < site.tensor.offset + site.tensor.length
            assert last.offset < last.tensor.offset + last.tensor.length


def test_intervals_are_exact():
    rate = clopper_pearson(0, 3000)
    assert (rate.low, rate.high) == (0.0, pytest.approx(1.2289e-3, rel=1e-3))
    half = clopper_pearson(5, 10)
    assert (half.low, half.high) == (pytest.approx(0.18709, abs=1e-5), pytest.approx(0.81291, abs=1e-5))
    assert proven_at_least(0, 3000) > 0.999 > proven_at_least(0, 2900)
    assert proven_at_least(3, 3) == 0.0
    assert math.isnan(clopper_pearson(0, 0).value)
    assert percentiles([]).p99 is None
    assert percentiles(list(range(1, 101))).p99 == 99.0


def record(index, fate=Fate.REPAIRED, stratum=Stratum.NORMS):
    done = landed(stratum, index=index).record(fate, report() if fate is Fate.REPAIRED else None)
    assert isinstance(done, StrikeRecord)
    return done


def test_a_report_tells_misses_wrong_tokens_and_what_was_compared(tmp_path):
    with Records(tmp_path, Header(plan="strikes", seed=5, image_id="abc"), StrikeRecord) as records:
        records.add(*(record(n) for n in range(9)), record(9, Fate.MISSED), record(10, Fate.UNUSED))
        records.note(worker="1", released=100, wrong=0, wall_s=60)
        records.note(worker="1", released=200, wrong=2, wall_s=120, jobs=3, wrong_ends=1, unexplained=1)
    text = make_report([tmp_path])
    assert "| norms | 10 | 9 | 0 | 0 | 1 |" in text
    assert "200, all compared" in text
    assert "**wrong: 2**" in text
    assert "--seed 5" in text
    assert "nobody had struck: 1" in text


def test_a_broken_campaign_goes_on_where_it_was_and_a_torn_line_is_dropped(tmp_path):
    header = Header(plan="strikes", seed=5)
    with Records(tmp_path, header, StrikeRecord) as records:
        records.add(record(0), record(1))
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(b'{"index":2,"att')
    with Records(tmp_path, header, StrikeRecord) as records:
        assert records.done == {0, 1}
        records.add(record(2))
    assert [r.index for r in read_lines(tmp_path / "trials.jsonl", StrikeRecord)] == [0, 1, 2]
    with pytest.raises(PenumbraError, match="seed 5 there, 6 here"):
        Records(tmp_path, Header(plan="strikes", seed=6), StrikeRecord)
    with pytest.raises(PenumbraError, match="no campaign directory"):
        make_report([tmp_path / "none"])


def test_a_disk_that_refuses_is_told_and_what_was_written_stays(tmp_path, monkeypatch):
    header = Header(plan="strikes", seed=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(PenumbraError, match="cannot be written"):
        Records(tmp_path / "file" / "x", header, StrikeRecord)
    with Records(tmp_path / "c", header, StrikeRecord) as records:
        records.add(record(0))

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(PenumbraError, match="No space left") as caught:
                records.add(record(1))
        assert "goes on where it was" in caught.value.mend
    with Records(tmp_path / "c", header, StrikeRecord) as records:
        assert 0 in records.done


def test_a_report_that_cannot_be_written_is_one_message(tmp_path):
    with Records(tmp_path / "c", Header(plan="strikes", seed=5), StrikeRecord) as records:
        records.add(record(0))
    command = ["campaign", "report", str(tmp_path / "c"), "--markdown", str(tmp_path / "none" / "x.md")]
    done = subprocess.run(
        [sys.executable, "-m", "hil.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("penumbra: --markdown")
    assert "Traceback" not in done.stderr
