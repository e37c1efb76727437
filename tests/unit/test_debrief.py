"""The parts of a flight's beginning and end that need no flight: windows, light, forecasts, counts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hil.debrief import all_packets, forecast_errors, worker_restarts
from hil.flight import draw, light_profile, merged_contacts
from hil.fly import FlyOptions, _short, with_options
from hil.plant.path import UmbraEvent
from hil.plant.plant import Plant
from hil.scenario import load_scenario
from telemetry.archive import Archive
from telemetry.errors import PenumbraError
from telemetry.fdir_merge import merged
from telemetry.frame import decode_frame, encode_frame
from telemetry.packets import Event, FdirReport, Level, Outcome, Severity
from tests.flight_records import housekeeping

NS = 1_000_000_000
START = 1_780_000_000 * NS


def umbra(entry_s: float, exit_s: float) -> UmbraEvent:
    return UmbraEvent(
        penumbra_entry_ns=START + int((entry_s - 10) * NS),
        entry_ns=START + int(entry_s * NS),
        exit_ns=START + int(exit_s * NS),
        penumbra_exit_ns=START + int((exit_s + 10) * NS),
    )


def forecast(t_s: float, entry_s: float | None):  # type: ignore[no-untyped-def]
    sample = housekeeping(t_s, 0, 0)
    entry_ns = None if entry_s is None else START + int(entry_s * NS)
    return msgspec.structs.replace(
        sample, packet=msgspec.structs.replace(sample.packet, eclipse_entry_ns=entry_ns)
    )


def test_forecasts_are_set_against_the_entry_they_mean() -> None:
    truth = [umbra(2000, 4000), umbra(7500, 9500)]
    samples = [
        forecast(10, 2001.5),
        forecast(1000, 1998.0),
        forecast(2500, 2001.5),  # the entry is over: no forecast any more
        forecast(4500, 7500.25),
        forecast(20, None),
    ]
    errors = forecast_errors(samples, truth, START)
    assert [(e.t_s, e.entry_s, e.error_s) for e in errors] == [
        (10, 2000.0, 1.5),
        (1000, 2000.0, -2.0),
        (4500, 7500.0, 0.25),
    ]
    assert forecast_errors(samples, [], START) == []


def test_light_over_a_flight() -> None:
    profile = light_profile([umbra(250, 500)], START, 1000.0, points=100)
    assert len(profile) == 100
    assert profile[10] == 1.0
    assert profile[24] == 0.5
    assert profile[30] == 0.0
    assert profile[50] == 0.5
    assert profile[60] == 1.0
    assert light_profile([], START, 1000.0, points=3) == [1.0, 1.0, 1.0]


def test_overlapping_passes_are_one_contact() -> None:
    class Windows:
        def __init__(self, *windows: tuple[str, float, float]) -> None:
            from hil.plant.contact import ContactWindow

            self.contact_windows = tuple(
                ContactWindow(
                    station=s, start_ns=START + int(a * NS), end_ns=START + int(b * NS), max_elevation_deg=9.0
                )
                for s, a, b in windows
            )

    plant = Windows(("B", 300, 900), ("A", 0, 400), ("C", 1000, 1100), ("D", 5000, 5100))
    merged = merged_contacts(plant, START, START + 2000 * NS)  # type: ignore[arg-type]
    assert [(c.name, c.start_s, c.end_s) for c in merged] == [("A, B", 0.0, 900.0), ("C", 1000.0, 1100.0)]


def test_default_flights_have_contacts_and_enough_faults() -> None:
    for name in ("default", "default-short"):
        scenario = load_scenario(name)
        contacts = merged_contacts(Plant(scenario), scenario.start_ns, scenario.end_ns)
        assert len(contacts) >= scenario.limits.min_contacts
        assert contacts[0].start_s < 60.0  # jobs go up at once
        faults = draw(scenario)
        assert len(faults) >= scenario.limits.min_flips_injected
        assert draw(scenario) == faults
        assert faults[-1].at_s <= scenario.duration_s


def test_every_packet_once_from_archive_and_disk(tmp_path: Path) -> None:
    def frame(seq: int, text: str) -> bytes:
        packet = Event(severity=Severity.INFO, name="n", text=text)
        return encode_frame(node="n", boot=1, seq=seq, t_ns=seq, packet=packet)

    archive = Archive.open(tmp_path / "a.db")
    archive.ingest([frame(1, "one"), frame(0, "zero")])
    stored = [decode_frame(frame(seq, text)) for seq, text in ((1, "one"), (2, "two"))]
    found = all_packets(archive, "n", stored, Event)
    archive.close()
    assert [packet.text for _, packet in found] == ["zero", "one", "two"]
    assert [f.seq for f, _ in found] == [0, 1, 2]


def test_a_lost_worker_counts_once() -> None:
    def report(level: Level, outcome: Outcome) -> FdirReport:
        return FdirReport(
            monitor="worker.exit", level=level, outcome=outcome, action="", detected_ns=1, recovered_ns=None
        )

    reports = [
        report(Level.WORKER_RESTART, Outcome.STARTED),
        report(Level.WORKER_RESTART, Outcome.RESTARTED),
        report(Level.IN_WORKER_REPAIR, Outcome.REPAIRED),
        report(Level.SAFE_MODE, Outcome.ESCALATED),
    ]
    assert worker_restarts(reports) == 1


def test_a_merged_report_counts_all_lost_workers_it_stands_for_and_none_twice() -> None:
    reports = [
        FdirReport(
            monitor="worker.exit",
            level=Level.WORKER_RESTART,
            outcome=Outcome.STARTED,
            action="",
            detected_ns=number,
            recovered_ns=None,
            covers=[(1, number, number)],
        )
        for number in (1, 2, 3)
    ]
    assert worker_restarts([reports[1], merged(reports)]) == 3


def test_options_override_the_scenario() -> None:
    scenario = load_scenario("default")
    flown = with_options(scenario, FlyOptions(speed=120.0, seed=7, board="sim")).scenario
    assert (flown.speed, flown.seed) == (120.0, 7)
    assert with_options(scenario, FlyOptions()) == scenario


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (FlyOptions(speed=0.0), "--speed 0"),
        (FlyOptions(speed=1000.5), "--speed 1000.5"),
        (FlyOptions(speed=float("nan")), "--speed nan"),
        (FlyOptions(seed=-1), "--seed -1"),
        (FlyOptions(board="jetson"), "kind 'jetson': no INA3221"),
    ],
)
def test_options_out_of_range(options: FlyOptions, words: str) -> None:
    with pytest.raises(PenumbraError, match=words):
        with_options(load_scenario("default"), options)


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (True, "True"), (7, "7"), (1234.567, "1235"), (0.7, "0.7"), ("x", "x")]
)
def test_short_figures(value: object, text: str) -> None:
    assert _short(value) == text
