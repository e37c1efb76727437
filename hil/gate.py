"""The space link: a TCP gate between the node and the broker, open only in contact windows.

Outside a window no byte passes: connections that exist are reset on both sides, and new ones are refused,
since nobody listens. The node sees what a radio link gives it: a peer that is not there.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024
STOP_BOUND_S = 2.0
"""Longest time `stop` may take, s."""


@dataclass
class GateCounts:
    """What went through the gate, and what did not."""

    connections: int = 0
    """Connections carried to the broker."""
    failed: int = 0
    """Connections in a window that found no broker."""
    cut: int = 0
    """Connections reset because the window ended."""
    bytes_up: int = 0
    """Bytes node to broker."""
    bytes_down: int = 0
    """Bytes broker to node."""


class Gate:
    """A TCP relay that can be shut. It begins shut.

    Parameters
    ----------
    upstream_port
        Port of the broker on 127.0.0.1.
    port
        Port to listen on, 0 for any free one.
    """

    def __init__(self, upstream_port: int, port: int = 0) -> None:
        self.port = port
        self.counts = GateCounts()
        self._upstream_port = upstream_port
        self._server: asyncio.Server | None = None
        self._reserved: socket.socket | None = None
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @property
    def url(self) -> str:
        """Address the node connects to, `mqtt://127.0.0.1:port`."""
        return f"mqtt://{HOST}:{self.port}"

    @property
    def is_open(self) -> bool:
        """True in a contact window."""
        return self._server is not None

    async def start(self) -> None:
        """Take the port, with the gate shut.

        Raises
        ------
        OSError
            The port cannot be had.
        """
        # Bound but not listening: the port stays ours while connections to it are refused.
        self._reserved = _bind(self.port)
        self.port = self._reserved.getsockname()[1]

    async def stop(self) -> None:
        """Cut what is left and give the port back. Bounded by `STOP_BOUND_S`."""
        self.shut()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        if self._links:
            _, late = await asyncio.wait(list(self._links), timeout=STOP_BOUND_S)
            for task in late:
                task.cancel()

    async def open(self) -> None:
        """Begin a contact window."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=_bind(self.port))

    def shut(self) -> None:
        """End the contact window: reset every connection at once, both sides, without flushing."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self.counts.cut += len(self._links)
        for writers in self._links.values():
            for writer in writers:
                writer.transport.abort()

    async def __aenter__(self) -> Gate:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task, server = asyncio.current_task(), self._server
        if task is None or server is None:
            writer.transport.abort()  # shut between the kernel's accept and ours
            return
        task.set_name("hil.gate.connection")
        writers = [writer]
        self._links[task] = writers
        try:
            up_reader, up_writer = await asyncio.open_connection(HOST, self._upstream_port)
            writers.append(up_writer)
            if self._server is not server:
                return  # the window ended while we were connecting
            self.counts.connections += 1
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, up_writer, up=True), name="hil.gate.up")
                group.create_task(self._pump(up_reader, writer, up=False), name="hil.gate.down")
        except OSError:
            self.counts.failed += 1
        except asyncio.CancelledError:
            # Only `stop` cancels us, after its bound; asyncio would log the cancellation as an error.
            pass
        finally:
            self._links.pop(task, None)
            for each in writers:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        """Copy one direction until either end is gone, then end the other direction too."""
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if up:
                    self.counts.bytes_up += len(data)
                else:
                    self.counts.bytes_down += len(data)
                writer.write(data)
                await writer.drain()
        # MQTT has no half-closed state: the peer's reader must see the end as well.
        writer.close()


def _bind(port: int) -> socket.socket:
    """Return a socket bound to a port of the loopback interface that we may bind a second time."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Not SO_REUSEADDR: with it on a socket that does not listen, anyone could take the port.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((HOST, port))
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made
