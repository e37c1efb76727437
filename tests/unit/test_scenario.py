"""Scenarios: the packaged ones hold, and a wrong one is refused with file, field, value and way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hil.scenario import PACKAGED, Scenario, load_scenario, packaged_scenarios
from hil.tle import mean_motion_rad_min
from node.power.elements import altitude_km, tle_checksum
from node.power.ephemeris import Ephemeris
from telemetry.commands import Infer
from telemetry.errors import PenumbraError
from telemetry.sampling import Sampling
from telemetry.strict_toml import load_toml

LINE1, LINE2 = load_scenario("default").tle()


def write(tmp_path: Path, old: str, new: str) -> Path:
    """Write the default scenario with one piece of it changed; the piece must be there."""
    source = Path(__file__).parents[2] / "hil" / "scenarios" / "default.toml"
    text = source.read_text()
    assert old in text
    path = tmp_path / "changed.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_packaged_scenarios_load() -> None:
    assert packaged_scenarios() == ["default", "default-short"]
    for name in packaged_scenarios():
        scenario = load_scenario(name)
        assert scenario.scenario.name == name
        assert len({j.id for j in scenario.jobs.listed()}) == scenario.jobs.count
        assert all(j.prompt and j.max_tokens > 0 for j in scenario.jobs.listed())


def test_default_flight_is_one_revolution_of_a_minute_and_a_half() -> None:
    scenario = load_scenario("default")
    assert scenario.duration_s == pytest.approx(5578, abs=5)
    assert scenario.wall_s == pytest.approx(93, abs=1)
    assert scenario.end_ns - scenario.start_ns == pytest.approx(scenario.duration_s * 1e9, abs=1e6)


def test_short_flight_is_half_a_minute() -> None:
    assert 25 <= load_scenario("default-short").wall_s <= 35


def test_jobs_go_round_prompts_and_lengths() -> None:
    jobs = load_scenario("default").jobs
    listed = jobs.listed()
    assert [j.max_tokens for j in listed[:5]] == [96, 128, 160, 192, 96]
    assert listed[24].prompt == listed[0].prompt
    assert (listed[0].id, listed[63].id) == ("job-001", "job-064")


def test_jobs_may_have_sampling_priority_and_a_deadline(tmp_path: Path) -> None:
    path = write(tmp_path, "count = 64", "count = 64\ndeadline_s = [0, 600.0]")
    lines = path.read_text().splitlines()
    given = {
        "sampling = ": 'sampling = [{}, {temperature = 0.7, seed = 3, stop = ["."]}]',
        "priority = ": "priority = [5, 5, 9]",
    }
    path.write_text("\n".join(given.get(line[:11], line) for line in lines))
    listed = load_scenario(path).jobs.listed()
    assert [j.priority for j in listed[:4]] == [5, 5, 9, 5]
    assert [j.deadline_s for j in listed[:3]] == [None, 600.0, None]
    assert listed[0].command(7) == Infer(
        job="job-001", prompt=listed[0].prompt, max_tokens=listed[0].max_tokens
    )
    assert listed[1].command(7) == Infer(
        job="job-002",
        prompt=listed[1].prompt,
        max_tokens=listed[1].max_tokens,
        sampling=Sampling(temperature=0.7, seed=3, stop=(".",)),
        deadline_ns=7 + 600 * 10**9,
    )
    assert listed[2].command(7).priority == 9


def test_a_tle_from_elements_keeps_them() -> None:
    scenario = load_scenario("default")
    assert altitude_km(float(LINE2[52:63])) == pytest.approx(420.0, abs=1e-3)
    assert float(LINE2[8:16]) == pytest.approx(51.64)
    assert float(LINE2[17:25]) == pytest.approx(231.0)
    assert float(LINE2[43:51]) == pytest.approx(132.0)
    assert abs(Ephemeris.from_tle(LINE1, LINE2).epoch_ns - scenario.start_ns) < 2_000_000
    assert mean_motion_rad_min(420.0) * scenario.period_s / 60 == pytest.approx(6.283185, abs=1e-4)


def test_an_orbit_may_come_as_tle(tmp_path: Path) -> None:
    path = write(tmp_path, "altitude_km = 420.0", f'line1 = "{LINE1}"\nline2 = "{LINE2}"')
    text = path.read_text().replace("inclination_deg = 51.64\n", "")
    path.write_text(text)
    assert load_scenario(path).tle() == (LINE1, LINE2)


def test_natural_upsets_are_flux_times_cross_section_times_bits_times_time() -> None:
    radiation = load_scenario("default").radiation
    expected = radiation.proton_flux_cm2_s * radiation.cross_section_cm2_bit * 3e9 * 5578
    assert radiation.natural_upsets(3e9, 5578) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("old", "new", "field", "says"),
    [
        ("altitude_km = 420.0", "altitude_km = 140.0", "orbit.altitude_km", "perigee"),
        ("eccentricity = 0.0005", "eccentricity = 0.05", "orbit.altitude_km", "150 km"),
        ("eccentricity = 0.0005", "eccentricity = 1.0", "orbit.eccentricity", "up to, but not, 1"),
        ("eccentricity = 0.0005", "eccentricity = -0.1", "orbit.eccentricity", "-0.1"),
        ("inclination_deg = 51.64", "inclination_deg = 190.0", "orbit.inclination_deg", "0 to 180"),
        ("inclination_deg = 51.64", "", "orbit.inclination_deg", "missing"),
        ("altitude_km = 420.0", "altitude_km = nan", "orbit.altitude_km", "finite"),
        ("altitude_km = 420.0", "altitude_km = 90000.0", "orbit.altitude_km", "50000"),
        ("altitude_km = 420.0", f'altitude_km = 420.0\nline1 = "{LINE1}"', "orbit", "both line1 and line2"),
        (
            "altitude_km = 420.0",
            f'altitude_km = 420.0\nline1 = "{LINE1}"\nline2 = "{LINE2}"',
            "orbit",
            "both TLE lines and elements",
        ),
        ("raan_deg = 231.0", "raan_deg = 400.0", "orbit.raan_deg", "400.0"),
        ("soc_floor = 0.70", "soc_floor = 0.95", "spacecraft.battery.soc_floor", "below soc_start 0.88"),
        ("soc_floor = 0.70", "soc_floor = 1.5", "spacecraft.battery.soc_floor", "1.5"),
        ("speed = 60.0", "speed = 0.0", "scenario.speed", "0.0"),
        ("speed = 60.0", "speed = -1.0", "scenario.speed", ">= 0.01"),
        ("speed = 60.0", 'speed = "fast"', "scenario.speed", "'fast'"),
        ("speed = 60.0", "sped = 60.0", "'sped'", "did you mean 'speed'"),
        ("duration_orbits = 1.0", "duration_orbits = 0", "scenario.duration_orbits", "> 0"),
        ("duration_orbits = 1.0", "duration_orbits = inf", "scenario.duration_orbits", "finite"),
        ("epoch = 2026-06-01T10:00:00Z", "epoch = 2026-06-01T10:00:00", "scenario.epoch", "timezone"),
        ("epoch = 2026-06-01T10:00:00Z", "epoch = 2055-06-01T10:00:00Z", "scenario.epoch", "1957 to 2049"),
        ("efficiency = 0.29", "efficiency = 29.0", "spacecraft.array.efficiency", "<= 1"),
        ('mount = "single_axis"', 'mount = "velcro"', "spacecraft.array.mount", "velcro"),
        ("capacity_wh = 24.0", "", "spacecraft.battery.capacity_wh", "missing"),
        ("idle_w = 4.0", "idle_w = 4.0\nfan = true", "'fan'", "[board]"),
        ('kind = "sim"', 'kind = "jetson"', "board.kind", "'sim'"),
        ("upsets_per_orbit = 60", "upsets_per_orbit = -1", "radiation.upsets_per_orbit", ">= 0"),
        ("latitude_deg = -25.887", "latitude_deg = -95.0", "stations[1].latitude_deg", ">= -90"),
        ("latitude_deg = -25.887", 'latitude_deg = "78N"', "stations[1].latitude_deg = '78N': ", "float"),
        ("latitude_deg = -25.887", "latitude = -25.887", "'latitude'", "stations[1]"),
        ('name = "Wallops"', 'name = "Maspalomas"', "stations.name", "each name once"),
        ("count = 64", "count = 8", "jobs.first_contact", "up to count 8"),
        ("priority = [5,", "priority = [10,", "jobs.priority", "<= 9"),
        ("count = 64", "count = 64\ndeadline_s = [-1]", "jobs.deadline_s", ">= 0"),
        ("sampling = [{}", "sampling = [{top_k = 0}", "jobs.sampling", ">= 1"),
        ("sampling = [{}", "sampling = [{heat = 1}", "'heat'", "jobs.sampling"),
        ("seats = 8", "seats = 3", "node.seats", "from node.batch 4 on"),
        ("batch = 4", "batch = 0", "node.batch", ">= 1"),
        ("positions = 1024", "positions = 128", "jobs.max_tokens", "below node.positions 128"),
        ('name = "penumbra-1"', 'name = "Penumbra 1"', "node.name", "a-z"),
        (
            "housekeeping_s = 0.5",
            "housekeeping_s = 0.5\n[node.governor]\nmin_duty = 0",
            "node.governor.min_duty",
            "0.01",
        ),
        (
            "housekeeping_s = 0.5",
            "housekeeping_s = 0.5\n[node.governor]\nhot_c = 10.0",
            "node.governor",
            "above warm_c",
        ),
        ("[node]", '[[faults]]\nat_s = 9000\nkind = "kill_node"\n[node]', "faults[0].at_s", "5578"),
        ("[node]", '[[faults]]\nat_s = 90\nkind = "fire"\n[node]', "faults[0].kind", "fire"),
        ("[radiation]", "[radation]", "'radation'", "did you mean 'radiation'"),
    ],
)
def test_a_wrong_scenario_names_file_field_and_way_out(
    tmp_path: Path, old: str, new: str, field: str, says: str
) -> None:
    path = write(tmp_path, old, new)
    with pytest.raises(PenumbraError) as caught:
        load_scenario(path)
    message = str(caught.value)
    assert str(path) in message
    assert field in message
    assert says in message
    assert caught.value.mend


def test_a_duration_of_weeks_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "altitude_km = 420.0", "altitude_km = 35786.0")
    path.write_text(path.read_text().replace("duration_orbits = 1.0", "duration_orbits = 9.0"))
    with pytest.raises(PenumbraError, match="7 are allowed"):
        load_scenario(path)


def spoilt(line: str, at: int, text: str) -> str:
    """Return the line with other characters and a right checksum."""
    line = line[:at] + text + line[at + len(text) : 68]
    return line + str(tle_checksum(line))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda one, two: (one[:-1] + str((int(one[-1]) + 1) % 10), two), "TLE line 1: checksum"),
        (lambda one, two: (one, two[:60]), "TLE line 2"),
        (lambda one, two: (one[:23] + "\u00a0" + one[24:], two), "TLE line 1: .* U\\+00A0 in column 24"),
        (
            lambda one, two: (one, spoilt(two, 2, "25544")),
            "line 1 is of satellite '99001', line 2 of '25544'",
        ),
        (lambda one, two: (spoilt(one, 20, "999"), two), "day 999 of the year 2026"),
        (lambda one, two: (one, spoilt(two, 8, "251")), "inclination 251"),
        (lambda one, two: (spoilt(one, 62, "4"), two), "ephemeris type 4"),
        # The node does not read the mean motion's derivative, but the plant's reader does.
        (lambda one, two: (spoilt(one, 33, "garbage!!!"), two), "orbit: TLE '1 99001U"),
    ],
)
def test_a_wrong_tle_names_file_and_line(tmp_path: Path, spoil: Any, says: str) -> None:
    one, two = spoil(LINE1, LINE2)
    path = write(tmp_path, "altitude_km = 420.0", f'line1 = "{one}"\nline2 = "{two}"')
    path.write_text(path.read_text().replace("inclination_deg = 51.64\n", ""))
    with pytest.raises(PenumbraError, match=says) as caught:
        load_scenario(path)
    assert str(path) in str(caught.value)


def test_an_old_tle_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "altitude_km = 420.0", f'line1 = "{LINE1}"\nline2 = "{LINE2}"')
    text = path.read_text().replace("inclination_deg = 51.64\n", "")
    path.write_text(text.replace("2026-06-01T10:00:00Z", "2026-07-01T10:00:00Z"))
    with pytest.raises(PenumbraError, match=r"30\.0 days"):
        load_scenario(path)


def test_an_unknown_name_lists_the_scenarios_there_are() -> None:
    with pytest.raises(PenumbraError, match="default, default-short"):
        load_scenario("defualt")


@pytest.mark.parametrize("content", [b"[scenario\n", b"\xff\xfe"])
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(PenumbraError, match="no TOML"):
        load_scenario(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match="No such file"):
        load_toml(tmp_path / "nothing.toml", Scenario)
    with pytest.raises(PenumbraError, match="Is a directory"):
        load_scenario(tmp_path)


def test_the_default_flight_needs_its_governor() -> None:
    # Numbers of the scenario itself: full power through the eclipse takes more than the battery may give.
    scenario = load_scenario("default")
    battery, board = scenario.spacecraft.battery, scenario.board
    most_w = scenario.spacecraft.platform_w + board.idle_w + board.core_w * board.cores
    least_w = scenario.spacecraft.platform_w + board.idle_w + 0.05 * board.core_w * board.cores
    eclipse_h = 2056 / 3600
    usable_wh = (1.0 - battery.soc_floor) * battery.capacity_wh
    assert least_w * eclipse_h < usable_wh < most_w * eclipse_h


def test_the_profile_of_a_scenario_lies_beside_it(tmp_path: Path) -> None:
    text = (PACKAGED / "default-short.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text + '\n[node.planner]\nprofile = "board.json"\n')
    assert load_scenario(path).node.planner.profile == str(tmp_path / "board.json")
    path.write_text(text)
    assert load_scenario(path).node.planner.profile == ""
