"""What the broker had kept, beside what is live."""

from __future__ import annotations

import pytest
from test_eclipse_forecast import JUNE, tle

from node.bus_view import STALE_S, BusView
from telemetry.bus import BusContact, BusEps, BusMessage, BusOrbit, BusThermal, BusTime

S = 1_000_000_000
DAY_NS = 86_400 * S
EPS = BusEps(
    t_ns=JUNE, battery_soc=0.9, battery_v=15.0, battery_a=0.1, battery_wh=100.0, array_w=20.0,
    array_sun_w=20.0, platform_w=5.0, soc_floor=0.7,
)  # fmt: skip


def orbit(days: float) -> BusOrbit:
    """Return elements with an epoch so many days after `JUNE`."""
    line1, line2 = tle(JUNE + round(days * DAY_NS))
    return BusOrbit(line1=line1, line2=line2)


@pytest.mark.parametrize(
    "message", [BusTime(t_ns=JUNE), EPS, BusThermal(t_ns=JUNE, board_c=20.0, radiator_c=5.0)]
)
def test_a_retained_message_is_no_time_and_no_reading(message: BusMessage) -> None:
    view = BusView()
    assert view.handle_retained(message, 100.0, JUNE, 1.0) == "a live one is needed"
    assert (view.eps, view.board_c(100.0)) == (None, None)


@pytest.mark.parametrize(
    ("mission_s", "rate", "taken"),
    [
        (0.0, 1.0, True),
        (STALE_S, 1.0, True),
        (STALE_S + 1, 1.0, False),
        (-STALE_S - 1, 1.0, False),
        (60 * STALE_S, 60.0, True),
        (None, 1.0, False),
    ],
)
def test_a_retained_contact_ages_by_its_own_stamp(mission_s: float | None, rate: float, taken: bool) -> None:
    view = BusView()
    mission_ns = None if mission_s is None else JUNE + round(mission_s * S)
    why = view.handle_retained(BusContact(t_ns=JUNE, in_contact=True), 100.0, mission_ns, rate)
    assert (why is None, view.contact is not None) == (taken, taken)
    if taken:
        assert mission_s is not None
        assert view.contact_heard_s == 100.0 - mission_s / rate


def test_a_retained_contact_does_not_replace_a_younger_one() -> None:
    view = BusView()
    view.handle(BusContact(t_ns=JUNE, in_contact=False), 100.0)
    assert view.handle_retained(BusContact(t_ns=JUNE - S, in_contact=True), 100.0, JUNE, 1.0) is None
    assert view.contact is not None
    assert not view.contact.in_contact


@pytest.mark.parametrize(
    ("in_use", "retained", "known", "taken"),
    [
        (None, 0.0, False, True),
        (None, -300.0, True, True),
        (-1.0, -2.0, True, False),
        (-2.0, -1.0, True, True),
        (-1.0, 3.0, True, False),
        (-1.0, -0.5, False, False),
    ],
)
def test_retained_elements_are_taken_only_if_nearer_than_those_in_use(
    in_use: float | None, retained: float, known: bool, taken: bool
) -> None:
    view = BusView()
    if in_use is not None:
        view.handle(orbit(in_use), 0.0)
    before = view.forecast
    for _ in range(2):  # each renewed subscription brings it again
        why = view.handle_retained(orbit(retained), 0.0, JUNE if known else None, 1.0)
        assert (why is None) == taken
    assert (view.forecast is not before) == taken
    # However they came, they are used only while they are young enough.
    assert (view.eclipses(JUNE).source == "forecast") == (retained > -20 or not taken)


def test_live_elements_replace_those_in_use_whatever_their_epoch() -> None:
    view = BusView()
    view.handle(orbit(0.0), 0.0)
    before = view.forecast
    view.handle(orbit(-2.0), 0.0)
    assert view.forecast is not before
