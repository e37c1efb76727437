"""What the ladder asks for, carried out: each action, its report, and what is told back."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from some_rows import make_row

from fdir.ladder import Act
from fdir.table import Action
from node import fdir_acts, state
from node.fdir_acts import Acts, Orders
from node.findings import Finding
from node.image_repair import ImageRepair
from node.image_slots import ImageSlots
from telemetry import bus
from telemetry.database import Database
from telemetry.errors import PenumbraError
from telemetry.packets import FdirReport, Outcome


class Config:
    """The sections that are read."""

    class node:
        name = "n"

    class model:
        images_dir = "/images"

    class fdir:
        model_file = ""
        repair_timeout_s = 5.0


class Parts:
    """Everything the acts touch, written down."""

    def __init__(self, database: Database) -> None:
        self.done: list[Any] = []
        self.reports: list[FdirReport] = []
        self.sent: list[tuple[str, bus.BusMessage]] = []
        self.holds = True
        self.database = database
        self.image_id = None
        slots = ImageSlots(Config(), "a", worker=self, database=database)  # type: ignore[arg-type]
        self.acts = Acts(
            Config(), slots, worker=self, recorder=self, database=database, link=self,  # type: ignore[arg-type]
            orders=Orders(
                lambda reason: self.done.append(("safe", reason)), self.end, lambda: 2
            ),
        )  # fmt: skip
        self.acts.recovered = lambda row: self.done.append(("recovered", row))
        self.acts.failed = lambda row, why: self.done.append(("failed", row, why))

    # The worker's service.
    def restart(self, row: str, reason: str) -> None:
        self.done.append(("restart", row, reason))

    async def hold(self) -> bool:
        return self.holds

    def release(self, image: Path | None = None) -> None:
        self.done.append(("release", image))

    # The recorder.
    def post(self, packet: FdirReport) -> None:
        self.reports.append(packet)

    def event(self, *_: object) -> None:
        self.done.append(("event", _[1]))

    def now_ns(self) -> int:
        return 7

    async def flush(self) -> None:
        self.done.append("flush")

    # The link.
    async def publish(self, topic: str, payload: bytes) -> None:
        self.sent.append((topic, bus.decode("request", payload)))

    def end(self, reason: str) -> None:
        with closing(sqlite3.connect(self.database.path)) as connection, connection:
            noted = state.begin_boot(connection).restart_requested
        self.done.append(("end", reason, noted))

    async def carry_out(self, action: Action, finding: Finding | None = None) -> None:
        row = make_row("a.row", action=action)
        async with asyncio.TaskGroup() as group:
            self.acts.group = group
            await self.acts.carry_out(Act(row, 1, {}, "found"), finding)

    def outcomes(self) -> list[Outcome]:
        return [report.outcome for report in self.reports]


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    database = await Database.open(tmp_path / "node.db", max_bytes=1 << 24)
    await database.run(state.create)
    await database.run(state.begin_boot)
    yield Parts(database)
    await database.close(2.0)


async def test_what_needs_no_action_is_reported_and_over(parts):
    await parts.carry_out(Action.NONE)
    assert parts.outcomes() == [Outcome.REPORTED]
    assert parts.done == [("recovered", "a.row")]


@pytest.mark.parametrize(
    ("failed", "outcome", "told"),
    [
        ("", Outcome.REPAIRED, ("recovered", "a.row")),
        ("no source", Outcome.FAILED, ("failed", "a.row", "no source")),
    ],
)
async def test_what_was_mended_where_it_was_found_is_reported_as_it_went(parts, failed, outcome, told):
    await parts.carry_out(Action.REPAIR, Finding("a.row", "struck", {"page": 3}, 5, failed=failed))
    assert parts.outcomes() == [outcome]
    (report,) = parts.reports
    assert (report.detected_ns, report.evidence["page"]) == (5, 3)
    assert (report.recovered_ns is None) == bool(failed)
    assert parts.done == [told]


async def test_the_worker_is_restarted_by_its_own_service(parts):
    await parts.carry_out(Action.RESTART_WORKER)
    assert parts.done == [("restart", "a.row", "found")]
    assert parts.reports == []


async def test_a_restart_of_the_node_is_noted_on_the_disk_before_it_is_ordered(parts):
    await parts.carry_out(Action.RESTART_NODE)
    assert parts.outcomes() == [Outcome.STARTED]
    assert parts.done == ["flush", ("end", "a.row: found", "a.row: found")]


async def test_safe_mode_is_reported_and_ordered(parts):
    await parts.carry_out(Action.SAFE_MODE)
    assert parts.outcomes() == [Outcome.ESCALATED]
    assert parts.done == [("safe", "a.row: found")]


@pytest.mark.parametrize(
    ("method", "slot", "refilled"),
    [("page_copy", "a", []), ("other_slot", "b", ["a"]), ("rebuilt", "a", ["b"])],
)
async def test_an_image_made_whole_is_used_and_the_slot_that_was_left_is_refilled(
    parts, monkeypatch, method, slot, refilled
):
    whole = ImageRepair(method=method, slot=slot, pages_from_parity=2)
    asked: list[str] = []
    monkeypatch.setattr(fdir_acts, "repair_image", lambda *_, **__: whole)
    monkeypatch.setattr(fdir_acts, "refill_slot", lambda _, slot, **__: asked.append(slot) or whole)
    await parts.carry_out(Action.SWITCH_IMAGE)
    assert parts.outcomes() == [Outcome.STARTED, Outcome.REPAIRED]
    assert parts.done[:2] == [("release", Path(f"/images/{slot}")), ("recovered", "a.row")]
    assert parts.reports[-1].evidence["method"] == method
    assert asked == refilled
    assert parts.done[2:] == [("event", "image.refilled")] * len(refilled)


async def test_a_slot_that_cannot_be_refilled_is_told(parts, monkeypatch):
    whole = ImageRepair(method="other_slot", slot="b")

    def full(*_: object, **__: object) -> ImageRepair:
        raise PenumbraError("no space left on the device")

    monkeypatch.setattr(fdir_acts, "repair_image", lambda *_, **__: whole)
    monkeypatch.setattr(fdir_acts, "refill_slot", full)
    await parts.carry_out(Action.SWITCH_IMAGE)
    assert parts.done[-1] == ("event", "image.not_refilled")


async def test_an_image_that_cannot_be_made_whole_fails(parts, monkeypatch):
    def fail(*_: object, **__: object) -> ImageRepair:
        raise PenumbraError("no image can be made whole")

    monkeypatch.setattr(fdir_acts, "repair_image", fail)
    await parts.carry_out(Action.SWITCH_IMAGE)
    assert parts.outcomes()[-1] is Outcome.FAILED
    assert parts.done == [("release", None), ("failed", "a.row", "no image can be made whole")]


async def test_an_image_in_use_is_not_touched(parts, monkeypatch):
    monkeypatch.setattr(fdir_acts, "repair_image", lambda *_, **__: pytest.fail("it was touched"))
    parts.holds = False
    await parts.carry_out(Action.SWITCH_IMAGE)
    assert parts.outcomes() == [Outcome.STARTED, Outcome.FAILED]
    assert parts.done[0] == ("release", None)


async def test_a_power_cycle_is_asked_for_again_and_again_and_withdrawn_if_none_comes(parts, monkeypatch):
    monkeypatch.setattr(fdir_acts, "CYCLE_WAIT_S", 0.2)
    monkeypatch.setattr(fdir_acts, "REQUEST_PERIOD_S", 0.05)
    await parts.carry_out(Action.POWER_CYCLE, Finding("a.row", "r", {"residual_w": 0.5}))
    assert len(parts.sent) >= 2
    assert {topic for topic, _ in parts.sent} == {"penumbra/n/bus/request"}
    message = parts.sent[0][1]
    assert (message.request, message.t_ns, message.evidence) == ("power_cycle", 7, {"residual_w": 0.5})
    assert len({sent.t_ns for _, sent in parts.sent}) == 1, "one request, repeated"
    assert parts.outcomes() == [Outcome.STARTED, Outcome.FAILED]
    assert parts.done[-1][0] == "failed"
    found = await parts.database.run(state.begin_boot)
    assert found.restart_requested == ""
