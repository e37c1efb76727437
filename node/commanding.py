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

from fdir.table import RowState
from node import state
from node.jobs import JobConflict, JobQueue, JobState
from node.pulse import Pulse
from node.recorder import Recorder, Throttle
from telemetry import commands
from telemetry.authenticator import (
    Accepted,
    Authentic,
    Authenticator,
    KeyChangeError,
    Redelivered,
    Rejected,
    ReplayError,
)
from telemetry.commands import Arguments, CommandError
from telemetry.database import Database, StoreFull
from telemetry.envelope import Command
from telemetry.packets import Mode, Stage, Verification
from telemetry.spool import Spool

_log = logging.getLogger(__name__)

MAX_WAITING = 64
"""Authentic commands that may wait: the authenticator's window; what is dropped is repeated (assumed)."""
RATE_HZ = 20.0
"""New commands taken in a second, on average (assumed: far more than an operator or a schedule needs)."""
BURST = 64
"""New commands taken at once after a quiet time (assumed)."""
KEY_COMMANDS = (commands.ActivateKey, commands.RetireKey, commands.Resync)
OK = "ok"


class CommandFailed(Exception):
    """An authentic command could not be executed; carries the code of its verification."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


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
    check
        Called before the effect, in the database's thread and the command's transaction; raises
        `CommandFailed` for what cannot be done.
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
        check: Callable[[sqlite3.Connection, Arguments], None] = lambda _, __: None,
    ) -> None:
        self.dropped = 0
        """Authentic commands dropped because too many were waiting."""
        self._database = database
        self._spool = spool
        self._jobs = jobs
        self._authenticator = authenticator
        self._recorder = recorder
        self._on_executed = on_executed
        self._check = check
        self._inbox: asyncio.Queue[Authentic | None] = asyncio.Queue(MAX_WAITING)
        """Commands; None wakes the task to answer a health ping."""
        self.pulse = Pulse("commanding", self._wake)
        """Health of the task that executes."""
        # Apart, so that a flood from someone without a key does not silence the answers to those with one.
        self._rejections = {authentic: Throttle(1.0, burst=5) for authentic in (False, True)}
        self._repetitions = Throttle(1.0, burst=16)
        self._rate = Throttle(1 / RATE_HZ, burst=BURST)

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
        while True:
            authentic = await self._inbox.get()
            self.pulse.beat()
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
        _log.warning("command rejected (%s): %s", rejected.code, rejected.text)
        if self._rejections[rejected.authentic].admit(time.monotonic()) is None:
            return
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
            executed = await self._database.run(lambda c: self._transact(c, accepted, now_ns))
        except (StoreFull, ReplayError, sqlite3.Error) as error:
            # Not durable, so not executed. Memory must not be ahead of the disk.
            _log.error("command %s not executed: %s", accepted.command.name, error)
            await self._database.run(self._authenticator.load)
            return
        if isinstance(executed, KEY_COMMANDS):
            # The ring and the numbers in memory follow the disk.
            await self._database.run(self._authenticator.load)
            self._recorder.post(self._authenticator.report())
        if executed is not None:
            self._on_executed(executed)

    def _transact(self, connection: sqlite3.Connection, accepted: Accepted, now_ns: int) -> Arguments | None:
        """Do all that must be durable; return the arguments if the command was executed."""
        command = accepted.command
        reports: list[Verification] = []

        def report(stage: Stage, code: str = OK, reason: str = "") -> None:
            reports.append(_verification(command, stage, code, reason))

        executed = self._execute_in(connection, command, report)
        for verification in reports:
            self._spool.append(connection, verification, now_ns)
        # Last, since it moves the counters: what fails before undoes the whole command.
        self._authenticator.commit(connection, accepted)
        for verification in reports:
            self._authenticator.record(connection, verification)
        return executed

    def _execute_in(
        self, connection: sqlite3.Connection, command: Command, report: Callable[..., None]
    ) -> Arguments | None:
        """Check the arguments and take the durable effect, reporting each stage."""
        try:
            arguments = commands.parse_arguments(command.name, command.args)
        except CommandError as error:
            report(Stage.ACCEPTED, error.code or commands.ArgumentCode.BAD_ARGUMENT, str(error))
            return None
        report(Stage.ACCEPTED)
        report(Stage.STARTED)
        try:
            self._take_effect(connection, command, arguments, report)
        except CommandFailed as error:
            report(Stage.COMPLETED, error.code, str(error))
            return None
        report(Stage.COMPLETED)
        return arguments

    def _take_effect(
        self,
        connection: sqlite3.Connection,
        command: Command,
        arguments: Arguments,
        report: Callable[[Stage], None],
    ) -> None:
        self._check(connection, arguments)
        match arguments:
            case commands.Ping():
                report(Stage.PROGRESS)
            case commands.Infer():
                try:
                    self._jobs.submit(
                        connection,
                        arguments.job,
                        arguments.prompt,
                        arguments.max_tokens,
                        sampling=arguments.sampling,
                        priority=arguments.priority,
                        deadline_ns=arguments.deadline_ns,
                    )
                except JobConflict as error:
                    raise CommandFailed("job_exists", str(error)) from None
            case commands.Cancel(job=job):
                known = self._jobs.cancel(connection, job)
                if known is None:
                    raise CommandFailed("unknown_job", f"no job {job!r}")
                if known.state is JobState.DONE:
                    raise CommandFailed("job_done", f"job {job!r} is done: {known.finish}")
            case commands.ActivateKey() | commands.RetireKey() | commands.Resync():
                self._change_keys(connection, command, arguments)
            case _:
                _remember(connection, arguments)

    def _change_keys(
        self,
        connection: sqlite3.Connection,
        command: Command,
        arguments: commands.ActivateKey | commands.RetireKey | commands.Resync,
    ) -> None:
        try:
            match arguments:
                case commands.ActivateKey(key=key):
                    self._authenticator.activate(connection, key)
                case commands.RetireKey(key=key):
                    self._authenticator.retire(connection, key, command.key_id)
                case commands.Resync(key=key, last_seq=last_seq):
                    self._authenticator.resync(connection, key, last_seq)
        except KeyChangeError as error:
            raise CommandFailed("key_unchanged", str(error)) from None


def _remember(connection: sqlite3.Connection, arguments: Arguments) -> None:
    """Store the state a command sets. What has no durable effect follows in `on_executed`."""
    match arguments:
        case commands.SetMode(mode=mode):
            state.set_safe(connection, Mode(mode) is Mode.SAFE)
        case commands.SetPowerCap(power_w=power_w):
            state.set_cap(connection, power_w)
        case commands.SetFdirRow(row=row, state=row_state):
            state.change_fdir_state(connection, None if row == "*" else row, RowState(row_state))
        case commands.ExternalControl(on=on):
            state.set_external_control(connection, on)
        case commands.ResetCounters():
            state.forget_reboots(connection)
        case _:
            pass


def _verification(command: Command, stage: Stage, code: str, reason: str) -> Verification:
    return Verification(
        key_id=command.key_id,
        command_seq=command.seq,
        name=command.name,
        stage=stage,
        ok=code == OK,
        code=code,
        reason=reason,
    )
