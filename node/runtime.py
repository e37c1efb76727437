"""The flight node as a process: start from a configuration, run until a signal, tell how it ended.

Nothing that can go wrong with the worker, the link or the store ends the node. An unexpected exception
does: it is stored as an event, logged, and told by the exit code, and the bus restarts the node.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fdir import boot as boot_manager
from fdir.boot import Slot
from fdir.table import RowState, Table, decode_table
from node import state, transfers
from node.boards import open_board
from node.config import NodeConfig
from node.fdir_wiring import load_configured
from node.inference.manifest import load_manifest
from node.inference.slots import active_slot
from node.jobs import JobQueue
from node.node import CANCEL_S, FLUSH_S, Identity, Node
from node.schedule import Schedule
from node.worker_process import REAP_S
from telemetry.authenticator import Authenticator
from telemetry.database import Database, DiskState, StoreFull
from telemetry.errors import PenumbraError
from telemetry.keys import KeyRing
from telemetry.packets import Event, Severity
from telemetry.spool import Spool

_log = logging.getLogger(__name__)

Begun = TypeVar("Begun")
EXIT_CLEAN = 0
EXIT_CRASH = 70
"""An unexpected exception ended the node (EX_SOFTWARE)."""
EXIT_OVERRUN = 71
"""An ordered stop overran its bound."""
EXIT_RESTART = 75
"""The recovery ladder asks for a new start (EX_TEMPFAIL)."""
CLOSE_S = 2.0
"""Bound on closing the database, s."""


def worker_command(config: NodeConfig, slot: Slot | None = None) -> list[str]:
    """Return the worker's command line, without the socket and generation that each start adds.

    Parameters
    ----------
    config
        Checked configuration.
    slot
        Image slot to run from; None: the one that the configuration means.
    """
    image = config.image_dir if slot is None else config.slot_dir(slot)
    w = config.worker
    return [
        *(sys.executable, "-m", "node.inference.worker"),
        *("--image", str(image), "--arena", str(config.arena_path)),
        *("--threads", str(config.model.threads), "--seats", str(w.seats), "--batch", str(w.batch)),
        *("--positions", str(w.positions), "--epoch-tokens", str(w.epoch_tokens)),
        *("--epoch-seconds", str(w.epoch_s), "--overhead-budget", str(w.overhead_budget)),
        *("--retries", str(w.retries)),
        *(["--checked"] if w.checked else []),
    ]


async def run_node(config: NodeConfig, stop: asyncio.Event, command: Sequence[str] | None = None) -> int:
    """Run one boot of the node until `stop` is set.

    Parameters
    ----------
    config
        Checked configuration.
    stop
        Set it to stop in order; see `Node.run` for the bound, to which closing the database adds `CLOSE_S`.
    command
        Worker command line without socket and generation; None for the real one, `worker_command`.

    Returns
    -------
    int
        `EXIT_CLEAN`, or `EXIT_RESTART` when the recovery ladder asks for a new start.

    Raises
    ------
    PenumbraError
        Keys, board, FDIR table, watchdog, or the state directory are at fault.
    Exception
        A defect: whatever a component raised. An event was stored if the database still worked.

    Tasks that do not end although cancelled end the process with `EXIT_OVERRUN`.
    """
    ring = KeyRing.load(Path(config.keys.file))
    board = open_board(config.board)
    loaded, refused = _load_table(config)
    slots, active = await asyncio.to_thread(_look_at_slots, config)
    _make_state_dir(config.state_dir)
    database = await Database.open(
        config.state_dir / "node.db", max_bytes=config.telemetry.database_max_bytes
    )
    try:
        # A lost database took the boot counter with it: the seconds since 1970 are higher than any count.
        lost = database.recovered_from

        def begin(
            connection: sqlite3.Connection,
        ) -> tuple[
            Table, state.BootState, boot_manager.BootDecision, Spool, JobQueue, Authenticator, Schedule
        ]:
            state.create(connection)
            table = _table_in_force(connection, loaded, refused)
            # In memory the count is not kept either: another boot may find the one before this.
            counted = lost is None and database.disk is not DiskState.MEMORY
            boot = state.begin_boot(connection, 1 if counted else int(time.time()), int(time.time()))
            decision = _decide_boot(config, table, boot, slots, active)
            state.keep_decision(connection, decision)
            spool = Spool(config.node.name, boot.boot, config.telemetry.spool_max_bytes)
            jobs = JobQueue(spool)
            authenticator = Authenticator(config.node.name, ring, require_sealed=config.keys.require_sealed)
            spool.create(connection)
            jobs.create(connection)
            authenticator.load(connection)
            schedule = Schedule()
            schedule.create(connection)
            transfers.create(connection)
            return table, boot, decision, spool, jobs, authenticator, schedule

        try:
            begun = await _with_room(database, config, begin)
        except StoreFull:
            # A boot that is not counted would use sequence numbers twice.
            raise PenumbraError(
                f"{database.path}: no room to count this boot", "free space on its disk"
            ) from None
        table, boot, decision, spool, jobs, authenticator, schedule = begun
        restart_reasons: list[str] = []

        def on_restart(reason: str) -> None:
            restart_reasons.append(reason)
            stop.set()
            asyncio.get_running_loop().call_later(stop_bound_s(config), _exit_at_once)

        node = Node(
            Identity(config, boot, decision, table, "" if refused is None else refused.what, lost),
            database=database,
            spool=spool,
            jobs=jobs,
            authenticator=authenticator,
            schedule=schedule,
            ring=ring,
            board=board,
            command=worker_command(config, decision.slot) if command is None else command,
            on_overrun=_exit_at_once,
            on_restart=on_restart,
        )
        try:
            await node.run(stop)
        except Exception as error:
            await _store_crash(database, spool, node, error)
            raise
    finally:
        await database.close(CLOSE_S)
    if restart_reasons:
        _log.warning("ended to be started again: %s", restart_reasons[0])
        return EXIT_RESTART
    return EXIT_CLEAN


async def _with_room(
    database: Database, config: NodeConfig, begin: Callable[[sqlite3.Connection], Begun]
) -> Begun:
    """Run `begin`; on a full disk telemetry gives way to it, and without any room it is done in memory.

    Raises
    ------
    StoreFull
        What is stored does not even fit into memory.
    """
    with suppress(StoreFull):
        return await database.run(begin)
    with suppress(StoreFull, sqlite3.Error):
        await database.run(Spool(config.node.name, 0, config.telemetry.spool_max_bytes).make_way)
    with suppress(StoreFull):
        return await database.run(begin)
    await database.leave_disk()
    return await database.run(begin)


def stop_bound_s(config: NodeConfig) -> float:
    """Return the time after which an ordered stop is cut short, s."""
    return config.worker.stop_timeout_s + REAP_S + FLUSH_S + CANCEL_S + CLOSE_S + 1


def _load_table(config: NodeConfig) -> tuple[Table | None, PenumbraError | None]:
    """Return the configured FDIR table, or why it is refused."""
    try:
        return load_configured(config), None
    except PenumbraError as error:
        return None, error


def _table_in_force(
    connection: sqlite3.Connection, loaded: Table | None, refused: PenumbraError | None
) -> Table:
    """Return the table of this boot, and keep it.

    That is the one a command has put in force, else the configured one; where its file is refused, the one of
    the boot before.

    Raises
    ------
    PenumbraError
        It is refused, and there is none before.
    """
    if state.kept_source(connection) is not state.TableSource.CONFIGURED:
        try:
            return decode_table(state.kept_table(connection))
        except PenumbraError as error:
            # Its copies are struck beyond a vote.
            _log.error("the FDIR table that was put in force by command is lost: %s", error.what)
            state.forget_source(connection)
    if loaded is not None:
        state.keep_table(connection, loaded.encode())
        return loaded
    try:
        return decode_table(state.kept_table(connection))
    except PenumbraError:
        raise refused or PenumbraError("no FDIR table") from None


def _look_at_slots(config: NodeConfig) -> tuple[dict[Slot, boot_manager.SlotState], Slot]:
    """Return what is known of the image slots without reading them whole, and which one is meant."""
    images = Path(config.model.images_dir)
    slots: dict[Slot, boot_manager.SlotState] = {}
    for slot in boot_manager.SLOTS:
        image = images / slot
        try:
            manifest = load_manifest(image)
            sizes = {name: (image / name).stat().st_size for name in manifest.sizes}
            whole = sizes == manifest.sizes
        except (PenumbraError, OSError):
            whole = False
        missing = not image.is_dir()
        slots[slot] = (
            boot_manager.SlotState.MISSING
            if missing
            else boot_manager.SlotState.VALID
            if whole
            else boot_manager.SlotState.INVALID
        )
    return slots, active_slot(images) if config.model.slot == "active" else config.model.slot


def _decide_boot(
    config: NodeConfig,
    table: Table,
    boot: state.BootState,
    slots: dict[Slot, boot_manager.SlotState],
    active: Slot,
) -> boot_manager.BootDecision:
    row = boot_manager.ROW
    enabled = row in table and boot.fdir_states.get(row, table.row(row).state) is RowState.ENABLED
    facts = boot_manager.BootFacts(
        boot=boot.boot,
        clean_shutdown=boot.clean_shutdown,
        restart_requested=bool(boot.restart_requested),
        safe=boot.safe,
        unintended=boot.unintended,
        last_slot=boot.slot,
        failed_starts=boot.failed_starts,
        slots=slots,
        active=active,
        last_active=boot.active,
        pinned=config.model.slot != "active",
        may_enter_safe=enabled and boot.fdir_overall is RowState.ENABLED and not boot.external_control,
        lost=boot.lost,
    )
    limits = boot_manager.BootLimits(config.fdir.other_slot_after, config.fdir.safe_after)
    return boot_manager.decide(facts, limits)


def _make_state_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PenumbraError(
            f"node.state_dir = {str(path)!r}: cannot be made: {error.strerror}", "choose a writable place"
        ) from None


def describe(error: BaseException) -> str:
    """Return an exception, or the first of a group, as one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    where = ""
    trace = error.__traceback__
    while trace is not None:
        where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{where}"


