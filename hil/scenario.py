"""Scenarios: one TOML file says what flies, through what, and what must come of it."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from functools import cached_property
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from hil.link_faults import LinkFault
from hil.tle import elements_of_tle, tle_from_elements
from node.boards import BoardSettings
from node.power.ceiling import GovernorSettings
from node.power.ephemeris import Ephemeris
from node.power.planner import PlannerSettings
from telemetry.bus import BatteryWh
from telemetry.commands import DEFAULT_PRIORITY, Infer, Priority
from telemetry.errors import PenumbraError
from telemetry.sampling import GREEDY, Sampling
from telemetry.strict_toml import load_toml
from telemetry.topics import check_node_name

NS_PER_S: Final = 1_000_000_000
MIN_PERIGEE_KM: Final = 150.0
"""An orbit below decays within a revolution or two."""
MAX_TLE_AGE_DAYS: Final = 14.0
"""SGP4 elements are useful for about two weeks."""
MAX_DURATION_S: Final = 7 * 86_400.0
"""The plant holds positions for each second of the flight."""
EPHEMERIS_YEARS: Final = (1957, 2050)
"""TLE years begin in 1957, JPL's DE421 and the flight Sun both hold to 2050."""
PACKAGED: Final = resources.files("hil") / "scenarios"

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Efficiency = Annotated[float, Meta(gt=0, le=1)]
Angle = Annotated[float, Meta(ge=0, le=360)]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table of a scenario."""


class Flight(Table, frozen=True, kw_only=True):
    """`[scenario]`."""

    name: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,40}$")]
    epoch: Annotated[dt.datetime, Meta(tz=True)]
    """Mission time at the start, with an offset."""
    duration_orbits: Annotated[float, Meta(gt=0, le=100)] = 1.0
    speed: Annotated[float, Meta(ge=0.01, le=1000)] = 60.0
    """Mission seconds a second of physical time."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 1
    description: str = ""


class Orbit(Table, frozen=True, kw_only=True):
    """`[orbit]`: either `line1` and `line2`, or elements from `altitude_km` on."""

    line1: str | None = None
    line2: str | None = None
    altitude_km: float | None = None
    """Mean semi-major axis less the equatorial radius."""
    eccentricity: float = 0.0005
    inclination_deg: float | None = None
    raan_deg: Angle = 0.0
    arg_perigee_deg: Angle = 0.0
    mean_anomaly_deg: Angle = 0.0
    bstar: Annotated[float, Meta(ge=-1, le=1)] = 0.0


class Mount(StrEnum):
    """How the solar array is carried."""

    SUN_TRACKING = "sun_tracking"
    """Two axes: normal incidence."""
    SINGLE_AXIS = "single_axis"
    """One axis along the orbit normal: the incidence is the beta angle."""
    ZENITH = "zenith"
    """Fixed to a body that keeps pointing to the nadir, looking away from Earth."""


class Array(Table, frozen=True, kw_only=True):
    """`[spacecraft.array]`."""

    area_m2: Positive
    efficiency: Efficiency
    packing: Efficiency = 0.85
    degradation: Unit = 0.0
    """Share of the power lost to age."""
    conversion: Efficiency = 0.93
    """Peak-power tracker, array to bus."""
    temperature_coefficient_per_k: Annotated[float, Meta(ge=-0.02, le=0)] = -0.0025
    """Change of power a kelvin, from 28 degC."""
    hot_c: Annotated[float, Meta(ge=-150, le=200)] = 60.0
    """Temperature it settles at in sunlight."""
    cold_c: Annotated[float, Meta(ge=-200, le=200)] = -70.0
    """Temperature it settles at in the dark."""
    lag_s: Positive = 400.0
    mount: Mount = Mount.SINGLE_AXIS


class Battery(Table, frozen=True, kw_only=True):
    """`[spacecraft.battery]`: lithium-ion cells in series."""

    capacity_wh: BatteryWh
    """At the cells' nominal 3.6 V."""
    cells_in_series: Annotated[int, Meta(ge=1, le=24)] = 2
    resistance_ohm: Positive = 0.10
    coulombic_efficiency: Efficiency = 0.995
    charge_conversion: Efficiency = 0.96
    discharge_conversion: Efficiency = 0.96
    max_charge_c_rate: Positive = 0.5
    """Largest charging current as a share of the capacity an hour."""
    soc_start: Unit
    soc_floor: Unit


