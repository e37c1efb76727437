"""The flight's SGP4, elements and Sun against their published references."""

from __future__ import annotations

import math
from importlib import resources

import numpy as np
import pytest
from sgp4.api import WGS72, Satrec

from hil.plant.orbit import TrueOrbit
from hil.plant.path import flight_path
from hil.tle import tle_from_elements
from node.power.ephemeris import Ephemeris
from node.power.forecast import EclipseForecast
from telemetry.bus import BusOrbit, decode, encode
from telemetry.errors import PenumbraError

NS = 1_000_000_000
JUNE_NS = 1_780_308_000 * NS
ELEMENTS = {
    "epoch_ns": JUNE_NS, "altitude_km": 420.0, "eccentricity": 0.0005, "inclination_deg": 51.64,
    "raan_deg": 231.0, "arg_perigee_deg": 10.0, "mean_anomaly_deg": 132.0, "bstar": 1e-4,
}  # fmt: skip
LINES = tle_from_elements(**ELEMENTS)


def omm() -> dict[str, str | int | float]:
    """Return the message of the same orbit as `LINES`, read back from them."""
    read = Satrec.twoline2rv(*LINES, WGS72)
    return {
        "EPOCH": "2026-06-01T10:00:00.000000",
        "MEAN_MOTION": read.no_kozai * 720.0 / math.pi,
        "ECCENTRICITY": read.ecco,
        "INCLINATION": math.degrees(read.inclo),
        "RA_OF_ASC_NODE": math.degrees(read.nodeo),
        "ARG_OF_PERICENTER": math.degrees(read.argpo),
        "MEAN_ANOMALY": math.degrees(read.mo),
        "BSTAR": read.bstar,
    }


def test_sgp4_gives_the_positions_of_its_verification_set() -> None:
    # SGP4-VER.TLE and tcppver.out: Vallado et al., AIAA 2006-6753, as the package carries them.
    files = resources.files("sgp4")
    elements = [
        line for line in files.joinpath("SGP4-VER.TLE").read_text().splitlines() if line[:2] in {"1 ", "2 "}
    ]
    by_number = {
        int(one[2:7]): (one[:69], two[:69]) for one, two in zip(elements[::2], elements[1::2], strict=True)
    }
    compared, satellite = 0, None
    for line in files.joinpath("tcppver.out").read_text().splitlines():
        fields = line.split()
        if fields[-1] == "xx":
            satellite = Satrec.twoline2rv(*by_number[int(fields[0])], WGS72)
            continue
        assert satellite is not None
        error, position, velocity = satellite.sgp4_tsince(float(fields[0]))
        if error:
            continue  # the last line of a satellite that decays
        assert position == pytest.approx([float(x) for x in fields[1:4]], abs=1e-6)
        assert velocity == pytest.approx([float(x) for x in fields[4:7]], abs=1e-8)
        compared += 1
    assert compared > 640


def test_a_message_of_mean_elements_is_the_same_orbit_as_its_tle() -> None:
    times = JUNE_NS + np.arange(0, 86_400, 600) * NS
    by_lines, by_omm = Ephemeris.from_tle(*LINES), Ephemeris.from_omm(omm())
    assert by_omm.period_s == pytest.approx(by_lines.period_s)
    apart_km = np.linalg.norm(by_omm.satellite_teme_km(times) - by_lines.satellite_teme_km(times), axis=1)
    assert apart_km.max() < 0.01
    one, other = (f.next_umbra(JUNE_NS) for f in (EclipseForecast(by_lines), EclipseForecast.from_omm(omm())))
    assert one is not None
    assert other is not None
    assert abs(one.entry_ns - other.entry_ns) < 0.01 * NS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"MEAN_MOTION": None}, "MEAN_MOTION is missing"),
        ({"ECCENTRICITY": "round"}, "ECCENTRICITY = 'round' is no number"),
        ({"INCLINATION": "nan"}, "INCLINATION = 'nan' is no number"),
        ({"EPOCH": "yesterday"}, "OMM"),
        ({"MEAN_MOTION": -1.0}, "MEAN_MOTION = -1.0; 0.01 to 17.1 revolutions a day is allowed"),
    ],
)
def test_a_bad_message_is_refused_by_field(change: dict[str, object], words: str) -> None:
    fields: dict[str, object] = {**omm(), **change}
    with pytest.raises(PenumbraError, match=words):
        Ephemeris.from_omm({name: value for name, value in fields.items() if value is not None})


def test_the_bus_carries_lines_or_a_message_and_never_both() -> None:
    for orbit in (BusOrbit(line1=LINES[0], line2=LINES[1]), BusOrbit(omm=omm())):
        assert decode("orbit", encode(orbit)) == orbit
    for wrong in ({}, {"line1": LINES[0]}, {"line1": LINES[0], "line2": LINES[1], "omm": omm()}):
        with pytest.raises(ValueError, match="either line1 and line2"):
            BusOrbit(**wrong)


def test_beta_is_that_of_skyfield_and_its_ephemeris() -> None:
    times = JUNE_NS + np.arange(0, 3 * 86_400, 3_600) * NS
    truth = TrueOrbit(*LINES).geometry(times)
    sun = truth.sun / np.linalg.norm(truth.sun, axis=1, keepdims=True)
    expected = np.degrees(np.arcsin(np.sum(sun * truth.normal, axis=1)))
    found = Ephemeris.from_tle(*LINES).beta_deg(times)
    assert np.abs(found - expected).max() < 0.05
    assert found.max() - found.min() > 5.0


def test_the_eclipses_of_a_day_are_those_of_the_independent_truth() -> None:
    seconds = 86_400
    truth = flight_path(*LINES, JUNE_NS, seconds).events
    found = EclipseForecast.from_tle(*LINES).between(JUNE_NS, JUNE_NS + seconds * NS)
    pairs = [(each, min(truth, key=lambda t, each=each: abs(t.entry_ns - each.entry_ns))) for each in found]
    assert len(pairs) > 13
    for each, true in pairs:
        for name in ("penumbra_entry_ns", "entry_ns", "exit_ns", "penumbra_exit_ns"):
            assert abs(getattr(each, name) - getattr(true, name)) < 1.0 * NS


def test_margins_of_the_edges_grow_with_age_until_it_is_no_forecast_any_more() -> None:
    forecast = EclipseForecast.from_tle(*LINES)
    margins = [forecast.edge_margin_s(JUNE_NS + days * 86_400 * NS) for days in range(40)]
    assert margins == sorted(margins)
    assert margins[0] == pytest.approx(2.0, abs=0.01)
    usable = [forecast.is_usable(JUNE_NS + days * 86_400 * NS) for days in range(40)]
    assert usable == sorted(usable, reverse=True)
    assert usable[14]
    assert not usable[30]


def test_the_incidence_on_an_array_that_looks_away_from_earth_is_that_of_the_plant() -> None:
    times = JUNE_NS + np.arange(0, 5_500, 60) * NS
    truth = TrueOrbit(*LINES).geometry(times)
    sun = truth.sun / np.linalg.norm(truth.sun, axis=1, keepdims=True)
    up = truth.satellite / np.linalg.norm(truth.satellite, axis=1, keepdims=True)
    expected = np.maximum(0.0, np.sum(sun * up, axis=1))
    found = EclipseForecast.from_tle(*LINES).zenith_incidence(times)
    ratio = found[expected > 0.1] / expected[expected > 0.1]
    assert ratio.max() / ratio.min() < 1.01
    lit = Ephemeris.from_tle(*LINES).sunlit_fraction(times) > 0.5
    assert found[lit].mean() == pytest.approx(1.0, abs=0.03)
