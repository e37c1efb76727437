"""Products: what is too large for a packet, kept on disk and sent in chunks as the spool has room.

A product is a file beside the database, a head, and the chunks still to be sent. A chunk is spooled, and
counted as sent, in one transaction: after a kill at any moment the next boot goes on where this one was. From
there on the chunk is a record like any other, until the ground's archive acknowledges it. The file stays for
a while, so that the ground can have chunks again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from node.command_effects import CommandFailed
from node.pulse import Pulse
from node.recorder import Recorder
from telemetry.database import Database, StoreFull
from telemetry.dictionary.base import ArgumentCode
from telemetry.dictionary.codes import FailureCode
from telemetry.disk_room import free_bytes
from telemetry.durable_file import replace_file
from telemetry.packets import Packet, Product, ProductChunk, ProductPart, Severity
from telemetry.spool import Spool, SpoolRefused

_log = logging.getLogger(__name__)

CHUNK_BYTES = 16 * 1024
"""Size of a chunk, at most (assumed: an eighth of a second at 1 Mbit/s)."""
BATCH = 16
"""Chunks spooled in one transaction (assumed)."""
MAX_PRODUCTS = 16
MAX_BYTES = 64 << 20
"""What products may take on disk; the oldest that is sent gives way (assumed: four dumps of full size)."""
POLL_S = 1.0
"""How often room in the spool is looked for, s (assumed)."""

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS product (
        number INTEGER PRIMARY KEY AUTOINCREMENT, product TEXT NOT NULL UNIQUE, size INTEGER NOT NULL,
        head BLOB NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS product_due (
        number INTEGER PRIMARY KEY AUTOINCREMENT, product TEXT NOT NULL, head INTEGER NOT NULL,
        next INTEGER NOT NULL, last INTEGER NOT NULL)""",
)
_head_decoder = msgspec.msgpack.Decoder(Product)


@dataclass(frozen=True)
class _Due:
    """Chunks `next` to `last` of a product are to be sent, its head before them if it was not yet."""

    number: int
    head: Product
    with_head: bool
    next: int
    last: int