class Thermal(Table, frozen=True, kw_only=True):
    """`[spacecraft.thermal]`: a board coupled to a radiator."""

    board_heat_capacity_j_k: Annotated[float, Meta(ge=20)] = 450.0
    conductance_w_k: Annotated[float, Meta(gt=0, le=10)] = 0.8
    radiator_area_m2: Positive = 0.06
    radiator_heat_capacity_j_k: Annotated[float, Meta(ge=20)] = 300.0
    emissivity: Efficiency = 0.85
    absorptivity: Unit = 0.20
    sun_view: Unit = 0.25
    """Mean cosine of the Sun's incidence on the radiator."""
    earth_view: Unit = 0.30
    """View factor of the Earth from the radiator."""
    start_c: Annotated[float, Meta(ge=-100, le=120)] = 20.0


class Spacecraft(Table, frozen=True, kw_only=True):
    """`[spacecraft]`."""

    platform_w: NotNegative
    """Draw of everything but the payload computer."""
    array: Array
    battery: Battery
    thermal: Thermal = Thermal()


class Radiation(Table, frozen=True, kw_only=True):
    """`[radiation]`: random upsets in protected memory, sped up so that one orbit shows some."""

    upsets_per_orbit: NotNegative
    """Flips injected over one revolution."""
    kv_share: Unit = 0.3
    """Share of them aimed at KV rows; the others at weight pages."""
    seed: Annotated[int, Meta(ge=0)] | None = None
    """None: derived from the scenario's."""
    proton_flux_cm2_s: Positive
    """Orbit mean flux behind shielding that memory sees."""
    cross_section_cm2_bit: Positive

    def natural_upsets(self, protected_bits: float, duration_s: float) -> float:
        """Return the upsets expected without acceleration in that many bits and seconds."""
        return self.proton_flux_cm2_s * self.cross_section_cm2_bit * protected_bits * duration_s


class Job(Table, frozen=True, kw_only=True):
    """One completion asked of the model."""

    id: str
    prompt: str
    max_tokens: int
    sampling: Sampling = GREEDY
    priority: int = DEFAULT_PRIORITY
    deadline_s: float | None = None
    """Mission time after it is queued for sending at which it ends as it is; None: never."""

    def command(self, now_ns: int) -> Infer:
        """Return the telecommand that asks for it, at mission time `now_ns`."""
        deadline_ns = None if self.deadline_s is None else now_ns + round(self.deadline_s * NS_PER_S)
        return Infer(
            job=self.id,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            priority=self.priority,
            deadline_ns=deadline_ns,
        )


class Jobs(Table, frozen=True, kw_only=True):
    """`[jobs]`: `count` jobs made by going round each of the lists."""

    prompts: Annotated[list[Annotated[str, Meta(min_length=1, max_length=16_000)]], Meta(min_length=1)]
    max_tokens: Annotated[list[Annotated[int, Meta(ge=1, le=2048)]], Meta(min_length=1)]
    count: Annotated[int, Meta(ge=1, le=10_000)]
    first_contact: Annotated[int, Meta(ge=1, le=10_000)]
    """Jobs sent up at the first contact."""
    per_contact: Annotated[int, Meta(ge=0, le=10_000)] = 8
    """Jobs sent up at each later one."""
    sampling: list[Sampling] = []
    """How tokens are chosen. Empty: all jobs are greedy."""
    priority: list[Priority] = []
    """9 goes first. Empty: all jobs have the usual one, 5."""
    deadline_s: list[NotNegative] = []
    """Mission time each may take from when it is sent, s; 0: as long as it likes. Empty: all may."""

    def listed(self) -> list[Job]:
        """Return all jobs in the order they go up."""
        rounds = zip(
            cycle(self.prompts),
            cycle(self.max_tokens),
            cycle(self.sampling or [GREEDY]),
            cycle(self.priority or [DEFAULT_PRIORITY]),
            cycle(self.deadline_s or [0.0]),
            strict=False,
        )
        return [
            Job(
                id=f"job-{number:03d}",
                prompt=prompt,
                max_tokens=most,
                sampling=sampling,
                priority=priority,
                deadline_s=deadline_s or None,
            )
            for number, (prompt, most, sampling, priority, deadline_s) in enumerate(
                islice(rounds, self.count), 1
            )
        ]


