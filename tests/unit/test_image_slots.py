"""Slots by command: what is refused, and that nothing it meets on the disk ends the node."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from node import state
from node.image_slots import ImageSlots, SwitchError
from node.inference.manifest import image_id, load_manifest
from node.job_runner import JobRunner
from node.jobs import JobQueue
from node.recorder import Recorder
from telemetry.certificate import NO_CERTIFICATE
from telemetry.database import Database
from telemetry.packets import Result
from telemetry.spool import Spool


class Config:
    """The sections that are read."""

    class model:
        images_dir = ""
        slot = "active"

    class fdir:
        repair_timeout_s = 5.0


def slots(images: Path, pinned: str = "active") -> ImageSlots:
    config: Any = Config()
    config.model.images_dir, config.model.slot = str(images), pinned
    nobody: Any = None
    return ImageSlots(config, "a", worker=nobody, database=nobody)


async def refused(of: ImageSlots, images: Path) -> dict[str, str]:
    """Return the codes by which each thing that can be asked is refused."""
    codes = {}
    for name, asked in (
        ("install", lambda: of.install(images / "x.tar")),
        ("switch", lambda: of.switch("a")),
    ):
        with pytest.raises(SwitchError) as caught:
            await asked()
        codes[name] = caught.value.code.value
    with pytest.raises(SwitchError) as caught:
        _ = of.before
    return {**codes, "before": caught.value.code.value}


async def test_a_damaged_file_of_the_active_slot_fails_the_command_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "active").write_bytes(b"\xff\x00")
    assert await refused(slots(tmp_path), tmp_path) == dict.fromkeys(
        ("install", "switch", "before"), "slot_unknown"
    )


async def test_what_cannot_be_done_now_is_told(tmp_path: Path) -> None:
    (tmp_path / "active").write_text("b\na\n", encoding="ascii")
    with pytest.raises(SwitchError, match="`switch_image` a first") as caught:
        await slots(tmp_path).install(tmp_path / "x.tar")
    assert caught.value.code == "slot_active"
    (tmp_path / "active").unlink()
    with pytest.raises(SwitchError, match="runs from slot a already") as caught:
        await slots(tmp_path).switch("a")
    assert caught.value.code == "slot_in_use"
    with pytest.raises(SwitchError, match="never switched"):
        _ = slots(tmp_path).before
    with pytest.raises(SwitchError, match=r"\[model\] slot = 'a'") as caught:
        await slots(tmp_path, "a").switch("b")
    assert caught.value.code == "slot_pinned"


class Worker:
    """A worker that was ready with an image."""

    def __init__(self, image: str | None) -> None:
        self.image_id = image
        self.released: list[Path | None] = []

    def release(self, image: Path | None = None) -> None:
        self.released.append(image)


@pytest.mark.parametrize("image", ["another", "same", None])
async def test_no_text_is_written_by_two_models(tiny_images: Path, tmp_path: Path, image: str | None) -> None:
    """Jobs that have begun end when the worker gets another image, and only then; others stay."""
    worker: Any = Worker(image_id(load_manifest(tiny_images / "b")) if image == "same" else image)
    database = await Database.open(tmp_path / "node.db")
    spool = Spool("n", 1, 1 << 20)
    jobs = JobQueue(spool)
    for create in (state.create, spool.create, jobs.create):
        await database.run(create)
    for job in ("begun", "parked", "waiting"):
        await database.run(lambda c, job=job: jobs.submit(c, job, "p", 9))  # type: ignore[misc]
    for job in ("begun", "parked"):
        block = Result(job=job, first=0, tokens=[1, 2], text=b"ab", certificate=NO_CERTIFICATE)
        await database.run(lambda c, job=job: jobs.activate(c, job))  # type: ignore[misc]
        await database.run(lambda c, block=block: jobs.store_block(c, block, 0))  # type: ignore[misc]
    await database.run(lambda c: jobs.park(c, "parked"))
    recorder = Recorder(database, spool, lambda: 0)
    runner = JobRunner(
        database, jobs, recorder, batch=lambda: 1, least_priority=lambda: 0, mission_ns=lambda: None,
        send=lambda _: True, on_fault=lambda *_: None,
    )  # fmt: skip
    config: Any = Config()
    config.model.images_dir = str(tiny_images)
    of = ImageSlots(config, "a", worker=worker, database=database)
    of.end_begun = runner.fail_begun
    writing = asyncio.create_task(recorder.run(), name="test.recorder")
    await of.use("b")
    ends = {
        job: await database.run(lambda c, job=job: jobs.get(c, job)) for job in ("begun", "parked", "waiting")
    }  # type: ignore[misc]
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await database.close()
    failed = "failed: the model image was changed" if image == "another" else None
    assert {job: found.finish for job, found in ends.items() if found is not None} == {
        "begun": failed,
        "parked": failed,
        "waiting": None,
    }
    assert worker.released == [tiny_images / "b"]
    assert of.slot == "b"
