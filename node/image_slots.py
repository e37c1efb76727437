"""Which image slot the worker runs from, and all that changes it or fills the other one: one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from fdir.recovery import WorkerState
from node import state
from node.config import NodeConfig
from node.image_process import run_image_process
from node.inference.manifest import Slot, image_id, load_manifest
from node.inference.slots import active_slot, slot_before
from node.worker_service import WorkerService
from telemetry.database import Database, StoreFull
from telemetry.dictionary.codes import FailureCode
from telemetry.errors import PenumbraError

MODULE = "node.inference.install"
READY_MARGIN_S = 5.0
"""Time a worker of a new image has beyond its start limit, s (assumed)."""
POLL_S = 0.1


class Installed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a slot holds."""

    slot: Slot
    image_id: str
    model: str


class SwitchError(Exception):
    """A switch that was not made, or was taken back; `code` is that of the verification."""

    def __init__(self, code: FailureCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class ImageSlots:
    """The slots.

    Parameters
    ----------
    config
        Sections model, worker and fdir.
    slot
        Slot the worker runs from; None when there is none.
    worker, database
        Who runs the worker, where the slot is remembered.

    Attributes
    ----------
    slot
        Slot the worker runs from.
    lock
        Held by whoever reads or writes whole slots: level 3 of the FDIR, and commands.
    end_begun
        Ends the jobs that have begun, for the reason given.
    """

    def __init__(
        self, config: NodeConfig, slot: Slot | None, *, worker: WorkerService, database: Database
    ) -> None:
        self.slot: Slot = slot or "a"
        self.lock = asyncio.Lock()
        self.end_begun: Callable[[str], Awaitable[None]] = _nobody
        self._config = config
        self._worker = worker
        self._database = database

    @property
    def images(self) -> Path:
        """Directory of the slots."""
        return Path(self._config.model.images_dir)

    @property
    def other(self) -> Slot:
        """The slot the worker does not run from."""
        return "b" if self.slot == "a" else "a"

    async def use(self, slot: Slot) -> None:
        """Have the worker run from a slot from now on; its image is whole, and the worker was held.

        If it is another image than the last worker had, jobs that have begun end: no text is of two models.
        """
        if self._worker.image_id not in {None, self._identity(slot)}:
            await self.end_begun("the model image was changed")
        self.slot = slot
        with contextlib.suppress(StoreFull, sqlite3.Error):
            await self._database.run(lambda c: state.set_slot(c, slot))
        self._worker.release(self.images / slot)

    async def install(self, archive: Path) -> Installed:
        """Fill the slot that is not in use.

        Raises
        ------
        SwitchError
            The image is refused, or the slot is the one that the next boot would use. It is as it was then.
        """
        async with self.lock:
            if self._config.model.slot == "active" and self._active() != self.slot:
                text = f"slot {self.other} is the active one, though the worker runs from {self.slot}"
                raise SwitchError(FailureCode.SLOT_ACTIVE, f"{text}: `switch_image` {self.slot} first")
            try:
                return await self._run("installing the image", self.other, archive)
            except PenumbraError as error:
                raise SwitchError(FailureCode.IMAGE_REFUSED, error.what) from None

    async def switch(self, slot: Slot) -> Installed:
        """Have the worker run from a slot, for good.

        Raises
        ------
        SwitchError
            Its image is not whole, or no worker came up from it: then the slot before is used again.
        """
        if self._config.model.slot != "active":
            raise SwitchError(
                FailureCode.SLOT_PINNED, f"the configuration says [model] slot = {self._config.model.slot!r}"
            )
        async with self.lock:
            before = self.slot
            if slot == before == self._active():
                raise SwitchError(FailureCode.SLOT_IN_USE, f"the worker runs from slot {slot} already")
            try:
                done = await self._run("switching the image", slot)
            except PenumbraError as error:
                raise SwitchError(FailureCode.IMAGE_REFUSED, error.what) from None
            if slot == before:
                return done
            if not await self._worker.hold():
                self._worker.release()
                await self._mean(before)
                raise SwitchError(
                    FailureCode.NO_WORKER, "the worker does not end, so it stays with its image"
                )
            await self.use(slot)
            if await self._is_up():
                return done
            await self._worker.hold()
            await self._mean(before)
            await self.use(before)
            raise SwitchError(
                FailureCode.NO_WORKER, f"no worker came up from slot {slot}; slot {before} is used again"
            )

    async def _mean(self, slot: Slot) -> None:
        """Make a slot the active one again."""
        with contextlib.suppress(PenumbraError):
            # Damaged or not: it is where the worker came from, and the FDIR mends it.
            await self._run("switching the image back", slot)

    async def _is_up(self) -> bool:
        """Wait for a worker; where none is wanted now, that is no fault of the image."""
        deadline_s = time.monotonic() + self._config.worker.start_timeout_s + READY_MARGIN_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
            if not self._worker.wanted or self._worker.state is WorkerState.RUNNING:
                return True
        return False

    def _active(self) -> Slot:
        """Return the slot the next boot would use. Raises `SwitchError` if its file is damaged."""
        try:
            return active_slot(self.images)
        except PenumbraError as error:
            raise SwitchError(FailureCode.SLOT_UNKNOWN, error.what) from None

    @property
    def before(self) -> Slot:
        """The slot that was active before the last switch.

        Raises
        ------
        SwitchError
            There was no switch, or the file that names it is damaged.
        """
        try:
            before = slot_before(self.images)
        except PenumbraError as error:
            raise SwitchError(FailureCode.SLOT_UNKNOWN, error.what) from None
        if before is None:
            raise SwitchError(FailureCode.NO_SLOT_BEFORE, "the slot was never switched")
        return before

    def _identity(self, slot: Slot) -> str | None:
        try:
            return image_id(load_manifest(self.images / slot))
        except PenumbraError:
            return None

    async def _run(self, what: str, slot: Slot, archive: Path | None = None) -> Installed:
        cancel = threading.Event()
        fill = [] if archive is None else ["--archive", str(archive)]
        try:
            return await asyncio.to_thread(
                run_image_process,
                what,
                MODULE,
                ["--images", str(self.images), "--slot", slot, *fill],
                Installed,
                timeout_s=self._config.fdir.repair_timeout_s,
                cancel=cancel,
            )
        finally:
            # Also when the node stops: the thread ends with the process it waits for.
            cancel.set()


async def _nobody(_: str) -> None:
    pass
