"""Elements out of TLEs and messages: what is usable flies, what means something else is refused by field."""

from __future__ import annotations

import datetime as dt
from importlib import resources

import numpy as np
import pytest
from sgp4.api import WGS72, Satrec
from test_ephemeris import JUNE_NS, LINES, omm

from node.bus_view import BusView
from node.power.elements import Elements
from node.power.ephemeris import Ephemeris
from node.power.forecast import EclipseForecast
from telemetry.bus import BusOrbit, decode, encode
from telemetry.errors import PenumbraError

NS = 1_000_000_000
DAY_NS = 86_400 * NS
GOOD = EclipseForecast.from_omm(omm())


def checksummed(line: str) -> str:
    total = sum(int(c) if c in "0123456789" else c == "-" for c in line[:68])
    return line[:68] + str(total % 10)


def with_columns(number: int, first: int, text: str) -> tuple[str, str]:
    """Return the TLE with other characters from a column on, and a right checksum."""
    lines = list(LINES)
    line = lines[number - 1]
    lines[number - 1] = checksummed(line[: first - 1] + text + line[first - 1 + len(text) :])
    return lines[0], lines[1]


@pytest.mark.parametrize(
    "change",
    [
        {"NORAD_CAT_ID": 340000},
        {"NORAD_CAT_ID": 799501299},
        {"NORAD_CAT_ID": "T0001"},
        {"NORAD_CAT_ID": None},
        {"EPOCH": "2026-06-01T10:00:00Z"},
        {"EPOCH": "2026-06-01T10:00:00"},
        {"EPOCH": "2026-06-01T10:00:00+00:00"},
        {"EPOCH": "2026-152T10:00:00.000000"},
        {"EPOCH": "2026-152T10:00:00Z"},
        {"EPOCH": "2026-06-01T10:00:00.000000000"},
        {"EPOCH": "2026-06-01T09:59:60.000"},
        {"REV_AT_EPOCH": 123.0},
        {"REV_AT_EPOCH": "many"},
        {"EPHEMERIS_TYPE": ""},
        {"EPHEMERIS_TYPE": " "},
        {"EPHEMERIS_TYPE": "0"},
        {"EPHEMERIS_TYPE": 0.0},
        {"EPHEMERIS_TYPE": 2},
        {"EPHEMERIS_TYPE": None},
        {"CLASSIFICATION_TYPE": ""},
        {"CLASSIFICATION_TYPE": "UU"},
        {"CLASSIFICATION_TYPE": 1.5},
        {"OBJECT_ID": ""},
        {"ELEMENT_SET_NO": -1},
        {"MEAN_MOTION_DOT": "", "MEAN_MOTION_DDOT": 1e300},
        {"DECAY_DATE": None, "COMMENT": ["a", "b"], "USER_DEFINED_X": {"y": 1}},
        {"TIME_SYSTEM": "utc", "CENTER_NAME": "Earth", "REF_FRAME": "TEME", "REF_FRAME_EPOCH": ""},
        {"MEAN_ELEMENT_THEORY": "SGP/SGP4", "GM": 398600.4415, "AGOM": "0.0", "BTERM": 0},
        {"RA_OF_ASC_NODE": 231.0 - 360.0},
        {"INCLINATION": "+51.64", "ECCENTRICITY": ".0005"},
        {f"CX_{number}": 0.0 for number in range(50)},
    ],
)
def test_a_usable_message_gives_the_same_forecast(change: dict[str, object]) -> None:
    view = BusView()
    view.handle(decode("orbit", encode(BusOrbit(omm={**omm(), **change}))), 0.0)
    assert view.forecast is not None
    good, found = GOOD.next_umbra(JUNE_NS), view.forecast.next_umbra(JUNE_NS)
    assert good is not None
    assert found is not None
    assert abs(found.entry_ns - good.entry_ns) < 0.01 * NS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"TIME_SYSTEM": "TAI"}, "TIME_SYSTEM = 'TAI'; UTC is allowed"),
        ({"TIME_SYSTEM": "GPS"}, "TIME_SYSTEM = 'GPS'"),
        ({"TIME_SYSTEM": 5}, "TIME_SYSTEM = 5"),
        ({"time_system": "TAI"}, "'time_system'"),
        ({"MEAN_ELEMENT_THEORY": "DSST"}, "'DSST'; SGP4 or SGP/SGP4 is allowed"),
        ({"MEAN_ELEMENT_THEORY": "SGP4-XP"}, "MEAN_ELEMENT_THEORY = 'SGP4-XP'"),
        ({"EPHEMERIS_TYPE": 4}, "EPHEMERIS_TYPE = 4; 0 or 2"),
        ({"EPHEMERIS_TYPE": "4"}, "EPHEMERIS_TYPE = '4'"),
        ({"EPHEMERIS_TYPE": True}, "EPHEMERIS_TYPE = True"),
        ({"BTERM": 0.02}, "BTERM = 0.02 is of SGP4-XP"),
        ({"AGOM": "0.01"}, "AGOM = '0.01' is of SGP4-XP"),
        ({"CENTER_NAME": "MOON"}, "CENTER_NAME = 'MOON'; EARTH is allowed"),
        ({"REF_FRAME": "ITRF"}, "REF_FRAME = 'ITRF'; TEME"),
        ({"REF_FRAME_EPOCH": "2000-01-01T00:00:00"}, "REF_FRAME_EPOCH = .* must be left out"),
        (
            {"EPOCH": "2026-06-31T10:00:00"},
            "EPOCH = '2026-06-31T10:00:00': day 31 of month 6 of 2026, 1 to 30",
        ),
        ({"EPOCH": "2026-366T10:00:00"}, "day 366 of the year 2026, 1 to 365 is allowed"),
        ({"EPOCH": "2026-06-01T10:00:61"}, "EPOCH"),
        ({"EPOCH": "2026-06-01T24:00:00"}, "EPOCH"),
        ({"EPOCH": "0026-06-01T10:00:00"}, "year 26, 1957 to 2199"),
        ({"EPOCH": "\u0662\u0660\u0662\u0666-06-01T10:00:00"}, "EPOCH"),
        ({"EPOCH": 20260601}, "EPOCH = 20260601; a time such as"),
        ({"EPOCH": ""}, "EPOCH is missing"),
        ({"MEAN_MOTION": 1e300}, r"MEAN_MOTION = 1e\+300; 0.01 to 17.1 revolutions a day is allowed"),
        ({"MEAN_MOTION": 1e-300}, "MEAN_MOTION = 1e-300; 0.01 to 17.1"),
        ({"MEAN_MOTION": "1e999"}, "MEAN_MOTION = '1e999'; 0.01 to 17.1"),
        ({"MEAN_MOTION": None}, "MEAN_MOTION is missing"),
        ({"MEAN_MOTION": "15_5"}, "MEAN_MOTION = '15_5' is no number"),
        ({"MEAN_MOTION": "\u0661\u0665"}, "MEAN_MOTION = .* is no number"),
        ({"ECCENTRICITY": 1.0}, "ECCENTRICITY = 1.0; 0 to 0.9999999 is allowed"),
        ({"ECCENTRICITY": 0.5}, "perigee at -29"),
        ({"INCLINATION": 251.64}, "INCLINATION = 251.64; 0 to 180 deg"),
        ({"RA_OF_ASC_NODE": 408.0}, "RA_OF_ASC_NODE = 408.0; -360 to 360 deg"),
        ({"MEAN_ANOMALY": float("nan")}, "MEAN_ANOMALY = nan; -360 to 360 deg"),
        ({"ARG_OF_PERICENTER": True}, "ARG_OF_PERICENTER = True is no number"),
        ({"BSTAR": 1e300}, r"BSTAR = 1e\+300; -10 to 10"),
        ({"BSTAR": []}, r"BSTAR = \[\] is no number"),
    ],
)
def test_a_message_that_means_something_else_is_refused_and_the_forecast_stays(
    change: dict[str, object], words: str
) -> None:
    view = BusView()
    view.handle(BusOrbit(omm=omm()), 0.0)
    forecast = view.forecast
    with pytest.raises(PenumbraError, match=words) as caught:
        view.handle(decode("orbit", encode(BusOrbit(omm={**omm(), **change}))), 1.0)
    assert caught.value.mend
    assert view.forecast is forecast


