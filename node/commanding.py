"""Telecommands: authenticate, make durable, execute, report each stage.

A command, its durable effect and its verification reports are one transaction: after a kill at any moment
either all of it happened, or nothing did and the ground's repetition is executed. What is not durable (the
worker, the mode machine) follows after the commit. Whatever arrives is counted and answered, never raised.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

from node import open_commands
from node.command_effects import CommandEffects, CommandFailed, Done, ends_restriction
from node.jobs import JobQueue
from node.open_commands import OK, Order
from node.pulse import Pulse
from node.recorder import Recorder, Throttle
from node.schedule import SKIP_AFTER_NS, Origin, Run, Schedule
from telemetry import commands
from telemetry.authenticator import (
    Accepted,
    Authentic,
    Authenticator,
    Redelivered,
    Rejected,
    ReplayError,
)
from telemetry.commands import Arguments, CommandError
from telemetry.database import Database, StoreFull
from telemetry.dictionary.codes import FailureCode
from telemetry.packets import Event, Packet, Severity, Stage, Verification
from telemetry.spool import Spool

_log = logging.getLogger(__name__)

MAX_WAITING = 64
"""Authentic commands that may wait: the authenticator's window; what is dropped is repeated (assumed)."""
RATE_HZ = 20.0
"""New commands taken in a second, on average (assumed: far more than an operator or a schedule needs)."""
BURST = 64
"""New commands taken at once after a quiet time (assumed)."""
SCHEDULE_TICK_S = 0.05
"""How often the schedule is looked at, s (assumed: small beside what commands take)."""
SCHEDULE_REST_S = 1.0
"""The same while the store takes nothing, s (assumed)."""
KEY_COMMANDS = (commands.ActivateKey, commands.RetireKey, commands.Resync)


@dataclass
class Answer:
    """What is stored of an execution."""

    reports: list[Verification]
    packet: Packet | None = None
    executed: Arguments | None = None
    """The arguments, if the command was executed, or begun."""
    begun: Order | None = None
    """The order, if it is only begun."""

    @property
    def packets(self) -> list[Packet]:
        """All of it, for the spool."""
        return [*self.reports, *([] if self.packet is None else [self.packet])]


