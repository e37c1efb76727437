"""The flight's eclipses against published times, the bench's independent truth, and bad TLEs."""

from __future__ import annotations

import datetime as dt
import math

import numpy as np
import pytest
from skyfield.precessionlib import compute_precession

from hil.plant.orbit import TrueOrbit
from hil.plant.shadow import edges, sunlit_fraction
from hil.tle import tle_from_elements
from node.power.ephemeris import (
    Ephemeris,
    PropagationError,
    disc_visible,
    shadow_angles,
    sun_of_date_km,
)
from node.power.forecast import EclipseForecast
from telemetry.errors import PenumbraError

NS = 1_000_000_000


def instant(*when: int) -> int:
    return int(dt.datetime(*when, tzinfo=dt.UTC).timestamp()) * NS  # type: ignore[misc]


def tle(epoch_ns: int, **changes: float) -> tuple[str, str]:
    elements = {
        "altitude_km": 420.0,
        "eccentricity": 0.0005,
        "inclination_deg": 51.64,
        "raan_deg": 60.0,
        "arg_perigee_deg": 30.0,
        "mean_anomaly_deg": 0.0,
        "bstar": 1e-4,
    }
    return tle_from_elements(epoch_ns=epoch_ns, **{**elements, **changes})


JUNE = instant(2026, 6, 1)


def kepler_j2000_km(seconds: np.ndarray) -> np.ndarray:
    """The orbit of poliastro's eclipse test, two bodies, J2000."""
    a, e, mu = 6828.137, 0.0073, 398_600.4418
    i, raan, argp = np.radians([87.0, 20.0, 10.0])
    mean = math.sqrt(mu / a**3) * seconds
    anomaly = mean.copy()
    for _ in range(20):
        anomaly -= (anomaly - e * np.sin(anomaly) - mean) / (1 - e * np.cos(anomaly))
    x, y = a * (np.cos(anomaly) - e), a * math.sqrt(1 - e * e) * np.sin(anomaly)

    def turn(angle: float, axis: int) -> np.ndarray:
        c, s = math.cos(angle), math.sin(angle)
        return np.array(
            [[c, -s, 0], [s, c, 0], [0, 0, 1]] if axis == 3 else [[1, 0, 0], [0, c, -s], [0, s, c]]
        )

    rotation = turn(raan, 3) @ turn(i, 1) @ turn(argp, 3)
    return np.stack([x, y, np.zeros_like(x)], axis=-1) @ rotation.T


@pytest.mark.parametrize(("sign", "reference_s"), [(1, 266.060), (-1, 291.328)], ids=["penumbra", "umbra"])
def test_entry_matches_orekit_on_a_spherical_earth(sign: int, reference_s: float) -> None:
    # "From Orekit" in poliastro's tests, tolerance 1 s there (reference/fsw.md section 5).
    seconds = np.arange(200.0, 350.0, 0.01)
    to_date = compute_precession(2_458_849.5)
    satellite = kepler_j2000_km(seconds) @ to_date.T
    sun = sun_of_date_km(instant(2020, 1, 1) + (seconds * NS).astype(np.int64))
    sun_radius, earth_radius, separation = shadow_angles(satellite, sun, flattening=0.0)
    inside = separation < earth_radius + sign * sun_radius
    assert seconds[np.argmax(inside)] == pytest.approx(reference_s, abs=1.0)


