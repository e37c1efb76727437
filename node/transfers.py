"""Telecommands about what is moved up and down in pieces: dumps, products, uploads, images, FDIR tables."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from fdir.table import read_table
from node import state, uploads
from node.command_effects import CommandFailed, Done
from node.image_slots import ImageSlots, SwitchError
from node.inference.manifest import Slot
from node.long_commands import Progress
from node.memory_dump import DumpError, MemoryRegions
from node.products import Products
from node.uploads import Upload, Uploads
from telemetry import commands
from telemetry.commands import Arguments
from telemetry.dictionary.codes import FailureCode
from telemetry.errors import PenumbraError


class Transfers:
    """Takes and carries out these commands.

    Parameters
    ----------
    regions
        Memory that can be dumped.
    products, incoming
        What is on its way down, and up.
    slots
        Image slots.
    """

    def __init__(
        self, *, regions: MemoryRegions, products: Products, incoming: Uploads, slots: ImageSlots
    ) -> None:
        self._regions = regions
        self._products = products
        self._uploads = incoming
        self._slots = slots

    def take(self, connection: sqlite3.Connection, arguments: Arguments) -> Done | None:
        """Take the effect of a command in its transaction, or begin it; None if it is none of these.

        Raises
        ------
        CommandFailed
            It cannot be done.
        """
        match arguments:
            case commands.DumpMemory(region=region):
                if region not in self._regions.names:
                    known = ", ".join(self._regions.names)
                    raise CommandFailed(
                        FailureCode.UNKNOWN_REGION, f"no region {region!r}; there are {known}"
                    )
                return Done(later=True)
            case commands.ResendProduct(product=product, first=first, last=last):
                self._products.resend(connection, product, first, last)
            case commands.DeleteProduct(product=product):
                self._products.delete(connection, product)
            case commands.UploadBegin():
                self._uploads.begin(connection, arguments)
            case commands.UploadStatus():
                return Done(packet=self._uploads.report(connection))
            case commands.UploadAbort():
                self._uploads.abort(connection)
            case commands.UploadCommit(sha256=sha256):
                self._uploads.complete(connection, sha256)
                return Done(later=True)
            case commands.SwitchImage() | commands.RollbackImage():
                return Done(later=True)
            case _:
                return None
        return Done()

    def executed(self, arguments: Arguments) -> None:
        """Follow a command whose completion is stored."""
        match arguments:
            case commands.DumpMemory() | commands.ResendProduct() | commands.DeleteProduct():
                self._products.look()
            case commands.UploadAbort() | commands.UploadCommit():
                self._uploads.look()
            case _:
                pass

    async def work(self, arguments: Arguments, progress: Progress) -> Done:
        """Carry out a command that was begun. Raises `CommandFailed` and `OSError`."""
        match arguments:
            case commands.DumpMemory():
                return await self._dump(arguments)
            case commands.UploadCommit(sha256=sha256):
                return await self._commit(sha256, progress)
            case commands.SwitchImage(slot=slot):
                return await self._switch(slot)
            case commands.RollbackImage():
                return await self._switch(None)
            case _:
                raise ValueError(f"{arguments.name} is carried out at once")

    async def _dump(self, asked: commands.DumpMemory) -> Done:
        try:
            dump = await asyncio.to_thread(
                self._regions.read, asked.region, asked.first_byte, asked.size_bytes
            )
        except DumpError as error:
            raise CommandFailed(FailureCode.NOT_READABLE, str(error)) from None
        head, keep = await self._products.make(asked.region, dump.content, asked.first_byte, dump.parts)
        return Done(f"product {head.product} of {head.size_bytes} bytes", effect=keep)

    async def _commit(self, sha256: str, progress: Progress) -> Done:
        upload = await self._uploads.find_complete(sha256)
        await self._uploads.prove(upload)
        await progress("every chunk is proven")
        return await (self._install(upload) if upload.kind == "image" else self._keep_table(upload))

    async def _install(self, upload: Upload) -> Done:
        try:
            done = await self._slots.install(self._uploads.path(upload))
        except SwitchError as error:
            raise CommandFailed(error.code, str(error)) from None
        text = f"slot {done.slot} holds image {done.image_id} of {done.model}"
        return Done(text, effect=self._uploads.close)

    async def _keep_table(self, upload: Upload) -> Done:
        content = await self._uploads.content(upload)
        try:
            table = read_table(content, Path("uplinked table"))
        except PenumbraError as error:
            raise CommandFailed(FailureCode.TABLE_REFUSED, error.what) from None

        def keep(connection: sqlite3.Connection) -> None:
            state.keep_uplinked_table(connection, table.encode())
            self._uploads.close(connection)

        return Done(f"table {table.sha256} of {len(table.rows)} rows", effect=keep)

    async def _switch(self, slot: Slot | None) -> Done:
        """Switch to a slot; None: back to the one before."""
        try:
            done = await self._slots.switch(self._slots.before if slot is None else slot)
        except SwitchError as error:
            raise CommandFailed(error.code, str(error)) from None
        return Done(f"the worker runs image {done.image_id} of {done.model} from slot {done.slot}")


def create(connection: sqlite3.Connection) -> None:
    """Create the tables that commands use before their services run."""
    uploads.create(connection)
    Products.create(connection)
