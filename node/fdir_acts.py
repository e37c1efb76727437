"""What the recovery ladder asks for, carried out and reported, level by level.

Levels 0 and 1 were carried out where the fault was found: they are only reported here. Every action is ended
by `recovered` or `failed`, without which the ladder would wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from fdir.ladder import Act
from fdir.table import Action, Report
from node import state
from node.config import NodeConfig
from node.findings import Finding
from node.image_repair import ImageRepair, refill_slot, repair_image
from node.image_slots import ImageSlots
from node.inference.manifest import Slot
from node.recorder import Evidence, Recorder
from node.worker_service import WorkerService
from telemetry import bus, topics
from telemetry.database import Database, StoreFull
from telemetry.errors import PenumbraError
from telemetry.link import Link, LinkDown
from telemetry.packets import FdirReport, Outcome, Severity

_log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Bound on having the reports of a restart on disk before it, s (assumed)."""
CYCLE_WAIT_S = 20.0
"""Time the bus has for a power cycle it was asked for, s of physical time (assumed)."""
REQUEST_PERIOD_S = 1.0
"""Time between two repetitions of a request to the bus, s (assumed)."""


@dataclass(frozen=True)
class Orders:
    """What only the node itself can do."""

    enter_safe: Callable[[str], None]
    restart: Callable[[str], None]
    """Ends the node in order, with the exit code that asks for a new start."""
    resets: Callable[[], int]
    """Returns the restarts asked for, this one included."""