@pytest.mark.parametrize(
    ("year", "month", "day", "orbit", "tolerance_s"),
    [
        pytest.param(2026, 3, 21, {}, 1.0, id="iss-equinox"),
        pytest.param(2026, 6, 1, {"raan_deg": 200.0}, 1.0, id="iss-high-beta"),
        pytest.param(
            2026, 9, 24, {"altitude_km": 500.0, "inclination_deg": 97.4, "raan_deg": 160.0}, 1.0, id="sso"
        ),
        pytest.param(2026, 12, 20, {"raan_deg": 200.0}, 5.0, id="iss-grazing-season"),
        pytest.param(2040, 6, 1, {"inclination_deg": 0.1}, 1.0, id="equatorial-2040"),
    ],
)
def test_forecast_agrees_with_the_truth_for_days(
    year: int, month: int, day: int, orbit: dict[str, float], tolerance_s: float
) -> None:
    epoch = instant(year, month, day)
    lines = tle(epoch, **orbit)
    true = TrueOrbit(*lines)
    grid = epoch + np.arange(0, 3 * 86_400, 30, dtype=np.int64) * NS
    sunlit = sunlit_fraction(true.geometry(grid))
    umbra = edges(true, grid, 0.0, sunlit)
    forecast = EclipseForecast.from_tle(*lines)
    assert len(umbra) > 20
    for moment, begins in umbra:
        coming = forecast.next_umbra(moment - 60 * NS)
        assert coming is not None
        forecast_ns = coming.entry_ns if begins else coming.exit_ns
        assert abs(forecast_ns - moment) / NS < tolerance_s


def test_events_are_where_the_disc_begins_and_ends_to_be_covered() -> None:
    forecast = EclipseForecast.from_tle(*tle(JUNE))
    coming = forecast.next_umbra(JUNE)
    assert coming is not None
    assert JUNE < coming.penumbra_entry_ns < coming.entry_ns < coming.exit_ns < coming.penumbra_exit_ns
    tenth = NS // 10
    assert forecast.sunlit(coming.penumbra_entry_ns - tenth) == 1.0
    assert 0.99 < forecast.sunlit(coming.penumbra_entry_ns + tenth) < 1.0
    assert 0.0 < forecast.sunlit(coming.entry_ns - tenth) < 0.01
    assert forecast.sunlit(coming.entry_ns + tenth) == 0.0
    assert forecast.sunlit(coming.exit_ns - tenth) == 0.0
    assert 0.0 < forecast.sunlit(coming.exit_ns + tenth) < 0.01
    assert forecast.sunlit(coming.penumbra_exit_ns + tenth) == 1.0


def test_a_pass_under_way_is_returned_whole_and_then_the_next() -> None:
    forecast = EclipseForecast.from_tle(*tle(JUNE))
    first = forecast.next_umbra(JUNE)
    assert first is not None
    middle = (first.entry_ns + first.exit_ns) // 2
    begun = EclipseForecast.from_tle(*tle(JUNE)).next_umbra(middle)
    assert begun is not None
    assert abs(begun.entry_ns - first.entry_ns) < NS // 100
    following = forecast.next_umbra(first.exit_ns)
    assert following is not None
    assert following.entry_ns - first.entry_ns == pytest.approx(forecast.period_s * NS, rel=0.01)
    assert first.duration_s == pytest.approx(2100, abs=120)


def test_passes_are_searched_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    find = EclipseForecast._find

    def counted(self: EclipseForecast, begin_ns: int, end_ns: int) -> list[object]:
        searches.append(begin_ns)
        return find(self, begin_ns, end_ns)  # type: ignore[return-value]

    monkeypatch.setattr(EclipseForecast, "_find", counted)
    forecast = EclipseForecast.from_tle(*tle(JUNE))
    for second in range(0, 16_000, 20):
        coming = forecast.next_umbra(JUNE + second * NS)
        assert coming is not None
        assert coming.exit_ns > JUNE + second * NS
    assert len(searches) == 2


def test_a_clock_set_back_gets_the_passes_of_that_time() -> None:
    forecast = EclipseForecast.from_tle(*tle(JUNE))
    later = forecast.next_umbra(JUNE + 40_000 * NS)
    earlier = forecast.next_umbra(JUNE)
    assert later is not None
    assert earlier is not None
    assert earlier.entry_ns - JUNE < forecast.period_s * NS


