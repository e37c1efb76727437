"""What goes up and down in pieces, through a real broker, node and worker: dumps, images, FDIR tables."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from node_bench import NODE, Bench, config_text, open_bench

from fdir.table import PACKAGED
from hil.ground import GroundStation
from hil.link_faults import LinkFaults
from hil.link_proxy import LinkProxy
from hil.products import products
from hil.uploader import FIRST_ROUND, MAX_ROUND, Rounds, outcome_of, upload
from node.config import NodeConfig
from node.inference.builder import build_image
from node.inference.image import verify_image
from node.inference.image_tar import pack_image
from node.inference.manifest import image_id, load_manifest
from node.inference.slots import active_slot
from telemetry import commands
from telemetry.archive import Archive
from telemetry.commands import Arguments
from telemetry.errors import PenumbraError
from telemetry.packets import Event, FdirStatus, Result, Stage, Verification

CHUNK = 4096
SMALL = {
    "worker__positions": "64",
    "worker__batch": "2",
    "worker__seats": "2",
    "worker__start_timeout_s": "6.0",
    "fdir__other_slot_after": "50",
    "fdir__safe_after": "50",
}


class Site:
    """A node, and a ground station that commands it."""

    def __init__(self, bench: Bench, station: GroundStation, archive: Archive) -> None:
        self.bench = bench
        self.station = station
        self.archive = archive
        self.images = bench.directory / "images"

    async def execute(self, arguments: Arguments, *, arm: bool = False) -> Verification:
        if arm:
            args = msgspec.to_builtins(arguments)
            assert (await self.execute(commands.Arm(command=arguments.name, args=args))).ok
        (ticket,) = self.station.uplink.queue([arguments])
        return await outcome_of(ticket, 60.0)

    async def until(self, condition: Callable[[], bool], what: str, bound_s: float = 30.0) -> None:
        await self.bench.until(condition, what, bound_s)

    def events(self, name: str) -> list[Event]:
        return [event for _, event in self.archive.packets(NODE, Event) if event.name == name]

    async def run_job(self, job: str) -> list[Result]:
        assert (await self.execute(commands.Infer(job=job, prompt="hello", max_tokens=8))).ok
        await self.until(lambda: self.finish(job) is not None, f"the end of {job}")
        return self.archive.results(NODE)[job]

    def finish(self, job: str) -> str | None:
        blocks = self.archive.results(NODE).get(job, [])
        return blocks[-1].finish if blocks else None

    def completions(self, name: str) -> list[Verification]:
        reports = [v for _, v in self.archive.packets(NODE, Verification) if v.name == name]
        return [v for v in reports if v.stage is Stage.COMPLETED]


@contextlib.asynccontextmanager
async def open_site(directory: Path, **overrides: str) -> AsyncIterator[Site]:
    async with open_bench(directory, **overrides) as bench:
        bench.ack = False
        archive = Archive.open(directory / "ground.db")
        station = GroundStation(bench.url, NODE, archive, bench.ring, now_ns=time.time_ns)
        station.in_contact = True
        async with asyncio.TaskGroup() as group:
            running = group.create_task(station.run(), name="test.station")
            yield Site(bench, station, archive)
            running.cancel()
        archive.close()


@pytest.fixture
def other_image(tiny_gguf: Path, tmp_path: Path) -> Path:
    """The tiny model with another context: another image, which runs as well."""
    build_image(tiny_gguf, tmp_path / "other", "a", context=128)
    return tmp_path / "other" / "a"


def pack(image: Path) -> Path:
    archive = image.with_suffix(".tar")
    pack_image(image, archive)
    return archive


async def test_memory_comes_down_as_it_is(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        await site.bench.start()
        done = await site.execute(commands.DumpMemory(region="config"))
        assert (done.ok, done.reason.split(" of ")[0]) == (True, "product dump-1-1")
        whole = commands.DumpMemory(region="supervisor.code", size_bytes=1 << 20)
        assert (await site.execute(whole)).ok
        await site.until(
            lambda: [p.state for p in products(site.archive, NODE)] == ["whole", "whole"], "both products"
        )
        config, code = products(site.archive, NODE)
        loaded = NodeConfig.load(site.bench.config)
        assert config.content == msgspec.msgpack.encode(loaded, order="deterministic")
        assert code.content is not None
        assert len(code.content) == 1 << 20
        first = code.head.parts[0]
        held = Path(first.file).read_bytes()  # noqa: ASYNC240 - a test may wait
        assert code.content[:64] == held[first.offset : first.offset + 64]
        refused = await site.execute(commands.DumpMemory(region="heap"))
        assert refused.code == "unknown_region"
        assert "worker.weights" in refused.reason
        beyond = await site.execute(commands.DumpMemory(region="config", first_byte=1 << 30))
        assert (beyond.stage, beyond.code) == (Stage.COMPLETED, "not_readable")


async def test_an_image_goes_up_over_kills_and_cuts_flies_and_is_taken_back(
    tmp_path: Path, tiny_images: Path, other_image: Path
) -> None:
    async with open_site(tmp_path, **SMALL) as site:
        shutil.copytree(tiny_images, site.images)
        site.bench.real_worker = True
        await site.bench.start()
        before, after = (image_id(load_manifest(image)) for image in (site.images / "a", other_image))
        assert before != after
        (block, *_) = await site.run_job("first")
        assert block.certificate.image_id == before

        shares: list[float] = []
        going = asyncio.create_task(
            upload(
                site.station,
                pack(other_image),
                "image",
                chunk_bytes=CHUNK,
                say=lambda _, share: shares.append(share),
            ),
            name="test.upload",
        )
        await site.until(lambda: max(shares, default=0) > 0.2, "a fifth of the image")
        site.station.in_contact = False
        await asyncio.sleep(1.0)
        site.station.in_contact = True
        await site.until(lambda: max(shares) > 0.4, "two fifths of the image")
        await site.bench.kill()
        await site.bench.start()
        # Killed once more while the image is being installed: the next boot says so, the ground goes on.
        progress = lambda: [  # noqa: E731
            v
            for _, v in site.archive.packets(NODE, Verification)
            if v.name == "upload_commit" and v.stage is Stage.PROGRESS
        ]
        await site.until(lambda: bool(progress()), "every chunk to be proven", 60.0)
        await site.bench.kill()
        await site.bench.start()
        done = await going
        assert done.reason == f"slot b holds image {after} of {load_manifest(other_image).model}"
        await site.until(
            lambda: [v.code for v in site.completions("upload_commit")] == ["interrupted", "ok"],
            "both answers",
        )
        assert verify_image(site.images / "b") == load_manifest(other_image)
        assert active_slot(site.images) == "a"
        await site.until(lambda: not list((tmp_path / "state").glob("upload-*")), "its file to go")

        # Nothing that is hazardous without being armed.
        refused = await site.execute(commands.SwitchImage(slot="b"))
        assert refused.code == "not_armed"
        done = await site.execute(commands.SwitchImage(slot="b"), arm=True)
        assert (done.ok, done.code) == (True, "ok"), done
        assert active_slot(site.images) == "b"
        (block, *_) = await site.run_job("second")
        assert block.certificate.image_id == after
        # It outlives the node, and the way back needs no arming.
        await site.bench.kill()
        await site.bench.start()
        (block, *_) = await site.run_job("third")
        assert block.certificate.image_id == after
        assert (await site.execute(commands.SwitchImage(slot="b"), arm=True)).code == "slot_in_use"
        assert (await site.execute(commands.RollbackImage())).ok
        (block, *_) = await site.run_job("fourth")
        assert block.certificate.image_id == before


async def test_an_image_no_worker_runs_is_taken_back_and_a_damaged_one_not_taken_over(
    tmp_path: Path, tiny_images: Path, tiny_gguf: Path
) -> None:
    async with open_site(tmp_path, **{**SMALL, "worker__positions": "128"}) as site:
        shutil.copytree(tiny_images, site.images)
        site.bench.real_worker = True
        await site.bench.start()
        await site.run_job("first")
        # Fewer positions than the configuration asks for.
        build_image(tiny_gguf, tmp_path / "short", "a", context=64)
        await upload(site.station, pack(tmp_path / "short" / "a"), "image", chunk_bytes=CHUNK)
        done = await site.execute(commands.SwitchImage(slot="b"), arm=True)
        assert (done.ok, done.code) == (False, "no_worker"), done
        assert active_slot(site.images) == "a"
        await site.run_job("second")

        held = load_manifest(site.images / "b")
        weights = tmp_path / "short" / "a" / "weights.bin"
        with weights.open("r+b") as file:
            file.seek(5000)
            file.write(b"struck")
        with pytest.raises(PenumbraError, match=r"image_refused: the uplinked image: weights\.bin: page 1"):
            await upload(site.station, pack(tmp_path / "short" / "a"), "image", chunk_bytes=CHUNK)
        assert load_manifest(site.images / "b") == held
        # It is still open: whoever sent it has to say what becomes of it.
        with pytest.raises(PenumbraError, match="upload_open"):
            await upload(site.station, PACKAGED, "fdir_table")
        assert (await site.execute(commands.UploadAbort())).ok


async def test_a_table_goes_up_is_put_in_force_and_taken_back(tmp_path: Path) -> None:
    def status(site: Site) -> FdirStatus:
        return site.archive.packets(NODE, FdirStatus)[-1][1]

    async def sha256(site: Site) -> str:
        count = len(site.archive.packets(NODE, FdirStatus))
        assert (await site.execute(commands.QueryFdir())).ok
        await site.until(lambda: len(site.archive.packets(NODE, FdirStatus)) > count, "the status")
        return status(site).table_sha256

    text = PACKAGED.read_text(encoding="utf-8")
    changed = tmp_path / "changed.toml"
    changed.write_text(text.replace("severity = 2", "severity = 3", 1), encoding="utf-8")
    assert changed.read_text(encoding="utf-8") != text
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text.replace("severity = 2", "severity = 9", 1), encoding="utf-8")
    async with open_site(tmp_path) as site:
        await site.bench.start()
        packaged = await sha256(site)
        none = await site.execute(commands.LoadFdir(source="uplinked"))
        assert (none.code, none.reason) == ("no_table", "there is no uplinked table on board")
        with pytest.raises(PenumbraError, match="table_refused: uplinked table: row "):
            await upload(site.station, wrong, "fdir_table")
        assert (await site.execute(commands.UploadAbort())).ok
        done = await upload(site.station, changed, "fdir_table", chunk_bytes=1024)
        assert await sha256(site) == packaged
        assert (await site.execute(commands.LoadFdir(source="uplinked"))).ok
        in_force = await sha256(site)
        assert in_force in done.reason
        assert in_force != packaged
        await site.bench.kill()
        await site.bench.start()
        assert await sha256(site) == in_force
        assert (await site.execute(commands.LoadFdir(source="previous"))).ok
        assert await sha256(site) == packaged
        assert (await site.execute(commands.LoadFdir(source="previous"))).ok
        assert await sha256(site) == in_force
        assert (await site.execute(commands.LoadFdir())).ok
        await site.bench.kill()
        await site.bench.start()
        assert await sha256(site) == packaged


async def test_an_upload_over_a_slow_link_does_not_starve_what_keeps_the_link_up(tmp_path: Path) -> None:
    # The content is no image: what matters here is how it comes up.
    junk = tmp_path / "junk.tar"
    junk.write_bytes(random.Random(3).randbytes(300_000))
    async with open_site(tmp_path) as site, LinkProxy(int(site.bench.url.rpartition(":")[2])) as proxy:
        await proxy.open()
        proxy.faults = LinkFaults(to_node_bit_s=400e3, to_ground_bit_s=400e3)
        site.bench.config.write_text(config_text(site.bench.url, link__url=f'"{proxy.url}"'))
        await site.bench.start()
        started_s = time.monotonic()
        with pytest.raises(PenumbraError, match="image_refused: no tar"):
            await upload(site.station, junk, "image")
        assert proxy.counts.connections == 1
        # 6 s if the link did nothing else.
        assert time.monotonic() - started_s > 6


def test_rounds_grow_to_what_fits_and_shrink_at_once() -> None:
    rounds = Rounds()
    taken = []
    for _ in range(20):  # 40 chunks a second, and 0.2 s for the answer
        taken.append(rounds.chunks)
        rounds.took(rounds.chunks, rounds.chunks / 40 + 0.2)
    assert taken[0] == FIRST_ROUND
    assert all(chunks / 40 < 2 for chunks in taken)
    assert 25 <= taken[-1] <= 40
    rounds.took(rounds.chunks, 60.0)  # The contact ended meanwhile.
    assert rounds.chunks <= 10
    for _ in range(20):
        rounds.took(rounds.chunks, 0.0)
    assert rounds.chunks == MAX_ROUND
    for _ in range(20):
        rounds.took(rounds.chunks, 1e6)
    assert rounds.chunks == 1
