"""Products: spooled chunk by chunk, over restarts and a full spool, and again when the ground asks."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from small_disk import fill, small_disk, used_bytes
from waiting import until

from hil.products import products
from node import products as module
from node.command_effects import CommandFailed
from node.products import CHUNK_BYTES, Products
from node.recorder import Recorder
from telemetry.ack import Ack
from telemetry.archive import Archive
from telemetry.database import Database
from telemetry.packets import Event, Product, ProductPart, Stream
from telemetry.spool import Spool

CONTENT = random.Random(2).randbytes(20 * CHUNK_BYTES + 7)
PART = ProductPart(first_byte=0, size_bytes=9, file="/lib/libc.so.6", offset=4096)


class Board:
    """The node's end: database, spool and products of one boot."""

    def __init__(self, directory: Path, database: Database, boot: int, capacity: int) -> None:
        self.database = database
        self.spool = Spool("n", boot, capacity)
        self.recorder = Recorder(database, self.spool, lambda: 7)
        self.products = Products(
            directory / "products", boot, database=database, spool=self.spool, recorder=self.recorder
        )

    async def make(self, content: bytes = CONTENT) -> Product:
        head, keep = await self.products.make("worker.kv", content, 512, [PART])
        await self.database.run(keep)
        self.products.look()
        return head

    async def due(self) -> int:
        rows = await self.database.run(lambda c: c.execute("SELECT COUNT(*) FROM product_due").fetchone())
        return int(rows[0])

    async def is_spooled(self) -> bool:
        return await self.due() == 0

    async def take_down(self, archive: Archive) -> None:
        """Bring all that is spooled into the archive, and acknowledge it."""
        while True:
            batch = await self.database.run(lambda c: self.spool.batch(c, 1000, set()))
            if not batch:
                return
            archive.ingest([record.frame for record in batch])
            for ack in archive.acks("n"):
                await self.database.run(lambda c, ack=ack: self.spool.acknowledge(c, ack))  # type: ignore[misc]


@contextlib.asynccontextmanager
async def board(directory: Path, boot: int = 1, capacity: int = 16 << 20) -> AsyncIterator[Board]:
    database = await Database.open(directory / "node.db")
    made = Board(directory, database, boot, capacity)
    await database.run(made.spool.create)
    await database.run(Products.create)
    tasks = [
        asyncio.create_task(made.products.run(), name="test.products"),
        asyncio.create_task(made.recorder.run(), name="test.recorder"),
    ]
    try:
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await database.close()


@pytest.fixture
def archive(tmp_path: Path):
    opened = Archive.open(tmp_path / "archive.db")
    yield opened
    opened.close()


async def test_a_product_comes_down_whole(tmp_path: Path, archive: Archive) -> None:
    async with board(tmp_path) as on:
        head = await on.make()
        await until(on.is_spooled)
        await on.take_down(archive)
    (found,) = products(archive, "n")
    assert found.content == CONTENT
    assert found.state == "whole"
    assert found.head == head
    assert (head.name, head.first_byte, head.parts, head.product) == ("worker.kv", 512, [PART], "dump-1-1")
    # In order, no chunk twice.
    assert archive.counts("n") == {(1, Stream.PRODUCT): 22}


