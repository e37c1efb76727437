"""`penumbra bench link`: codec, spool, and a frame's whole way through a real broker to a committed archive.

Beside it, what the bare MQTT client does on the same broker. All of it runs in this process on one event
loop, node and ground alike; mosquitto has a process of its own.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hil.bench.link_load import EVENT, NODE, T0_NS, backlog
from hil.bench.machine import describe_machine, load_average
from hil.bench.stats import spread
from hil.ground import GroundStation
from hil.link_faults import LinkFaults, Way
from hil.link_proxy import LinkProxy
from hil.mosquitto import Mosquitto
from node.downlink import Downlink, DownlinkWindow
from telemetry import topics
from telemetry.ack import decode_ack
from telemetry.archive import Archive
from telemetry.database import Database
from telemetry.figures import BenchLink, CodecRates, LinkPass
from telemetry.flow import decode_flow
from telemetry.frame import decode_frame, encode_frame
from telemetry.keys import Key, KeyRing
from telemetry.link import MqttLink
from telemetry.packets import PRIORITY, Packet, Stream
from telemetry.spool import Spool

FRAMES: Final = 200_000
"""Frames of one round of the codec: a third of a second, after a tenth of it unmeasured: the round before
ends with a wait, in which the processor rests."""
RECORDS: Final = 20_000
"""Records of one round of spool, broker and archive."""
GROUP: Final = 256
"""Records of one transaction of the spool."""
IN_FLIGHT: Final = 64
"""Messages the bare client has under way."""
LEAD: Final = 512
"""Messages it may have sent and not yet heard."""
CAPACITY_BYTES: Final = 1 << 30
BACKLOG_S: Final = 2400.0
PASS_S: Final = 480.0
PASS_BIT_S: Final = 1e6
BOUND_S: Final = 600.0


def bench_link(
    *, rounds: int, command: str, progress: Callable[[str], None] = lambda text: None
) -> BenchLink:
    """Measure; needs mosquitto.

    Parameters
    ----------
    rounds
        Of each measurement but the pass, which takes place once.
    command
        What was asked for, for the record.

    Raises
    ------
    PenumbraError
        There is no mosquitto.
    """
    return asyncio.run(_bench(rounds, command, progress))


async def _bench(rounds: int, command: str, progress: Callable[[str], None]) -> BenchLink:
    encode, decode, spool, client, end_to_end = [], [], [], [], []
    holes: list[float] = []
    load_before = load_average()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        async with Mosquitto(root) as broker:
            for number in range(rounds):
                progress(f"round {number + 1} of {rounds}")
                encode.append(_encode_rate())
                decode.append(_decode_rate())
                spool.append(await _spool_rate(_new(root, f"spool-{number}")))
                client.append(await _client_rate(broker.url))
                end_to_end.append(await _end_to_end_rate(broker.url, _new(root, f"chain-{number}")))
                holes.append(await _black_hole_s(broker))
            progress("a pass of 8 minutes at 1 Mbit/s, at most")
            contact = await _pass(broker, _new(root, "pass"))
    return BenchLink(
        command=command,
        machine=describe_machine(1, peers=False, load_before=load_before),
        frame_bytes=len(_frame(0)),
        rounds=rounds,
        codec_frames_s=CodecRates(encode=spread(encode), decode=spread(decode)),
        spool_records_s=spread(spool),
        end_to_end_frames_s=spread(end_to_end),
        client_msgs_s=spread(client),
        black_hole_noticed_s=spread(holes),
        contact=contact,
    )


def _new(root: Path, name: str) -> Path:
    directory = root / name
    directory.mkdir()
    return directory


def _frame(seq: int) -> bytes:
    return encode_frame(node=NODE, boot=1, seq=seq, t_ns=T0_NS + seq, packet=EVENT)


def _encode_rate() -> float:
    """Return the rate of checking packets and making frames of them."""

    def encode(count: int) -> None:
        for seq in range(count):
            encode_frame(node=NODE, boot=1, seq=seq, t_ns=T0_NS, packet=EVENT)

    encode(FRAMES // 10)
    begun = time.perf_counter()
    encode(FRAMES)
    return FRAMES / (time.perf_counter() - begun)


def _decode_rate() -> float:
    """Return the rate of checking CRC and header and reading the packet."""
    frames = [_frame(seq) for seq in range(1000)]

    def decode(rounds: int) -> None:
        for _ in range(rounds):
            for frame in frames:
                decode_frame(frame).packet()

    rounds = FRAMES // len(frames)
    decode(rounds // 10)
    begun = time.perf_counter()
    decode(rounds)
    return FRAMES / (time.perf_counter() - begun)


@asynccontextmanager
async def _store(directory: Path) -> AsyncIterator[tuple[Database, Spool]]:
    database = await Database.open(directory / "node.db")
    spool = Spool(NODE, 1, CAPACITY_BYTES)
    await database.run(spool.create)
    try:
        yield database, spool
    finally:
        await database.close()


async def _fill(database: Database, spool: Spool, packets: Sequence[tuple[Packet, int]]) -> None:
    for start in range(0, len(packets), GROUP):
        group = packets[start : start + GROUP]
        await database.run(lambda c, g=group: spool.append_many(c, g))  # type: ignore[misc]


async def _spool_rate(directory: Path) -> float:
    """Return the rate of records that are durable: each group is one transaction with full sync."""
    async with _store(directory) as (database, spool):
        packets: list[tuple[Packet, int]] = [(EVENT, T0_NS + seq) for seq in range(RECORDS)]
        begun = time.perf_counter()
        await _fill(database, spool, packets)
        return RECORDS / (time.perf_counter() - begun)


@asynccontextmanager
async def _running(*links: MqttLink | GroundStation | Downlink) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(link.run(), name="hil.bench.link") for link in links]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _client_rate(url: str) -> float:
    """Return the rate of messages of one frame each from one bare client to another, QoS 1."""
    heard = 0
    done = asyncio.Event()

    def on_message(topic: str, payload: bytes) -> None:
        nonlocal heard
        heard += 1
        if heard == RECORDS // 2:
            done.set()

    sender = MqttLink(url, "bench-sender", [], lambda _, __: None, max_inflight=IN_FLIGHT)
    receiver = MqttLink(url, "bench-receiver", ["bench/#"], on_message)
    frame = _frame(0)
    left = iter(range(RECORDS // 2))

    async def send() -> None:
        for number in left:
            # A receiver that falls behind would discard, and the figure were that of the sender alone.
            while number - heard > LEAD:  # noqa: ASYNC110 - messages count, no event
                await asyncio.sleep(0.001)
            await sender.publish("bench/frame", frame)

    async with _running(sender, receiver):
        await sender.connected.wait()
        await receiver.connected.wait()
        begun = time.perf_counter()
        async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(send(), name="hil.bench.send")
            await done.wait()
        return heard / (time.perf_counter() - begun)


@dataclass
class _Chain:
    database: Database
    spool: Spool
    archive: Archive
    ground: GroundStation
    downlink: Downlink
    link: MqttLink

    async def drained(self) -> None:
        """Return when every record is archived, acknowledged and deleted."""
        async with asyncio.timeout(BOUND_S):
            while (await self.database.run(self.spool.size))[0]:  # noqa: ASYNC110 - the disk tells
                await asyncio.sleep(0.02)


@asynccontextmanager
async def _chain(broker_url: str, link_url: str, directory: Path) -> AsyncIterator[_Chain]:
    """Make a node's downlink and a ground station, each with its own connection; nothing runs yet."""
    key = Key("bench", bytes(range(32)))
    ring = KeyRing([key])
    archive = Archive.open(directory / "archive.db")
    ground = GroundStation(broker_url, NODE, archive, ring, now_ns=lambda: T0_NS)
    ground.in_contact = True

    def on_message(topic: str, payload: bytes) -> None:
        if topic == topics.ack(NODE):
            downlink.on_ack(decode_ack(payload, ring))
        else:
            downlink.on_flow(decode_flow(payload, ring))

    link = MqttLink(link_url, f"penumbra-{NODE}-link", [topics.ack(NODE), topics.flow(NODE)], on_message)
    async with _store(directory) as (database, spool):
        downlink = Downlink(NODE, database, spool, link, DownlinkWindow(2048, 5.0))
        try:
            yield _Chain(database, spool, archive, ground, downlink, link)
        finally:
            archive.close()


