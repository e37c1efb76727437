"""After the flight: one record of everything, from the bench's truth, the archive and the node's disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from hil.accounts import assemble, ledger_fact, stored_frames
from hil.faults import PROOF_BOUND_S, attribute
from hil.flight import Flown
from hil.memory import WeightSites
from hil.plant.plant import UmbraEvent
from hil.record import (
    FlightRecord,
    ForecastError,
    Happening,
    HousekeepingSample,
    Limits,
    PlanSample,
    Window,
)
from hil.run_dir import RunDir, constants, host_manifest
from hil.scenario import Scenario
from node.inference.manifest import Manifest, image_id
from telemetry.archive import Archive
from telemetry.fdir_merge import counted
from telemetry.frame import Frame, FrameError
from telemetry.packets import Event, FdirReport, Housekeeping, Level, Outcome, Packet, PowerPlan, Severity

P = TypeVar("P", bound=Packet)
NS = 1_000_000_000


def debrief(
    scenario: Scenario,
    source: str,
    run: RunDir,
    flown: Flown,
    *,
    umbrae: Sequence[UmbraEvent],
    contacts: Sequence[Window],
    manifest: Manifest,
) -> FlightRecord:
    """Put the record of a flight together. Reference run and overhead are added later.

    Parameters
    ----------
    scenario, source
        The scenario and its text.
    run
        Its directory; the node has ended.
    flown
        What the bench saw.
    umbrae, contacts
        The true eclipses, and the windows in which the link was open.
    manifest
        Of the model image.
    """
    start_ns, node = scenario.start_ns, scenario.node.name
    archive = Archive.read(run.archive)
    try:
        stored = stored_frames(run.database)
        reports = [report for _, report in all_packets(archive, node, stored, FdirReport)]
        samples = all_packets(archive, node, stored, Housekeeping)
        events = all_packets(archive, node, stored, Event)
        planned = all_packets(archive, node, stored, PowerPlan)
        ledger = ledger_fact(archive, node, run.database)
        results = archive.results(node)
    finally:
        archive.close()
    housekeeping = [
        HousekeepingSample(t_s=(frame.t_ns - start_ns) / NS, packet=packet)
        for frame, packet in samples
        if packet.clock_locked and frame.t_ns >= start_ns
    ]
    identity = image_id(manifest)
    facts = assemble(identity, scenario.jobs.listed(), results)
    jobs = [job for job in facts if job.tokens or job.finish]
    flight, battery = scenario.scenario, scenario.spacecraft.battery
    eclipses = [_window(event, start_ns) for event in umbrae]
    return FlightRecord(
        scenario=flight.name,
        description=flight.description,
        seed=flight.seed,
        speed=flight.speed,
        start_ns=start_ns,
        start_host_ns=flown.start_host_ns,
        wall_s=flown.wall_s,
        planned_s=scenario.duration_s,
        flown_s=flown.flown_s,
        orbit_s=scenario.period_s,
        eclipse_s=sum(max(0.0, min(w.end_s, flown.flown_s) - max(w.start_s, 0.0)) for w in eclipses),
        interrupted=flown.interrupted,
        limits=Limits(
            soc_floor=battery.soc_floor,
            floor_violation_s=scenario.limits.floor_violation_s,
            eclipse_forecast_error_s=scenario.limits.eclipse_forecast_error_s,
            min_flips=scenario.limits.min_flips_injected,
            min_contacts=scenario.limits.min_contacts,
        ),
        plant=list(flown.samples),
        housekeeping=housekeeping,
        plans=[
            PlanSample(t_s=(frame.t_ns - start_ns) / NS, packet=packet)
            for frame, packet in planned
            if frame.t_ns >= start_ns
        ],
        umbrae=[w for w in eclipses if w.start_s < scenario.duration_s],
        contacts=list(contacts),
        fates=attribute(
            flown.strikes,
            reports,
            commits=flown.commits,
            worker_deaths=flown.worker_deaths,
            end_ns=flown.watch_end_ns,
            proof_bound_s=PROOF_BOUND_S * scenario.node.patience,
        ),
        flips_not_injected=flown.not_injected,
        process_faults=list(flown.process_faults),
        worker_restarts=worker_restarts(reports),
        node_restarts=flown.node_restarts,
        stopped_how=flown.stopped_how,
        orphans_killed=flown.orphans_killed,
        forecast=forecast_errors(housekeeping, umbrae, start_ns),
        jobs=jobs,
        tokens_discarded=_discarded(samples),
        ledger=ledger,
        ground_garbage=flown.ground_garbage,
        overhead=None,
        happenings=_happenings(flown.happenings, events, start_ns),
        constants=constants(source),
        acceleration=_acceleration(scenario, manifest),
        manifest=host_manifest(identity, WeightSites(manifest.tensors).bits / 8 / 2**20),
    )


def forecast_errors(
    housekeeping: Iterable[HousekeepingSample], umbrae: Sequence[UmbraEvent], start_ns: int
) -> list[ForecastError]:
    """Return how far each forecast of an umbra's entry was off, for entries that were still to come.

    A forecast is set against the true entry nearest to it.
    """
    errors = []
    for sample in housekeeping:
        entry_ns = sample.packet.eclipse_entry_ns
        if entry_ns is None or not umbrae:
            continue
        truth = min(umbrae, key=lambda event: abs(event.entry_ns - entry_ns))
        entry_s = (truth.entry_ns - start_ns) / NS
        if sample.t_s < entry_s:
            errors.append(
                ForecastError(t_s=sample.t_s, entry_s=entry_s, error_s=(entry_ns - truth.entry_ns) / NS)
            )
    return errors


def all_packets(archive: Archive, node: str, stored: Iterable[Frame], kind: type[P]) -> list[tuple[Frame, P]]:
    """Return every packet of one type, archived or still on the node's disk, once each, by (boot, seq)."""
    found = {(frame.boot, frame.seq): (frame, packet) for frame, packet in archive.packets(node, kind)}
    for frame in stored:
        if frame.type != kind.type_name:
            continue
        try:
            packet = frame.packet()
        except FrameError:
            continue
        if isinstance(packet, kind):
            found.setdefault((frame.boot, frame.seq), (frame, packet))
    return [found[key] for key in sorted(found)]