class OneLine(logging.Formatter):
    """Log format of one line a record: an exception is told by its type, message and place."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line = super().format(
            logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
        )
        if record.exc_info and record.exc_info[1] is not None:
            line += f" ({describe(record.exc_info[1])})"
        return line.replace("\n", " | ")


async def _store_crash(database: Database, spool: Spool, node: Node, error: Exception) -> None:
    text, t_ns = describe(error)[:500], node.recorder.now_ns()
    event = Event(severity=Severity.HIGH, name="node.crash", text=text)
    record = node.flight_record(f"crash: {text}")
    with suppress(StoreFull, sqlite3.Error, TimeoutError):
        async with asyncio.timeout(FLUSH_S):
            for packet in (event, record):
                await database.run(partial(spool.append, packet=packet, t_ns=t_ns))


def _exit_at_once() -> None:
    """End the process although tasks hang: what is committed is safe, and the bus starts the node again."""
    names = sorted(task.get_name() for task in asyncio.all_tasks())
    _log.critical("the stop overran its bound; still running: %s", ", ".join(names))
    os._exit(EXIT_OVERRUN)


def _log_stray(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log in one line what a callback of a library raised into the event loop."""
    error = context.get("exception")
    told = describe(error) if isinstance(error, BaseException) else "no exception"
    _log.warning("event loop: %s: %s", context.get("message", ""), told)


