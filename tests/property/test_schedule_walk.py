"""Random walk of the command schedule beside a plain list: order, shifts, sequences, and restarts."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from node.schedule import Origin, Schedule, ScheduleError
from telemetry.commands import Ping, make_step

ORIGIN = Origin("g", 1)
NAMES = st.sampled_from(["dawn", "dusk"])


class ScheduleWalk(RuleBasedStateMachine):
    """The model is a list of (mission time, entry, sequence); a restart is a new object on the same disk."""

    @initialize()
    def start(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.now_ns = 10**18
        self.model: list[tuple[int, int, str | None]] = []
        self.loaded: dict[str, list[int]] = {}
        self.kill()

    def teardown(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()

    @rule()
    def kill(self) -> None:
        self.schedule = Schedule()
        self.schedule.create(self.connection)

    @rule(ahead_ns=st.integers(1, 100))
    def insert(self, ahead_ns: int) -> None:
        entry = self.schedule.insert(self.connection, self.now_ns + ahead_ns, "ping", {}, ORIGIN)
        assert all(entry != known for _, known, _ in self.model)
        self.model.append((self.now_ns + ahead_ns, entry, None))

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if self.model:
            chosen = data.draw(st.sampled_from(sorted(self.model, key=lambda m: m[1])))
            self.schedule.delete(self.connection, chosen[1])
            self.model.remove(chosen)
            with pytest.raises(ScheduleError):
                self.schedule.delete(self.connection, chosen[1])

    @rule(by_ns=st.integers(-50, 50), data=st.data())
    def shift(self, by_ns: int, data: st.DataObject) -> None:
        entries = sorted(entry for _, entry, _ in self.model)
        entry = data.draw(st.none() | st.sampled_from(entries)) if entries else None
        moved = [(t, e, s) for t, e, s in self.model if entry in (None, e)]
        if any(t + by_ns <= self.now_ns for t, _, _ in moved):
            with pytest.raises(ScheduleError, match="none is moved"):
                self.schedule.shift(self.connection, by_ns, entry, self.now_ns)
            return
        assert self.schedule.shift(self.connection, by_ns, entry, self.now_ns) == len(moved)
        kept = [m for m in self.model if m not in moved]
        self.model = kept + [(t + by_ns, e, s) for t, e, s in moved]

    @rule(name=NAMES, delays=st.lists(st.integers(0, 20), min_size=1, max_size=4))
    def load(self, name: str, delays: list[int]) -> None:
        steps = [make_step(Ping(), delay / 1e9) for delay in delays]
        if any(sequence == name for _, _, sequence in self.model):
            with pytest.raises(ScheduleError, match="runs"):
                self.schedule.load(self.connection, name, steps)
            return
        self.schedule.load(self.connection, name, steps)
        self.loaded[name] = delays

    @rule(name=NAMES)
    def start_sequence(self, name: str) -> None:
        if name not in self.loaded or any(sequence == name for _, _, sequence in self.model):
            with pytest.raises(ScheduleError):
                self.schedule.start(self.connection, name, self.now_ns, ORIGIN)
            return
        self.schedule.start(self.connection, name, self.now_ns, ORIGIN)
        known = {entry for _, entry, _ in self.model}
        new = [e.entry for e in self.schedule.report(self.connection).entries if e.entry not in known]
        t_ns = self.now_ns
        for entry, delay in zip(sorted(new), self.loaded[name], strict=True):
            t_ns += delay
            self.model.append((t_ns, entry, name))

    @rule(name=NAMES)
    def stop_sequence(self, name: str) -> None:
        left = [m for m in self.model if m[2] == name]
        if not left:
            with pytest.raises(ScheduleError):
                self.schedule.stop(self.connection, name)
            return
        assert self.schedule.stop(self.connection, name) == len(left)
        self.model = [m for m in self.model if m[2] != name]

    @rule(pass_ns=st.integers(0, 60))
    def let_time_pass(self, pass_ns: int) -> None:
        self.now_ns += pass_ns
        taken = []
        while (entry := self.schedule.take_due(self.connection, self.now_ns)) is not None:
            assert entry.sound
            taken.append((entry.t_ns, entry.entry))
        due = sorted((t, e) for t, e, _ in self.model if t <= self.now_ns)
        assert taken == due
        self.model = [m for m in self.model if m[0] > self.now_ns]

    @invariant()
    def the_disk_holds_the_model(self) -> None:
        if not hasattr(self, "schedule"):
            return
        report = self.schedule.report(self.connection)
        assert [(e.execute_ns, e.entry, e.sequence) for e in report.entries] == sorted(
            self.model, key=lambda m: m[:2]
        )
        assert report.sequences == sorted(self.loaded)
        assert self.schedule.next_ns == min((t for t, _, _ in self.model), default=None)


TestScheduleWalk = ScheduleWalk.TestCase
TestScheduleWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
