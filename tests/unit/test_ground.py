"""The ground station with a real broker, through the link, against a small node written here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hil.broker import EmbeddedBroker
from hil.ground import GroundStation
from hil.link_proxy import LinkProxy
from telemetry import topics
from telemetry.ack import Ack, decode_ack
from telemetry.archive import Archive, Ingested
from telemetry.block import encode_block
from telemetry.commands import Infer, Ping
from telemetry.database import StoreFull
from telemetry.envelope import open_command
from telemetry.flow import Flow, decode_flow
from telemetry.frame import encode_frame
from telemetry.keys import Key, KeyRing
from telemetry.link import LinkDown, MqttLink
from telemetry.packets import Event, Packet, Severity, Stage, Stream, Verification

NODE = "penumbra-1"
KEY = Key("ground-1", bytes(range(32)))
RING = KeyRing([KEY])
T0 = 1_700_000_000_000_000_000


async def until(done: Callable[[], object]) -> None:
    for _ in range(500):
        if done():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


def frame(seq: int, packet: Packet | None = None, node: str = NODE) -> bytes:
    body = packet or Event(severity=Severity.INFO, name="test.event", text=f"event {seq}")
    return encode_frame(node=node, boot=1, seq=seq, t_ns=T0 + seq, packet=body)


class SmallNode:
    """Answers each command with `accepted`, unless told to lose the answer; remembers acknowledgements."""

    def __init__(self, url: str) -> None:
        self.acks: list[Ack] = []
        self.flows: list[Flow] = []
        self.commands: list[bytes] = []
        self.lose_answers = 0
        self._seq = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.link = MqttLink(
            url,
            "node",
            [topics.tc(NODE), topics.ack(NODE), topics.flow(NODE)],
            self.on_message,
            max_backoff_s=0.3,
        )

    def on_message(self, topic: str, payload: bytes) -> None:
        if topic == topics.ack(NODE):
            self.acks.append(decode_ack(payload, RING))
            return
        if topic == topics.flow(NODE):
            self.flows.append(decode_flow(payload, RING))
            return
        command = open_command(payload, RING)
        self.commands.append(payload)
        if self.lose_answers:
            self.lose_answers -= 1
            return
        report = Verification(
            key_id=command.key_id, command_seq=command.seq, name=command.name, stage=Stage.ACCEPTED, ok=True,
            code="ok",
        )  # fmt: skip
        task = asyncio.create_task(self.send(Stream.VERIFICATION, frame(self._seq, report)))
        self._seq += 1
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def send(self, stream: Stream, data: bytes) -> None:
        await self.link.publish(topics.tm(NODE, stream), data)


@asynccontextmanager
async def running(coroutine_of: Callable[[], object]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(coroutine_of())  # type: ignore[call-overload]
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


class Chain:
    """Broker, link, archive, ground station and node, wired as in a flight."""

    def __init__(self, broker: EmbeddedBroker, link: LinkProxy, archive: Archive) -> None:
        self.broker, self.link, self.archive = broker, link, archive
        self.heard: list[Packet] = []
        self.ground = GroundStation(
            broker.url, NODE, archive, RING, now_ns=lambda: T0, on_packet=lambda _, p: self.heard.append(p)
        )
        self.node = SmallNode(link.url)

    async def contact(self, begins: bool) -> None:
        self.ground.in_contact = begins
        if begins:
            await self.link.open()
        else:
            self.link.shut()


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Chain]:
    archive = Archive.open(tmp_path / "archive.db")
    async with EmbeddedBroker() as broker, LinkProxy(broker.port) as link:
        made = Chain(broker, link, archive)
        async with running(made.ground.run), running(made.node.link.run):
            await asyncio.wait_for(made.ground.connected.wait(), 5)
            yield made
    archive.close()


async def test_archives_then_acknowledges(chain: Chain) -> None:
    await chain.contact(True)
    await asyncio.wait_for(chain.node.link.connected.wait(), 5)
    for seq in (0, 1, 3):
        await chain.node.send(Stream.EVENT, frame(seq))
    await until(lambda: any(a.upto == 4 for a in chain.node.acks))
    last = next(a for a in chain.node.acks if a.upto == 4)
    assert (last.node, last.boot, last.stream, list(last.gaps)) == (NODE, 1, Stream.EVENT, [(2, 2)])
    assert chain.archive.sequences(NODE) == {(1, Stream.EVENT): [(0, 1), (3, 3)]}
    assert chain.ground.counts.archived == 3
    await chain.node.send(Stream.EVENT, frame(1))
    await until(lambda: chain.ground.counts.duplicates == 1)
    assert [p.text for p in chain.heard if isinstance(p, Event)] == [
        "event 0",
        "event 1",
        "event 3",
        "event 1",
    ]


async def test_nothing_is_acknowledged_that_is_not_archived(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = chain.archive.ingest

    def full(frames: list[bytes]) -> Ingested:
        raise StoreFull("disk full")

    monkeypatch.setattr(chain.archive, "ingest", full)
    await chain.contact(True)
    await asyncio.wait_for(chain.node.link.connected.wait(), 5)
    await chain.node.send(Stream.EVENT, frame(0))
    await until(lambda: chain.ground.counts.not_archived == 1)
    await asyncio.sleep(0.1)
    assert chain.node.acks == []
    monkeypatch.setattr(chain.archive, "ingest", real)
    await chain.node.send(Stream.EVENT, frame(0))
    await until(lambda: chain.node.acks)


async def test_garbage_is_counted_and_service_goes_on(chain: Chain) -> None:
    await chain.contact(True)
    await asyncio.wait_for(chain.node.link.connected.wait(), 5)
    damaged = bytearray(frame(5))
    damaged[10] ^= 4
    for data in (b"", b"garbage", bytes(damaged), frame(0, node="another")):
        await chain.node.send(Stream.EVENT, data)
    await chain.node.send(Stream.RESULT, frame(0))  # an event on the topic of results
    await chain.node.send(Stream.EVENT, frame(1))
    await until(lambda: chain.ground.counts.archived == 1)
    assert chain.ground.counts.garbage == 5
    assert chain.archive.sequences(NODE) == {(1, Stream.EVENT): [(1, 1)]}


async def test_commands_go_up_in_contact_only_and_are_repeated_until_accepted(chain: Chain) -> None:
    chain.node.lose_answers = 1
    chain.ground.uplink.queue([Infer(job="job-1", prompt="p", max_tokens=4), Ping()])
    await asyncio.sleep(0.2)
    assert chain.node.commands == []
    assert chain.ground.uplink.counts.issued == 0
    await chain.contact(True)
    await until(lambda: chain.ground.uplink.counts.accepted == 2)
    first = [c for c in chain.node.commands if open_command(c, RING).seq == 1]
    assert len(first) >= 2
    assert len(set(first)) == 1
    assert [open_command(c, RING).name for c in chain.node.commands][-1] == "ping"


async def test_a_full_disk_holds_commands_back_and_loses_none(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = chain.archive.next_sequence
    tried = 0

    def full(node: str, key_id: str) -> int:
        nonlocal tried
        tried += 1
        raise StoreFull("disk full")

    monkeypatch.setattr("hil.ground.FULL_S", 0.05)
    monkeypatch.setattr(chain.archive, "next_sequence", full)
    chain.ground.uplink.queue([Ping()])
    await chain.contact(True)
    await until(lambda: tried >= 2)
    assert chain.node.commands == []
    monkeypatch.setattr(chain.archive, "next_sequence", real)
    await until(lambda: chain.ground.uplink.counts.accepted == 1)


async def test_acknowledgement_lost_with_the_link_is_repeated_in_the_next_contact(chain: Chain) -> None:
    await chain.contact(True)
    await asyncio.wait_for(chain.node.link.connected.wait(), 5)
    await chain.node.send(Stream.EVENT, frame(0))
    await until(lambda: chain.node.acks)
    await chain.contact(False)
    await until(lambda: not chain.node.link.connected.is_set())
    with pytest.raises(LinkDown):
        await chain.node.send(Stream.EVENT, frame(1))
    chain.node.acks.clear()
    await chain.contact(True)
    await until(lambda: chain.node.acks)  # nothing new came down: this is the periodic repeat
    assert chain.node.acks[0].upto == 1
    assert chain.archive.counts(NODE) == {(1, Stream.EVENT): 1}


async def test_a_broker_that_dies_and_comes_back_is_survived(chain: Chain) -> None:
    await chain.contact(True)
    await asyncio.wait_for(chain.node.link.connected.wait(), 5)
    await chain.broker.kill()
    await until(lambda: not chain.ground.connected.is_set())
    await chain.broker.start()
    await until(lambda: chain.ground.connected.is_set() and chain.node.link.connected.is_set())
    await chain.node.send(Stream.EVENT, frame(0))
    await until(lambda: chain.node.acks)


async def test_blocks_are_unpacked_and_archived_frame_by_frame(chain: Chain) -> None:
    await chain.contact(True)
    await asyncio.wait_for(chain.node.link.connected.wait(), 5)
    block = encode_block([frame(seq) for seq in range(20)] + [frame(0, node="another")])
    assert block is not None
    await chain.node.link.publish(topics.tm_block(NODE), block)
    await chain.node.link.publish(topics.tm_block(NODE), block[:-1])
    await until(lambda: chain.ground.counts.archived == 20 and chain.ground.counts.garbage == 2)
    assert chain.archive.sequences(NODE) == {(1, Stream.EVENT): [(0, 19)]}


async def test_a_ground_that_cannot_archive_holds_the_node_and_lets_it_go_on_after(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = chain.archive.ingest

    def full(frames: list[bytes]) -> Ingested:
        raise StoreFull("disk full")

    monkeypatch.setattr(chain.archive, "ingest", full)
    await chain.contact(True)
    await asyncio.wait_for(chain.node.link.connected.wait(), 5)
    await chain.node.send(Stream.EVENT, frame(0))
    await until(lambda: any(flow.records == 0 for flow in chain.node.flows))
    monkeypatch.setattr(chain.archive, "ingest", real)
    await chain.node.send(Stream.EVENT, frame(0))
    await until(lambda: chain.node.flows[-1].records > 1000)