async def _end_to_end_rate(url: str, directory: Path) -> float:
    async with _chain(url, url, directory) as chain:
        await _fill(chain.database, chain.spool, [(EVENT, T0_NS + seq) for seq in range(RECORDS)])
        async with _running(chain.ground, chain.link):
            await chain.ground.connected.wait()
            await chain.link.connected.wait()
            begun = time.perf_counter()
            async with _running(chain.downlink):
                await chain.drained()
            took_s = time.perf_counter() - begun
        archived = sum(chain.archive.counts(NODE).values())
        if archived != RECORDS:
            raise RuntimeError(f"{archived} of {RECORDS} records archived")
        return RECORDS / took_s


async def _black_hole_s(broker: Mosquitto) -> float:
    """Return how long a link that swallows everything goes unnoticed; nothing is published meanwhile."""
    async with LinkProxy(broker.port, version5=True) as proxy:
        await proxy.open()
        link = MqttLink(proxy.url, "bench-hole", [], lambda _, __: None)
        async with _running(link):
            await link.connected.wait()
            await asyncio.sleep(random.random())  # noqa: S311 - some phase of the keep-alive
            proxy.faults = LinkFaults(black_hole=Way.BOTH)
            begun = time.perf_counter()
            async with asyncio.timeout(BOUND_S):
                while link.connected.is_set():  # noqa: ASYNC110 - what is waited for is its end
                    await asyncio.sleep(0.01)
            return time.perf_counter() - begun