class Acts:
    """Carries actions out.

    Parameters
    ----------
    config
        Sections node, model and fdir.
    slots
        Image slots.
    worker, recorder, database, link
        Who restarts the worker, where reports and state go, the link of the bus.
    orders
        What only the node can do.
    """

    def __init__(
        self,
        config: NodeConfig,
        slots: ImageSlots,
        *,
        worker: WorkerService,
        recorder: Recorder,
        database: Database,
        link: Link,
        orders: Orders,
    ) -> None:
        self.recovered: Callable[[str], None] = lambda _row: None
        self.failed: Callable[[str, str], None] = lambda _row, _why: None
        self.group: asyncio.TaskGroup | None = None
        self._config = config
        self._slots = slots
        self._worker = worker
        self._recorder = recorder
        self._database = database
        self._link = link
        self._orders = orders

    async def carry_out(self, act: Act, finding: Finding | None) -> None:
        """Carry out an action, or begin to. Returns soon; what takes long goes on in a task."""
        row, finding = act.row, finding or Finding(act.row.id, act.reason)
        match row.action:
            case Action.NONE | Action.REJECT:
                self._report(act, finding, Outcome.REPORTED, recovered=False)
                if isinstance(row.check, Report):
                    self.recovered(row.id)
            case Action.REPAIR | Action.REDO:
                self._mended(act, finding)
            case Action.RESTART_WORKER:
                self._worker.restart(row.id, act.reason)
            case Action.SWITCH_IMAGE:
                self._report(act, finding, Outcome.STARTED, recovered=False)
                self._spawn(self._make_image_whole(act, finding), "node.fdir.image")
            case Action.RESTART_NODE:
                await self._restart_node(act, finding)
            case Action.POWER_CYCLE:
                self._report(act, finding, Outcome.STARTED, recovered=False)
                self._spawn(self._ask_for_power_cycle(act, finding), "node.fdir.power-cycle")
            case Action.SAFE_MODE:
                self._report(act, finding, Outcome.ESCALATED, recovered=False)
                self._orders.enter_safe(f"{row.id}: {act.reason}")

    def _report(
        self,
        act: Act,
        finding: Finding,
        outcome: Outcome,
        *,
        recovered: bool,
        evidence: Evidence | None = None,
    ) -> None:
        told: Evidence = {**finding.evidence, "reason": act.reason[:300], "attempt": act.attempt}
        told.pop("detected_ns", None)
        self._recorder.post(
            FdirReport(
                monitor=act.row.id,
                level=act.row.level,
                outcome=outcome,
                action=act.row.action.value,
                detected_ns=finding.detected_ns,
                recovered_ns=time.time_ns() if recovered else None,
                evidence={**told, **(evidence or {})},
            )
        )

    def _mended(self, act: Act, finding: Finding) -> None:
        """Report what was mended where it was found."""
        if finding.report is not None:
            self._recorder.post(finding.report)
        else:
            outcome = Outcome.FAILED if finding.failed else Outcome.REPAIRED
            self._report(act, finding, outcome, recovered=not finding.failed)
        if finding.failed:
            self.failed(act.row.id, finding.failed)
        else:
            self.recovered(act.row.id)

    async def _make_image_whole(self, act: Act, finding: Finding) -> None:
        """Level 3: stop the worker, mend or replace its image, and let it run again."""
        async with self._slots.lock:
            done = await self._repair(act, finding)
        if done is None:
            return
        self._report(act, finding, Outcome.REPAIRED, recovered=True, evidence=_told(done))
        self.recovered(act.row.id)
        if done.method == "whole":
            text = f"{act.row.id}: the image in slot {done.slot} is whole, it is not what is wrong"
            self._recorder.event(Severity.MEDIUM, "image.whole", text)
        elif done.method != "page_copy":
            self._spawn(self._refill(self._slots.other), "node.fdir.refill")

    async def _repair(self, act: Act, finding: Finding) -> ImageRepair | None:
        fdir = self._config.fdir
        cancel = threading.Event()
        try:
            if not await self._worker.hold():
                raise PenumbraError("the worker does not end, so its image is not touched")
            gguf = Path(fdir.model_file) if fdir.model_file else None
            done = await asyncio.to_thread(
                repair_image,
                self._slots.images,
                self._slots.slot,
                gguf=gguf,
                timeout_s=fdir.repair_timeout_s,
                cancel=cancel,
            )
        except PenumbraError as error:
            self._worker.release()
            self._report(act, finding, Outcome.FAILED, recovered=False, evidence={"error": error.what[:300]})
            self.failed(act.row.id, error.what)
            return None
        finally:
            # Also when the node stops: the thread ends with the process it waits for.
            cancel.set()
        await self._slots.use(done.slot)
        return done

    async def _refill(self, slot: Slot) -> None:
        """Make the slot that was left whole again: until then there is none to fall back on."""
        cancel = threading.Event()
        try:
            async with self._slots.lock:
                done = await asyncio.to_thread(
                    refill_slot,
                    self._slots.images,
                    slot,
                    timeout_s=self._config.fdir.repair_timeout_s,
                    cancel=cancel,
                )
        except PenumbraError as error:
            self._recorder.event(Severity.HIGH, "image.not_refilled", f"slot {slot}: {error.what}"[:500])
        else:
            text = f"slot {slot} is whole again after {done.took_s:.0f} s"
            self._recorder.event(Severity.INFO, "image.refilled", text, {"slot": slot})
        finally:
            cancel.set()

    async def _restart_node(self, act: Act, finding: Finding) -> None:
        self._report(act, finding, Outcome.STARTED, recovered=False)
        await self._request_restart(f"{act.row.id}: {act.reason}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await self._recorder.flush()
        self._orders.restart(f"{act.row.id}: {act.reason}")

    async def _request_restart(self, reason: str) -> None:
        resets = self._orders.resets()
        try:
            await self._database.run(lambda c: state.request_restart(c, reason[:500], resets))
        except (StoreFull, sqlite3.Error) as error:
            # The restart then counts as unintended, which is bounded as well.
            _log.error("restart not noted: %s", error)

    async def _ask_for_power_cycle(self, act: Act, finding: Finding) -> None:
        """Ask the bus again and again; if it does not act, the action has failed."""
        await self._request_restart(f"power cycle for {act.row.id}: {act.reason}")
        evidence: Evidence = {**finding.evidence}
        evidence.pop("detected_ns", None)
        message = bus.BusRequest(
            t_ns=self._recorder.now_ns(),
            request="power_cycle",
            reason=act.reason[:300],
            evidence=evidence,
        )
        topic = topics.bus(self._config.node.name, "request")
        deadline_s = time.monotonic() + CYCLE_WAIT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(LinkDown):
                await self._link.publish(topic, bus.encode(message))
            await asyncio.sleep(REQUEST_PERIOD_S)
        with contextlib.suppress(StoreFull, sqlite3.Error):
            await self._database.run(state.withdraw_restart)
        why = f"the bus did not switch the board off within {CYCLE_WAIT_S:g} s"
        self._report(act, finding, Outcome.FAILED, recovered=False, evidence={"error": why})
        self.failed(act.row.id, why)

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        if self.group is None:
            raise RuntimeError("the FDIR service does not run")
        self.group.create_task(coroutine, name=name)


def _told(done: ImageRepair) -> Evidence:
    return {
        "method": done.method,
        "slot": done.slot,
        "pages_from_parity": done.pages_from_parity,
        "pages_from_other_slot": done.pages_from_other_slot,
        "files": ",".join(done.files)[:200],
        "took_s": done.took_s,
    }
