"""The bench's MQTT broker: amqtt in this process, on the loopback interface only.

We open the listening socket ourselves and hand the connections to amqtt: that gives a free port on request,
an error a user can mend when the port is taken, and connections that can be cut when the broker is killed.
amqtt speaks MQTT 3.1.1; nothing relies on what a broker remembers (design section 4).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from contextlib import suppress
from types import TracebackType

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import BrokerConfig, ListenerConfig, ListenerType

from telemetry.errors import PenumbraError

HOST = "127.0.0.1"
STOP_BOUND_S = 5.0
"""Longest time `stop` and `kill` may take, s."""

_PLUGINS = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
_LISTENER = "default"


class EmbeddedBroker:
    """An MQTT 3.1.1 broker on 127.0.0.1.

    Use as an async context manager, or call `start` and `stop`. A stopped or killed broker can be started
    again on the same port.

    Parameters
    ----------
    port
        TCP port, 0 for any free one; `port` and `url` say which after the start.

    Raises
    ------
    PenumbraError
        From `start`: the port is in use or may not be opened.
    """

    def __init__(self, port: int = 0) -> None:
        if not 0 <= port <= 65535:
            raise PenumbraError(f"broker port {port}: 0 to 65535 is allowed", "0 takes any free port")
        self.port = port
        self._broker: Broker | None = None
        self._bound: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def url(self) -> str:
        """Address for clients, `mqtt://127.0.0.1:port`."""
        return f"mqtt://{HOST}:{self.port}"

    @property
    def running(self) -> bool:
        """True between `start` and `stop` or `kill`."""
        return self._server is not None

    def bind(self) -> None:
        """Take the port, and do not listen yet. Raises `PenumbraError` when it cannot be had."""
        bound = socket.socket()
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((HOST, self.port))
        except OSError as error:
            bound.close()
            if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                raise
            why = "is in use" if error.errno == errno.EADDRINUSE else "may not be opened by this user"
            raise PenumbraError(
                f"broker port {HOST}:{self.port} {why}",
                "choose another --port, or 0 for any free one, or stop the program that holds it",
            ) from error
        self._bound = bound
        self.port = bound.getsockname()[1]

    def release(self) -> None:
        """Give back a port that was bound and not listened on."""
        if self._bound is not None:
            self._bound.close()
            self._bound = None

    async def start(self) -> None:
        """Listen, on the port that was bound if one was. Raises `PenumbraError` as `bind`."""
        if self._server is not None:
            return
        if self._bound is None:
            self.bind()
        bound, self._bound = self._bound, None
        for name in ("amqtt", "transitions"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        config = BrokerConfig(
            listeners={_LISTENER: ListenerConfig(type=ListenerType.EXTERNAL, bind=f"{HOST}:{self.port}")},
            plugins=_PLUGINS,
        )
        server = await asyncio.start_server(self._connected, sock=bound)
        self._broker = Broker(config)
        await self._broker.start()
        self._server = server

    async def stop(self) -> None:
        """Close the listener, then every session in order. Bounded by `STOP_BOUND_S`."""
        await self._end(abrupt=False)

    async def kill(self) -> None:
        """Cut every connection as a crash would: no DISCONNECT, queued messages are lost."""
        await self._end(abrupt=True)

    async def __aenter__(self) -> EmbeddedBroker:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        broker = self._broker
        if task is None or broker is None:
            writer.transport.abort()
            return
        task.set_name("hil.broker.connection")
        self._connections[task] = writer
        try:
            await broker.external_connected(
                StreamReaderAdapter(reader), StreamWriterAdapter(writer), _LISTENER
            )
        except (OSError, asyncio.CancelledError):
            # The client is gone or the broker ends: either way this connection has nothing left to say.
            pass
        finally:
            self._connections.pop(task, None)
            writer.transport.abort()

    async def _end(self, *, abrupt: bool) -> None:
        server, broker = self._server, self._broker
        if server is None or broker is None:
            return
        self._server = self._broker = None
        server.close()
        if abrupt:
            for writer in self._connections.values():
                writer.transport.abort()
        with suppress(TimeoutError):
            await asyncio.wait_for(broker.shutdown(), STOP_BOUND_S / 2)
        tasks = list(self._connections)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=STOP_BOUND_S / 4)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=STOP_BOUND_S / 4)
