"""A flipped bit in the node's SUBSCRIBE: the link is up, and deaf to a topic, until it is said again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from waiting import until

from hil.bench.link import EVENT, _chain, _fill, _running
from hil.broker import EmbeddedBroker
from hil.link_faults import LinkFaults, Way
from hil.link_proxy import LinkProxy
from hil.mosquitto import Mosquitto, find_mosquitto
from node.downlink import DownlinkWindow
from telemetry.link import MqttLink

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")


class OneBit(LinkProxy):
    """Changes one letter of a topic in the first SUBSCRIBE."""

    flipped = 0
    letters = (b"/ack", b"/acc")

    def _corrupted(self, data: bytes) -> bytes:
        if self.flipped == 0 and self.letters[0] in data:
            self.flipped += 1
            return data.replace(*self.letters)
        return data


async def test_a_damaged_subscription_holds_the_downlink_up_for_a_while_only(tmp_path: Path) -> None:
    async with (
        Mosquitto(tmp_path) as broker,
        OneBit(broker.port, version5=True) as proxy,
        _chain(broker.url, proxy.url, tmp_path) as chain,
    ):
        await _fill(chain.database, chain.spool, [(EVENT, seq) for seq in range(100)])
        chain.downlink._window = DownlinkWindow(2048, 0.2)
        chain.link._renew_s = 1.0
        await proxy.open()
        async with _running(chain.ground, chain.link, chain.downlink):
            await chain.drained()
        assert proxy.flipped == 1
        assert chain.link.connections == 1
        assert len(chain.archive.frames("penumbra-1")) == 100


@pytest.mark.parametrize("embedded", [True, False])
async def test_every_topic_is_heard_again_and_each_message_once(tmp_path: Path, embedded: bool) -> None:
    heard: list[tuple[str, bytes]] = []
    async with (
        EmbeddedBroker() if embedded else Mosquitto(tmp_path) as broker,
        OneBit(broker.port, version5=not embedded) as proxy,
    ):
        await proxy.open()
        topics = ["n/tc", "n/ack", "n/up"]
        link = MqttLink(proxy.url, "node", topics, lambda *message: heard.append(message), renew_s=0.5)
        ground = MqttLink(broker.url, "ground", [], lambda *_: None)
        proxy.letters = (b"n/up", b"n/uq")
        tasks = [asyncio.create_task(each.run(), name="test.link") for each in (link, ground)]
        try:
            for each in (link, ground):
                await asyncio.wait_for(each.connected.wait(), 5)
            await ground.publish("n/tc", b"1")
            await ground.publish("n/up", b"lost")
            await until(lambda: heard == [("n/tc", b"1")])
            await asyncio.sleep(
                1.6
            )  # Said again three times by now: once would do, and no more is heard for it.
            for topic in topics:
                await ground.publish(topic, b"2")
            await until(lambda: len(heard) >= 4)
            await asyncio.sleep(0.3)
            assert heard[1:] == [(topic, b"2") for topic in topics]
            assert link.connections == 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_broker_that_does_not_confirm_a_subscription_is_given_up(tmp_path: Path) -> None:
    async with Mosquitto(tmp_path) as broker, LinkProxy(broker.port, version5=True) as proxy:
        await proxy.open()
        link = MqttLink(
            proxy.url, "node", ["n/tc"], lambda *_: None, renew_s=0.2, publish_timeout_s=0.5, keepalive_s=60
        )
        task = asyncio.create_task(link.run(), name="test.link")
        try:
            await asyncio.wait_for(link.connected.wait(), 5)
            await asyncio.sleep(0.5)
            assert link.connections == 1
            proxy.faults = LinkFaults(black_hole=Way.BOTH)
            await until(lambda: not link.connected.is_set())
            assert "no answer to SUBSCRIBE" in str(link.last_error)
            proxy.faults = LinkFaults()
            await until(link.connected.is_set)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
