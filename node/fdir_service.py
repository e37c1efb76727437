"""The FDIR put together: findings go to the monitors, what fires goes to the ladder, and is carried out.

`fdir.monitors` and `fdir.ladder` decide; this service feeds them. What must outlive the node is persisted
before it is acted on. Every stimulus and action goes into the flight recorder.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from fdir import ladder, monitors
from fdir.flight_recorder import FlightRecorder
from fdir.table import Action, Report, RowState, Table
from node import state
from node.fdir_acts import Acts
from node.findings import Finding
from node.inference.protocol import Repair
from node.pulse import Pulse
from node.recorder import Recorder, Throttle
from telemetry.database import Database, StoreFull
from telemetry.packets import (
    FdirReport,
    FdirStatus,
    FlightRecord,
    Level,
    Mode,
    Outcome,
    RowReport,
    Severity,
)

_log = logging.getLogger(__name__)
Value = float | int | bool | None
SUPPRESSED_PERIOD_S = 10.0
"""Time between two reports that nothing is done about a row, s (assumed)."""
DUMP_LEVEL = Level.IMAGE_REBUILD
"""Recovery level from which the flight recorder is sent."""


@dataclass(frozen=True)
class _Work:
    """An action of the ladder on its way, with the finding that led to it."""

    action: ladder.LadderAction
    finding: Finding | None


Store: TypeAlias = Callable[[sqlite3.Connection], None]


class FdirService:
    """Feeds monitors and ladder, and has carried out what they say.

    Parameters
    ----------
    table
        The FDIR table.
    boot
        What was commanded and counted before this boot.
    database, recorder
        Where states are persisted, where reports go.
    max_resets
        Restarts of the node that may be asked for.
    sample_s
        Period of sampling, s of physical time.
    sample
        Returns the value of each item now; called once a period.
    acts
        Carries actions out.
    safe
        True when the node starts in safe mode.
    """

    def __init__(
        self,
        table: Table,
        boot: state.BootState,
        *,
        database: Database,
        recorder: Recorder,
        max_resets: int,
        sample_s: float,
        sample: Callable[[], Mapping[str, Value]],
        acts: Acts,
        safe: bool,
    ) -> None:
        self.detections = 0
        """Findings of rows that are not disabled, since boot."""
        self.actions = 0
        """Actions carried out, since boot."""
        self.pulse = Pulse("fdir", lambda: self._work.put_nowait(None))
        """Health of the task that carries out."""
        self.flight = FlightRecorder()
        self._database = database
        self._recorder = recorder
        self._sample_s = sample_s
        self._sample = sample
        self._acts = acts
        self._monitors = monitors.Monitors(table, boot.fdir_states, boot.fdir_overall)
        self._ladder = ladder.Ladder(
            table,
            ladder.ResetCount(boot.resets, max_resets),
            time.monotonic(),
            safe=safe,
            external_control=boot.external_control,
        )
        self._work: asyncio.Queue[_Work | Store | None] = asyncio.Queue()
        self._throttles: dict[str, Throttle] = {}
        self._safe = safe
        self._tell_states()
        acts.recovered = self.recovered
        acts.failed = self._failed

    @property
    def table(self) -> Table:
        """The table in force."""
        return self._monitors.table

    @property
    def resets(self) -> int:
        """Restarts of the node asked for, not cleared yet."""
        return self._ladder.resets.count

    @property
    def external_control(self) -> bool:
        """True while the ground has taken over."""
        return self._ladder.external_control

    @property
    def level(self) -> Level | None:
        """Level of the highest recovery under way; None when there is none."""
        running = [self.table.row(row).level for row in self._ladder.running() if row in self.table]
        return Level.SAFE_MODE if self._safe else max(running, default=None)

    def counts(self) -> tuple[int, int, int]:
        """Return how many rows are enabled, passive and disabled."""
        states = [self._monitors.effective(row) for row in self.table.ids]
        return (
            states.count(RowState.ENABLED), states.count(RowState.PASSIVE), states.count(RowState.DISABLED),
        )  # fmt: skip

    def may_mend(self) -> Repair:
        """Return what the worker may mend by itself, as the rows say."""
        enabled = {row: self._is_enabled(row) for row in ("weights.digest", "kv.digest", "compute.check")}
        return Repair(
            weights=enabled["weights.digest"], kv=enabled["kv.digest"], compute=enabled["compute.check"]
        )

    def find(self, finding: Finding) -> None:
        """Take a finding of a component; it is decided on at once, and acted on by the service's task."""
        if finding.row not in self.table:
            text = f"no row {finding.row} in the FDIR table: {finding.reason}"
            self._recorder.event(Severity.MEDIUM, "fdir.no_row", text)
            return
        if not isinstance(self.table.row(finding.row).check, Report):
            raise ValueError(f"row {finding.row} takes no reports: a defect of its finder")
        if self._monitors.effective(finding.row) is not RowState.DISABLED:
            self.detections += 1
        evidence = {**finding.evidence, "detected_ns": finding.detected_ns}
        self._watch(monitors.Reported(finding.row, evidence, finding.reason), finding)

    def recovered(self, row_id: str) -> None:
        """Tell that what a row found is over."""
        if row_id in self.table:
            self._watch(monitors.Recovered(row_id))
            self._climb(ladder.Recovered(row_id), None)

    def recovered_all(self, action: Action) -> None:
        """Tell that what was found is over for every row whose action of this kind runs."""
        for row_id in self._ladder.running():
            if row_id in self.table and self.table.row(row_id).action is action:
                self.recovered(row_id)

    def worker_started(self) -> None:
        """Tell that a new worker is started: its faults are new ones, though none is over yet."""
        for row in self.table.rows:
            if row.action is Action.RESTART_WORKER and self._monitors.status(row.id).fired:
                self._watch(monitors.Rearm(row.id))

    def set_mode(self, mode: Mode) -> None:
        """Tell the mode of the node."""
        self._watch(monitors.ModeChanged(mode))
        if self._safe is not (mode is Mode.SAFE):
            self._safe = mode is Mode.SAFE
            self._climb(ladder.SafeChanged(self._safe), None)
            if not self._safe:
                self._rearm_fired()

    def use(self, table: Table) -> None:
        """Put another table in force, at once: counts and attempts of rows that are the same go on."""
        self._watch(monitors.LoadTable(table))
        self._climb(ladder.LoadTable(table), None)
        self._tell_states()

    def set_row(self, row_id: str | None, state: RowState) -> None:
        """Carry out `set_fdir_row`, for a row that may be in this state; None: the FDIR as a whole."""
        self._watch(monitors.SetState(row_id, state))
        self._tell_states()

    def rearm(self, row_id: str | None) -> None:
        """Carry out `rearm_fdir`."""
        self._watch(monitors.Rearm(row_id))

    def set_external_control(self, on: bool) -> None:
        """Carry out `external_control`."""
        self._climb(ladder.ExternalControl(on), None)
        self._work.put_nowait(lambda c: state.set_external_control(c, on))
        text = "the ground has taken over: FDIR reports and does nothing" if on else "FDIR acts again"
        self._recorder.event(Severity.MEDIUM, "fdir.external_control", text, {"on": on})
        if not on:
            self._rearm_fired()

    def reset_counters(self) -> None:
        """Carry out `reset_counters`."""
        self._climb(ladder.ResetCounters(), None)

    def dump(self, reason: str, level: Level | None) -> FlightRecord:
        """Return the flight recorder's latest entries as a packet."""
        return FlightRecord(
            reason=reason[:500], level=level, noted=self.flight.noted, entries=self.flight.dump()
        )

    def status(self) -> FdirStatus:
        """Return the whole table as it stands."""
        now_s = time.monotonic()
        rows = []
        for row_id in self.table.ids:
            one = self._monitors.status(row_id)
            rose = one.last_false_to_true
            rows.append(
                RowReport(
                    row=row_id,
                    state=one.state,
                    watch=one.watch,
                    point=one.point,
                    fired=one.fired,
                    evaluations=one.counts.evaluations,
                    consecutive=one.counts.consecutive,
                    cumulative=one.counts.cumulative,
                    actions=one.counts.actions,
                    last_violation_s=None if rose is None else now_s - rose.t_s,
                )
            )
        resets = self._ladder.resets
        return FdirStatus(
            table_sha256=self.table.sha256,
            overall=self._monitors.overall,
            external_control=self.external_control,
            resets=resets.count,
            max_resets=resets.limit,
            rows=rows,
        )

    def note(self, machine: str, event: object, actions: object) -> None:
        """Note what another machine of the node was told and decided in the flight recorder."""
        t_ns = time.time_ns()
        self.flight.stimulus(machine, event, t_ns)
        for action in actions if isinstance(actions, list) else []:
            self.flight.action(machine, action, t_ns)

    async def run(self) -> None:
        """Sample and carry out until cancelled."""
        for row_id in self._monitors.dropped:
            text = f"the state commanded for row {row_id} does not fit the FDIR table, and is dropped"
            self._recorder.event(Severity.MEDIUM, "fdir.state_dropped", text)
        async with asyncio.TaskGroup() as group:
            self._acts.group = group
            group.create_task(self._sample_each_period(), name="node.fdir.sample")
            group.create_task(self._carry_out(), name="node.fdir.act")

    async def _sample_each_period(self) -> None:
        while True:
            await asyncio.sleep(self._sample_s)
            values = self._sample()
            self.flight.stimulus("monitors", values, time.time_ns())
            for item, value in values.items():
                self._watch(monitors.Sample(item, value))
            self._watch(monitors.Tick())
            self._climb(ladder.Tick(), None)

    async def _carry_out(self) -> None:
        while True:
            work = await self._work.get()
            self.pulse.beat()
            match work:
                case None:
                    pass
                case _Work(ladder.Act() as act, finding):
                    self.actions += act.row.action not in {Action.NONE, Action.REJECT}
                    if act.row.level >= DUMP_LEVEL:
                        self._recorder.post(self.dump(f"{act.row.id}: {act.reason}", act.row.level))
                    await self._acts.carry_out(act, finding)
                case _Work(ladder.Suppressed() as suppressed, finding):
                    self._report_suppressed(suppressed, finding)
                case _Work(ladder.Escalate(below, above, reason)):
                    text = f"{below.id} escalates to {above.id}: {reason}"
                    self._recorder.event(Severity.HIGH, "fdir.escalated", text, {"row": below.id})
                case _Work(ladder.PersistResets(count)):
                    await self._persist(partial(state.set_resets, resets=count))
                case _Work(ladder.DeEscalated(row_id)):
                    text = f"attempts of {row_id} are forgotten after clean time"
                    self._recorder.event(Severity.INFO, "fdir.de_escalated", text, {"row": row_id})
                case _Work():
                    pass
                case _:
                    await self._persist(work)

    def _tell_states(self) -> None:
        """Tell the ladder what holds, so that it does not escalate into a row that is switched off."""
        states = {row: self._monitors.effective(row) for row in self.table.ids}
        self._climb(ladder.SetStates(states), None)

    def _is_enabled(self, row_id: str) -> bool:
        return row_id not in self.table or self._monitors.effective(row_id) is RowState.ENABLED

    def _watch(self, event: monitors.MonitorEvent, finding: Finding | None = None) -> None:
        t_ns = time.time_ns()
        if not isinstance(event, (monitors.Sample, monitors.Tick)):
            self.flight.stimulus("monitors", event, t_ns)
        for action in self._monitors.handle(event, time.monotonic()):
            self.flight.action("monitors", action, t_ns)
            match action:
                case monitors.Fired(row, evidence, reason):
                    if finding is None:
                        self.detections += 1
                        finding = Finding(row.id, reason, dict(evidence))
                    known = {key: value for key, value in evidence.items() if value is not None}
                    self._climb(ladder.Detected(row, known, reason), finding)
                case monitors.Announce(row, what, severity, text, evidence):
                    name = f"fdir.{what.value}"
                    told = {"row": "*" if row is None else row.id, **evidence}
                    self._recorder.event(severity, name, text if row is None else f"{row.id}: {text}", told)
                case monitors.PersistStates(states, overall):
                    self._work.put_nowait(partial(state.set_fdir_states, states=states, overall=overall))

    def _climb(self, event: ladder.LadderEvent, finding: Finding | None) -> None:
        t_ns = time.time_ns()
        if not isinstance(event, ladder.Tick):
            self.flight.stimulus("ladder", event, t_ns)
        for action in self._ladder.handle(event, time.monotonic()):
            self.flight.action("ladder", action, t_ns)
            self._work.put_nowait(_Work(action, finding))

    def _rearm_fired(self) -> None:
        """Let fire again what fired while nothing could be done about it, if that needs no command."""
        for row in self.table.rows:
            if self._monitors.status(row.id).fired and row.rearm == "auto":
                self._watch(monitors.Recovered(row.id))

    def _failed(self, row_id: str, reason: str) -> None:
        self._climb(ladder.Failed(row_id, reason), None)

    def _report_suppressed(self, suppressed: ladder.Suppressed, finding: Finding | None) -> None:
        """Report a finding that nothing is done about, and let its row fire again where that may change."""
        row = suppressed.row
        if suppressed.why is not ladder.Why.EXTERNAL_CONTROL and row.id in self.table:
            self._watch(monitors.Recovered(row.id))
        throttle = self._throttles.setdefault(row.id, Throttle(SUPPRESSED_PERIOD_S))
        if throttle.admit(time.monotonic()) is None:
            return
        self._recorder.post(
            FdirReport(
                monitor=row.id,
                level=row.level,
                outcome=Outcome.REPORTED,
                action=f"none: {suppressed.why.value}",
                detected_ns=time.time_ns() if finding is None else finding.detected_ns,
                recovered_ns=None,
                evidence={} if finding is None else {"reason": finding.reason[:200], **finding.evidence},
            )
        )

    async def _persist(self, store: Store) -> None:
        try:
            await self._database.run(store)
        except (StoreFull, sqlite3.Error) as error:
            # It is acted on all the same: the bound then holds within this boot only.
            _log.error("state of the FDIR not persisted: %s", error)