class Station(Table, frozen=True, kw_only=True):
    """`[[stations]]`."""

    name: Annotated[str, Meta(min_length=1, max_length=40)]
    latitude_deg: Annotated[float, Meta(ge=-90, le=90)]
    longitude_deg: Annotated[float, Meta(ge=-180, le=180)]
    altitude_m: Annotated[float, Meta(ge=-500, le=9000)] = 0.0
    min_elevation_deg: Annotated[float, Meta(ge=0, lt=90)] = 5.0


class Limits(Table, frozen=True, kw_only=True):
    """`[limits]`: what the verdict judges by. The floor itself is the battery's `soc_floor`."""

    eclipse_forecast_error_s: Positive = 5.0
    min_flips_injected: Annotated[int, Meta(ge=0)] = 30
    floor_violation_s: NotNegative = 0.0
    min_contacts: Annotated[int, Meta(ge=0)] = 1


class NodeOverrides(Table, frozen=True, kw_only=True):
    """`[node]`: settings of the node under test that the scenario asks for."""

    name: str = "penumbra-1"
    threads: Annotated[int, Meta(ge=1, le=64)] = 2
    batch: Annotated[int, Meta(ge=1, le=64)] = 4
    """Jobs decoded together at most."""
    seats: Annotated[int, Meta(ge=1, le=128)] = 8
    """Sequences the KV arena holds; at least `batch`."""
    checked: bool = False
    """Check every matrix product by its checksum."""
    redundant_modes: list[Literal["nominal", "eclipse"]] = []
    """Modes in which every epoch is decoded twice and compared."""
    overhead_budget: Annotated[float, Meta(ge=0.001, le=0.5)] = 0.01
    """Share of the time that proofs of memory may take."""
    epoch_tokens: Annotated[int, Meta(ge=1, le=512)] = 32
    positions: Annotated[int, Meta(ge=64, le=32_768)] = 1024
    epoch_s: Annotated[float, Meta(ge=0.05, le=60)] = 2.0
    retries: Annotated[int, Meta(ge=0, le=100)] = 6
    housekeeping_s: Annotated[float, Meta(ge=0.05, le=60)] = 0.5
    """Period of housekeeping, physical time."""
    patience: Annotated[float, Meta(ge=1, le=1000)] = 1.0
    """Times longer than by default that node and bench wait before they take a process for hung: for a board
    that is slow, or emulated."""
    spool_bytes: Annotated[int, Meta(ge=65_536)] = 16_777_216
    governor: GovernorSettings = GovernorSettings()
    planner: PlannerSettings = PlannerSettings()


class FaultKind(StrEnum):
    """Faults of processes the bench can cause."""

    KILL_NODE = "kill_node"
    KILL_WORKER = "kill_worker"
    STOP_WORKER = "stop_worker"


class Fault(Table, frozen=True, kw_only=True):
    """`[[faults]]`."""

    at_s: NotNegative
    """Mission time from the start."""
    kind: FaultKind