def inversions(priorities: Sequence[int]) -> int:
    """Return how many records came before a more urgent one."""
    count, lowest = 0, 8
    for priority in reversed(priorities):
        count += priority > lowest
        lowest = min(lowest, priority)
    return count


async def _pass(broker: Mosquitto, directory: Path) -> LinkPass:
    waiting = backlog(BACKLOG_S)
    async with (
        LinkProxy(broker.port, version5=True) as proxy,
        _chain(broker.url, proxy.url, directory) as chain,
    ):
        await _fill(chain.database, chain.spool, waiting)
        _, frames_bytes = await chain.database.run(chain.spool.size)
        proxy.faults = LinkFaults(to_ground_bit_s=PASS_BIT_S, to_node_bit_s=PASS_BIT_S, delay_s=0.01)
        async with _running(chain.ground, chain.link, chain.downlink):
            await chain.ground.connected.wait()
            begun = time.perf_counter()
            await proxy.open()
            await chain.drained()
            drained_s = time.perf_counter() - begun
        frames = [decode_frame(data) for data in chain.archive.frames(NODE)]
        last: dict[int, int] = {}
        for position, frame in enumerate(frames):
            last[frame.priority] = position
        return LinkPass(
            backlog_s=BACKLOG_S,
            pass_s=PASS_S,
            bit_s=PASS_BIT_S,
            records=len(waiting),
            archived=len(frames),
            frames_bytes=frames_bytes,
            wire_bytes=proxy.counts.to_ground_bytes,
            drained_s=drained_s,
            inversions=inversions([frame.priority for frame in frames]),
            bulk_turns=chain.downlink.batches,
            last_position={str(priority): at for priority, at in sorted(last.items())},
            streams={stream.value: PRIORITY[stream] for stream in Stream},
        )
