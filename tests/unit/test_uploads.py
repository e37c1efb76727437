"""Uploads on board: chunks in any order, over restarts; what is lost, foreign or struck is missing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import handled

from node import uploads
from node.command_effects import CommandFailed
from node.uploads import MAX_TABLE_BYTES, Upload, Uploads
from telemetry.commands import UploadBegin
from telemetry.database import Database
from telemetry.keys import Key, KeyRing
from telemetry.packets import UploadReport
from telemetry.signed import SignedError
from telemetry.upload import Chunk, encode_chunk

KEY = Key("g", b"k" * 32)
CHUNK = 256
CONTENT = random.Random(1).randbytes(9 * CHUNK + 17)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BEGIN = UploadBegin(kind="image", sha256=SHA256, size_bytes=len(CONTENT), chunk_bytes=CHUNK)


def chunk(index: int, *, content: bytes = CONTENT, data: bytes | None = None, node: str = "n") -> bytes:
    data = content[index * CHUNK : (index + 1) * CHUNK] if data is None else data
    whole = hashlib.sha256(content).digest()
    return encode_chunk(Chunk(node=node, sha256=whole, index=index, data=data), KEY)


def files(directory: Path) -> list[Path]:
    return list(directory.glob("upload-*"))


class Board:
    """Uploads on a database that outlives them."""

    def __init__(self, directory: Path, database: Database) -> None:
        self.database = database
        self.uploads = Uploads("n", KeyRing([KEY]), directory, directory / "images", database)

    async def begin(self, asked: UploadBegin = BEGIN) -> None:
        await self.database.run(lambda c: self.uploads.begin(c, asked))

    async def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.uploads.offer(payload)
            await asyncio.sleep(0)
        await handled(self.uploads._waiting)

    async def report(self) -> UploadReport:
        return await self.database.run(self.uploads.report)


@contextlib.asynccontextmanager
async def board(directory: Path) -> AsyncIterator[Board]:
    database = await Database.open(directory / "node.db")
    await database.run(uploads.create)
    made = Board(directory, database)
    task = asyncio.create_task(made.uploads.run(), name="test.uploads")
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await database.close()


async def test_chunks_in_any_order_make_the_whole(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        await on.begin()
        await on.send(*(chunk(index) for index in (9, 0, 4, 4, 3)))
        report = await on.report()
        assert (report.sha256, report.chunks, report.received) == (SHA256, 10, 4)
        assert report.missing == [(1, 2), (5, 8)]
        with pytest.raises(CommandFailed, match="6 of 10 chunks are missing") as failed:
            await on.uploads.find_complete(SHA256)
        assert failed.value.code == "incomplete"
        await on.send(*(chunk(index) for index in (8, 7, 6, 5, 2, 1)))
        upload = await on.uploads.find_complete(SHA256)
        await on.uploads.prove(upload)
        assert await on.uploads.content(upload) == CONTENT
        assert (await on.report()).refused == 0


async def test_what_is_not_of_the_open_upload_is_refused_and_counted(tmp_path: Path) -> None:
    other = CONTENT[::-1]
    async with board(tmp_path) as on:
        await on.send(chunk(0))  # none is open
        await on.begin()
        await on.send(
            chunk(0, content=other), chunk(10, data=b"x"), chunk(0, data=b"short"), chunk(9, data=b"x" * 18)
        )
        assert (await on.report()).received == 0
        for payload in (chunk(0, node="m"), chunk(0)[:-1], b"", chunk(0)[:-1] + b"\0"):
            with pytest.raises(SignedError):
                on.uploads.offer(payload)
        assert (await on.report()).refused == 9


async def test_an_upload_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        await on.begin()
        await on.send(*(chunk(index) for index in range(5)))
    async with board(tmp_path) as on:
        await on.begin()  # The same again is no error, and loses nothing.
        assert (await on.report()).missing == [(5, 9)]
        await on.send(*(chunk(index) for index in range(5, 10)))
        await on.uploads.prove(await on.uploads.find_complete(SHA256))


async def test_only_one_is_open_and_an_abort_removes_its_file(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        await on.begin()
        await on.send(chunk(0))
        another = UploadBegin(kind="fdir_table", sha256="0" * 64, size_bytes=9, chunk_bytes=256)
        with pytest.raises(CommandFailed, match=f"upload {SHA256} of kind image is open") as failed:
            await on.begin(another)
        assert failed.value.code == "upload_open"
        assert len(files(tmp_path)) == 1
        await on.database.run(on.uploads.abort)
        await on.uploads.sweep()
        assert not files(tmp_path)
        assert (await on.report()).sha256 == ""
        with pytest.raises(CommandFailed, match="no upload is open"):
            await on.database.run(on.uploads.abort)
        await on.begin(another)


async def test_chunks_struck_on_the_disk_are_missing_again(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        await on.begin()
        await on.send(*(chunk(index) for index in range(10)))
        upload = await on.uploads.find_complete(SHA256)
        with on.uploads.path(upload).open("r+b") as file:
            for at in (3 * CHUNK + 5, 9 * CHUNK):
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))
        with pytest.raises(CommandFailed, match="2 chunks were damaged on board, 3 the first") as failed:
            await on.uploads.prove(upload)
        assert failed.value.code == "damaged"
        assert failed.value.effect is not None
        await on.database.run(failed.value.effect)
        assert (await on.report()).missing == [(3, 3), (9, 9)]
        await on.send(chunk(3), chunk(9))
        await on.uploads.prove(upload)


@pytest.mark.parametrize("left", [None, 3 * CHUNK + 5])
async def test_a_file_that_is_gone_or_cut_short_is_sent_anew(tmp_path: Path, left: int | None) -> None:
    async with board(tmp_path) as on:
        await on.begin()
        await on.send(*(chunk(index) for index in range(10)))
        upload = await on.uploads.find_complete(SHA256)
        if left is None:
            on.uploads.path(upload).unlink()
        else:
            os.truncate(on.uploads.path(upload), left)
        with pytest.raises(CommandFailed) as failed:
            await on.uploads.prove(upload)
        assert failed.value.code == "damaged"
        assert failed.value.effect is not None
        await on.database.run(failed.value.effect)
        assert (await on.report()).missing == [(0 if left is None else 3, 9)]
        await on.send(*(chunk(index) for index in range(10)))
        await on.uploads.prove(upload)


async def test_content_that_is_not_what_was_announced_is_never_taken_over(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        await on.begin()
        await on.send(*(chunk(index) for index in range(9)), chunk(9, data=b"x" * 17))
        with pytest.raises(CommandFailed, match="is not what was meant") as failed:
            await on.uploads.prove(await on.uploads.find_complete(SHA256))
        assert failed.value.code == "wrong_content"
        with pytest.raises(CommandFailed, match="is open, not 000"):
            await on.uploads.find_complete("0" * 64)


async def test_what_has_no_room_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with board(tmp_path) as on:
        huge = UploadBegin(kind="image", sha256=SHA256, size_bytes=16 << 30, chunk_bytes=65536)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uploads.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 31 << 30})())
            with pytest.raises(CommandFailed, match="34359738368 bytes are needed") as failed:
                await on.begin(huge)
        assert failed.value.code == "no_room"
        table = UploadBegin(
            kind="fdir_table", sha256=SHA256, size_bytes=MAX_TABLE_BYTES + 1, chunk_bytes=65536
        )
        with pytest.raises(CommandFailed, match="more than 262144 bytes"):
            await on.begin(table)
        assert await on.database.run(uploads.current) is None


async def test_a_disk_that_takes_no_chunks_costs_these_chunks_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async with board(tmp_path) as on:
        await on.begin()
        with monkeypatch.context() as patch:
            patch.setattr(uploads, "_write", full)
            await on.send(chunk(0))
        assert ((await on.report()).received, (await on.report()).refused) == (0, 1)
        await on.send(chunk(0))
        assert (await on.report()).received == 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.sets(st.integers(0, 29), max_size=3))
def test_what_is_missing_is_what_was_never_sent(
    tmp_path_factory: pytest.TempPathFactory, sent: list[int], restarts: set[int]
) -> None:
    async def run() -> None:
        directory = tmp_path_factory.mktemp("upload")
        cuts = [0, *sorted(at for at in restarts if at < len(sent)), len(sent)]
        for begin, end in itertools.pairwise(cuts):
            async with board(directory) as on:
                await on.begin()
                await on.send(*(chunk(index) for index in sent[begin:end]))
                report = await on.report()
        missing = {index for first, last in report.missing for index in range(first, last + 1)}
        assert missing == set(range(10)) - set(sent)
        assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(report.missing))

    asyncio.run(run())


def test_the_last_chunk_is_as_long_as_what_is_left() -> None:
    assert Upload("", "image", 512, 256).chunks == 2
    assert [Upload("", "image", 513, 256).length(index) for index in range(3)] == [256, 256, 1]
