"""Eclipses by the array alone, and the fallback of the bus view on them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from test_ephemeris import JUNE_NS, LINES

from node.bus_view import BusView
from node.power.sensed import SensedEclipses
from telemetry.bus import BusEps, BusOrbit

NS = 1_000_000_000
PERIOD_S, SUN_S = 5_560, 3_460


def array_w(t_s: int) -> float:
    return 25.0 if t_s % PERIOD_S < SUN_S else 0.0


def eps(t_s: int, start_ns: int = 0) -> BusEps:
    return BusEps(
        t_ns=start_ns + t_s * NS, battery_soc=0.9, battery_v=7.6, battery_a=0.1, battery_wh=24.0,
        array_w=array_w(t_s), array_sun_w=25.0, platform_w=4.0, soc_floor=0.7,
    )  # fmt: skip


def test_nothing_is_told_before_a_whole_orbit_and_then_the_next_ones_are() -> None:
    sensed = SensedEclipses()
    for t_s in range(0, 20_000, 10):
        sensed.handle(t_s * NS, array_w(t_s), 25.0)
        passes = sensed.passes(t_s * NS)
        if t_s < SUN_S + PERIOD_S:
            assert passes == ()
        if t_s > SUN_S + 2 * PERIOD_S:
            assert sensed.period_s == PERIOD_S
            first = passes[0]
            dark = array_w(t_s) == 0.0
            assert (first.entry_ns <= t_s * NS < first.exit_ns) == dark
            assert abs(first.entry_ns / NS % PERIOD_S - SUN_S) <= 10
            assert abs(first.duration_s - (PERIOD_S - SUN_S)) <= 10


def test_a_dropout_is_no_eclipse() -> None:
    sensed = SensedEclipses()
    for t_s in range(0, 15_000, 10):
        sensed.handle(t_s * NS, 0.0 if t_s % 1_000 == 500 else array_w(t_s), 25.0)
    assert sensed.period_s == PERIOD_S


@given(st.lists(st.tuples(st.integers(0, 10**14), st.floats(0, 1e5), st.floats(0, 1e5)), max_size=60))
def test_whatever_comes_passes_are_in_order_and_ahead(readings: list[tuple[int, float, float]]) -> None:
    sensed = SensedEclipses()
    for t_ns, watts, full in sorted(readings):
        sensed.handle(t_ns, watts, full)
        passes = sensed.passes(t_ns)
        assert all(p.exit_ns > t_ns and p.exit_ns > p.entry_ns for p in passes)
        assert all(a.entry_ns < b.entry_ns for a, b in pairwise(passes))


def test_with_elements_too_old_the_array_tells() -> None:
    view = BusView()
    view.handle(BusOrbit(line1=LINES[0], line2=LINES[1]), 0.0)
    assert view.eclipses(JUNE_NS).source == "forecast"
    later_ns = JUNE_NS + 30 * 86_400 * NS
    assert view.eclipses(later_ns).source == "unknown"
    assert view.sunlit(later_ns) is None
    for t_s in range(0, 13_000, 20):
        view.handle(eps(t_s, later_ns), float(t_s))
    found = view.eclipses(later_ns + 13_000 * NS)
    assert (found.source, found.period_s) == ("sensed", float(PERIOD_S))
    assert found.passes[0].exit_ns > later_ns + 13_000 * NS
    assert view.sunlit(later_ns + 13_000 * NS) == (1.0 if array_w(13_000) else 0.0)
