"""Voting on redundant sensors: each fault is rejected, and no sound sensor is."""

from __future__ import annotations

import math

import pytest

from fdir.sensors import (
    ChannelSpec,
    Lost,
    Reading,
    Regained,
    Rejected,
    Restored,
    SensorVoter,
    Source,
    Tick,
    Why,
)

SPEC = ChannelSpec(
    "battery_v", 0.0, 100.0, tolerance=0.2, max_rate_per_s=0.5, stuck_samples=10, restore_samples=3,
    stale_after_s=3.0, lost_after_s=4.0,
)  # fmt: skip


class Bench:
    """A voter of one channel, read once a second."""

    def __init__(self, spec: ChannelSpec = SPEC) -> None:
        self.voter = SensorVoter([spec])
        self.name = spec.name
        self.now_s = 0.0

    def read(self, *values: float | None, fresh: tuple[bool, ...] = (), refused: tuple[Why | None, ...] = ()):
        self.now_s += 1.0
        return self.voter.handle(Reading(self.name, values, None, fresh, refused), self.now_s)

    @property
    def voted(self):
        return self.voter.value(self.name, self.now_s)

    def rejected(self):
        return self.voter.rejected(self.name)


def whys(actions) -> list[tuple[int, Why]]:
    return [(a.sensor_set, a.why) for a in actions if isinstance(a, Rejected)]


def test_the_median_of_sets_that_agree_is_believed():
    bench = Bench()
    assert bench.read(14.0, 14.1, 13.95) == []
    assert (bench.voted.value, bench.voted.source) == (14.0, Source.VOTED)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (math.nan, Why.NAN),
        (math.inf, Why.NAN),
        (None, Why.NAN),
        (-1.0, Why.RANGE),
        (101.0, Why.RANGE),
        (17.0, Why.SPIKE),
    ],
)
def test_a_value_that_cannot_be_is_rejected_at_once_and_the_others_go_on(value, why):
    bench = Bench()
    bench.read(14.0, 14.0, 14.0)
    assert whys(bench.read(14.0, value, 14.0)) == [(1, why)]
    assert bench.rejected() == {1: why}
    assert (bench.voted.value, bench.voted.source) == (14.0, Source.VOTED)


def test_a_set_that_drifts_away_is_outvoted():
    bench = Bench()
    found = [whys(bench.read(14.0, 14.0, 14.0 + 0.1 * n)) for n in range(5)]
    assert found[:3] == [[], [], []]
    assert [w for f in found[3:] for w in f] == [(2, Why.OUTVOTED)]


def test_a_set_that_stands_still_while_the_others_move_is_stuck():
    bench = Bench()
    found = [whys(bench.read(14.0 + 0.01 * (n % 5), 14.02 - 0.01 * (n % 3), 14.0)) for n in range(30)]
    assert [w for f in found for w in f] == [(2, Why.STUCK)]


def test_control_all_still_or_at_the_end_of_the_range_is_not_stuck():
    bench = Bench()
    assert [a for _ in range(40) for a in bench.read(14.0, 14.0, 14.0)] == []
    low = Bench(ChannelSpec("array_w", 0.0, 100.0, tolerance=0.5, stuck_samples=10))
    assert [a for n in range(40) for a in low.read(0.01 * (n % 7), 0.02 * (n % 5), 0.0)] == []


def test_a_set_without_new_samples_is_stale():
    bench = Bench()
    bench.read(14.0, 14.0, 14.0)
    found = [whys(bench.read(14.0, 14.0, 14.0, fresh=(True, True, False))) for _ in range(5)]
    assert [w for f in found for w in f] == [(2, Why.STALE)]


def test_what_a_decoder_refused_is_rejected_with_its_reason():
    bench = Bench()
    bench.read(14.0, 14.0, 14.0)
    assert whys(bench.read(None, 14.0, 14.0, refused=(Why.RANGE, None, None))) == [(0, Why.RANGE)]


