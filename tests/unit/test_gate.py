"""The gate really cuts: no byte passes outside a window, and both ends see the end of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from hil.gate import Gate


class Echo:
    """A server that sends back what it gets, and remembers whether its clients went away."""

    def __init__(self) -> None:
        self.port = 0
        self.gone = asyncio.Event()
        self.received = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                self.received += len(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            self.gone.set()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    server = Echo()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    yield server
    listener.close()
    await listener.wait_closed()


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 5) == b""
    except ConnectionResetError:
        return True


async def test_begins_shut_and_refuses(echo: Echo) -> None:
    async with Gate(echo.port) as gate:
        assert not gate.is_open
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", gate.port)
        await gate.open()
        await gate.open()  # open twice is open
        gate.shut()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", gate.port)
        assert gate.counts.connections == 0
        assert not echo.gone.is_set()  # the broker never saw it


async def test_open_gate_relays_and_counts_both_ways(echo: Echo) -> None:
    async with Gate(echo.port) as gate:
        await gate.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        payload = bytes(200_000)
        writer.write(payload)
        assert await asyncio.wait_for(reader.readexactly(len(payload)), 5) == payload
        assert gate.counts.bytes_up == gate.counts.bytes_down == len(payload)
        assert gate.counts.connections == 1
        writer.close()
        await asyncio.wait_for(echo.gone.wait(), 5)  # a client that leaves takes the broker side along
    assert gate.counts.cut == 0


async def test_shut_cuts_both_sides_at_once_and_opens_again(echo: Echo) -> None:
    async with Gate(echo.port) as gate:
        await gate.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        writer.write(b"x")
        await asyncio.wait_for(reader.readexactly(1), 5)
        gate.shut()
        assert await ended(reader)
        await asyncio.wait_for(echo.gone.wait(), 5)
        assert gate.counts.cut == 1
        received = echo.received
        writer.write(b"lost")
        await asyncio.sleep(0.05)
        assert echo.received == received
        writer.close()
        gate.shut()  # shut twice counts nothing twice
        assert gate.counts.cut == 1

        await gate.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        writer.write(b"y")
        assert await asyncio.wait_for(reader.readexactly(1), 5) == b"y"
        writer.close()


async def test_broker_that_is_away_ends_the_connection(echo: Echo) -> None:
    async with Gate(1) as gate:  # nothing listens on port 1
        await gate.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        assert await ended(reader)
        writer.close()
    assert gate.counts.failed == 1


async def test_server_that_leaves_ends_the_client(echo: Echo) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    listener = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with Gate(listener.sockets[0].getsockname()[1]) as gate:
        await gate.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        assert await ended(reader)
        writer.close()
    listener.close()


async def test_the_port_stays_ours_while_shut(echo: Echo) -> None:
    async with Gate(echo.port) as gate:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", gate.port))
        with pytest.raises(OSError, match="in use"):
            await asyncio.start_server(lambda r, w: None, "127.0.0.1", gate.port)


async def test_stop_leaves_no_task(echo: Echo) -> None:
    gate = Gate(echo.port)
    await gate.start()
    await gate.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    writer.write(b"x")
    await asyncio.wait_for(reader.readexactly(1), 5)
    await gate.stop()
    assert await ended(reader)
    writer.close()
    await asyncio.sleep(0.05)
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("hil.gate")]