def test_the_fraction_of_an_epoch_counts() -> None:
    early, late = (
        Ephemeris.from_omm({**omm(), "EPOCH": f"2026-06-01T10:00:{second}"}).epoch_ns
        for second in ("00.000000001", "60.5Z")
    )
    assert early == JUNE_NS + 1
    assert late == JUNE_NS + 60 * NS + NS // 2


def test_every_day_of_the_calendar_is_that_of_the_library() -> None:
    first = dt.datetime(1957, 1, 1, tzinfo=dt.UTC)
    for days in range(0, 243 * 365, 17):
        date = first + dt.timedelta(days=days)
        t_ns = round(date.timestamp()) * NS
        for text in (f"{date:%Y-%m-%d}", f"{date:%Y-%j}"):
            assert Elements.from_omm({**omm(), "EPOCH": f"{text}T00:00:00"}).epoch_ns == t_ns


OTHER = "2 25544  51.6416 247.4627 0006703 130.5360 325.0288 15.72125391563537"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((LINES[0], OTHER), "line 1 is of satellite '99001', line 2 of '25544'"),
        (with_columns(1, 21, "000"), "columns 21 to 23: day 0 of the year 2026, 1 to 365 is allowed"),
        (with_columns(1, 21, "999"), "day 999 of the year 2026"),
        (with_columns(1, 21, "366"), "day 366 of the year 2026"),
        (with_columns(1, 19, "xx"), "columns 18 to 32"),
        (with_columns(1, 63, "4"), "column 63: ephemeris type 4"),
        (with_columns(1, 63, "x"), "columns 62 to 63"),
        (with_columns(1, 60, "+9"), "columns 54 to 61: drag"),
        (with_columns(1, 54, " x"), "columns 53 to 61"),
        (with_columns(2, 9, "251.6416"), "columns 9 to 16: inclination 251.6416; 0 to 180 deg is allowed"),
        (with_columns(2, 9, " -1.6416"), "columns 8 to 16"),
        (with_columns(2, 18, "408.0000"), "ascension of the node 408.0000"),
        (with_columns(2, 35, "361.0000"), "argument of perigee 361.0000"),
        (with_columns(2, 44, "999.0000"), "mean anomaly 999.0000"),
        (with_columns(2, 27, "000 x00"), "columns 26 to 33"),
        (with_columns(2, 27, "9000000"), "perigee at -"),
        (with_columns(2, 53, "99.00000000"), "mean motion 99.00000000; 0.01 to 17.1"),
        (with_columns(2, 53, " 0.00000000"), "mean motion 0.00000000"),
        (with_columns(2, 17, "9"), "columns 17 to 25"),
    ],
)
def test_a_tle_out_of_range_or_of_two_satellites_is_refused(lines: tuple[str, str], words: str) -> None:
    with pytest.raises(PenumbraError, match=words) as caught:
        EclipseForecast.from_tle(*lines)
    assert str(caught.value).count("TLE")
    assert caught.value.mend