def test_an_orbit_in_full_sunlight_has_no_umbra() -> None:
    # Dawn-dusk, 1400 km: no eclipse all year (reference/power.md section 1).
    lines = tle(instant(2026, 3, 21), altitude_km=1400.0, inclination_deg=101.4, raan_deg=90.0)
    forecast = EclipseForecast.from_tle(*lines)
    assert forecast.next_umbra(instant(2026, 3, 21)) is None
    assert forecast.sunlit(instant(2026, 3, 21)) == 1.0


def test_oblate_earth_shortens_an_eclipse_seen_over_the_poles() -> None:
    lines = tle(JUNE, altitude_km=500.0, inclination_deg=97.4, raan_deg=70.0)
    oblate = EclipseForecast(Ephemeris.from_tle(*lines)).next_umbra(JUNE)
    sphere = EclipseForecast(Ephemeris.from_tle(*lines, flattening=0.0)).next_umbra(JUNE)
    assert oblate is not None
    assert sphere is not None
    assert 0.5 < sphere.duration_s - oblate.duration_s < 20.0


def test_visible_share_of_discs() -> None:
    one = np.ones(1)
    assert disc_visible(0.1 * one, one, 1.2 * one) == 1.0
    assert disc_visible(0.1 * one, one, 0.8 * one) == 0.0
    # A huge disc's limb is nearly straight: half the small one shows where its centre is on it.
    assert disc_visible(0.001 * one, one, one) == pytest.approx(0.5, abs=1e-3)
    share = disc_visible(0.1 * one, one, np.linspace(0.89, 1.11, 200))
    assert np.all(np.diff(share) >= 0)
    assert np.all((share >= 0) & (share <= 1))


def test_shapes_follow_the_times() -> None:
    ephemeris = Ephemeris.from_tle(*tle(JUNE))
    times = JUNE + np.arange(6, dtype=np.int64).reshape(2, 3) * 600 * NS
    assert ephemeris.satellite_teme_km(times).shape == (2, 3, 3)
    assert sun_of_date_km(times).shape == (2, 3, 3)
    assert ephemeris.sunlit_fraction(times).shape == (2, 3)
    assert float(ephemeris.sunlit_fraction(int(times[1, 2]))) == ephemeris.sunlit_fraction(times)[1, 2]


def test_a_decayed_orbit_is_an_error_and_not_a_nan() -> None:
    ephemeris = Ephemeris.from_tle(*tle(JUNE, altitude_km=200.0, bstar=0.01))
    with pytest.raises(PropagationError, match="SGP4 error"):
        ephemeris.satellite_teme_km(JUNE + 40 * 86_400 * NS)


def test_an_orbit_that_decays_within_five_revolutions_is_refused() -> None:
    with pytest.raises(PenumbraError, match="no orbit SGP4 can propagate over five revolutions"):
        EclipseForecast.from_tle(*tle(JUNE, altitude_km=160.0, bstar=0.1))


def test_age_of_the_tle() -> None:
    forecast = EclipseForecast.from_tle(*tle(JUNE))
    assert forecast.tle_age_days(JUNE + 2 * 86_400 * NS) == pytest.approx(2.0, abs=1e-4)
    assert forecast.tle_age_days(JUNE - 86_400 * NS) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda line: line[:-1] + str((int(line[-1]) + 1) % 10), "checksum", id="checksum"),
        pytest.param(lambda line: line[:-5], "64 characters", id="short"),
        pytest.param(lambda line: "3" + line[1:], "does not begin", id="number"),
        pytest.param(lambda line: line[:-2] + "é1", "U\\+00E9", id="not-ascii"),
    ],
)
def test_a_bad_tle_names_its_line(number: int, spoil: object, message: str) -> None:
    lines = list(tle(JUNE))
    lines[number - 1] = spoil(lines[number - 1])  # type: ignore[operator]
    with pytest.raises(PenumbraError, match=message) as caught:
        EclipseForecast.from_tle(*lines)
    assert f"TLE line {number}" in str(caught.value)
    assert caught.value.mend