class Products:
    """Keeps products, and spools their chunks.

    Parameters
    ----------
    directory
        For their files; made when there is the first.
    boot
        Boot counter: names of products are never used again.
    database, spool, recorder
        Where chunks go, and reports.
    chunk_bytes
        Size of a chunk: what the link may have under way at once, or less.
    """

    def __init__(
        self,
        directory: Path,
        boot: int,
        *,
        database: Database,
        spool: Spool,
        recorder: Recorder,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._directory = directory
        self._boot = boot
        self._database = database
        self._spool = spool
        self._recorder = recorder
        self._chunk_bytes = chunk_bytes
        self._made = 0
        self._wake = asyncio.Event()
        self._changed = True
        """Whether products came or went since files were last looked at."""
        self.pulse = Pulse("products", self._wake.set)
        """Health of the task that spools chunks."""

    async def make(
        self, name: str, content: bytes, first_byte: int, parts: list[ProductPart]
    ) -> tuple[Product, Callable[[sqlite3.Connection], None]]:
        """Store a memory dump as a file; return its head, and what makes it a product, in a transaction.

        Raises
        ------
        CommandFailed
            Products that are not sent yet take up the room, or the disk has none.
        OSError
            It cannot be written.
        """
        await self._database.run(lambda c: self._make_room(c, len(content)))
        # Twice: a dump must not take the last room of the disk, which telemetry needs.
        need, free = 2 * len(content), free_bytes(self._directory.parent)
        if free < need:
            raise CommandFailed(FailureCode.NO_ROOM, f"{need} bytes of the disk are needed, {free} are free")
        self._made += 1
        head = Product(
            product=f"dump-{self._boot}-{self._made}",
            kind="memory_dump",
            name=name,
            first_byte=first_byte,
            parts=parts,
            size_bytes=len(content),
            chunk_bytes=self._chunk_bytes,
            sha256=hashlib.sha256(content).hexdigest(),
        )
        await asyncio.to_thread(self._write, head.product, content)

        def keep(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO product (product, size, head) VALUES (?, ?, ?)",
                (head.product, head.size_bytes, msgspec.msgpack.encode(head)),
            )
            self._send(connection, head, 0, None)

        return head, keep

    def _write(self, product: str, content: bytes) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        replace_file(self._directory / product, content)

    def resend(self, connection: sqlite3.Connection, product: str, first: int, last: int | None) -> None:
        """Have a product's head and some chunks sent again.

        Raises
        ------
        CommandFailed
            It is not kept, or has no such chunk.
        """
        head = self._head(connection, product)
        chunks = _chunks(head)
        if not first <= (chunks - 1 if last is None else last) < chunks:
            raise CommandFailed(
                ArgumentCode.BAD_ARGUMENT, f"product {product!r} has chunks 0 to {chunks - 1}"
            )
        self._send(connection, head, first, last)

    def delete(self, connection: sqlite3.Connection, product: str) -> None:
        """Drop a product; its file goes with the next look. Raises `CommandFailed` if it is not kept."""
        self._head(connection, product)
        self._drop(connection, product)

    def look(self) -> None:
        """Tell that something has changed."""
        self._changed = True
        self._wake.set()

    async def run(self) -> None:
        """Spool chunks until cancelled."""
        while True:
            self._wake.clear()
            self.pulse.beat()
            if self._changed:
                self._changed = False
                await self._remove_files()
            while await self._feed():
                self.pulse.beat()
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()

    @staticmethod
    def create(connection: sqlite3.Connection) -> None:
        """Create the tables where they are missing."""
        for statement in _SCHEMA:
            connection.execute(statement)

    async def _again(self, function: Callable[[sqlite3.Connection], None]) -> None:
        while True:
            try:
                await self._database.run(function)
            except (StoreFull, sqlite3.Error) as error:
                _log.error("products: %s", error)
                self.pulse.beat()
                await asyncio.sleep(POLL_S)
            else:
                return

    @staticmethod
    def _head(connection: sqlite3.Connection, product: str) -> Product:
        row = connection.execute("SELECT head FROM product WHERE product = ?", (product,)).fetchone()
        if row is None:
            kept = [name for (name,) in connection.execute("SELECT product FROM product ORDER BY number")]
            raise CommandFailed(
                FailureCode.UNKNOWN_PRODUCT, f"no product {product!r}; kept are {', '.join(kept) or 'none'}"
            )
        return _head_decoder.decode(row[0])

    def _send(self, connection: sqlite3.Connection, head: Product, first: int, last: int | None) -> None:
        end = _chunks(head) - 1 if last is None else last
        connection.execute(
            "INSERT INTO product_due (product, head, next, last) VALUES (?, 1, ?, ?)",
            (head.product, first, end),
        )

    @staticmethod
    def _drop(connection: sqlite3.Connection, product: str) -> None:
        for table in ("product", "product_due"):
            connection.execute(f"DELETE FROM {table} WHERE product = ?", (product,))  # noqa: S608 - two names

    def _make_room(self, connection: sqlite3.Connection, size: int) -> None:
        kept = connection.execute(
            "SELECT product, size, EXISTS (SELECT 1 FROM product_due d WHERE d.product = p.product) "
            "FROM product p ORDER BY number"
        ).fetchall()
        count, used = len(kept), sum(each for _, each, _ in kept)
        for product, each, due in kept:
            if count < MAX_PRODUCTS and used + size <= MAX_BYTES:
                return
            if not due:
                self._drop(connection, product)
                count, used = count - 1, used - each
        if count >= MAX_PRODUCTS or used + size > MAX_BYTES:
            raise CommandFailed(
                FailureCode.NO_ROOM, f"{count} products of {used} bytes are not sent yet: wait, or delete one"
            )

    async def _remove_files(self) -> None:
        """Remove the files of products that are not kept any more."""

        def names(connection: sqlite3.Connection) -> set[str]:
            return {name for (name,) in connection.execute("SELECT product FROM product")}

        def remove(kept: set[str]) -> None:
            # What is being written right now is of this boot, and not kept yet.
            mine = f"dump-{self._boot}-"
            for path in self._directory.iterdir() if self._directory.is_dir() else ():
                if path.name not in kept and not path.name.lstrip(".").startswith(mine):
                    path.unlink(missing_ok=True)

        try:
            kept = await self._database.run(names)
            await asyncio.to_thread(remove, kept)
        except (StoreFull, sqlite3.Error, OSError) as error:
            _log.error("files of products are not removed: %s", error)

    async def _feed(self) -> bool:
        """Spool some chunks; return whether there may be more, and room for them."""
        try:
            due = await self._database.run(_next_due)
        except (StoreFull, sqlite3.Error) as error:
            _log.error("products: %s", error)
            return False
        if due is None:
            return False
        try:
            packets = await asyncio.to_thread(self._read, due)
        except OSError as error:
            await self._lose(due.head.product, error)
            return True
        for some in (packets, packets[:1]):
            # Where there is no room for all, there may be for one.
            try:
                await self._database.run(partial(self._spool_some, due=due, packets=some))
            except SpoolRefused:
                continue
            except (StoreFull, sqlite3.Error) as error:
                _log.error("products: %s", error)
                return False
            return True
        return False

    def _read(self, due: _Due) -> list[Packet]:
        """Return what is to be sent next, in order."""
        head = due.head
        packets: list[Packet] = [head] if due.with_head else []
        with (self._directory / head.product).open("rb") as file:
            file.seek(due.next * head.chunk_bytes)
            for index in range(due.next, min(due.last + 1, due.next + BATCH)):
                data = file.read(head.chunk_bytes)
                if len(data) != min(head.chunk_bytes, head.size_bytes - index * head.chunk_bytes):
                    raise OSError(0, "cut short", file.name)
                packets.append(ProductChunk(product=head.product, index=index, data=data))
        return packets

    def _spool_some(self, connection: sqlite3.Connection, due: _Due, packets: list[Packet]) -> None:
        known = connection.execute(
            "SELECT head, next FROM product_due WHERE number = ?", (due.number,)
        ).fetchone()
        if known != (due.with_head, due.next):
            return  # deleted meanwhile
        now_ns = self._recorder.now_ns()
        for packet in packets:
            self._spool.append(connection, packet, now_ns)
        after = due.next + sum(isinstance(packet, ProductChunk) for packet in packets)
        if after > due.last:
            connection.execute("DELETE FROM product_due WHERE number = ?", (due.number,))
        else:
            connection.execute(
                "UPDATE product_due SET head = 0, next = ? WHERE number = ?", (after, due.number)
            )

    async def _lose(self, product: str, error: OSError) -> None:
        text = f"product {product} is lost, its file cannot be read: {error.strerror or error}"
        self._recorder.event(Severity.MEDIUM, "product.lost", text, {"product": product})
        await self._again(lambda c: self._drop(c, product))


def _chunks(head: Product) -> int:
    return -(-head.size_bytes // head.chunk_bytes)


def _next_due(connection: sqlite3.Connection) -> _Due | None:
    row = connection.execute(
        "SELECT d.number, p.head, d.head, d.next, d.last FROM product_due d JOIN product p USING (product) "
        "ORDER BY d.number LIMIT 1"
    ).fetchone()
    if row is None:
        return None
    return _Due(row[0], _head_decoder.decode(row[1]), bool(row[2]), row[3], row[4])
