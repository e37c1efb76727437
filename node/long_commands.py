"""Carries out commands that take longer than their transaction, and reports how they end.

A work ends with what it did, or raises `CommandFailed`. When the node ends first, the next boot reports the
command as interrupted (`node.open_commands`).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

from node.command_effects import CommandFailed, Done
from node.open_commands import OK, Order
from node.pulse import Pulse
from telemetry.commands import Arguments
from telemetry.database import StoreFull
from telemetry.dictionary.codes import FailureCode

Progress: TypeAlias = Callable[[str], Awaitable[None]]
"""Reports how far a work is, in words."""
Work: TypeAlias = Callable[[Arguments, Progress], Awaitable[Done]]


class Reporter(Protocol):
    """The part of `node.commanding.Commanding` that is needed."""

    async def progress(self, order: Order, text: str) -> None:
        """Store a report of progress."""

    async def finish(self, order: Order, code: str, done: Done) -> None:
        """Store the completion, with the effect of the command."""


class LongCommands:
    """Carries works out, each in a task of its own.

    Parameters
    ----------
    work
        Carries a command out; what must not run beside another waits in it.
    reporter
        Returns who stores reports.
    on_done
        Called when the completion is stored.
    """

    def __init__(
        self, work: Work, reporter: Callable[[], Reporter], on_done: Callable[[Arguments], None]
    ) -> None:
        self._work = work
        self._reporter = reporter
        self._on_done = on_done
        self._begun: asyncio.Queue[tuple[Order, Arguments] | None] = asyncio.Queue()
        self.pulse = Pulse("long-commands", lambda: self._begun.put_nowait(None))
        """Health of the task that begins them."""

    def begin(self, order: Order, arguments: Arguments) -> None:
        """Take a command whose start is durable."""
        self._begun.put_nowait((order, arguments))

    async def run(self) -> None:
        """Carry out until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                begun = await self._begun.get()
                self.pulse.beat()
                if begun is None:
                    continue
                order, arguments = begun
                group.create_task(self._carry_out(order, arguments), name=f"node.command.{order.name}")

    async def _carry_out(self, order: Order, arguments: Arguments) -> None:
        reporter = self._reporter()

        async def progress(text: str) -> None:
            await reporter.progress(order, text)

        try:
            done = await self._work(arguments, progress)
        except CommandFailed as error:
            await reporter.finish(order, error.code, Done(str(error), effect=error.effect))
        except (StoreFull, sqlite3.Error) as error:
            await reporter.finish(order, FailureCode.NOT_STORED, Done(f"the node's database: {error}"))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            await reporter.finish(order, FailureCode.IO_ERROR, Done(f"{where}{error.strerror or error}"))
        else:
            await reporter.finish(order, OK, done)
        self._on_done(arguments)