class Commanding:
    """Handles telecommands in order.

    Parameters
    ----------
    database, spool, jobs
        Where commands take effect.
    authenticator
        Loaded; owned by this class from here on.
    recorder
        For security reports, and the mission clock.
    on_executed
        Called after the commit with the arguments of each command executed.
    on_begun
        Called after the commit with each command that takes longer; `finish` is to be called for it.
    schedule
        Its tables exist; owned by this class from here on.
    mission_ns
        Returns mission time, UTC ns; None while the bus has not given it.
    acting_ns
        The same, and None as well while a step of it waits to be confirmed: the schedule waits. By default
        `mission_ns`.
    check, take_other
        See `CommandEffects`; called in the database's thread and the command's transaction.
    """

    def __init__(
        self,
        *,
        database: Database,
        spool: Spool,
        jobs: JobQueue,
        authenticator: Authenticator,
        recorder: Recorder,
        on_executed: Callable[[Arguments], None],
        schedule: Schedule,
        mission_ns: Callable[[], int | None],
        acting_ns: Callable[[], int | None] | None = None,
        on_begun: Callable[[Order, Arguments], None] = lambda _, __: None,
        check: Callable[[sqlite3.Connection, Arguments], None] = lambda _, __: None,
        take_other: Callable[[sqlite3.Connection, Arguments], Done | None] = lambda _, __: None,
    ) -> None:
        self.dropped = 0
        """Authentic commands dropped because too many were waiting."""
        self._database = database
        self._spool = spool
        self._authenticator = authenticator
        self._recorder = recorder
        self._on_executed = on_executed
        self._schedule = schedule
        self._acting_ns = acting_ns or mission_ns
        self._step_ns = 0
        """Steps of mission time that the sequences under way have yet to follow, ns."""
        self._on_begun = on_begun
        self._effects = CommandEffects(
            jobs, authenticator, schedule, mission_ns=mission_ns, check=check, take_other=take_other
        )
        self._inbox: asyncio.Queue[Authentic | None] = asyncio.Queue(MAX_WAITING)
        """Commands; None wakes the task to answer a health ping."""
        self.pulse = Pulse("commanding", self._wake)
        """Health of the task that executes."""
        # Apart, so that a flood from someone without a key does not silence the answers to those with one.
        self._rejections = {authentic: Throttle(1.0, burst=5) for authentic in (False, True)}
        self._repetitions = Throttle(1.0, burst=16)
        self._rate = Throttle(1 / RATE_HZ, burst=BURST)
        self._stored = True
        """Whether the store took the last scheduled command."""

    def offer(self, payload: bytes, topic: str | None = None) -> None:
        """Take a message, topic None for that of commands. Nobody without a key gets into the queue."""
        found = self._authenticator.authenticate(payload, topic)
        if isinstance(found, Rejected):
            self._report_rejected(found)
            return
        try:
            self._inbox.put_nowait(found)
        except asyncio.QueueFull:
            self.dropped += 1

    def _wake(self) -> None:
        # A full inbox is being worked off, and the task beats at each message.
        if not self._inbox.full():
            self._inbox.put_nowait(None)

    async def run(self) -> None:
        """Handle commands until cancelled."""
        await self._patiently(self._close_interrupted)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_schedule(), name="node.commanding.schedule")
            group.create_task(self._handle(), name="node.commanding.handle")

    async def progress(self, order: Order, text: str) -> None:
        """Store how far a command is that was begun."""
        await self._patiently(lambda c: self._answer_later(c, order, order.report(Stage.PROGRESS, OK, text)))

    async def finish(self, order: Order, code: str, done: Done) -> None:
        """Store the completion of a command that was begun, its effect, and what it sends down."""

        def finish(connection: sqlite3.Connection) -> None:
            if done.effect is not None:
                done.effect(connection)
            self._answer_later(connection, order, order.report(Stage.COMPLETED, code, done.note))
            if done.packet is not None:
                self._spool.append(connection, done.packet, self._recorder.now_ns())
            open_commands.remove(connection, order)

        await self._patiently(finish)

    def _close_interrupted(self, connection: sqlite3.Connection) -> None:
        open_commands.create(connection)
        for order in open_commands.all_open(connection):
            text = "the node ended while it was carried out"
            self._answer_later(
                connection, order, order.report(Stage.COMPLETED, FailureCode.INTERRUPTED, text)
            )
            open_commands.remove(connection, order)

    def _answer_later(self, connection: sqlite3.Connection, order: Order, report: Verification) -> None:
        self._spool.append(connection, report, self._recorder.now_ns())
        if order.entry is None:
            self._authenticator.record(connection, report)

    async def _patiently(self, function: Callable[[sqlite3.Connection], None]) -> None:
        """Run a transaction, again and again while the store takes nothing."""
        while True:
            try:
                await self._database.run(function)
            except (StoreFull, sqlite3.Error) as error:
                _log.error("a command's report is not stored yet: %s", error)
                await asyncio.sleep(SCHEDULE_REST_S)
            else:
                return

    async def _watch_schedule(self) -> None:
        """Wake the task that executes when the time of a scheduled command has come."""
        while True:
            await asyncio.sleep(SCHEDULE_TICK_S if self._stored else SCHEDULE_REST_S)
            if self._step_ns or self._due_ns() is not None:
                self._wake()

    def follow_step(self, by_ns: int) -> None:
        """Note that mission time stepped: what is left of a sequence keeps its delays in physical time."""
        self._step_ns += by_ns

    async def _shift_sequences(self) -> None:
        by_ns = self._step_ns
        try:
            await self._database.run(lambda c: self._schedule.shift_sequences(c, by_ns))
        except (StoreFull, sqlite3.Error) as error:
            self._stored = False
            _log.error("sequences did not follow a step of mission time: %s", error)
            await self._database.run(self._follow_disk)
            return
        self._stored = True
        self._step_ns -= by_ns

    def _due_ns(self) -> int | None:
        """Return mission time if a scheduled command is due."""
        if self._step_ns:
            return None
        now_ns, next_ns = self._acting_ns(), self._schedule.next_ns
        return now_ns if now_ns is not None and next_ns is not None and next_ns <= now_ns else None

    async def _handle(self) -> None:
        while True:
            authentic = await self._inbox.get()
            self.pulse.beat()
            if self._step_ns:
                await self._shift_sequences()
            while (due_ns := self._due_ns()) is not None and await self._execute_entry(due_ns):
                pass
            if authentic is None:
                continue
            now_ns = self._recorder.now_ns()
            match self._authenticator.place(authentic, now_ns):
                case Accepted() as accepted:
                    if self._rate.admit(time.monotonic()) is None:
                        self._report_rejected(self._authenticator.hold_back(accepted))
                    else:
                        await self._execute(accepted, now_ns)
                case Redelivered(_, verifications):
                    if self._repetitions.admit(time.monotonic()) is not None:
                        for verification in verifications:
                            self._recorder.post(verification)
                case Rejected() as rejected:
                    self._report_rejected(rejected)

    def _report_rejected(self, rejected: Rejected) -> None:
        count = self._rejections[rejected.authentic].admit(time.monotonic())
        if count is None:
            return
        _log.warning("command rejected (%s, %d of late): %s", rejected.code, count, rejected.text)
        self._recorder.post(self._authenticator.report())
        if rejected.authentic and rejected.key_id is not None and rejected.seq is not None:
            # Its sender holds the key, and waits for an answer.
            self._recorder.post(
                Verification(
                    key_id=rejected.key_id,
                    command_seq=rejected.seq,
                    name=rejected.name or "",
                    stage=Stage.ACCEPTED,
                    ok=False,
                    code=rejected.code,
                    reason=rejected.text,
                )
            )

    async def _execute(self, accepted: Accepted, now_ns: int) -> None:
        try:
            answer = await self._store(accepted, now_ns)
        except (StoreFull, ReplayError, sqlite3.Error) as error:
            # Not durable, so not executed. Memory must not be ahead of the disk.
            _log.error("command %s not executed: %s", accepted.command.name, error)
            await self._database.run(self._follow_disk)
            return
        if isinstance(answer.executed, KEY_COMMANDS):
            # The ring and the numbers in memory follow the disk.
            await self._database.run(self._authenticator.load)
            self._recorder.post(self._authenticator.report())
        self._go_on(answer)

    async def _store(self, accepted: Accepted, now_ns: int) -> Answer:
        """Carry out a command durably; telemetry gives way to it on a full disk, but not to another job."""
        try:
            return await self._database.run(lambda c: self._transact(c, accepted, now_ns))
        except StoreFull:
            if accepted.command.name == commands.Infer.name:
                raise
        await self._database.run(self._follow_disk)
        given = await self._database.run(self._spool.make_way)
        _log.warning("the disk is full: %d records gave way to command %s", given, accepted.command.name)
        return await self._database.run(lambda c: self._transact(c, accepted, now_ns))

    def _go_on(self, answer: Answer) -> None:
        """Do what follows the commit."""
        if answer.begun is not None and answer.executed is not None:
            self._on_begun(answer.begun, answer.executed)
        elif answer.executed is not None:
            self._on_executed(answer.executed)

    def _follow_disk(self, connection: sqlite3.Connection) -> None:
        self._authenticator.load(connection)
        self._schedule.look(connection)

    def _transact(self, connection: sqlite3.Connection, accepted: Accepted, now_ns: int) -> Answer:
        """Do all that must be durable."""
        command = accepted.command
        order = Order(Origin(command.key_id, command.seq), command.name, command.args)
        answer = self._execute_in(connection, order)
        for packet in answer.packets:
            self._spool.append(connection, packet, now_ns)
        # Last, since it moves the counters: what fails before undoes the whole command.
        self._authenticator.commit(connection, accepted)
        for verification in answer.reports:
            self._authenticator.record(connection, verification)
        return answer

    async def _execute_entry(self, now_ns: int) -> bool:
        """Execute the earliest entry of the schedule that is due; return whether there may be another."""
        try:
            answer = await self._database.run(lambda c: self._transact_entry(c, now_ns))
        except (StoreFull, sqlite3.Error) as error:
            self._stored = False
            _log.error("scheduled command not executed: %s", error)
            await self._database.run(self._follow_disk)
            return False
        self._stored = True
        if answer is not None:
            self._go_on(answer)
        return True

    def _transact_entry(self, connection: sqlite3.Connection, now_ns: int) -> Answer | None:
        entry = self._schedule.take_due(connection, now_ns)
        if entry is None:
            return None
        order = Order(entry.origin, entry.name, entry.args, entry.entry)
        late_ns = now_ns - entry.t_ns
        if not entry.sound:
            answer = Answer(
                [
                    order.report(
                        Stage.STARTED, FailureCode.DAMAGED, "its copies on board are struck beyond a vote"
                    )
                ]
            )
        elif late_ns > SKIP_AFTER_NS and not ends_restriction(connection, entry.name, entry.args):
            answer = Answer(
                [order.report(Stage.STARTED, FailureCode.SKIPPED, f"its time was {late_ns / 1e9:.0f} s ago")]
            )
        else:
            answer = self._execute_in(connection, order)
        for packet in answer.packets:
            self._spool.append(connection, packet, now_ns)
        if entry.sequence is not None:
            ended = self._schedule.count_step(connection, entry.sequence, ran=answer.executed is not None)
            if ended is not None and ended.missed:
                self._spool.append(connection, _partial(entry.sequence, ended), now_ns)
        return answer

    def _execute_in(self, connection: sqlite3.Connection, order: Order) -> Answer:
        """Check the arguments and take the durable effect, reporting each stage."""
        answer = Answer([])
        stages = (Stage.ACCEPTED, Stage.STARTED) if order.entry is None else (Stage.STARTED,)
        try:
            arguments = commands.parse_arguments(order.name, order.args)
        except CommandError as error:
            code = error.code or commands.ArgumentCode.BAD_ARGUMENT
            answer.reports.append(order.report(stages[0], code, str(error)))
            return answer
        for stage in stages:
            answer.reports.append(order.report(stage))
        if isinstance(arguments, commands.Ping):
            answer.reports.append(order.report(Stage.PROGRESS))
        try:
            done = self._effects.take(connection, order.origin, arguments)
        except CommandFailed as error:
            answer.reports.append(order.report(Stage.COMPLETED, error.code, str(error)))
            return answer
        answer.executed = arguments
        if done.later:
            open_commands.add(connection, order)
            answer.begun = order
            return answer
        answer.reports.append(order.report(Stage.COMPLETED, OK, done.note))
        answer.packet = done.packet
        return answer


def _partial(sequence: str, run: Run) -> Event:
    """Return the event of a sequence that has ended, and of which not all steps were carried out."""
    text = f"sequence {sequence} has ended: {run.ran} of its steps ran, {run.missed} did not"
    return Event(
        severity=Severity.MEDIUM,
        name="sequence.partial",
        text=text,
        evidence={"sequence": sequence, "ran": run.ran, "missed": run.missed},
    )
