"""The real broker: plain and as shipped, with certificates and ACL; who has no business there is kept out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiomqtt
import pytest
from brokers import hardened, needs_mosquitto
from waiting import until

from hil.certificates import Authority
from hil.mosquitto import Mosquitto, render
from telemetry import topics
from telemetry.errors import PenumbraError
from telemetry.link import MqttLink
from telemetry.packets import Stream
from telemetry.tls import TlsFiles

pytestmark = needs_mosquitto

NODE = "penumbra-1"
UPWARDS = (topics.tc, topics.ack, topics.flow, topics.up)
DENIED_S = 0.4
"""How long a message that must not come is waited for, s; a message that may takes a few milliseconds."""


class Client:
    """A client that remembers what it hears."""

    def __init__(self, url: str, name: str, subscribe: list[str], tls: TlsFiles | None = None) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.link = MqttLink(
            url, name, subscribe, lambda topic, payload: self.heard.append((topic, payload)), tls=tls
        )

    async def say(self, topic: str, payload: bytes = b"x") -> None:
        await self.link.publish(topic, payload)


@asynccontextmanager
async def up(*clients: Client) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(client.link.run(), name=f"test.{n}") for n, client in enumerate(clients)]
    try:
        for client in clients:
            await asyncio.wait_for(client.link.connected.wait(), 5)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.mark.parametrize("scheme", ["mqtt", "mqtt5"])
async def test_plain_broker_serves_both_protocols_and_survives_a_kill(tmp_path: Path, scheme: str) -> None:
    async with Mosquitto(tmp_path) as broker:
        client = Client(f"{scheme}://127.0.0.1:{broker.port}", "c", ["a/#"])
        async with up(client):
            await client.say("a/b", b"1")
            await until(lambda: client.heard == [("a/b", b"1")])
            await broker.kill()
            await until(lambda: not client.link.connected.is_set())
            await broker.start()
            await until(client.link.connected.is_set)
            await client.say("a/b", b"2")
            await until(lambda: client.heard[-1] == ("a/b", b"2"))


@pytest.mark.parametrize("scheme", ["mqtt", "mqtt5"])
async def test_what_the_broker_had_kept_is_apart_from_what_is_live(tmp_path: Path, scheme: str) -> None:
    async with Mosquitto(tmp_path) as broker:
        gateway = aiomqtt.Client("127.0.0.1", broker.port, identifier="gateway")
        live: list[bytes] = []
        kept: list[bytes] = []
        link = MqttLink(
            f"{scheme}://127.0.0.1:{broker.port}",
            "node",
            ["a/#"],
            lambda _, payload: live.append(payload),
            on_retained=lambda _, payload: kept.append(payload),
            renew_s=0.2,
        )
        async with gateway:
            await gateway.publish("a/b", b"yesterday", qos=1, retain=True)
            task = asyncio.create_task(link.run(), name="test.link")
            await until(lambda: len(kept) >= 2)  # with each renewed subscription
            # Retained as well, and live for whoever has subscribed.
            await gateway.publish("a/b", b"now", qos=1, retain=True)
            await until(lambda: b"now" in kept)
            task.cancel()
            await asyncio.wait([task])
    assert live == [b"now"]
    assert set(kept) == {b"yesterday", b"now"}


async def test_a_broker_that_cannot_start_says_why(tmp_path: Path) -> None:
    async with Mosquitto(tmp_path) as first:
        other = Mosquitto(tmp_path, first.port)
        with pytest.raises(PenumbraError, match="in use"):
            await other.start()
    broken = Mosquitto(tmp_path, template="listener 1\nno_such_setting 1\n")
    with pytest.raises(PenumbraError, match=r"ended at its start: .*"):
        await broken.start()


def test_only_settings_that_are_there_are_replaced() -> None:
    assert render("a 1\n# a 2\nb 3", {"a": "9"}) == "a 9\n# a 2\nb 3\n"
    with pytest.raises(ValueError, match="not in the configuration: c"):
        render("a 1", {"c": "2"})


class Site:
    """A hardened broker, with a client of each kind."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self.broker = hardened(directory, self.authority)

    def files(self, name: str) -> TlsFiles:
        return self.authority.issue(name)

    def client(
        self, name: str, subscribe: list[str], tls: TlsFiles | None = None, scheme: str = "mqtts5"
    ) -> Client:
        return Client(f"{scheme}://127.0.0.1:{self.broker.port}", name, subscribe, tls or self.files(name))

    def node(self) -> Client:
        bus = [topics.bus(NODE, channel) for channel in ("time", "orbit", "eps", "thermal", "contact")]
        return self.client(f"node-{NODE}", [*(topic(NODE) for topic in UPWARDS), *bus])

    def ground(self, scheme: str = "mqtts5") -> Client:
        return self.client("ground", [topics.tm(NODE, "#")], scheme=scheme)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    await made.broker.start()
    yield made
    await made.broker.stop()