def test_a_rejected_set_comes_back_after_sound_readings_in_a_row():
    bench = Bench()
    bench.read(14.0, 14.0, 14.0)
    bench.read(14.0, math.nan, 14.0)
    assert bench.read(14.0, 14.0, 14.0) == []
    assert bench.read(14.0, 14.0, 14.0) == []
    bench.read(14.0, 19.0, 14.0)
    actions = [a for _ in range(3) for a in bench.read(14.0, 14.0, 14.0)]
    assert actions == []
    assert bench.read(14.0, 14.0, 14.0) == [Restored("battery_v", 1)]
    assert bench.rejected() == {}


def test_two_sets_that_disagree_give_no_value_and_then_the_channel_is_lost():
    bench = Bench()
    bench.read(14.0, 14.0)
    for n in range(4):
        bench.read(14.0 + 0.3 * (n + 1), 14.0 - 0.3 * (n + 1))
    assert bench.voted.value is None or bench.voted.age_s > 0
    lost = [a for n in range(3) for a in bench.read(16.0, 12.0)]
    assert [type(a) for a in lost if isinstance(a, Lost)] == [Lost]
    assert bench.voted.source is Source.NONE


def test_of_two_sets_the_one_that_jumped_is_the_liar():
    bench = Bench()
    bench.read(14.0, 14.0)
    assert whys(bench.read(14.0, 18.0)) == [(1, Why.SPIKE)]
    assert (bench.voted.value, bench.voted.source) == (14.0, Source.SINGLE)


def test_a_single_set_is_believed_but_not_its_jumps():
    bench = Bench()
    bench.read(14.0)
    assert (bench.voted.value, bench.voted.source) == (14.0, Source.SINGLE)
    assert whys(bench.read(30.0)) == [] or bench.voted.value == 14.0
    assert bench.voted.value == 14.0


def test_a_silent_bus_loses_the_channel_once_and_a_reading_regains_it():
    bench = Bench()
    bench.read(14.0, 14.0, 14.0)
    lost = [a for n in range(10) for a in bench.voter.handle(Tick(), 2.0 + n)]
    assert [type(a) for a in lost] == [Lost]
    assert bench.voter.value("battery_v", 12.0).value is None
    bench.now_s = 20.0
    assert Regained("battery_v") in bench.read(14.0, 14.0, 14.0)


def test_a_set_that_was_never_fitted_is_no_fault():
    bench = Bench()
    assert [a for _ in range(10) for a in bench.read(14.0, None, None)] == []
    assert bench.voted.source is Source.SINGLE


def test_evidence_shows_all_sets_and_the_vote():
    bench = Bench()
    bench.read(14.0, 14.0, 14.0)
    (rejected,) = [a for a in bench.read(14.0, math.nan, 14.1) if isinstance(a, Rejected)]
    assert rejected.evidence == {
        "vote": pytest.approx(14.05), "set0": 14.0, "set1": None, "set2": 14.1, "sensor_set": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        {"low": 5.0, "high": 5.0},
        {"tolerance": 0.0},
        {"relative": -1.0},
        {"max_rate_per_s": 0.0},
        {"stuck_samples": 1},
        {"restore_samples": 0},
        {"stale_after_s": 0.0},
        {"lost_after_s": 0.0},
    ],
)
def test_limits_that_make_no_sense_are_refused(values):
    settings = {"name": "x", "low": 0.0, "high": 1.0, "tolerance": 0.1} | values
    with pytest.raises(ValueError, match="x: "):
        ChannelSpec(**settings)


def test_channels_are_known_and_named_once():
    with pytest.raises(ValueError, match="specified twice"):
        SensorVoter([SPEC, SPEC])
    with pytest.raises(ValueError, match="unknown channel 'y'"):
        SensorVoter([SPEC]).handle(Reading("y", (1.0,)), 0.0)
    with pytest.raises(ValueError, match="unknown channel 'y'"):
        SensorVoter([SPEC]).value("y", 0.0)
