"""What a broker's confirmation is worth: nine cases in which mosquitto loses what it has confirmed.

They are why a record leaves the node's disk only when the ground's archive acknowledges it
(reference/fsw.md, 4.3), and why nothing here uses shared subscriptions. In each case every message is sent
with QoS 1 and confirmed, and the receiver counts. Where one of these fails, the broker has changed (they were
made with mosquitto 2.0), and the reasoning is to be looked at again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import paho.mqtt.client as paho
from brokers import needs_mosquitto
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from hil.mosquitto import Mosquitto

pytestmark = needs_mosquitto

QUIET_S = 0.4
"""Time without a message after which no more come, s: they take milliseconds."""
PERSISTENT = """\
listener 0 127.0.0.1
allow_anonymous true
persistence true
persistence_location unset
max_queued_messages 1000
log_type error
log_type warning
"""


class Peer:
    """A client of MQTT 5 with a session that lasts, or not."""

    def __init__(
        self, broker: Mosquitto, name: str, *, expiry_s: int, clean: bool = False, acks: bool = True
    ) -> None:
        self.heard: list[int] = []
        self._acks = acks
        self._properties = Properties(PacketTypes.CONNECT)
        self._properties.SessionExpiryInterval = expiry_s
        self._clean = clean
        self._broker = broker
        self._subscribed = threading.Event()
        self._client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5, manual_ack=not acks
        )
        self._client.on_message = lambda _c, _u, message: self.heard.append(int(message.payload))
        self._client.on_subscribe = lambda *_: self._subscribed.set()

    def connect(self, topic: str | None = None) -> Peer:
        self._client.connect(
            "127.0.0.1", self._broker.port, clean_start=self._clean, properties=self._properties
        )
        self._client.loop_start()
        if topic is not None:
            while not self._client.is_connected():
                time.sleep(0.01)
            self._client.subscribe(topic, qos=1)
            assert self._subscribed.wait(5)
        return self

    def publish(self, numbers: range) -> None:
        """Send, and wait until each is confirmed."""
        for number in numbers:
            told = self._client.publish("t", str(number), qos=1)
            told.wait_for_publish(5)
            assert told.is_published()

    def vanish(self) -> None:
        """End without a word, as a process that is killed."""
        sock = self._client.socket()
        if sock is not None:
            sock.close()
        self._client.loop_stop()

    def leave(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def settle(self) -> list[int]:
        """Return what was heard once nothing more comes."""
        count = -1
        while count != len(self.heard):
            count = len(self.heard)
            time.sleep(QUIET_S)
        return sorted(set(self.heard))


def sender(broker: Mosquitto) -> Peer:
    return Peer(broker, "sender", expiry_s=0, clean=True).connect()


def persistent(directory: Path, *more: str) -> Mosquitto:
    store = directory / "store"
    store.mkdir()
    template = PERSISTENT + "".join(f"{line}\n" for line in more)
    return Mosquitto(directory, template=template, settings={"persistence_location": f"{store}/"})


def share(broker: Mosquitto, *, expiry_s: int) -> tuple[list[int], list[int], list[int]]:
    """Have A of a shared subscription die with five messages unacknowledged; return what B heard before and
    after, and what A hears if it comes back.
    """
    a = Peer(broker, "a", expiry_s=expiry_s, acks=False).connect("$share/g/t")
    send = sender(broker)
    send.publish(range(5))
    assert a.settle() == [0, 1, 2, 3, 4]
    b = Peer(broker, "b", expiry_s=0).connect("$share/g/t")
    a.vanish()
    time.sleep(QUIET_S)
    before = b.settle()
    send.publish(range(5, 25))
    after = b.settle()
    time.sleep(2.5)  # longer than the short expiry
    again = Peer(broker, "a", expiry_s=expiry_s).connect()
    back = again.settle()
    for peer in (b, send, again):
        peer.leave()
    return before, after, back


async def test_1_a_shared_consumer_that_dies_takes_what_it_held_with_it(tmp_path: Path) -> None:
    async with Mosquitto(tmp_path) as broker:
        before, after, back = await asyncio.to_thread(share, broker, expiry_s=0)
    assert before == []
    assert after == list(range(5, 25))
    assert back == []  # 0 to 4 are lost.


async def test_2_a_shared_consumer_that_stays_away_keeps_its_half(tmp_path: Path) -> None:
    async with Mosquitto(tmp_path) as broker:
        before, after, back = await asyncio.to_thread(share, broker, expiry_s=3600)
    assert before == []
    assert len(after) == 10
    assert back == sorted({*range(25)} - {*after})  # Only because it came back.


async def test_3_what_an_expired_session_held_goes_to_nobody_else(tmp_path: Path) -> None:
    async with Mosquitto(tmp_path) as broker:
        _, after, back = await asyncio.to_thread(share, broker, expiry_s=2)
    assert not {0, 1, 2, 3, 4} & {*after, *back}


async def offline(
    broker: Mosquitto, end: str, *, clean: bool = False, count: int = 20, wait_s: float = 0.0
) -> list[int]:
    """Send to a session that is away, end the broker, start it; return what the session then gets."""

    def send() -> None:
        Peer(broker, "r", expiry_s=3600, clean=clean).connect("t").leave()
        from_here = sender(broker)
        from_here.publish(range(count))
        from_here.leave()
        time.sleep(wait_s)

    def receive() -> list[int]:
        receiver = Peer(broker, "r", expiry_s=3600).connect()
        heard = receiver.settle()
        receiver.leave()
        return heard

    await asyncio.to_thread(send)
    if end == "kill":
        await broker.kill()
    elif end == "stop":
        await broker.stop()
    if end != "none":
        await broker.start()
    return await asyncio.to_thread(receive)


async def test_4_without_persistence_a_kill_loses_all(tmp_path: Path) -> None:
    async with Mosquitto(tmp_path) as broker:
        assert await offline(broker, "kill") == []


async def test_5_with_persistence_as_it_comes_a_kill_loses_all(tmp_path: Path) -> None:
    async with persistent(tmp_path) as broker:
        assert await offline(broker, "kill") == []


async def test_6_with_a_save_at_each_change_a_kill_at_once_may_lose_some(tmp_path: Path) -> None:
    async with persistent(tmp_path, "autosave_on_changes true", "autosave_interval 1") as broker:
        assert len(await offline(broker, "kill", wait_s=2.0)) >= 19


async def test_7_an_ordered_stop_loses_none(tmp_path: Path) -> None:
    async with persistent(tmp_path) as broker:
        assert await offline(broker, "stop") == list(range(20))


async def test_8_a_session_that_began_clean_is_not_persisted_at_all(tmp_path: Path) -> None:
    async with persistent(tmp_path) as broker:
        assert await offline(broker, "stop", clean=True) == []


async def test_9_what_exceeds_the_queue_is_dropped_and_confirmed(tmp_path: Path) -> None:
    template = PERSISTENT.replace("persistence true\npersistence_location unset\n", "").replace("1000", "10")
    async with Mosquitto(tmp_path, template=template) as broker:
        heard = await offline(broker, "none", count=60)
    assert len(heard) < 60  # though every one of them was confirmed
    assert heard == list(range(len(heard)))