@pytest.mark.parametrize("scheme", ["mqtts", "mqtts5"])
async def test_each_side_may_do_its_work(site: Site, scheme: str) -> None:
    node, ground = site.node(), site.ground(scheme)
    bench = site.client("bench", [topics.bus(NODE, "load"), topics.bus(NODE, "request")])
    async with up(node, ground, bench):
        for stream in Stream:
            await node.say(topics.tm(NODE, stream))
        await node.say(topics.tm_block(NODE))
        await node.say(topics.bus(NODE, "load"))
        await node.say(topics.bus(NODE, "request"))
        for topic in UPWARDS:
            await ground.say(topic(NODE))
        for channel in ("time", "orbit", "eps", "thermal", "contact"):
            await bench.say(topics.bus(NODE, channel))
        await until(lambda: len(ground.heard) == len(Stream) + 1)
        await until(lambda: len(bench.heard) == 2)
        await until(lambda: len(node.heard) == 9)


@pytest.mark.parametrize(
    ("name", "topic"),
    [
        (f"node-{NODE}", topics.tc(NODE)),
        (f"node-{NODE}", topics.ack(NODE)),
        (f"node-{NODE}", topics.up(NODE)),
        (f"node-{NODE}", topics.bus(NODE, "eps")),
        (f"node-{NODE}", topics.tm("penumbra-2", Stream.EVENT)),
        ("node-penumbra-2", topics.tm(NODE, Stream.EVENT)),
        ("ground", topics.tm(NODE, Stream.EVENT)),
        ("ground", topics.bus(NODE, "eps")),
        ("bench", topics.tc(NODE)),
        ("bench", topics.tm(NODE, Stream.EVENT)),
        ("bench", topics.up(NODE)),
        ("stranger", topics.tc(NODE)),
        ("stranger", topics.tm(NODE, Stream.EVENT)),
    ],
)
async def test_nobody_speaks_for_another(site: Site, name: str, topic: str) -> None:
    node, ground, other = site.node(), site.ground(), site.client(name, [])
    if name in {"ground", f"node-{NODE}"}:
        other = Client(node.link.url, f"{name}-2", [], site.files(name))
    async with up(node, ground, other):
        await other.say(topic)
        await node.say(topics.tm(NODE, Stream.EVENT), b"control")
        await ground.say(topics.tc(NODE), b"control")
        await until(lambda: node.heard and ground.heard)
        await asyncio.sleep(DENIED_S)
        assert {payload for _, payload in (*node.heard, *ground.heard)} == {b"control"}


async def test_nobody_listens_in(site: Site) -> None:
    stranger, ground, node = site.client("stranger", []), site.ground(), site.node()
    refused = site.client("stranger", ["#"])
    async with up(ground, node, stranger):
        task = asyncio.create_task(refused.link.run(), name="test.refused")
        await ground.say(topics.tc(NODE), b"secret")
        await until(lambda: node.heard)
        await asyncio.sleep(DENIED_S)
        assert refused.heard == []
        task.cancel()
        await asyncio.wait([task])


async def test_who_has_no_valid_certificate_does_not_get_in(site: Site, tmp_path: Path) -> None:
    other_authority = tmp_path / "other"
    other_authority.mkdir()
    revoked = site.files("revoked")
    site.authority.revoke("revoked")
    await site.broker.stop()
    await site.broker.start()
    ours = site.files("ground")
    forged = Authority(other_authority).issue("ground")
    for tls in (
        replace(ours, certificate=None, key=None),
        replace(ours, certificate=forged.certificate, key=forged.key),
        revoked,
    ):
        client = site.client("c", [], tls)
        task = asyncio.create_task(client.link.run(), name="test.out")
        await until(lambda c=client: c.link.last_error is not None)
        await asyncio.sleep(DENIED_S)
        assert client.link.connections == 0
        task.cancel()
        await asyncio.wait([task])
    good = site.client("ground", [topics.tm(NODE, "#")], ours)
    async with up(good):
        assert good.link.connections == 1


async def test_a_broker_that_is_not_the_one_named_is_not_spoken_to(site: Site, tmp_path: Path) -> None:
    other_authority = tmp_path / "other"
    other_authority.mkdir()
    theirs = Authority(other_authority).issue("ground")
    client = site.client("c", [], replace(site.files("ground"), ca=theirs.ca))
    task = asyncio.create_task(client.link.run(), name="test.out")
    await until(lambda: client.link.last_error is not None)
    assert "certificate verify failed" in (client.link.last_error or "")
    assert client.link.connections == 0
    task.cancel()
    await asyncio.wait([task])
