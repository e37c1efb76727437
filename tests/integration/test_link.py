"""The link against a real broker: deliver, reconnect, notice a black hole, leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from hil.broker import EmbeddedBroker
from telemetry.errors import PenumbraError
from telemetry.link import Backoff, BrokerAddress, LinkDown, MqttLink

Received = list[tuple[str, bytes]]


async def until(condition: Callable[[], bool], bound_s: float = 10.0) -> None:
    async with asyncio.timeout(bound_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is not ours to signal
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running(*links: MqttLink) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run links, and prove that cancelling them leaves no task behind and no error unheard."""
    before = asyncio.all_tasks()
    loop = asyncio.get_running_loop()
    unheard: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    tasks = [asyncio.create_task(link.run(), name=f"test.{n}") for n, link in enumerate(links)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        ours = {
            t for t in asyncio.all_tasks() - before if ".link." in t.get_name() or "_misc_loop" in repr(t)
        }
        assert ours == set()
        assert not any(link.connected.is_set() for link in links)
        gc.collect()
        assert unheard == []


class Wire:
    """A TCP forwarder to a broker that can go silent without closing, count packet types, and cut."""

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.silent = False
        self.port = 0
        self.sent = bytearray()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()
        await asyncio.sleep(0.05)

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        self._writers += [writer, up_writer]

        async def forward(
            source: asyncio.StreamReader, sink: asyncio.StreamWriter, log: bytearray | None
        ) -> None:
            with suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    if self.silent:
                        continue
                    if log is not None:
                        log += data
                    sink.write(data)
                    await sink.drain()
            sink.close()

        with suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as group:
                group.create_task(forward(reader, up_writer, self.sent), name="test.wire.up")
                group.create_task(forward(up_reader, writer, None), name="test.wire.down")


def make(url: str, received: Received | None = None, client_id: str = "sat-1", **options: float) -> MqttLink:
    sink = [] if received is None else received
    topics = ["penumbra/sat-1/tc", "penumbra/sat-1/bus/+"]
    return MqttLink(url, client_id, topics, lambda t, p: sink.append((t, p)), **options)  # type: ignore[arg-type]


def ground(url: str, received: Received) -> MqttLink:
    return MqttLink(url, "ground", ["penumbra/+/tm/#"], lambda t, p: received.append((t, p)))


async def test_publish_and_receive_both_ways_with_qos_1(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    on_node: Received = []
    on_ground: Received = []
    async with EmbeddedBroker() as broker, Wire(broker.port) as wire:
        node, base = make(f"mqtt://127.0.0.1:{wire.port}", on_node), ground(broker.url, on_ground)
        async with running(node, base):
            await asyncio.wait_for(asyncio.gather(node.connected.wait(), base.connected.wait()), 5)
            for i in range(200):
                await node.publish("penumbra/sat-1/tm/event", b"%d" % i)
            await base.publish("penumbra/sat-1/tc", b"command")
            await base.publish("penumbra/sat-1/bus/time", b"")
            await base.publish("penumbra/sat-2/tc", b"not for us")
            await until(lambda: len(on_ground) == 200 and len(on_node) == 2)
        subscribe, publish = wire.sent.find(b"\x82"), wire.sent.find(b"penumbra/sat-1/tm/event")
        assert wire.sent[publish - 4] & 0b110 == 0b010, "PUBLISH must carry QoS 1"
        assert subscribe > 0
        assert wire.sent.count(b"penumbra/sat-1/tc\x01") == 1, "SUBSCRIBE must ask for QoS 1"
        assert wire.sent[:14][9] & 0b10, "the session must be clean"
    assert [payload for _, payload in on_ground] == [b"%d" % i for i in range(200)]
    assert on_node == [("penumbra/sat-1/tc", b"command"), ("penumbra/sat-1/bus/time", b"")]
    assert caplog.text == ""


async def test_a_killed_and_restarted_broker_is_found_again() -> None:
    on_ground: Received = []
    async with EmbeddedBroker() as broker:
        node, base = make(broker.url, max_backoff_s=0.3), ground(broker.url, on_ground)
        async with running(node, base):
            for round_ in range(3):
                await asyncio.wait_for(asyncio.gather(node.connected.wait(), base.connected.wait()), 10)
                await node.publish("penumbra/sat-1/tm/event", b"%d" % round_)
                await until(lambda n=round_: len(on_ground) > n)  # type: ignore[misc]
                await broker.kill()
                await until(lambda: not node.connected.is_set() and not base.connected.is_set(), 5)
                with pytest.raises(LinkDown, match="down"):
                    await node.publish("penumbra/sat-1/tm/event", b"lost")
                await asyncio.sleep(0.5)
                await broker.start()
            await asyncio.wait_for(node.connected.wait(), 10)
            assert node.connections == 4
    assert [payload for _, payload in on_ground] == [b"0", b"1", b"2"]


async def test_a_black_hole_is_noticed_within_the_publish_timeout() -> None:
    async with EmbeddedBroker() as broker, Wire(broker.port) as wire:
        node = make(f"mqtt://127.0.0.1:{wire.port}", publish_timeout_s=0.5, keepalive_s=60)
        async with running(node):
            await asyncio.wait_for(node.connected.wait(), 5)
            await node.publish("penumbra/sat-1/tm/event", b"")
            wire.silent = True
            started = time.monotonic()
            outcomes = await asyncio.gather(
                *(node.publish("penumbra/sat-1/tm/event", b"x" * 1000) for _ in range(50)),
                return_exceptions=True,
            )
            assert all(isinstance(outcome, LinkDown) for outcome in outcomes)
            assert time.monotonic() - started < 1.0
            await until(lambda: not node.connected.is_set(), 1)
            assert "0.5 s" in str(node.last_error)
            wire.silent = False
            wire.cut()
            await asyncio.wait_for(node.connected.wait(), 5)
            await node.publish("penumbra/sat-1/tm/event", b"")


@pytest.mark.parametrize("publishing", [True, False])
async def test_a_black_hole_is_noticed_by_default_too(publishing: bool) -> None:
    async with EmbeddedBroker() as broker, Wire(broker.port) as wire:
        node = make(f"mqtt://127.0.0.1:{wire.port}")
        async with running(node):
            await until(node.connected.is_set)
            wire.silent = True
            async with asyncio.timeout(10):  # 4 or 4.5 s, and what a busy machine adds
                while node.connected.is_set():
                    if publishing:
                        with suppress(LinkDown):
                            await node.publish("a", b"")
                    await asyncio.sleep(0.05)
            wire.silent = False
            await until(node.connected.is_set)


async def test_a_black_hole_is_noticed_without_publishing_too() -> None:
    async with EmbeddedBroker() as broker, Wire(broker.port) as wire:
        node = make(f"mqtt://127.0.0.1:{wire.port}", publish_timeout_s=0.5, keepalive_s=1)
        async with running(node):
            await asyncio.wait_for(node.connected.wait(), 5)
            wire.silent = True
            await until(lambda: not node.connected.is_set(), 6)


async def test_a_publisher_waiting_for_a_slot_does_not_end_a_healthy_connection() -> None:
    async with EmbeddedBroker() as broker:
        node = make(broker.url, max_inflight=2, publish_timeout_s=2)
        async with running(node):
            await asyncio.wait_for(node.connected.wait(), 5)
            outcomes = await asyncio.gather(
                *(node.publish("penumbra/sat-1/tm/event", b"x" * 200) for _ in range(500)),
                return_exceptions=True,
            )
            assert not [outcome for outcome in outcomes if outcome is not None]
            assert node.connections == 1


@pytest.mark.parametrize("moment_s", [0.0, 0.001, 0.005, 0.02, 0.1])
async def test_cancelled_at_any_moment_it_leaves_nothing(moment_s: float) -> None:
    async with EmbeddedBroker() as broker:
        node = make(broker.url)
        async with running(node):
            await asyncio.sleep(moment_s)


async def test_a_cancelled_publish_is_cancelled_whenever_that_is() -> None:
    """Also when the confirmation comes in the same turn of the loop (`asyncio.wait_for` swallows that)."""
    async with EmbeddedBroker() as broker:
        node = make(broker.url)
        async with running(node):
            await asyncio.wait_for(node.connected.wait(), 5)
            client = node._client
            assert client is not None
            cancelled = 0
            for _ in range(50):
                task = asyncio.create_task(node.publish("penumbra/sat-1/tm/event", b""))
                while not client._pending_publishes:  # noqa: ASYNC110 - aiomqtt does not signal it
                    await asyncio.sleep(0)
                (confirmation,) = client._pending_publishes.values()
                assert isinstance(confirmation, asyncio.Event)
                confirmation.set()
                task.cancel()
                await asyncio.wait([task])
                cancelled += task.cancelled()
                client._pending_publishes.clear()
            assert cancelled == 50


async def test_cancelled_while_a_silent_server_holds_it_up() -> None:
    """It accepts the connection and never answers: the worst moment to be cancelled."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = make(f"mqtt://127.0.0.1:{silent.getsockname()[1]}", publish_timeout_s=1)
        async with running(node):
            await asyncio.sleep(0.2)
            started = time.monotonic()
        assert time.monotonic() - started < 2.0


async def test_a_server_that_never_answers_is_given_up_and_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = make(f"mqtt://127.0.0.1:{silent.getsockname()[1]}", publish_timeout_s=0.3, max_backoff_s=0.1)
        async with running(node) as (task,):
            await until(lambda: node.last_error is not None, 3)
            first = node.last_error
            node.last_error = None
            await until(lambda: node.last_error is not None, 3)
            assert first == node.last_error
            assert not task.done()
        # Both attempts reached the server's backlog and were closed by us.
        silent.settimeout(1)
        for _ in range(2):
            connection, _ = silent.accept()
            connection.settimeout(1)
            data = b""
            while part := connection.recv(1 << 12):
                data += part
            assert data.startswith(b"\x10")
            connection.close()


async def test_no_server_at_all_is_no_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    node = make(f"mqtt://127.0.0.1:{port}", max_backoff_s=0.1)
    async with running(node) as (task,):
        await until(lambda: node.last_error is not None, 3)
        await asyncio.sleep(0.3)
        assert not task.done()
        with pytest.raises(LinkDown):
            await node.publish("a", b"")


async def test_the_loop_stays_free_while_a_broker_comes_and_goes() -> None:
    async with EmbeddedBroker() as broker, Wire(broker.port) as wire:
        node = make(f"mqtt://127.0.0.1:{wire.port}", publish_timeout_s=0.3, max_backoff_s=0.1)

        async def publish_for_ever() -> None:
            while True:
                await node.connected.wait()
                with suppress(LinkDown):
                    await node.publish("penumbra/sat-1/tm/event", b"x" * 5000)

        async with running(node):
            publishers = [asyncio.create_task(publish_for_ever()) for _ in range(4)]
            longest, last = 0.0, time.monotonic()
            for step in range(300):
                if step == 100:
                    wire.silent = True
                if step == 200:
                    wire.silent = False
                    wire.cut()
                await asyncio.sleep(0.005)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            for task in publishers:
                task.cancel()
            await asyncio.wait(publishers)
            assert node.connections >= 2
            assert longest < 0.25


async def test_a_caller_that_never_waits_does_not_starve_the_loop() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    node = make(f"mqtt://127.0.0.1:{port}")

    async def publish_for_ever() -> None:
        while True:
            with suppress(LinkDown):
                await node.publish("a", b"")

    async with running(node):
        spinning = asyncio.create_task(publish_for_ever())
        await asyncio.wait_for(asyncio.sleep(0.05), 2)
        spinning.cancel()


async def test_a_publish_that_fails_at_once_takes_the_link_down_at_once() -> None:
    """Between the loss of the socket and the end of the session, nobody may spin on a link that looks up."""
    async with EmbeddedBroker() as broker:
        node = make(broker.url)
        async with running(node):
            await asyncio.wait_for(node.connected.wait(), 5)
            client = node._client
            assert client is not None
            raw = client._client.socket()
            assert isinstance(raw, socket.socket)
            raw.shutdown(socket.SHUT_RDWR)
            client._client.loop_read()
            with pytest.raises(LinkDown):
                await node.publish("a", b"")
            assert not node.connected.is_set()
            await asyncio.wait_for(node.connected.wait(), 5)
            assert node.connections == 2


class TinyServer:
    """Knows just enough MQTT to confirm what a client says. Packets shorter than 128 bytes.

    Parameters
    ----------
    version5
        Whether it speaks MQTT 5: its answers then have a length of properties.
    granted
        Its answers to the two topics of a SUBSCRIBE.
    after_subscribe
        Sent once, a moment after the first SUBSCRIBE was confirmed.
    """

    def __init__(
        self, *, version5: bool = False, granted: bytes = b"\1\1", after_subscribe: bytes = b""
    ) -> None:
        self.seen: list[bytes] = []
        self.struck = False
        self._properties = b"\0" if version5 else b""
        self._scheme = "mqtt5" if version5 else "mqtt"
        self._granted = granted
        self._after_subscribe = after_subscribe

    async def __aenter__(self) -> TinyServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"{self._scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, length = await reader.readexactly(2)
                body = await reader.readexactly(length)
                self.seen.append(bytes([kind]) + body)
                if kind >> 4 == 1:
                    writer.write(bytes([0x20, 2 + len(self._properties), 0, 0]) + self._properties)
                elif kind >> 4 == 8:
                    codes = body[:2] + self._properties + self._granted
                    writer.write(bytes([0x90, len(codes)]) + codes)
                    if self._after_subscribe and not self.struck:
                        self.struck = True
                        await asyncio.sleep(0.1)
                        writer.write(self._after_subscribe)
                elif kind >> 4 == 3:
                    start = 2 + int.from_bytes(body[:2])
                    writer.write(bytes([0x40, 2, *body[start : start + 2]]))
                elif kind >> 4 == 14:
                    break
        writer.close()


async def test_mqtt_5_is_spoken_when_asked_for() -> None:
    async with TinyServer(version5=True) as server:
        node = make(server.url)
        async with running(node):
            await asyncio.wait_for(node.connected.wait(), 5)
            await node.publish("penumbra/sat-1/tm/event", b"payload")
        seen = server.seen
    connect, subscribe, publish = seen[0], seen[1], seen[2]
    assert connect[1:8] == b"\x00\x04MQTT\x05"
    assert connect[8] == 0b10, "clean start, no will, no password"
    assert subscribe[0] == 0x82
    assert publish[0] == 0x32, "QoS 1, not retained"
    assert seen[-1][0] == 0xE0, "an ordered stop says DISCONNECT"


DAMAGED = {
    "topic that is no UTF-8": bytes.fromhex("320b0004e2612f62 0001 ffffff"),
    "topic longer than the packet": bytes.fromhex("3204 00ff 6161"),
    "PUBLISH without anything": bytes.fromhex("3200"),
    "PUBLISH of half a length": bytes.fromhex("320100"),
    "SUBACK of nothing": bytes.fromhex("9000"),
    "PUBACK of one byte": bytes.fromhex("400100"),
    "CONNACK again": bytes.fromhex("20020000"),
    "unknown packet": bytes.fromhex("f000"),
    "length that never ends": bytes.fromhex("30ffffffffff"),
    "PINGREQ of a broker": bytes.fromhex("c000"),
}


@pytest.mark.parametrize("version5", [False, True])
@pytest.mark.parametrize("junk", list(DAMAGED.values()), ids=list(DAMAGED))
async def test_damaged_packets_of_the_broker_cost_the_connection_at_most(junk: bytes, version5: bool) -> None:
    """Found by `penumbra campaign run link`: a flipped bit in a topic ended the node."""
    async with TinyServer(version5=version5, after_subscribe=junk) as server:
        node = make(server.url, publish_timeout_s=0.5)
        async with running(node) as (task,):
            await until(lambda: server.struck)
            await publish_in_the_end(node, task)


async def publish_in_the_end(node: MqttLink, task: asyncio.Task[None]) -> None:
    """Return when the link takes a message again."""
    await asyncio.sleep(0.2)
    for _ in range(100):
        assert not task.done()
        with suppress(LinkDown):
            await node.publish("penumbra/sat-1/tm/event", b"payload")
            return
        await asyncio.sleep(0.05)
    pytest.fail("the link did not come back")


async def test_a_broker_that_refuses_the_topics_is_no_link() -> None:
    async with TinyServer(granted=b"\x80\1") as server:
        node = make(server.url)
        async with running(node):
            await until(lambda: node.last_error is not None)
            assert "refused to subscribe" in str(node.last_error)
            assert node.connections == 0


async def test_two_owners_of_one_name_push_each_other_off_but_none_dies() -> None:
    async with EmbeddedBroker() as broker:
        first, second = make(broker.url), make(broker.url)
        async with running(first, second) as (a, b):
            await asyncio.sleep(0.5)
            assert not a.done()
            assert not b.done()


async def test_a_handler_that_raises_ends_the_link_loudly() -> None:
    def handler(topic: str, payload: bytes) -> None:
        raise KeyError(topic)

    async with EmbeddedBroker() as broker:
        node = MqttLink(broker.url, "sat-1", ["a"], handler)
        task = asyncio.create_task(node.run())
        await asyncio.wait_for(node.connected.wait(), 5)
        await node.publish("a", b"")
        with pytest.raises(ExceptionGroup) as caught:
            await asyncio.wait_for(task, 5)
        assert caught.group_contains(KeyError)
        assert not node.connected.is_set()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("127.0.0.1:1883", "scheme"),
        ("http://host", "scheme"),
        ("https://host", "scheme"),
        ("", "scheme"),
        ("mqtt://", "host is missing"),
        ("mqtt://:1883", "host is missing"),
        ("mqtt://host:0", "port"),
        ("mqtt://host:70000", "port"),
        ("mqtt://host:x", "port"),
        ("mqtt://host/topic", "nothing may follow"),
        ("mqtt://host?x=1", "nothing may follow"),
        ("mqtt://user:hush@host/topic", "nothing may follow"),
    ],
)
def test_a_wrong_url_is_explained(url: str, why: str) -> None:
    with pytest.raises(PenumbraError, match=why) as caught:
        BrokerAddress.parse(url)
    assert "mqtt5://host:port" in caught.value.mend
    assert "hush" not in str(caught.value)


def test_urls() -> None:
    assert BrokerAddress.parse("mqtt://host") == BrokerAddress("host", 1883, False)
    assert BrokerAddress.parse("mqtt5://[::1]:99/") == BrokerAddress("::1", 99, True)
    address = BrokerAddress.parse("mqtt://me:p%40ss@host:1")
    assert (address.username, address.password) == ("me", "p@ss")
    assert "p@ss" not in repr(address)


def test_back_off_doubles_is_bounded_and_spread() -> None:
    backoff = Backoff(first_s=0.2, max_s=1.0)
    assert [backoff.next(1.0) for _ in range(5)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.next(0.0) == 0.5
    backoff.reset()
    assert backoff.next(1.0) == 0.2
