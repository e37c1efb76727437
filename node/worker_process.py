"""One generation of the inference worker: a process, its socket, its end.

The worker is exec'ed fresh (an ONNX Runtime session does not survive a fork), connects to the
supervisor's Unix socket, and says `Ready` with the generation it was started as, so that two
generations cannot be mixed. Whether it is healthy and what follows is decided elsewhere
(`fdir.health`, `fdir.recovery`); this class only carries it out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from node import bounded_log
from node.inference import protocol

_log = logging.getLogger(__name__)

EOF_GRACE_S = 1.0
"""Time a process may go on running after its socket closed before that counts as a fault, s (assumed)."""
REAP_S = 2.0
"""Time a killed process may take to be reaped, s (assumed: far more than the kernel needs)."""
_READ_BYTES = 1 << 16
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class WorkerExit:
    """How a generation ended."""

    returncode: int | None
    """As `subprocess`: negative is a signal. None when the process could not be started."""
    reason: str
    """The same as a sentence."""


def describe_exit(returncode: int) -> str:
    """Return an exit code as a sentence."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        return f"killed by signal {-returncode}"
    return f"killed by signal {-returncode} ({name})"


class WorkerProcess:
    """Run one worker and talk to it.

    Parameters
    ----------
    argv
        Full command line; the worker learns socket and generation from it.
    socket_path
        Unix socket to listen on for this generation; at most 107 bytes long.
    log_path
        File that the worker's stdout and stderr are appended to; of a long one the latest lines are kept.
    generation
        Number the worker has to echo in `Ready`.
    on_message
        Called in the event loop with each message of the worker, `Ready` first. Must not block.
    on_fault
        Called with (monitor, reason) when the worker breaks the protocol while it still runs.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        socket_path: Path,
        log_path: Path,
        generation: int,
        on_message: Callable[[protocol.FromWorker], None],
        on_fault: Callable[[str, str], None],
    ) -> None:
        self.generation = generation
        self._argv = list(argv)
        self._socket_path = socket_path
        self._log_path = log_path
        self._on_message = on_message
        self._on_fault = on_fault
        self._process: asyncio.subprocess.Process | None = None
        self._connection: asyncio.Future[Streams] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._gone = asyncio.Event()
        self._doomed = False

    @property
    def pid(self) -> int | None:
        """Process id, None before it is started and after its end."""
        return None if self._process is None or self._gone.is_set() else self._process.pid

    async def run(self) -> WorkerExit:
        """Start the worker and stay until it is gone and reaped. Cancelling kills it.

        Messages that the worker sent before it died are still delivered.
        """
        self._connection = asyncio.get_running_loop().create_future()
        try:
            server = await self._listen()
        except OSError as error:
            self._gone.set()
            return WorkerExit(None, f"could not be started: {self._socket_path}: {error}")
        try:
            return await self._run(self._connection)
        finally:
            self._gone.set()
            if self._writer is not None:
                self._writer.close()
            server.close()
            self._socket_path.unlink(missing_ok=True)

    def send(self, message: protocol.Message) -> bool:
        """Queue a message to the worker; False when it is not connected (the message is dropped)."""
        if self._writer is None or self._writer.is_closing():
            return False
        self._writer.write(protocol.encode(message))
        return True

    def kill(self) -> None:
        """Send SIGKILL, which ends a stopped process as well. One not yet started dies as soon as it is."""
        self._doomed = True
        if self._process is not None and not self._gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, timeout_s: float) -> None:
        """Ask the worker to end, kill it after `timeout_s`; return when it is gone.

        Takes at most ``timeout_s + REAP_S`` seconds.
        """
        if self.send(protocol.Shutdown()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), timeout_s)
        self.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), REAP_S)

    async def _listen(self) -> asyncio.Server:
        self._socket_path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._connected, str(self._socket_path))
        self._socket_path.chmod(0o600)
        return server

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connection is None or self._connection.done():
            _log.warning("a second connection to the worker's socket was refused")
            writer.close()
            return
        self._connection.set_result((reader, writer))

    async def _run(self, connection: asyncio.Future[Streams]) -> WorkerExit:
        try:
            with _open_log(self._log_path) as log:
                process = await asyncio.create_subprocess_exec(
                    *self._argv, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
                )
        except OSError as error:
            return WorkerExit(None, f"could not be started: {error}")
        self._process = process
        if self._doomed:
            self.kill()
        try:
            async with asyncio.TaskGroup() as group:
                exited = group.create_task(process.wait(), name="node.worker.wait")
                reader = group.create_task(self._read(connection), name="node.worker.read")
                log_keeper = group.create_task(bounded_log.keep(self._log_path), name="node.worker.log")
                await asyncio.wait({exited, reader}, return_when=asyncio.FIRST_COMPLETED)
                if reader.done() and reader.result():
                    await asyncio.wait({exited}, timeout=EOF_GRACE_S)
                    if not exited.done():
                        self._on_fault("worker.socket", "closed its socket but goes on running")
                returncode = await exited
                if self._writer is not None:
                    # What it sent before its end is still to be read.
                    await asyncio.wait({reader}, timeout=EOF_GRACE_S)
                reader.cancel()
                log_keeper.cancel()
            return WorkerExit(returncode, describe_exit(returncode))
        finally:
            self.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), REAP_S)

    async def _read(self, connection: asyncio.Future[Streams]) -> bool:
        """Deliver messages; return True at the end of the stream, False after one that cannot be used."""
        stream, self._writer = await connection
        reader: protocol.Reader[protocol.FromWorker] = protocol.Reader(protocol.FromWorker)
        ready = False
        try:
            while data := await stream.read(_READ_BYTES):
                for message in reader.feed(data):
                    if not ready:
                        self._check_ready(message)
                        ready = True
                    self._on_message(message)
        except ConnectionError as error:
            _log.debug("worker socket: %s", error)
        except ValueError as error:
            self._on_fault("worker.protocol", str(error))
            return False
        return True

    def _check_ready(self, message: protocol.FromWorker) -> None:
        if not isinstance(message, protocol.Ready):
            raise ValueError(f"first message was {type(message).__name__}, Ready was expected")
        if message.generation != self.generation:
            raise ValueError(f"ready with generation {message.generation}, {self.generation} was expected")


def _open_log(path: Path) -> IO[bytes]:
    return path.open("ab")
