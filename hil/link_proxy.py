"""The space link: a TCP proxy between the node and the broker, open in contact windows, with faults on order.

Outside a window no byte passes: connections that exist are reset on both sides, and new ones are refused,
since nobody listens. The node sees what a radio link gives it: a peer that is not there. Within a window
`set_faults` makes the link slow, late, silent, wrong or half dead (`hil.link_faults`).
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from hil.link_faults import LinkFaults, Way

HOST = "127.0.0.1"
CHUNK_BYTES = 4096
"""Most bytes that share one delay: a thirtieth of a second at 1 Mbit/s."""
CHUNKS = 64
"""Chunks under way in one direction; then the sender waits, as at a full window of TCP."""
FAULT_POLL_S = 0.02
"""Interval of looking whether a black hole has ended, or a connection is to be reset, s."""
STOP_BOUND_S = 2.0
"""Longest time `stop` may take, s."""


@dataclass
class LinkCounts:
    """What went over the link, and what did not."""

    connections: int = 0
    """Connections carried to the broker."""
    failed: int = 0
    """Connections in a window that found no broker."""
    cut: int = 0
    """Connections reset because the window ended, or by a fault."""
    to_ground_bytes: int = 0
    to_node_bytes: int = 0
    flipped_bits: int = 0


class LinkProxy:
    """A TCP relay that can be shut, and have faults. It begins shut and sound.

    Parameters
    ----------
    upstream_port
        Port of the broker on 127.0.0.1.
    port
        Port to listen on, 0 for any free one.
    seed
        Of what happens by chance.
    version5
        Whether `url` asks for MQTT 5.
    """

    def __init__(self, upstream_port: int, port: int = 0, *, seed: int = 0, version5: bool = False) -> None:
        self.port = port
        self.counts = LinkCounts()
        self.faults = LinkFaults()
        """What is wrong with the link now."""
        self._chance = random.Random(seed)  # noqa: S311 - a fault model, no secret
        self._scheme = "mqtt5" if version5 else "mqtt"
        self._upstream_port = upstream_port
        self._server: asyncio.Server | None = None
        self._reserved: socket.socket | None = None
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @property
    def url(self) -> str:
        """Address the node connects to."""
        return f"{self._scheme}://{HOST}:{self.port}"

    @property
    def is_open(self) -> bool:
        """True in a contact window."""
        return self._server is not None

    async def start(self) -> None:
        """Take the port, with the link shut.

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
            await asyncio.wait(list(self._links), timeout=STOP_BOUND_S)

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
        self.cut()

    def cut(self) -> None:
        """Reset every connection at once, both sides, without flushing. New ones are taken."""
        self.counts.cut += len(self._links)
        for task, writers in self._links.items():
            for writer in writers:
                writer.transport.abort()
            task.cancel()  # It may be waiting for what is due later.

    async def __aenter__(self) -> LinkProxy:
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
        task.set_name("hil.link.connection")
        writers = [writer]
        self._links[task] = writers
        try:
            up_reader, up_writer = await asyncio.open_connection(HOST, self._upstream_port)
            writers.append(up_writer)
            if self._server is not server:
                return  # the window ended while we were connecting
            self.counts.connections += 1
            async with asyncio.TaskGroup() as group:
                ground, node = Way.TO_GROUND, Way.TO_NODE
                ends = [
                    group.create_task(self._carry(reader, up_writer, ground), name="hil.link.to_ground"),
                    group.create_task(self._carry(up_reader, writer, node), name="hil.link.to_node"),
                ]
                faults = group.create_task(self._strike(writers), name="hil.link.faults")
                await asyncio.wait(ends)
                faults.cancel()
        except OSError:
            self.counts.failed += 1
        except asyncio.CancelledError:
            # Only `cut` cancels us; asyncio would log the cancellation as an error.
            pass
        finally:
            self._links.pop(task, None)
            for each in writers:
                each.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        """Carry one direction until either end is gone, then end the other direction too."""
        under_way: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(CHUNKS)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take(reader, under_way), name=f"hil.link.{way}.take")
            await self._deliver(under_way, writer, way)
        # MQTT has no half-closed state: the peer's reader must see the end as well.
        if not self.faults.half_open:
            writer.close()

    async def _take(
        self, reader: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes] | None]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                faults = self.faults
                late_s = faults.delay_s + faults.jitter_s * self._chance.random()
                await under_way.put((time.monotonic() + late_s, data))
        await under_way.put(None)

    async def _deliver(
        self, under_way: asyncio.Queue[tuple[float, bytes] | None], writer: asyncio.StreamWriter, way: Way
    ) -> None:
        free_s = 0.0
        dead = False
        while (chunk := await under_way.get()) is not None:
            due_s, data = chunk
            free_s = max(free_s, due_s, time.monotonic())
            bit_s = self.faults.bit_s(way)
            if bit_s is not None:
                free_s += 8 * len(data) / bit_s
            await asyncio.sleep(free_s - time.monotonic())
            while self.faults.black_hole.covers(way):  # noqa: ASYNC110 - whoever sets the faults need not tell
                await asyncio.sleep(FAULT_POLL_S)
            if dead:
                continue  # Both ends are emptied, so that each sees the other's end.
            try:
                writer.write(self._corrupted(data))
                await writer.drain()
            except OSError:
                dead = True
                continue
            if way is Way.TO_GROUND:
                self.counts.to_ground_bytes += len(data)
            else:
                self.counts.to_node_bytes += len(data)

    def _corrupted(self, data: bytes) -> bytes:
        share = self.faults.corrupt_per_byte
        if share <= 0:
            return data
        struck = bytearray(data)
        for index in range(len(struck)):
            if self._chance.random() < share:
                struck[index] ^= 1 << self._chance.randrange(8)
                self.counts.flipped_bits += 1
        return bytes(struck)

    async def _strike(self, writers: list[asyncio.StreamWriter]) -> None:
        """Reset this connection, or let its far side die, when the faults say so."""
        node, ground = writers
        while True:
            await asyncio.sleep(FAULT_POLL_S)
            if self.faults.half_open:
                ground.transport.abort()
            if self._chance.random() < self.faults.reset_hz * FAULT_POLL_S:
                self.counts.cut += 1
                node.transport.abort()
                ground.transport.abort()


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