@pytest.mark.parametrize("code", [0xA0, 0x660, 0xFF10, 0x09, 0x00, 0x2212, 0x7F, 0x1F680])
@pytest.mark.parametrize("number", [1, 2])
def test_a_character_that_is_not_of_a_tle_is_named(number: int, code: int) -> None:
    lines = list(LINES)
    lines[number - 1] = lines[number - 1][:23] + chr(code) + lines[number - 1][24:]
    with pytest.raises(PenumbraError, match=f"TLE line {number}: .* U\\+{code:04X} in column 24") as caught:
        EclipseForecast.from_tle(lines[0], lines[1])
    assert "69" not in caught.value.what


@pytest.mark.parametrize(
    "lines",
    [
        with_columns(1, 63, " "),
        with_columns(1, 63, "2"),
        with_columns(1, 34, "garbage!"),
        with_columns(1, 10, "        "),
        with_columns(1, 65, "    "),
    ],
)
def test_a_tle_with_oddities_that_do_not_move_the_satellite_gives_the_same_forecast(
    lines: tuple[str, str],
) -> None:
    assert EclipseForecast.from_tle(*lines).next_umbra(JUNE_NS) == EclipseForecast.from_tle(
        *LINES
    ).next_umbra(JUNE_NS)


def test_the_tles_of_the_verification_set_are_read_as_sgp4_reads_them() -> None:
    # SGP4-VER.TLE: Vallado et al., AIAA 2006-6753, as the package carries it.
    text = resources.files("sgp4").joinpath("SGP4-VER.TLE").read_text()
    elements = [line[:69] for line in text.splitlines() if line[:2] in {"1 ", "2 "}]
    compared = refused = 0
    for line1, line2 in zip(elements[::2], elements[1::2], strict=True):
        lines = checksummed(line1), checksummed(line2)
        try:
            ours = Ephemeris.from_tle(*lines)
        except PenumbraError:
            refused += 1
            continue
        theirs = Satrec.twoline2rv(*lines, WGS72)
        epoch = np.array([theirs.jdsatepoch]), np.array([theirs.jdsatepochF])
        _, position, _ = theirs.sgp4_array(*epoch)
        apart_km = np.linalg.norm(ours.satellite_teme_km(ours.epoch_ns) - position[0])
        assert apart_km < 0.001
        compared += 1
    assert compared >= 29, refused
