"""No value of any field of `bus/orbit` ends the node: it is refused and the forecast stays, or it is one."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from node.bus_view import BusView
from telemetry.bus import BusOrbit, decode
from telemetry.errors import PenumbraError

JUNE_NS = 1_780_308_000_000_000_000
OMM: dict[str, Any] = {
    "CCSDS_OMM_VERS": "2.0",
    "CREATION_DATE": "2026-06-01T12:00:00",
    "ORIGINATOR": "BENCH",
    "OBJECT_NAME": "PENUMBRA",
    "OBJECT_ID": "2026-001A",
    "CENTER_NAME": "EARTH",
    "REF_FRAME": "TEME",
    "TIME_SYSTEM": "UTC",
    "MEAN_ELEMENT_THEORY": "SGP4",
    "EPOCH": "2026-06-01T10:00:00.000000",
    "MEAN_MOTION": 15.5,
    "ECCENTRICITY": 0.0005,
    "INCLINATION": 51.64,
    "RA_OF_ASC_NODE": 231.0,
    "ARG_OF_PERICENTER": 10.0,
    "MEAN_ANOMALY": 132.0,
    "EPHEMERIS_TYPE": 0,
    "CLASSIFICATION_TYPE": "U",
    "NORAD_CAT_ID": 99001,
    "ELEMENT_SET_NO": 999,
    "REV_AT_EPOCH": 123,
    "BSTAR": 1e-4,
    "MEAN_MOTION_DOT": 1e-5,
    "MEAN_MOTION_DDOT": 0,
}
NAMES = (*OMM, "REF_FRAME_EPOCH", "BTERM", "AGOM", "GM", "COMMENT")
HOSTILE: list[Any] = [
    None, True, 0, -1, 1, 2, 4, 2**63, 2**64 - 1, -(2**63), 1e-308, 5e-324, 1e300, -1e300, 1.5, math.nan,
    math.inf, -math.inf, "", " ", "U", "UU", "0", "-1", "1e-308", "1e300", "1e999", "nan", "inf", "9" * 5000,
    "\x00", "\u0661\u0665", "\u00a0", [], [1], {}, {"a": 1}, b"", b"\xff", "2026-06-01T10:00:00",
]  # fmt: skip
values = (
    st.sampled_from(HOSTILE)
    | st.floats()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=30)
    | st.floats().map(str)
    | st.lists(st.integers(0, 9), max_size=3)
)


def take(message: dict[str, Any]) -> None:
    view = BusView()
    view.handle(BusOrbit(omm=OMM), 0.0)
    before, refused = view.forecast, False
    assert before is not None
    try:
        view.handle(decode("orbit", msgspec.msgpack.encode(message)), 1.0)
    except (ValueError, PenumbraError):
        refused = True
    after = view.forecast
    assert after is before or not refused
    assert after is not None
    assert 0 < after.period_s < 1e8
    if after is not before and after.is_usable(JUNE_NS):
        sunlit = view.sunlit(JUNE_NS)
        assert sunlit is not None
        assert 0 <= sunlit <= 1
        assert view.eclipses(JUNE_NS).source == "forecast"


def test_every_field_with_every_hostile_value() -> None:
    for name in NAMES:
        for value in HOSTILE:
            take({"omm": {**OMM, name: value}})


@given(name=st.sampled_from(NAMES), value=values)
@example(name="CLASSIFICATION_TYPE", value="")
@example(name="CLASSIFICATION_TYPE", value="UU")
@example(name="CLASSIFICATION_TYPE", value=1.5)
@example(name="MEAN_MOTION", value=1e300)
def test_no_value_of_a_field_is_an_error_of_ours(name: str, value: Any) -> None:
    take({"omm": {**OMM, name: value}})


@given(
    st.dictionaries(
        st.sampled_from(["line1", "line2", "omm", "other"]), values | st.text("12 .-", max_size=69)
    )
)
def test_no_value_of_the_message_is_an_error_of_ours(message: dict[str, Any]) -> None:
    take(message)


@given(st.integers(0, 1), st.integers(0, 68), st.characters(min_codepoint=0, max_codepoint=0x2FF))
def test_no_character_of_a_tle_is_an_error_of_ours(number: int, column: int, character: str) -> None:
    lines = [
        "1 25544U 98067A   08264.51782528 -.00002182  00000-0 -11606-4 0  2927",
        "2 25544  51.6416 247.4627 0006703 130.5360 325.0288 15.72125391563537",
    ]
    spoilt = lines[number][:column] + character + lines[number][column + 1 :]
    digits = sum(int(c) if c in "0123456789" else c == "-" for c in spoilt[:68])
    lines[number] = spoilt[:68] + str(digits % 10)
    take({"line1": lines[0], "line2": lines[1]})
