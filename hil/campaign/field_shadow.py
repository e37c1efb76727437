"""What the flight software answers to a message, asked in this process: the reason, and whether it changed.

`Shadow` is the node's own intake, view of the spacecraft and mission clock; `Commands` its authenticator and
the effects of commands, each undone again. Whatever else comes out than their own errors is a finding.
"""

from __future__ import annotations

import sqlite3
import warnings
from typing import Any, Final, cast

from hil.bench.link_load import NODE, T0_NS
from hil.campaign.hostile import RING
from hil.campaign.node_state import state_of
from node import open_commands, state
from node.bus_view import BusView
from node.clock import MissionClock
from node.command_effects import CommandEffects, CommandFailed
from node.intake import Intake
from node.jobs import JobQueue
from node.recorder import Recorder
from node.schedule import Origin, Schedule
from telemetry import commands, topics
from telemetry.authenticator import Authenticator, Rejected
from telemetry.bus import BusError, BusMessage, BusTime, decode, decode_eps
from telemetry.commands import CommandError
from telemetry.dictionary.codes import DropCode
from telemetry.spool import Spool

NS: Final = 1_000_000_000
EVERY: Final = 50
"""Messages that nobody takes change nothing: for one of so many that is looked at all the same."""
TAKEN: Final = "accepted"
_KINDS: Final = (
    ("MessagePack data", "no msgpack"),
    ("recursion", "too deep"),
    ("missing required", "missing"),
    ("unknown field", "unknown"),
    ("not finite", "not finite"),
    ("length", "length"),
    ("= ", "range"),
    ("got `", "type"),
)
"""Pieces of the text of an error of the schema, the first that is found counts, and what they say."""


def kind_of(text: str) -> str:
    """Return the kind of an error of the schema by its text; `content` for what the schema allows."""
    return next((kind for piece, kind in _KINDS if piece in text), "content")


def why_malformed(channel: str, payload: bytes) -> str:
    """Return the kind of error that a malformed message of the bus has."""
    try:
        decode_eps(payload) if channel == "eps" else decode(channel, payload)
    except BusError as error:
        return kind_of(str(error))
    return "none"


class _Silent:
    """Stands for the recorder."""

    def now_ns(self) -> int:
        return T0_NS

    def event(self, *_: object) -> None:
        return


class Shadow:
    """The node's way in for messages of the bus, and what it knows by them."""

    def __init__(self) -> None:
        self.view = BusView()
        self.clock = MissionClock(T0_NS, 0)
        self.changed = 0
        """Messages that were refused, and have changed something all the same."""
        self._turn = 0
        self._intake = self._opened()
        self._before: bytes | None = None
        """What was known when the message came to whoever takes it; None: it did not come so far."""

    def take(self, channel: str, payload: bytes, *, retained: bool = False) -> DropCode | None:
        """Take a message of a channel, live or as the broker had kept it.

        Returns
        -------
        DropCode or None
            Why it was not taken, None when it was. What is held for a second sample was taken (ADR 0021).
        """
        with warnings.catch_warnings():
            # Of foreign code, over what it makes of elements: as in the node, they are no errors.
            warnings.simplefilter("ignore")
            return self._take(channel, payload, retained=retained)

    def _take(self, channel: str, payload: bytes, *, retained: bool) -> DropCode | None:
        self._turn += 1
        self._before = None if self._turn % EVERY else self._knows()
        dropped, forecast = self._intake.dropped.copy(), self.view.forecast
        self._intake.on_message(topics.bus(NODE, channel), payload, retained=retained)
        codes = list((self._intake.dropped - dropped).elements())
        if not codes:
            return None
        same = self._before is None or self._before == self._knows()
        self.changed += not (same and self.view.forecast is forecast)
        return codes[0]

    def _opened(self) -> Intake:
        recorder = cast("Recorder", _Silent())
        ignored: Any = lambda *_: None  # noqa: E731 - four handlers that do nothing
        return Intake(
            NODE, RING, recorder,
            on_command=ignored, on_upload=ignored, on_ack=ignored, on_flow=ignored, on_bus=self._on_bus,
            on_retained=self._on_retained,
        )  # fmt: skip

    def _on_bus(self, message: BusMessage) -> None:
        self._before = self._knows()
        if isinstance(message, BusTime):
            self.clock.handle(message, self._turn * NS)
        else:
            self.view.handle(message, self._turn * 0.1)

    def _on_retained(self, message: BusMessage) -> str | None:
        self._before = self._knows()
        return self.view.handle_retained(message, self._turn * 0.1, T0_NS, self.clock.rate)

    def _knows(self) -> bytes:
        return state_of(self.view, without={"forecast"}) + state_of(self.clock)


class Commands:
    """The node's judgement of telecommands, and their effects, each of which is undone."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        spool, schedule = Spool(NODE, 1, 1 << 24), Schedule()
        jobs, self._authenticator = JobQueue(spool), Authenticator(NODE, RING)
        for create in (
            *(state.create, spool.create, jobs.create, self._authenticator.load, schedule.create),
            open_commands.create,
        ):
            create(self._connection)
        self._effects = CommandEffects(
            jobs, self._authenticator, schedule,
            mission_ns=lambda: T0_NS, check=lambda _, __: None, take_other=lambda _, __: None,
        )  # fmt: skip

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def answer(self, payload: bytes) -> str:
        """Return the code a telecommand is answered with; whatever else is raised is a finding."""
        verdict = self._authenticator.check(payload, T0_NS)
        if isinstance(verdict, Rejected):
            return verdict.code.value
        command = verdict.command
        self._connection.execute("SAVEPOINT one")
        try:
            arguments = commands.parse_arguments(command.name, command.args)
            self._effects.take(self._connection, Origin(command.key_id, command.seq), arguments)
        except CommandError as error:
            return "malformed" if error.code is None else error.code.value
        except CommandFailed as error:
            return error.code.value
        finally:
            self._connection.execute("ROLLBACK TO one")
            self._connection.execute("RELEASE one")
        return TAKEN
