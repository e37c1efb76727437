"""Reports of the FDIR as one: what a merged report says, and how many findings reports stand for."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from telemetry.fdir_merge import MAX_SPANS, both_ends, counted, merged, shorter
from telemetry.frame import decode_frame, encode_frame
from telemetry.packets import FdirReport, Level, Outcome

GOLDEN = (
    "9901a26e3101a466646972020300a4666469728ba76d6f6e69746f72ae776569676874732e646967657374a56c6576656c00"
    "a76f7574636f6d65a87265706169726564a6616374696f6ea9706167655f636f7079ab64657465637465645f6e73cd03eaac"
    "7265636f76657265645f6e73cd07d2a6726567696f6ea777656967687473a47061676502a4726f6c65a66174746e5f71a563"
    "6f756e7402a6636f7665727391930101023e11eb77"
)
EARLIER = (
    "9901a26e3101a466646972020300a4666469728aa76d6f6e69746f72ae776569676874732e646967657374a56c6576656c00"
    "a76f7574636f6d65a87265706169726564a6616374696f6ea9706167655f636f7079ab64657465637465645f6e73cd03e9ac"
    "7265636f76657265645f6e73cd07d1a6726567696f6ea0a470616765c0a4726f6c65a0a865766964656e6365807917f02e"
)
"""The frame of a report as versions without `count`, `first` and `covers` wrote it."""


def finding(number: int, boot: int = 1, monitor: str = "weights.digest") -> FdirReport:
    return FdirReport(
        monitor=monitor,
        level=Level.IN_WORKER_REPAIR,
        outcome=Outcome.REPAIRED,
        action="page_copy",
        detected_ns=1000 * boot + number,
        recovered_ns=2000 * boot + number,
        region="weights",
        page=number,
        role="attn_q",
        evidence={"number": number, "reason": "r" * 100},
        covers=[(boot, number, number)],
    )


def test_a_merged_report_has_the_count_and_both_ends() -> None:
    parts = [finding(n) for n in (3, 4, 5, 6)]
    whole = merged(parts[::-1])
    assert (whole.count, whole.covers) == (4, [(1, 3, 6)])
    first, last = both_ends(whole)
    assert replace(first, covers=[(1, 3, 3)]) == parts[0]
    assert replace(last, covers=[(1, 6, 6)]) == parts[-1]
    assert both_ends(parts[0]) == [parts[0]]


def test_merging_again_adds_up_and_keeps_the_ends() -> None:
    all_at_once = merged(finding(n, boot) for boot in (1, 2) for n in range(1, 5))
    early = merged(finding(n) for n in (1, 2, 3, 4))
    late = merged([finding(1, 2), merged([finding(2, 2), finding(3, 2)]), finding(4, 2)])
    assert merged([late, early]) == all_at_once
    assert (all_at_once.count, all_at_once.covers) == (8, [(1, 1, 4), (2, 1, 4)])


def test_what_was_merged_and_came_down_as_well_counts_once() -> None:
    parts = [finding(n) for n in range(1, 6)]
    inner = merged(parts[:3])
    assert counted(parts) == 5
    assert counted([merged([inner, *parts[3:]]), inner, parts[1], parts[1], parts[4]]) == 5
    # 2 was acknowledged and deleted on board before 1 and 3 were merged.
    assert counted([parts[1], merged([parts[0], parts[2]])]) == 3


def test_other_rows_outcomes_and_boots_are_counted_apart() -> None:
    other = replace(finding(1), outcome=Outcome.ESCALATED)
    assert counted([finding(1), finding(1, boot=2), finding(1, monitor="kv.digest"), other]) == 4


def test_reports_of_an_earlier_version_count_one_each() -> None:
    old = replace(finding(1), covers=[])
    assert counted([old, old]) == 2


def test_the_boots_a_report_names_are_bounded_and_the_count_is_not() -> None:
    whole = finding(1)
    for boot in range(2, 101):
        whole = merged([whole, finding(1, boot)])
    assert whole.count == 100
    assert len(whole.covers) == MAX_SPANS
    assert whole.covers[-1] == (100, 1, 1)
    assert counted([whole, finding(1, 100), finding(1, 90)]) == 100
    assert both_ends(whole)[0].detected_ns == 1001


def test_shorter_reports_keep_count_and_times_and_say_that_evidence_is_missing() -> None:
    whole = merged([finding(1), finding(2)])
    full, short, bare = shorter(whole)
    assert full == whole
    for cut in (short, bare):
        assert cut.evidence["evidence_cut"] is True
        assert cut.first is not None
        assert whole.first is not None
        assert (cut.count, cut.covers, cut.first.detected_ns) == (2, [(1, 1, 2)], whole.first.detected_ns)
    assert short.evidence["number"] == 2
    assert bare.evidence == {"evidence_cut": True}
    sizes = [
        len(encode_frame(node="n", boot=1, seq=0, t_ns=0, packet=report)) for report in (full, short, bare)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_golden_bytes() -> None:
    whole = replace(merged([finding(1), finding(2)]), evidence={}, first=None)
    frame = encode_frame(node="n1", boot=1, seq=2, t_ns=3, packet=whole)
    assert frame.hex() == GOLDEN
    assert decode_frame(frame).packet() == whole
    alone = replace(finding(1), covers=[], evidence={}, region="", page=None, role="")
    assert decode_frame(bytes.fromhex(EARLIER)).packet() == alone


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_however_reports_are_merged_and_whatever_came_down_each_counts_once(many: int, seed: int) -> None:
    rng = random.Random(seed)
    stored = [finding(n) for n in range(1, many + 1)]
    ground: list[FdirReport] = []
    for _ in range(8):
        if len(stored) > 1 and rng.random() < 0.6:
            picked = rng.sample(stored, rng.randint(2, len(stored)))
            stored = [report for report in stored if report not in picked] + [merged(picked)]
        elif stored:
            came = rng.choice(stored)
            ground.append(came)
            if rng.random() < 0.5:
                stored.remove(came)
    assert counted([*ground, *stored]) == many