async def _run_until_signal(config: NodeConfig, command: Sequence[str] | None) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_stray)
    stop = asyncio.Event()

    def on_signal() -> None:
        if not stop.is_set():
            stop.set()
            loop.call_later(stop_bound_s(config), _exit_at_once)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return await run_node(config, stop, command)


def main(config_path: Path, command: Sequence[str] | None = None) -> int:
    """Run the node from a configuration file until SIGTERM or SIGINT; return its exit code.

    Logs go to stderr, one line each. After a signal it ends within
    ``stop_timeout_s + REAP_S + FLUSH_S + CANCEL_S + CLOSE_S + 1`` seconds (12 s by default); a second
    signal changes nothing.

    Parameters
    ----------
    config_path
        TOML file, see `node.config`.
    command
        As for `run_node`.

    Returns
    -------
    int
        0 ordered stop, 2 something the user has to mend, `EXIT_CRASH` a defect, `EXIT_OVERRUN` a stop that
        overran its bound, `EXIT_RESTART` the recovery ladder asks for a new start.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    try:
        return asyncio.run(_run_until_signal(NodeConfig.load(config_path), command))
    except PenumbraError as error:
        sys.stderr.write(f"penumbra node: {error}\n")
        return error.exit_code
    except Exception as error:
        # The last place to turn a defect into a line and a code.
        _log.critical("%s", describe(error))
        return EXIT_CRASH
