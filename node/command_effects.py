"""What each telecommand does in its transaction. What is not durable follows after the commit, elsewhere."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from fdir.table import RowState
from node import state
from node.jobs import JobConflict, JobQueue, JobState
from node.schedule import Origin, Schedule, ScheduleError
from telemetry import commands
from telemetry.authenticator import Authenticator, KeyChangeError
from telemetry.commands import Arguments, CommandError, Hazard
from telemetry.database import check_kept_pages
from telemetry.dictionary.base import ArgumentCode
from telemetry.dictionary.codes import FailureCode
from telemetry.packets import Mode, Packet

ARMED_S = 60.0
"""Time in which an armed command must be given, s of physical time (assumed)."""
NOT_FOR_LATER = (
    *(commands.Arm, commands.ActivateKey, commands.RetireKey, commands.Resync),
    *(commands.ScheduleInsert, commands.SequenceLoad),
)
"""Commands that need somebody at the console, or would make the schedule feed itself."""


Effect: TypeAlias = Callable[[sqlite3.Connection], None]


class CommandFailed(Exception):
    """An authentic command could not be executed; carries the code of its verification.

    `effect` is what a command that takes long changes all the same, with its completion.
    """

    def __init__(self, code: FailureCode | ArgumentCode, reason: str, effect: Effect | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.effect = effect


@dataclass(frozen=True)
class Done:
    """What a command did."""

    note: str = ""
    """For the verification: what the ground could not know."""
    packet: Packet | None = None
    """To be sent down with it."""
    later: bool = False
    """Whether the command is only begun: what it does, and its completion, follow after the commit."""
    effect: Effect | None = None
    """Of a command that was carried out after its commit: what becomes durable with its completion."""


class CommandEffects:
    """Takes effects.

    Parameters
    ----------
    jobs, authenticator, schedule
        What commands change.
    mission_ns
        Returns mission time, UTC ns; None while the bus has not told it.
    check
        Called before the effect; raises `CommandFailed` for what cannot be done.
    take_other
        Takes the effect of a command that is not about jobs, keys or the schedule; None if it is none of its.
    """

    def __init__(
        self,
        jobs: JobQueue,
        authenticator: Authenticator,
        schedule: Schedule,
        *,
        mission_ns: Callable[[], int | None],
        check: Callable[[sqlite3.Connection, Arguments], None],
        take_other: Callable[[sqlite3.Connection, Arguments], Done | None],
    ) -> None:
        self._jobs = jobs
        self._authenticator = authenticator
        self._schedule = schedule
        self._mission_ns = mission_ns
        self._check = check
        self._take_other = take_other

    def take(self, connection: sqlite3.Connection, origin: Origin, arguments: Arguments) -> Done:
        """Do what a command does, in its transaction. Raises `CommandFailed`."""
        if arguments.hazard is Hazard.HAZARDOUS:
            _fire(connection, arguments)
        self._check(connection, arguments)
        match arguments:
            case commands.Infer() | commands.Cancel():
                self._change_jobs(connection, arguments)
            case commands.ActivateKey() | commands.RetireKey() | commands.Resync():
                self._change_keys(connection, origin, arguments)
            case commands.Arm():
                return _arm(connection, arguments)
            case _:
                try:
                    done = self._change_schedule(connection, origin, arguments)
                except ScheduleError as error:
                    raise CommandFailed(error.code, str(error)) from None
                done = done or self._take_other(connection, arguments)
                if done is not None:
                    return done
                _remember(connection, arguments)
        return Done()

    def _change_jobs(
        self, connection: sqlite3.Connection, arguments: commands.Infer | commands.Cancel
    ) -> None:
        if isinstance(arguments, commands.Infer):
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
                raise CommandFailed(FailureCode.JOB_EXISTS, str(error)) from None
            # Jobs until nothing fits would leave no room for the command that cancels one.
            check_kept_pages(connection)
            return
        known = self._jobs.cancel(connection, arguments.job)
        if known is None:
            raise CommandFailed(FailureCode.UNKNOWN_JOB, f"no job {arguments.job!r}")
        if known.state is JobState.DONE:
            raise CommandFailed(FailureCode.JOB_DONE, f"job {arguments.job!r} is done: {known.finish}")

    def _change_keys(
        self,
        connection: sqlite3.Connection,
        origin: Origin,
        arguments: commands.ActivateKey | commands.RetireKey | commands.Resync,
    ) -> None:
        try:
            match arguments:
                case commands.ActivateKey(key=key):
                    self._authenticator.activate(connection, key)
                case commands.RetireKey(key=key):
                    self._authenticator.retire(connection, key, origin.key_id)
                case commands.Resync(key=key, last_seq=last_seq):
                    self._authenticator.resync(connection, key, last_seq)
        except KeyChangeError as error:
            raise CommandFailed(FailureCode.KEY_UNCHANGED, str(error)) from None

    def _change_schedule(
        self, connection: sqlite3.Connection, origin: Origin, arguments: Arguments
    ) -> Done | None:
        """Return None if it is no command of the schedule. Raises `ScheduleError`."""
        schedule = self._schedule
        match arguments:
            case commands.ScheduleInsert(t_ns=t_ns, command=name, args=args):
                _for_later(name, args)
                if t_ns <= self._now_ns():
                    raise ScheduleError(FailureCode.IN_THE_PAST, f"{t_ns} is not ahead of mission time")
                return Done(f"entry {schedule.insert(connection, t_ns, name, args, origin)}")
            case commands.ScheduleDelete(entry=entry):
                schedule.delete(connection, entry)
            case commands.ScheduleShift(by_s=by_s, entry=entry):
                count = schedule.shift(connection, round(by_s * 1e9), entry, self._now_ns())
                return Done(f"{count} entries")
            case commands.ScheduleList():
                return Done(packet=schedule.report(connection))
            case _:
                return self._change_sequences(connection, origin, arguments)
        return Done()

    def _change_sequences(
        self, connection: sqlite3.Connection, origin: Origin, arguments: Arguments
    ) -> Done | None:
        schedule = self._schedule
        match arguments:
            case commands.SequenceLoad(sequence=name, steps=steps):
                for step in steps:
                    _for_later(step.command, step.args)
                schedule.load(connection, name, steps)
            case commands.SequenceStart(sequence=name):
                count = schedule.start(connection, name, self._now_ns(), origin)
                return Done(f"{count} steps")
            case commands.SequenceStop(sequence=name):
                return Done(f"{schedule.stop(connection, name)} steps were left")
            case _:
                return None
        return Done()

    def _now_ns(self) -> int:
        now_ns = self._mission_ns()
        if now_ns is None:
            raise ScheduleError(FailureCode.NO_CLOCK, "the bus has not told mission time yet")
        return now_ns


def _arm(connection: sqlite3.Connection, arm: commands.Arm) -> Done:
    hazard = _parse(arm.command, arm.args).hazard
    if hazard is not Hazard.HAZARDOUS:
        raise CommandFailed(
            FailureCode.NOT_HAZARDOUS, f"{arm.command} needs no arming: its hazard is {hazard}"
        )
    state.set_armed(connection, state.Armed(arm.command, arm.args, time.monotonic() + ARMED_S))
    return Done(f"{arm.command} is armed for {ARMED_S:g} s")


def _fire(connection: sqlite3.Connection, arguments: Arguments) -> None:
    """Use up what is armed; whatever does not match it disarms as well."""
    armed = state.armed(connection)
    state.set_armed(connection, None)
    if armed is None or time.monotonic() > armed.until_s or _parse(armed.name, armed.args) != arguments:
        raise CommandFailed(
            FailureCode.NOT_ARMED, f"{arguments.name} is hazardous: arm it with these arguments first"
        )


def _parse(name: str, args: dict[str, Any]) -> Arguments:
    try:
        return commands.parse_arguments(name, args)
    except CommandError as error:
        raise CommandFailed(error.code or commands.ArgumentCode.BAD_ARGUMENT, str(error)) from None


def _for_later(name: str, args: dict[str, Any]) -> None:
    arguments = _parse(name, args)
    if arguments.hazard is Hazard.HAZARDOUS or isinstance(arguments, NOT_FOR_LATER):
        raise CommandFailed(FailureCode.NOT_FOR_LATER, f"{name} is given from the ground, at its time")


def ends_restriction(connection: sqlite3.Connection, name: str, args: dict[str, Any]) -> bool:
    """Tell whether a command lifts what another one imposed: a power cap, or what holds the FDIR back.

    Such a command is carried out however late: skipped, the restriction would last until the ground sees it.
    """
    try:
        arguments = commands.parse_arguments(name, args)
    except CommandError:
        return False
    match arguments:
        case commands.SetPowerCap(power_w=power_w):
            cap_w = state.cap_w(connection)
            return cap_w is not None and (power_w is None or power_w > cap_w)
        case commands.SetFdirRow(state=row_state):
            return RowState(row_state) is RowState.ENABLED
        case commands.ExternalControl(on=on):
            return not on
        case _:
            return False


def _remember(connection: sqlite3.Connection, arguments: Arguments) -> None:
    """Store the state a command sets."""
    match arguments:
        case commands.SetMode(mode=mode):
            state.set_safe(connection, Mode(mode) is Mode.SAFE)
        case commands.SetPowerCap(power_w=power_w):
            state.set_cap(connection, power_w)
        case commands.SetRates(housekeeping_s=housekeeping_s, ledger_s=ledger_s):
            state.set_rates(connection, state.Rates(housekeeping_s, ledger_s))
        case commands.SetFdirRow(row=row, state=row_state):
            state.change_fdir_state(connection, None if row == "*" else row, RowState(row_state))
        case commands.ExternalControl(on=on):
            state.set_external_control(connection, on)
        case commands.ResetCounters():
            state.forget_reboots(connection)
        case _:
            pass
