"""The link really cuts: no byte passes outside a window. And each of its faults really is one."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hil.link_faults import LinkFault, LinkFaults, Way, faults_at
from hil.link_proxy import CHUNK_BYTES, CHUNKS, LinkProxy


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
    async with LinkProxy(echo.port) as link:
        assert not link.is_open
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", link.port)
        await link.open()
        await link.open()  # open twice is open
        link.shut()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", link.port)
        assert link.counts.connections == 0
        assert not echo.gone.is_set()  # the broker never saw it


async def test_open_link_relays_and_counts_both_ways(echo: Echo) -> None:
    async with LinkProxy(echo.port) as link:
        await link.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        payload = bytes(200_000)
        writer.write(payload)
        assert await asyncio.wait_for(reader.readexactly(len(payload)), 5) == payload
        assert link.counts.to_ground_bytes == link.counts.to_node_bytes == len(payload)
        assert link.counts.connections == 1
        writer.close()
        await asyncio.wait_for(echo.gone.wait(), 5)  # a client that leaves takes the broker side along
        await asyncio.sleep(0.1)  # and then there is nothing left to cut
    assert link.counts.cut == 0


async def test_shut_cuts_both_sides_at_once_and_opens_again(echo: Echo) -> None:
    async with LinkProxy(echo.port) as link:
        await link.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"x")
        await asyncio.wait_for(reader.readexactly(1), 5)
        link.shut()
        assert await ended(reader)
        await asyncio.wait_for(echo.gone.wait(), 5)
        assert link.counts.cut == 1
        received = echo.received
        writer.write(b"lost")
        await asyncio.sleep(0.05)
        assert echo.received == received
        writer.close()
        link.shut()  # shut twice counts nothing twice
        assert link.counts.cut == 1

        await link.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"y")
        assert await asyncio.wait_for(reader.readexactly(1), 5) == b"y"
        writer.close()


async def test_broker_that_is_away_ends_the_connection(echo: Echo) -> None:
    async with LinkProxy(1) as link:  # nothing listens on port 1
        await link.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        assert await ended(reader)
        writer.close()
    assert link.counts.failed == 1


async def test_server_that_leaves_ends_the_client(echo: Echo) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    listener = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with LinkProxy(listener.sockets[0].getsockname()[1]) as link:
        await link.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        assert await ended(reader)
        writer.close()
    listener.close()


async def test_the_port_stays_ours_while_shut(echo: Echo) -> None:
    async with LinkProxy(echo.port) as link:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", link.port))
        with pytest.raises(OSError, match="in use"):
            await asyncio.start_server(lambda r, w: None, "127.0.0.1", link.port)


async def test_stop_leaves_no_task(echo: Echo) -> None:
    link = LinkProxy(echo.port)
    await link.start()
    await link.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"x")
    await asyncio.wait_for(reader.readexactly(1), 5)
    await link.stop()
    assert await ended(reader)
    writer.close()
    await asyncio.sleep(0.05)
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("hil.link")]


async def exchange(link: LinkProxy, payload: bytes, bound_s: float = 10.0) -> tuple[bytes, float]:
    """Return what comes back for a payload, and how long that took, s."""
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    begun_s = time.monotonic()
    writer.write(payload)
    came = await asyncio.wait_for(reader.readexactly(len(payload)), bound_s)
    writer.close()
    return came, time.monotonic() - begun_s


@asynccontextmanager
async def faulty(port: int, faults: LinkFaults) -> AsyncIterator[LinkProxy]:
    async with LinkProxy(port, seed=1) as link:
        await link.open()
        link.faults = faults
        yield link


async def test_a_sound_link_changes_nothing(echo: Echo) -> None:
    payload = random.Random(2).randbytes(3_000_000)
    async with faulty(echo.port, LinkFaults()) as link:
        assert (await exchange(link, payload))[0] == payload


async def test_delay_and_jitter_hold_back_and_keep_the_order(echo: Echo) -> None:
    payload = bytes(range(256)) * 200
    async with faulty(echo.port, LinkFaults(delay_s=0.1, jitter_s=0.05)) as link:
        came, took_s = await exchange(link, payload)
    assert came == payload
    assert took_s >= 0.2


async def test_bandwidth_is_bounded_each_way_by_its_own(echo: Echo) -> None:
    payload = bytes(50_000)
    async with faulty(echo.port, LinkFaults(to_ground_bit_s=1e6)) as link:
        assert (await exchange(link, payload))[1] >= 0.4 * 0.98
    async with faulty(echo.port, LinkFaults(to_node_bit_s=1e6)) as link:
        assert (await exchange(link, payload))[1] >= 0.4 * 0.98


@pytest.mark.parametrize("way", [Way.TO_GROUND, Way.TO_NODE, Way.BOTH])
async def test_a_black_hole_holds_everything_until_it_ends(echo: Echo, way: Way) -> None:
    async with faulty(echo.port, LinkFaults(black_hole=way)) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"into the dark")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        assert (echo.received > 0) is (way is Way.TO_NODE)
        link.faults = LinkFaults()
        assert await asyncio.wait_for(reader.readexactly(13), 5) == b"into the dark"
        writer.close()


async def test_corruption_flips_bits_and_counts_them(echo: Echo) -> None:
    payload = bytes(100_000)
    async with faulty(echo.port, LinkFaults(corrupt_per_byte=0.01)) as link:
        came, _ = await exchange(link, payload)
        assert sum(byte.bit_count() for byte in came) == pytest.approx(link.counts.flipped_bits, abs=20)
        assert 1000 < link.counts.flipped_bits < 3000


async def test_half_open_takes_the_far_side_and_tells_nobody(echo: Echo) -> None:
    async with faulty(echo.port, LinkFaults()) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"x")
        await asyncio.wait_for(reader.readexactly(1), 5)
        link.faults = LinkFaults(half_open=True)
        await asyncio.wait_for(echo.gone.wait(), 5)
        writer.write(b"y")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        writer.close()


async def test_resets_by_chance(echo: Echo) -> None:
    async with faulty(echo.port, LinkFaults(reset_hz=50)) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"x")
        with suppress(ConnectionResetError):
            while await asyncio.wait_for(reader.read(10), 5):
                pass
        assert link.counts.cut == 1
        writer.close()


async def test_a_cut_does_not_wait_for_what_is_due_later(echo: Echo) -> None:
    async with faulty(echo.port, LinkFaults(delay_s=60)) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(bytes(CHUNK_BYTES * CHUNKS * 4))
        await asyncio.sleep(0.1)
        link.cut()
        assert await ended(reader)
        writer.close()


ways = st.sampled_from(Way)
link_faults = st.builds(
    LinkFaults,
    delay_s=st.floats(0, 60),
    jitter_s=st.floats(0, 60),
    to_ground_bit_s=st.none() | st.floats(1e3, 1e10),
    to_node_bit_s=st.none() | st.floats(1e3, 1e10),
    black_hole=ways,
    corrupt_per_byte=st.floats(0, 1),
    half_open=st.booleans(),
    reset_hz=st.floats(0, 100),
)


@given(link_faults, link_faults, link_faults)
def test_faults_join_in_any_order(a: LinkFaults, b: LinkFaults, c: LinkFaults) -> None:
    assert a.joined(b) == b.joined(a)
    assert a.joined(b).joined(c) == a.joined(b.joined(c))
    assert a.joined(a) == a.joined(LinkFaults()) == a


def test_a_script_says_what_is_wrong_when() -> None:
    script = [
        LinkFault(at_s=10, for_s=10, delay_s=1.0, black_hole=Way.TO_NODE),
        LinkFault(at_s=15, for_s=10, delay_s=0.5, to_ground_bit_s=1e6, black_hole=Way.TO_GROUND),
    ]
    assert faults_at(script, 9.9) == LinkFaults()
    assert faults_at(script, 10) == LinkFaults(delay_s=1.0, black_hole=Way.TO_NODE)
    assert faults_at(script, 15) == LinkFaults(delay_s=1.0, to_ground_bit_s=1e6, black_hole=Way.BOTH)
    assert faults_at(script, 20) == LinkFaults(delay_s=0.5, to_ground_bit_s=1e6, black_hole=Way.TO_GROUND)
    assert faults_at(script, 25) == LinkFaults()
