"""The embedded broker: carries messages, names a taken port, leaves no task behind."""

from __future__ import annotations

import asyncio
import socket

import aiomqtt
import pytest

from hil.broker import STOP_BOUND_S, EmbeddedBroker
from telemetry.errors import PenumbraError


def names() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def test_carries_messages_on_a_free_port() -> None:
    async with EmbeddedBroker() as broker:
        assert broker.running
        assert broker.port > 0
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        async with aiomqtt.Client("127.0.0.1", broker.port) as client:
            await client.subscribe("a/#", qos=1)
            await client.publish("a/b", b"payload", qos=1)
            message = await asyncio.wait_for(anext(aiter(client.messages)), 5)
    assert message.payload == b"payload"
    assert not broker.running


async def test_listens_on_loopback_only() -> None:
    async with EmbeddedBroker() as broker:
        server = broker._server
        assert server is not None
        assert [s.getsockname()[0] for s in server.sockets] == ["127.0.0.1"]


async def test_a_taken_port_is_an_error_the_user_can_mend() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PenumbraError, match=f"127.0.0.1:{port} is in use"):
            await EmbeddedBroker(port).start()


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(PenumbraError, match="0 to 65535"):
        EmbeddedBroker(port)


@pytest.mark.parametrize("abrupt", [False, True])
async def test_end_disconnects_clients_in_bound_and_leaves_no_task(abrupt: bool) -> None:
    before = names()
    broker = EmbeddedBroker()
    await broker.start()
    # A client that connects and says nothing must not hold the stop up either.
    _, mute = await asyncio.open_connection("127.0.0.1", broker.port)
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    writer.write(bytes.fromhex("100d00044d5154540402003c000161"))  # CONNECT, client id "a"
    assert await asyncio.wait_for(reader.readexactly(4), 5) == bytes.fromhex("20020000")  # CONNACK, accepted
    await asyncio.wait_for(broker.kill() if abrupt else broker.stop(), STOP_BOUND_S)
    try:
        assert await asyncio.wait_for(reader.read(), 5) == b""
    except ConnectionResetError:
        assert abrupt
    mute.close()
    writer.close()
    await asyncio.sleep(0.05)
    assert names() == before


async def test_a_killed_broker_starts_again_on_its_port() -> None:
    broker = EmbeddedBroker()
    await broker.start()
    port = broker.port
    await broker.kill()
    await broker.kill()  # nothing to kill: no error
    await broker.start()
    assert broker.port == port
    async with aiomqtt.Client("127.0.0.1", port) as client:
        await client.publish("a", b"b", qos=1)
    await broker.stop()