class Scenario(Table, frozen=True, kw_only=True, dict=True):
    """A whole scenario, checked."""

    scenario: Flight
    orbit: Orbit
    spacecraft: Spacecraft
    board: BoardSettings = BoardSettings()
    radiation: Radiation
    jobs: Jobs
    stations: Annotated[list[Station], Meta(min_length=1)]
    limits: Limits = Limits()
    node: NodeOverrides = NodeOverrides()
    faults: list[Fault] = []
    link_faults: list[LinkFault] = []

    @property
    def start_ns(self) -> int:
        """Mission time at the start, UTC ns."""
        return round(self.scenario.epoch.timestamp() * 1_000_000) * 1000

    @cached_property
    def period_s(self) -> float:
        """Period of the orbit, s."""
        return Ephemeris.from_tle(*self.tle()).period_s

    @property
    def duration_s(self) -> float:
        """Length of the flight in mission time, s."""
        return self.scenario.duration_orbits * self.period_s

    @property
    def end_ns(self) -> int:
        """Mission time at the end, UTC ns."""
        return self.start_ns + round(self.duration_s * NS_PER_S)

    @property
    def wall_s(self) -> float:
        """Physical time the flight takes, s."""
        return self.duration_s / self.scenario.speed

    def tle(self) -> tuple[str, str]:
        """Return the orbit as TLE lines, made from the elements when none are given."""
        return self._lines

    @cached_property
    def _lines(self) -> tuple[str, str]:
        o = self.orbit
        if o.line1 is not None and o.line2 is not None:
            return o.line1, o.line2
        if o.altitude_km is None or o.inclination_deg is None:
            raise ValueError("the scenario has not been checked")
        return tle_from_elements(
            epoch_ns=self.start_ns,
            altitude_km=o.altitude_km,
            eccentricity=o.eccentricity,
            inclination_deg=o.inclination_deg,
            raan_deg=o.raan_deg,
            arg_perigee_deg=o.arg_perigee_deg,
            mean_anomaly_deg=o.mean_anomaly_deg,
            bstar=o.bstar,
        )


def packaged_scenarios() -> list[str]:
    """Return the names of the scenarios that come with Penumbra."""
    return sorted(p.name.removesuffix(".toml") for p in PACKAGED.iterdir() if p.name.endswith(".toml"))


def load_scenario(path_or_name: str | Path) -> Scenario:
    """Load and check a scenario.

    Parameters
    ----------
    path_or_name
        A TOML file, or the name of a packaged scenario such as `default`.

    Raises
    ------
    PenumbraError
        There is no such scenario, or something in it is wrong: names file, field, value, what is allowed.
    """
    path = Path(path_or_name)
    if path.suffix != ".toml" and str(path_or_name) == path.name:
        names = packaged_scenarios()
        if path.name not in names:
            raise PenumbraError(
                f"scenario {path.name!r}: no packaged scenario of that name; there are {', '.join(names)}",
                "take one of them, or give the path of a .toml file",
            )
        with resources.as_file(PACKAGED / f"{path.name}.toml") as packaged:
            return _checked(load_toml(packaged, Scenario), packaged)
    return _with_profile(_checked(load_toml(path, Scenario), path), path.absolute().parent)


def _with_profile(scenario: Scenario, directory: Path) -> Scenario:
    """Return the scenario with the path of its profile taken from the directory of its own file."""
    planner = scenario.node.planner
    if not planner.profile:
        return scenario
    planner = msgspec.structs.replace(planner, profile=str(directory / planner.profile))
    return msgspec.structs.replace(scenario, node=msgspec.structs.replace(scenario.node, planner=planner))


def _checked(scenario: Scenario, path: Path) -> Scenario:
    """Return the scenario if its fields agree with each other and with physics, else raise."""
    _check_orbit(scenario, path)
    _check_times(scenario, path)
    battery = scenario.spacecraft.battery
    if battery.soc_floor >= battery.soc_start:
        raise _error(
            path, "spacecraft.battery.soc_floor", battery.soc_floor, f"below soc_start {battery.soc_start:g}"
        )
    if scenario.board.kind != "sim":
        raise _error(path, "board.kind", scenario.board.kind, "'sim'")
    names = [s.name for s in scenario.stations]
    for name in names:
        if names.count(name) > 1:
            raise _error(path, "stations.name", name, "each name once")
    longest = max(scenario.jobs.max_tokens)
    if longest >= scenario.node.positions:
        raise _error(path, "jobs.max_tokens", longest, f"below node.positions {scenario.node.positions}")
    if scenario.node.seats < scenario.node.batch:
        raise _error(path, "node.seats", scenario.node.seats, f"from node.batch {scenario.node.batch} on")
    if scenario.jobs.first_contact > scenario.jobs.count:
        raise _error(
            path, "jobs.first_contact", scenario.jobs.first_contact, f"up to count {scenario.jobs.count}"
        )
    try:
        check_node_name(scenario.node.name)
    except PenumbraError as error:
        raise PenumbraError(f"{path}: node.name: {error.what}", error.mend) from error
    return scenario


