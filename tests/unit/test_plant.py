"""The plant: geometry, shadow, energy, heat and contacts against laws and brute force."""

from __future__ import annotations

import math
import warnings
from typing import Any

import msgspec
import numpy as np
import pytest
from skyfield.api import EarthSatellite, load, wgs84

from hil.plant.contact import contact_windows, elevation_deg
from hil.plant.eps import OCV_CELL_V, OCV_SOC, PowerSystem, open_circuit_v
from hil.plant.orbit import Geometry, TrueOrbit, geodetic
from hil.plant.plant import TAIL_S, Plant, PlantState
from hil.plant.shadow import EQUATOR_KM, POLE_KM, SUN_RADIUS_KM, sunlit_fraction
from hil.plant.thermal import STEFAN_BOLTZMANN_W_M2_K4, HeatModel
from hil.scenario import Mount, Scenario, Thermal, load_scenario
from node.power.forecast import EclipseForecast
from telemetry import bus

NS = 1_000_000_000
SCENARIO = load_scenario("default")
SHORT = load_scenario("default-short")
CRAFT = SCENARIO.spacecraft


@pytest.fixture
def plant() -> Plant:
    return Plant(SCENARIO)


def changed(part: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(part, **changes)


def with_craft(**changes: Any) -> Scenario:
    scenario: Scenario = changed(SCENARIO, spacecraft=changed(CRAFT, **changes))
    return scenario


def fly(plant: Plant, scenario: Scenario, step_s: float, load: Any = lambda t_s: 9.0) -> PlantState:
    t_ns, state = scenario.start_ns, plant.state
    while t_ns < scenario.end_ns:
        t_ns = min(t_ns + round(step_s * NS), scenario.end_ns)
        state = plant.step(t_ns, load((t_ns - scenario.start_ns) / NS))
    return state


# Orbit and shadow.


def test_positions_are_skyfields_own() -> None:
    line1, line2 = SCENARIO.tle()
    times = SCENARIO.start_ns + np.arange(0, 6000, 700, dtype=np.int64) * NS
    latitude, longitude, height = geodetic(TrueOrbit(line1, line2).geometry(times).satellite)
    timescale = load.timescale(builtin=True)
    satellite = EarthSatellite(line1, line2, ts=timescale)
    for i in range(len(times)):
        moment = timescale.utc(2026, 6, 1, 10, 0, 700 * i)
        place = wgs84.geographic_position_of(satellite.at(moment))
        assert latitude[i] == pytest.approx(place.latitude.degrees, abs=1e-6)
        assert longitude[i] == pytest.approx(place.longitude.degrees, abs=1e-6)
        assert height[i] == pytest.approx(place.elevation.km, abs=1e-5)


def test_height_is_right_at_a_pole() -> None:
    latitude, _, height = geodetic(np.array([[0.0, 0.0, POLE_KM + 400.0], [EQUATOR_KM + 400.0, 0.0, 0.0]]))
    assert latitude == pytest.approx([90.0, 0.0])
    assert height == pytest.approx([400.0, 400.0], abs=1e-6)


def test_shadow_edge_of_the_ellipsoid_in_closed_form() -> None:
    # Sun in the equator's plane at 1 au: over the pole the shadow is as high as the polar radius, less what
    # the cone has narrowed; half the Sun shows about where its centre is on the limb.
    sun_km = 149_597_870.7
    x = -2000.0
    for axis, radius in ((1, EQUATOR_KM), (2, POLE_KM)):
        narrowing = abs(x) * SUN_RADIUS_KM / sun_km
        offsets = np.array([radius - 3 * narrowing, radius, radius + 3 * narrowing])
        satellite = np.zeros((3, 3))
        satellite[:, 0], satellite[:, axis] = x, offsets
        sun = np.tile([sun_km, 0.0, 0.0], (3, 1))
        dark, half, lit = sunlit_fraction(Geometry(satellite, sun, np.zeros((3, 3))))
        assert dark == 0.0
        assert half == pytest.approx(0.5, abs=0.01)
        assert lit == 1.0


def test_day_side_is_lit_however_low() -> None:
    sun = np.array([[149_597_870.7, 0.0, 0.0]])
    assert sunlit_fraction(Geometry(np.array([[6500.0, 0.0, 0.0]]), sun, sun)) == 1.0


@pytest.mark.parametrize("scenario", [SCENARIO, SHORT], ids=["default", "short"])
def test_events_bound_the_umbra_and_the_forecast_knows_them(scenario: Scenario) -> None:
    plant = Plant(scenario)
    (event, *_) = plant.umbra_events()
    coming = EclipseForecast.from_tle(*scenario.tle()).next_umbra(scenario.start_ns)
    assert coming is not None
    for field in ("penumbra_entry_ns", "entry_ns", "exit_ns", "penumbra_exit_ns"):
        assert abs(getattr(coming, field) - getattr(event, field)) / NS < 1.0
    assert not plant.step(event.entry_ns - 1, 5.0).umbra
    state = plant.step(event.entry_ns, 5.0)
    assert state.umbra
    assert state.sunlit < 0.2
    assert plant.step(event.entry_ns + 2 * NS, 5.0).sunlit == 0.0
    assert not plant.step(event.exit_ns, 5.0).umbra


def test_default_flight_has_sun_then_a_whole_eclipse_then_sun() -> None:
    plant = Plant(SCENARIO)
    assert plant.state.sunlit == 1.0
    (event,) = [e for e in plant.umbra_events() if e.entry_ns < SCENARIO.end_ns]
    assert 0.35 < (event.entry_ns - SCENARIO.start_ns) / NS / SCENARIO.period_s < 0.50
    assert event.penumbra_exit_ns < SCENARIO.end_ns


# Contacts.


@pytest.mark.parametrize("scenario", [SCENARIO, SHORT], ids=["default", "short"])
def test_contacts_come_at_the_start_between_and_near_the_end(scenario: Scenario) -> None:
    plant = Plant(scenario)
    assert plant.state.in_contact
    inside = [w for w in plant.contact_windows if w.start_ns < scenario.end_ns]
    assert len(inside) >= 3
    assert scenario.end_ns - inside[-1].end_ns < 0.1 * scenario.duration_s * NS
    assert all(w.duration_s > 120 for w in inside)


def test_windows_agree_with_brute_force_by_skyfield() -> None:
    line1, line2 = SCENARIO.tle()
    grid = SCENARIO.start_ns + np.arange(0, 5578, dtype=np.int64) * NS
    windows = contact_windows(SCENARIO.stations, grid, TrueOrbit(line1, line2).geometry(grid).satellite)
    timescale = load.timescale(builtin=True)
    moments = timescale.utc(2026, 6, 1, 10, 0, np.arange(0, 5578))
    satellite = EarthSatellite(line1, line2, ts=timescale)
    for station in SCENARIO.stations:
        place = wgs84.latlon(station.latitude_deg, station.longitude_deg, elevation_m=station.altitude_m)
        altitude, _, _ = (satellite - place).at(moments).altaz()
        expected = altitude.degrees >= station.min_elevation_deg
        ours = np.zeros(len(grid), dtype=bool)
        for window in windows:
            if window.station == station.name:
                ours |= (grid >= window.start_ns) & (grid < window.end_ns)
        assert np.count_nonzero(expected) > 100
        assert np.count_nonzero(ours != expected) <= 2


def test_elevation_is_90_overhead_and_0_on_the_horizon() -> None:
    station = changed(SCENARIO.stations[0], latitude_deg=0.0, longitude_deg=0.0, altitude_m=0.0)
    places = np.array([[EQUATOR_KM + 400.0, 0.0, 0.0], [EQUATOR_KM, 1000.0, 0.0]])
    assert elevation_deg(station, places) == pytest.approx([90.0, 0.0], abs=1e-9)


def test_contact_state_follows_the_windows(plant: Plant) -> None:
    first, second, *_ = plant.contact_windows
    assert plant.state.station == first.station
    assert plant.state.next_contact == second
    between = plant.step(first.end_ns, 5.0)
    assert (between.in_contact, between.station) == (False, "")
    assert plant.step(second.start_ns, 5.0).station == second.station


# Energy.


def test_every_joule_is_accounted_for(plant: Plant) -> None:
    fly(plant, SCENARIO, 6.0, lambda t_s: 12.0 if t_s % 1000 < 500 else 4.4)
    account = plant.energy
    assert account.array_j > 50_000
    assert min(account.resistance_j, account.conversion_j, account.coulombic_j) > 10
    assert abs(account.imbalance_j()) < 1e-3
    assert account.unserved_j == pytest.approx(0.0, abs=1e-6)


def test_stored_energy_is_the_area_under_the_voltage_curve(plant: Plant) -> None:
    state = fly(plant, SCENARIO, 6.0, lambda _: 11.0)
    soc = np.linspace(CRAFT.battery.soc_start, state.eps.battery_soc, 20_001)
    volts = 2 * np.interp(soc, OCV_SOC, OCV_CELL_V)
    capacity_ah = CRAFT.battery.capacity_wh / 7.2
    expected_j = np.trapezoid(volts, soc) * capacity_ah * 3600
    assert plant.energy.stored_j == pytest.approx(expected_j, rel=1e-3)


def test_a_full_battery_curtails_the_array() -> None:
    craft = with_craft(battery=changed(CRAFT.battery, soc_start=1.0))
    state = Plant(craft).step(craft.start_ns + 60 * NS, 6.0)
    assert state.eps.battery_soc == 1.0
    assert state.eps.array_w == pytest.approx(10.0)
    assert state.eps.array_available_w > 20.0


def test_an_empty_battery_leaves_load_unserved_and_nothing_negative() -> None:
    craft = with_craft(battery=changed(CRAFT.battery, capacity_wh=1.0, soc_start=0.2, soc_floor=0.1))
    plant = Plant(craft)
    worst = 1.0
    for second in range(0, 4400, 20):
        state = plant.step(craft.start_ns + second * NS, 200.0)
        worst = min(worst, state.eps.battery_soc)
        assert all(math.isfinite(v) for v in msgspec.structs.astuple(state.eps))
    assert worst == pytest.approx(0.0, abs=1e-9)
    assert plant.energy.unserved_j > 1000
    assert abs(plant.energy.imbalance_j()) < 1e-3
    assert state.eps.below_floor_s > 3000


def test_charging_current_is_limited() -> None:
    craft = with_craft(
        array=changed(CRAFT.array, area_m2=1.0), battery=changed(CRAFT.battery, soc_start=0.3, soc_floor=0.1)
    )
    state = Plant(craft).step(craft.start_ns + 10 * NS, 4.0)
    assert state.eps.battery_a == pytest.approx(0.5 * 24.0 / 7.2)


def test_open_circuit_voltage_rises_with_charge() -> None:
    volts = [open_circuit_v(soc, 2) for soc in np.linspace(0, 1, 101)]
    assert volts == sorted(volts)
    assert (volts[0], volts[-1]) == pytest.approx((6.0, 8.36))


def test_array_power_follows_its_data_sheet() -> None:
    array = changed(CRAFT.array, degradation=0.1)
    system = PowerSystem(array, CRAFT.battery, 4.0)
    rated_w = 1361.0 * 0.088 * 0.85 * 0.29 * 0.9 * 0.93
    assert system.full_sun_w(1.0, 28.0) == pytest.approx(rated_w)
    assert system.full_sun_w(0.5, 28.0) == pytest.approx(rated_w / 2)
    assert system.full_sun_w(1.0, 68.0) == pytest.approx(rated_w * 0.9)
    assert system.full_sun_w(-0.5, 28.0) == 0.0


def test_mounts_rank_as_they_must() -> None:
    power = {
        mount: Plant(with_craft(array=changed(CRAFT.array, mount=mount))).state.array_sun_w for mount in Mount
    }
    assert power[Mount.SUN_TRACKING] > power[Mount.SINGLE_AXIS] > power[Mount.ZENITH] > 0


def test_greedy_full_power_breaks_the_floor_that_the_least_keeps() -> None:
    greedy, least = Plant(SCENARIO), Plant(SCENARIO)
    assert fly(greedy, SCENARIO, 6.0, lambda _: 12.0).eps.below_floor_s > 300
    assert fly(least, SCENARIO, 6.0, lambda _: 4.4).eps.below_floor_s == 0


# Heat.


def test_heat_settles_where_radiation_balances() -> None:
    settings = Thermal(sun_view=0.0, earth_view=0.0)
    heat = HeatModel(settings)
    for _ in range(40_000):
        heat.advance(1.0, irradiance=0.0, sun_above_earth=-1.0, payload_w=10.0)
    radiator_k = (10.0 / (settings.emissivity * STEFAN_BOLTZMANN_W_M2_K4 * settings.radiator_area_m2)) ** 0.25
    assert heat.state.radiator_c == pytest.approx(radiator_k - 273.15, abs=0.1)
    assert heat.state.board_c - heat.state.radiator_c == pytest.approx(
        10.0 / settings.conductance_w_k, abs=0.1
    )


def test_sun_and_work_warm() -> None:
    def after(irradiance: float, payload_w: float) -> float:
        heat = HeatModel(Thermal())
        for _ in range(2000):
            heat.advance(1.0, irradiance=irradiance, sun_above_earth=irradiance, payload_w=payload_w)
        return heat.state.board_c

    assert after(1.0, 12.0) > after(1.0, 4.0) > after(0.0, 4.0)


# The whole.


@pytest.mark.parametrize("step_s", [0.37, 1.0, 17.3, 250.0])
def test_results_do_not_depend_on_the_step(step_s: float) -> None:
    reference, other = Plant(SHORT), Plant(SHORT)
    a, b = fly(reference, SHORT, 6.0), fly(other, SHORT, step_s)
    assert b.eps.battery_soc == pytest.approx(a.eps.battery_soc, abs=1e-5)
    assert b.thermal.board_c == pytest.approx(a.thermal.board_c, abs=1e-3)
    assert b.eps.array_c == pytest.approx(a.eps.array_c, abs=1e-3)


def test_the_same_inputs_give_the_same_flight(plant: Plant) -> None:
    again = Plant(SCENARIO)
    assert fly(plant, SCENARIO, 60.0) == fly(again, SCENARIO, 60.0)


def test_bus_messages_survive_the_wire_at_every_moment(plant: Plant) -> None:
    assert bus.decode("orbit", bus.encode(plant.orbit)) == plant.orbit
    for second in range(0, int(SCENARIO.duration_s), 60):
        state = plant.step(SCENARIO.start_ns + second * NS, 8.0)
        for channel, message in state.messages(60.0).items():
            assert bus.decode(channel, bus.encode(message)) == message
        assert -90 <= state.latitude_deg <= 90
        assert 400 < state.altitude_km < 450


def test_bus_says_what_the_state_says(plant: Plant) -> None:
    state = plant.step(SCENARIO.start_ns + 100 * NS, 8.0)
    messages = state.messages(60.0)
    assert set(messages) == {"time", "eps", "thermal", "contact"}
    assert messages["time"] == bus.BusTime(t_ns=state.t_ns, rate=60.0)
    eps = messages["eps"]
    assert isinstance(eps, bus.BusEps)
    assert (eps.battery_soc, eps.platform_w, eps.soc_floor) == (state.eps.battery_soc, 4.0, 0.7)
    assert eps.battery_a > 0
    contact = messages["contact"]
    assert isinstance(contact, bus.BusContact)
    assert (contact.in_contact, contact.station) == (True, "Maspalomas")
    assert contact.next_start_ns == plant.contact_windows[1].start_ns


@pytest.mark.parametrize("load_w", [math.nan, math.inf, -1.0])
def test_a_load_that_cannot_be_is_refused(plant: Plant, load_w: float) -> None:
    with pytest.raises(ValueError, match="load"):
        plant.step(SCENARIO.start_ns + NS, load_w)


def test_time_goes_forward_and_ends(plant: Plant) -> None:
    plant.step(SCENARIO.start_ns + 5 * NS, 4.0)
    with pytest.raises(ValueError, match="t_ns"):
        plant.step(SCENARIO.start_ns + 4 * NS, 4.0)
    plant.step(SCENARIO.end_ns + TAIL_S * NS, 4.0)
    with pytest.raises(ValueError, match="t_ns"):
        plant.step(SCENARIO.end_ns + (TAIL_S + 2) * NS, 4.0)


def test_the_ephemeris_loads_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        orbit = TrueOrbit(*SCENARIO.tle())
        assert np.all(np.isfinite(orbit.geometry(np.array([SCENARIO.start_ns])).sun))


def test_a_flight_that_decays_is_an_error_and_not_a_nan() -> None:
    lines = changed(SCENARIO, orbit=changed(SCENARIO.orbit, altitude_km=155.0, bstar=0.9)).tle()
    with pytest.raises(ValueError, match="decays"):
        TrueOrbit(*lines).geometry(SCENARIO.start_ns + np.arange(0, 40 * 86_400, 86_400, dtype=np.int64) * NS)