async def test_a_full_spool_makes_it_wait_and_nothing_is_lost(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    async with board(tmp_path, capacity=6 * CHUNK_BYTES) as on:
        await on.make()
        await asyncio.sleep(0.3)
        assert await on.due() == 1  # Products may fill half of it: two chunks.
        stored = await on.database.run(on.spool.stored_sequences)
        assert len(stored[1, Stream.PRODUCT]) == 3
        for _ in range(30):
            await on.take_down(archive)
            await asyncio.sleep(0.05)
        assert await on.is_spooled()
        await on.take_down(archive)
        assert all(not entry.dropped for entry in await on.database.run(on.spool.ledger))
    (found,) = products(archive, "n")
    assert found.content == CONTENT


async def test_it_goes_on_after_a_restart_where_it_was(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    for boot in range(1, 12):
        async with board(tmp_path, boot, capacity=9 * CHUNK_BYTES) as on:
            if boot == 1:
                await on.make()
            await on.take_down(archive)
            await asyncio.sleep(0.1)  # Ended in the middle of it.
    async with board(tmp_path, 12) as on:
        await until(on.is_spooled)
        await on.take_down(archive)
    (found,) = products(archive, "n")
    assert found.content == CONTENT
    assert sum(archive.counts("n").values()) == 22


async def test_the_ground_can_have_chunks_again_until_it_deletes_them(
    tmp_path: Path, archive: Archive
) -> None:
    async with board(tmp_path) as on:
        head = await on.make()
        await until(on.is_spooled)
        batch = await on.database.run(lambda c: on.spool.batch(c, 1000, set()))
        lost = [record.frame for record in batch if record.seq not in (4, 5, 21)]
        archive.ingest(lost)
        (found,) = products(archive, "n")
        assert (found.state, found.missing) == ("incomplete", ((3, 4), (20, 20)))
        # What was lost for good, struck in the store, say.
        upto = Ack(node="n", boot=1, stream=Stream.PRODUCT, upto=22, gaps=[])
        await on.database.run(lambda c: on.spool.acknowledge(c, upto))
        for first, last in found.missing:
            await on.database.run(
                lambda c, first=first, last=last: on.products.resend(c, head.product, first, last)  # type: ignore[misc]
            )
        on.products.look()
        await until(on.is_spooled)
        await on.take_down(archive)
        (found,) = products(archive, "n")
        assert found.content == CONTENT

        for first, last in ((21, None), (0, 21), (5, 4)):
            with pytest.raises(CommandFailed, match="has chunks 0 to 20"):
                await on.database.run(
                    lambda c, first=first, last=last: on.products.resend(c, head.product, first, last)  # type: ignore[misc]
                )
        file = tmp_path / "products" / head.product
        assert file.exists()
        await on.database.run(lambda c: on.products.delete(c, head.product))
        with pytest.raises(CommandFailed, match="no product 'dump-1-1'; kept are none"):
            await on.database.run(lambda c: on.products.delete(c, head.product))
    async with board(tmp_path, 2) as on:
        await until(lambda: not file.exists())


async def test_the_oldest_that_is_sent_gives_way_and_none_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PRODUCTS", 2)
    async with board(tmp_path) as on:
        await on.make(b"one")
        await on.make(b"two")
        await until(on.is_spooled)
        await on.make(b"three")
        await until(on.is_spooled)
        kept = await on.database.run(lambda c: c.execute("SELECT product FROM product").fetchall())
        assert kept == [("dump-1-2",), ("dump-1-3",)]
    async with board(tmp_path, 2, capacity=3 * CHUNK_BYTES) as on:
        for _ in range(2):
            await on.make(bytes(2 * CHUNK_BYTES))
        with pytest.raises(CommandFailed, match="2 products of 65536 bytes are not sent yet") as failed:
            await on.make(b"six")
        assert failed.value.code == "no_room"


async def test_a_file_that_is_gone_is_reported_and_the_next_product_comes_down(
    tmp_path: Path, archive: Archive
) -> None:
    async with board(tmp_path) as on:
        head, keep = await on.products.make("config", b"lost", 0, [])
        (tmp_path / "products" / head.product).unlink()
        await on.database.run(keep)
        await on.make(b"next")
        await until(on.is_spooled)
        await on.recorder.flush()
        await on.take_down(archive)
    assert [found.content for found in products(archive, "n")] == [b"next"]
    assert [event.name for _, event in archive.packets("n", Event)] == ["product.lost"]


def test_a_product_whose_chunks_do_not_fit_its_head_is_damaged(archive: Archive) -> None:
    from telemetry.frame import encode_frame
    from telemetry.packets import ProductChunk

    head = Product(
        product="dump-1-1", kind="memory_dump", name="x", size_bytes=3, chunk_bytes=3, sha256="0" * 64
    )
    chunk = ProductChunk(product="dump-1-1", index=0, data=b"abc")
    archive.ingest(
        encode_frame(node="n", boot=1, seq=seq, t_ns=1, packet=packet)
        for seq, packet in enumerate((head, chunk))
    )
    (found,) = products(archive, "n")
    assert (found.state, found.content) == ("damaged", None)


async def test_a_dump_leaves_the_disk_as_much_as_it_takes(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 3_000_000) as disk:
        fill(disk / "other", len(CONTENT) + 200_000)
        async with board(tmp_path) as there:
            there.products = Products(
                disk / "products", 1, database=there.database, spool=there.spool, recorder=there.recorder
            )
            with pytest.raises(CommandFailed, match="of the disk are needed") as failed:
                await there.make()
            assert failed.value.code == "no_room"
            assert used_bytes(disk, "products") == 0
            (disk / "other").unlink()
            await there.make()
