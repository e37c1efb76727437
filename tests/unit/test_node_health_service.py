"""Pings to tasks, and the watchdog that is fed while they answer, and only then."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import until

from node.config import FdirSection
from node.health_service import HealthService
from node.pulse import Pulse
from node.recorder import Recorder
from node.watchdog import WatchdogSet
from telemetry.database import Database
from telemetry.spool import Spool

FAST = FdirSection(ping_period_s=0.1, ping_warn_s=0.2, ping_fatal_s=0.5, lag_limit_s=0.3)


class Dog:
    """A watchdog that counts."""

    kind = "device"
    timeout_s: float | None = 0.4

    def __init__(self) -> None:
        self.feeds = 0
        self.said: list[str] = []

    def feed(self) -> None:
        self.feeds += 1

    def ready(self) -> None:
        self.said.append("ready")

    def stopping(self) -> None:
        self.said.append("stopping")

    def close(self, ordered: bool) -> None:
        self.said.append(f"close {ordered}")


class Patients:
    def __init__(self, database: Database) -> None:
        self.dog = Dog()
        self.events: list[str] = []
        self.fatal: list[tuple[str, str]] = []
        recorder = Recorder(database, Spool("n", 1, 1 << 20), lambda: 0)
        recorder.event = lambda _s, name, *_: self.events.append(name)  # type: ignore[method-assign]
        self.stuck = asyncio.Event()
        self.pulses = [Pulse("turning"), Pulse("other")]
        self.service = HealthService(
            FAST, WatchdogSet([self.dog]), self.pulses, recorder, lambda *told: self.fatal.append(told)
        )

    async def turn(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            self.pulses[1].beat()
            if not self.stuck.is_set():
                self.pulses[0].beat()


@contextlib.asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Patients]:
    database = await Database.open(directory / "n.db", max_bytes=1 << 22)
    patients = Patients(database)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(patients.turn()), group.create_task(patients.service.run())]
        try:
            yield patients
        finally:
            for task in tasks:
                task.cancel()
    await patients.service.close(ordered=True)
    await database.close(2.0)


async def test_the_watchdog_is_fed_while_every_task_answers(tmp_path: Path) -> None:
    async with running(tmp_path) as patients:
        await until(lambda: patients.dog.feeds >= 5)
        assert patients.fatal == []
        assert patients.dog.said == ["ready"]
        assert (patients.service.watchdog, patients.service.feeds > 0) == ("device", True)
    assert patients.dog.said == ["ready", "close True"]


async def test_the_watchdog_is_not_fed_once_a_task_is_stuck(tmp_path: Path) -> None:
    async with running(tmp_path) as patients:
        await until(lambda: patients.dog.feeds >= 2)
        patients.stuck.set()
        await until(lambda: bool(patients.fatal))
        feeds = patients.dog.feeds
        assert [name for name, _ in patients.fatal] == ["turning"]
        await asyncio.sleep(0.5)
        assert patients.dog.feeds == feeds
        assert "task.ping_late" in patients.events
        assert "watchdog.withheld" in patients.events


async def test_the_watchdog_is_not_fed_while_the_loop_is_blocked(tmp_path: Path) -> None:
    async with running(tmp_path) as patients:
        await until(lambda: patients.dog.feeds >= 2)
        before = patients.dog.feeds
        time.sleep(1.2)  # noqa: ASYNC251 - blocked on purpose
        # Three feeds at most fall into the time the lag is still within its limit.
        assert patients.dog.feeds - before <= 4
        assert patients.service.take_lag_s() > 0.8
        await until(lambda: "watchdog.fed" in patients.events)


async def test_a_restart_asked_for_ends_the_feeding(tmp_path: Path) -> None:
    async with running(tmp_path) as patients:
        await until(lambda: patients.dog.feeds >= 2)
        patients.service.request_restart("row node.restart")
        await asyncio.sleep(0.2)
        feeds = patients.dog.feeds
        await asyncio.sleep(0.5)
        assert patients.dog.feeds == feeds
        patients.service.stopping()
        assert patients.dog.said == ["ready", "stopping"]


def test_a_pulse_answers_once_the_latest_ping() -> None:
    woken: list[int] = []
    answers: list[tuple[str, int]] = []
    pulse = Pulse("task", lambda: woken.append(1))
    pulse.beat()
    pulse.on_answer = lambda name, key: answers.append((name, key))
    pulse.ask(1)
    pulse.ask(2)
    pulse.beat()
    pulse.beat()
    assert (woken, answers) == ([1, 1], [("task", 2)])


@pytest.mark.parametrize("error", [OSError("gone")])
async def test_a_watchdog_that_cannot_be_told_ends_nothing(tmp_path: Path, error: OSError) -> None:
    async with running(tmp_path) as patients:
        await until(lambda: patients.dog.feeds >= 1)

        def fail() -> None:
            raise error

        patients.dog.stopping = fail  # type: ignore[method-assign]
        patients.service.stopping()
        await until(lambda: patients.dog.feeds >= 2)