def _check_orbit(scenario: Scenario, path: Path) -> None:
    o = scenario.orbit
    lines = o.line1 is not None or o.line2 is not None
    if lines and (o.line1 is None or o.line2 is None):
        raise PenumbraError(f"{path}: orbit: one TLE line alone", "give both line1 and line2")
    if lines and (o.altitude_km is not None or o.inclination_deg is not None):
        raise PenumbraError(f"{path}: orbit: both TLE lines and elements", "keep one of the two")
    if o.line1 is not None and o.line2 is not None:
        try:
            elements = elements_of_tle(o.line1, o.line2)
        except PenumbraError as error:
            raise PenumbraError(f"{path}: orbit: {error.what}", error.mend) from error
        height = elements.altitude_km
        eccentricity, inclination = elements.eccentricity, elements.inclination_deg
    else:
        if o.altitude_km is None or o.inclination_deg is None:
            missing = "altitude_km" if o.altitude_km is None else "inclination_deg"
            raise PenumbraError(
                f"{path}: orbit.{missing} is missing",
                "give altitude_km and inclination_deg, or the TLE as line1 and line2",
            )
        height, eccentricity, inclination = o.altitude_km, o.eccentricity, o.inclination_deg
    if not 0.0 <= eccentricity < 1.0:
        raise _error(path, "orbit.eccentricity", eccentricity, "0 up to, but not, 1")
    if not 0.0 <= inclination <= 180.0:
        raise _error(path, "orbit.inclination_deg", inclination, "0 to 180")
    perigee = (6378.135 + height) * (1.0 - eccentricity) - 6378.135
    if perigee < MIN_PERIGEE_KM:
        raise PenumbraError(
            f"{path}: orbit.altitude_km = {height:.1f} with eccentricity {eccentricity:g} has its perigee at "
            f"{perigee:.1f} km; {MIN_PERIGEE_KM:g} km and more is allowed",
            "raise the altitude or lower the eccentricity",
        )
    if height > 50_000.0:
        raise _error(path, "orbit.altitude_km", height, "up to 50000")


def _check_times(scenario: Scenario, path: Path) -> None:
    year = scenario.scenario.epoch.astimezone(dt.UTC).year
    first, last = EPHEMERIS_YEARS
    if not first <= year < last:
        raise _error(
            path, "scenario.epoch", scenario.scenario.epoch.isoformat(), f"years {first} to {last - 1}"
        )
    if scenario.duration_s > MAX_DURATION_S:
        raise PenumbraError(
            f"{path}: scenario.duration_orbits = {scenario.scenario.duration_orbits:g} lasts "
            f"{scenario.duration_s / 86_400:.1f} days; {MAX_DURATION_S / 86_400:g} are allowed",
            "fly fewer orbits",
        )
    age_days = abs(Ephemeris.from_tle(*scenario.tle()).epoch_ns - scenario.start_ns) / (86_400 * NS_PER_S)
    if age_days > MAX_TLE_AGE_DAYS:
        raise PenumbraError(
            f"{path}: orbit.line1: the TLE's epoch is {age_days:.1f} days from scenario.epoch; "
            f"{MAX_TLE_AGE_DAYS:g} are allowed",
            "take a TLE of the time of the flight, or move scenario.epoch",
        )
    for index, link_fault in enumerate(scenario.link_faults):
        if link_fault.at_s >= scenario.duration_s:
            field, allowed = f"link_faults[{index}].at_s", f"below the flight's {scenario.duration_s:.0f} s"
            raise _error(path, field, link_fault.at_s, allowed)
    for index, fault in enumerate(scenario.faults):
        if fault.at_s >= scenario.duration_s:
            raise _error(
                path, f"faults[{index}].at_s", fault.at_s, f"below the flight's {scenario.duration_s:.0f} s"
            )


def _error(path: Path, field: str, value: object, allowed: str) -> PenumbraError:
    return PenumbraError(
        f"{path}: {field} = {value!r}; allowed: {allowed}", f"set {field} to an allowed value"
    )