def _window(event: UmbraEvent, start_ns: int) -> Window:
    return Window(start_s=(event.entry_ns - start_ns) / NS, end_s=(event.exit_ns - start_ns) / NS)


def worker_restarts(reports: Iterable[FdirReport]) -> int:
    """Count the losses of a worker that were answered with a restart: one report each says it began."""
    return counted(r for r in reports if r.level is Level.WORKER_RESTART and r.outcome is Outcome.STARTED)


def _discarded(housekeeping: Iterable[tuple[Frame, Housekeeping]]) -> int:
    """Return the provisional tokens thrown away: each boot counts from 0."""
    by_boot: dict[int, int] = {}
    for frame, packet in housekeeping:
        by_boot[frame.boot] = max(by_boot.get(frame.boot, 0), packet.tokens_discarded)
    return sum(by_boot.values())


def _happenings(
    bench: Iterable[Happening], events: Iterable[tuple[Frame, Event]], start_ns: int
) -> list[Happening]:
    node = [
        Happening(
            t_s=(frame.t_ns - start_ns) / NS,
            source="node",
            name=event.name,
            text=event.text,
            severity=int(event.severity),
        )
        for frame, event in events
        if event.severity >= Severity.LOW or frame.t_ns >= start_ns
    ]
    return sorted([*bench, *node], key=lambda happened: happened.t_s)


def _acceleration(scenario: Scenario, manifest: Manifest) -> float | None:
    """Return flips flown for each one nature would cause in the same weights and time."""
    bits = WeightSites(manifest.tensors).bits
    duration_s = scenario.duration_s
    natural = scenario.radiation.natural_upsets(bits, duration_s)
    flown = scenario.radiation.upsets_per_orbit * duration_s / scenario.period_s
    factor = flown / natural if natural > 0 else math.inf
    return factor if math.isfinite(factor) and factor > 0 else None
