"""Level 3 of the recovery ladder: make the image whole that is to run, in a process of its own.

    python -m node.inference.mending --images DIR --slot a [--gguf PATH] [--refill]

It writes one JSON object to stdout: `node.image_repair.ImageRepair`, or ``{"what": ..., "mend": ...}`` with
exit code 2. `node.image_repair` starts it.

What is read is judged twice, as the page cache has it, which a worker would map, and as the disk does. Pages
are written where they lie: they were bad before, so an interruption leaves them bad, and found so. Other
files are replaced atomically.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import onnxruntime as ort

from fdir import erasure
from fdir.golden import read_golden
from fdir.pages import PAGE_SIZE, PageTable, page_digests
from fdir.parity import DATA_PAGES, ParityFile, group_count
from node.image_repair import ImageRepair
from node.inference import manifest as m
from node.inference.image import verify_image
from node.inference.image_process_main import answer
from node.inference.slot_files import copy_image, exclusive
from node.inference.slots import ACTIVE, active_slot, switch_slot
from telemetry.durable_file import replace_file
from telemetry.errors import PenumbraError

_CHUNK: Final = 1 << 20
"""Bytes read at once."""


@dataclass
class Mended:
    """What was written anew in a slot."""

    from_parity: int = 0
    from_other_slot: int = 0
    from_own: int = 0
    """Pages that the disk had right and the page cache had not, or the other way round."""
    parity_pages: int = 0
    files: list[str] = field(default_factory=list)

    @property
    def anything(self) -> bool:
        """Whether anything was bad."""
        return bool(
            self.from_parity or self.from_other_slot or self.from_own or self.parity_pages or self.files
        )


def mend_slot(images: Path, slot: m.Slot) -> Mended:
    """Make a slot whole, from its parity and from the other slot, as far as that holds the same.

    Parameters
    ----------
    images
        Directory of the slots.
    slot
        The slot to mend; the worker must not have it mapped.

    Returns
    -------
    What was written anew; the slot is proven whole.

    Raises
    ------
    PenumbraError
        It cannot be made whole, or is for another machine; what could be mended is.
    """
    image, other = images / slot, images / _other(slot)
    done = Mended()
    with exclusive(images):
        old = images / f".{slot}.old"
        if not image.exists() and old.exists():
            old.rename(image)  # whoever was replacing it was interrupted
        if not image.exists() and not other.exists():
            raise PenumbraError(f"{image}: no such slot, and no other one")
        image.mkdir(exist_ok=True)
        manifest = _mend_manifest(image, other, done)
        m.check_machine(manifest, image, ort.__version__)
        for name, digest in manifest.sha256.items():
            _mend_file(image, other, name, digest, done)
        table = m.load_page_table(image, manifest)
        _mend_weights(image, other, table, done)
        _mend_parity(image, other, table, done)
    verify_image(image)
    return done


def repair_slots(images: Path, active: m.Slot, gguf: Path | None) -> ImageRepair:
    """Mend the active slot, else make the other one active, else build the active one anew.

    Raises
    ------
    PenumbraError
        Nothing worked; it names each step and why it failed.
    """
    started = time.monotonic()
    notes: list[str] = []

    def result(method: str, slot: m.Slot, done: Mended) -> ImageRepair:
        return msgspec.convert(
            {
                "method": method, "slot": slot, "notes": notes, "files": done.files,
                "pages_from_parity": done.from_parity, "pages_from_other_slot": done.from_other_slot,
                "pages_from_own_file": done.from_own, "parity_pages": done.parity_pages,
                "took_s": time.monotonic() - started,
            },
            ImageRepair,
        )  # fmt: skip

    known = _known(images, active)
    for slot in (active, _other(active)):
        try:
            done = mend_slot(images, slot)
            _point(images, slot, switch=slot != active)
        except (PenumbraError, OSError) as error:
            notes.append(f"slot {slot} cannot be mended: {_what(error)}")
        else:
            method = "other_slot" if slot != active else "page_copy" if done.anything else "whole"
            return result(method, slot, done)
    try:
        _rebuild(images, active, gguf, known)
        _point(images, active, switch=False)
    except (PenumbraError, OSError) as error:
        notes.append(f"slot {active} cannot be built anew: {_what(error)}")
    else:
        return result("rebuilt", active, Mended())
    raise PenumbraError(
        f"{images}: no image can be made whole: {'; '.join(notes)}",
        "uplink the model file, or free the disk; then `penumbra model build --force`",
    )


def refill(images: Path, slot: m.Slot) -> ImageRepair:
    """Make a slot whole, if need be as a copy of the other one.

    Raises
    ------
    PenumbraError
        The other slot is damaged as well, or the disk does not take it.
    """
    started = time.monotonic()
    try:
        done = mend_slot(images, slot)
    except (PenumbraError, OSError):
        copy_image(images, _other(slot), slot, force=True)
        done = Mended(files=list(m.FILES))
    return ImageRepair(
        method="page_copy" if done.anything else "whole", slot=slot, files=tuple(done.files),
        pages_from_parity=done.from_parity, pages_from_other_slot=done.from_other_slot,
        pages_from_own_file=done.from_own, parity_pages=done.parity_pages,
        took_s=time.monotonic() - started,
    )  # fmt: skip


def _other(slot: m.Slot) -> m.Slot:
    return "b" if slot == "a" else "a"


def _what(error: Exception) -> str:
    return error.what if isinstance(error, PenumbraError) else str(error)


def _known(images: Path, active: m.Slot) -> m.Manifest | None:
    """Return what a manifest still tells of the image that was to run."""
    for slot in (active, _other(active)):
        with contextlib.suppress(PenumbraError, OSError):
            return m.load_manifest(images / slot)
    return None


def _rebuild(images: Path, slot: m.Slot, gguf: Path | None, known: m.Manifest | None) -> None:
    # The builder needs packages that a board may lack.
    try:
        from node.inference.builder import build_image  # noqa: PLC0415
        from node.inference.gguf_source import packaged_gguf  # noqa: PLC0415
    except ImportError as error:
        raise PenumbraError(f"{error.name} is not installed", "pip install 'penumbra-node[gemma]'") from None
    model = packaged_gguf(images.parent / "gguf") if gguf is None else gguf
    if known is not None and _sha256(model) != known.gguf_sha256:
        # Another model would answer with other texts, and nobody has asked for it.
        raise PenumbraError(
            f"{model}: is not the model file the image was built from ({known.model}, sha256 "
            f"{known.gguf_sha256[:16]})",
            "name that file in [fdir] model_file",
        )
    build_image(model, images, slot, force=True, context=None if known is None else known.shape.context)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _point(images: Path, slot: m.Slot, *, switch: bool) -> None:
    """Make a slot active, with `switch`; else only see to it that the file that tells is readable."""
    try:
        active_slot(images)
    except PenumbraError:
        (images / ACTIVE).unlink()
        switch = True
    if switch:
        switch_slot(images, slot)


def _mend_manifest(image: Path, other: Path, done: Mended) -> m.Manifest:
    path = image / m.MANIFEST
    mine = list(_contents(path))
    reason = PenumbraError(f"{path}: no such file")
    for content in (*mine, *_contents(other / m.MANIFEST)):
        try:
            found = m.decode_manifest(content, path)
        except PenumbraError as error:
            reason = error
            continue
        if [content, content] != mine:
            replace_file(path, content)
            done.files.append(m.MANIFEST)
        return found
    raise reason


def _mend_file(image: Path, other: Path, name: str, sha256: str, done: Mended) -> None:
    """Make a small file whole, in the page cache and on the disk."""
    mine = list(_contents(image / name))
    for content in (*mine, *_contents(other / name)):
        if hashlib.sha256(content).hexdigest() == sha256:
            if [content, content] != mine:
                replace_file(image / name, content)
                done.files.append(name)
            return
    raise PenumbraError(f"{image / name}: damaged, and {other} does not have it")


def _contents(path: Path) -> Iterator[bytes]:
    """Yield a file as the page cache has it, and as the disk has it."""
    with contextlib.suppress(OSError):
        yield path.read_bytes()
        size = path.stat().st_size
        yield read_golden(path, 0, max(PAGE_SIZE, -(-size // PAGE_SIZE) * PAGE_SIZE))[:size]


class _PagedFile:
    """A file judged and mended page by page.

    Parameters
    ----------
    path
        The file; made, or given its right length, if need be.
    digests
        uint64, one a page.
    """

    def __init__(self, path: Path, digests: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        self.path = path
        self._digests = digests
        size = len(digests) * PAGE_SIZE
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.fstat(self._file).st_size != size:
            os.ftruncate(self._file, size)

    def bad(self) -> list[int]:
        """Return the pages that the page cache or the disk has wrong."""
        wrong: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
        end = len(self._digests) * PAGE_SIZE
        for at in range(0, end, _CHUNK):
            length = min(_CHUNK, end - at)
            expected = self._digests[at // PAGE_SIZE : (at + length) // PAGE_SIZE]
            for content in (os.pread(self._file, length, at), read_golden(self.path, at, length)):
                found = page_digests(memoryview(content.ljust(length, b"\0")))
                wrong.append(np.flatnonzero(found != expected).astype(np.uint64) + np.uint64(at // PAGE_SIZE))
        return [int(page) for page in np.unique(np.concatenate(wrong))] if wrong else []

    def good(self, page: int, path: Path) -> bytes | None:
        """Return a page as a file has it, in the page cache or on the disk, if that is what it should be."""
        with contextlib.suppress(OSError):
            for content in (_cached(path, page), read_golden(path, page * PAGE_SIZE, PAGE_SIZE)):
                if page_digests(memoryview(content))[0] == self._digests[page]:
                    return content
        return None

    def take(self, page: int, content: bytes | None) -> bool:
        """Write a page, if there is one."""
        if content is not None:
            os.pwrite(self._file, content, page * PAGE_SIZE)
        return content is not None

    def close(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file)
        os.close(self._file)


def _cached(path: Path, page: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, PAGE_SIZE, page * PAGE_SIZE).ljust(PAGE_SIZE, b"\0")
    finally:
        os.close(descriptor)


def _mend_weights(image: Path, other: Path, table: PageTable, done: Mended) -> None:
    file = _PagedFile(image / m.WEIGHTS, table.pages)
    parity = ParityFile(image / m.PARITY, table)

    def own(page: int) -> bytes | None:
        return file.good(page, file.path)

    def from_other(page: int) -> bytes | None:
        return file.good(page, other / m.WEIGHTS)

    def from_parity(page: int) -> bytes | None:
        return parity.restore([page], lambda member: own(member) or b"").get(page)

    try:
        bad = file.bad()
        counts = []
        # Parity once more at the end: by then other pages of a group may be good again.
        for source in (own, from_parity, from_other, from_parity):
            before, bad = len(bad), [page for page in bad if not file.take(page, source(page))]
            counts.append(before - len(bad))
    finally:
        file.close()
    done.from_own += counts[0]
    done.from_parity += counts[1] + counts[3]
    done.from_other_slot += counts[2]
    if bad:
        raise PenumbraError(
            f"{image / m.WEIGHTS}: {len(bad)} pages, the first of them {bad[0]}, are damaged beyond parity, "
            "and the other slot does not have them"
        )


def _mend_parity(image: Path, other: Path, table: PageTable, done: Mended) -> None:
    """Make the parity whole; the weights are."""
    file = _PagedFile(image / m.PARITY, table.parity)
    weights = image / m.WEIGHTS
    groups = group_count(len(table.pages))
    try:
        for page in file.bad():
            content = file.good(page, file.path) or file.good(page, other / m.PARITY)
            if content is None:
                number, group = divmod(page, groups)
                members = range(group, len(table.pages), groups)
                data = [_cached(weights, member) for member in members]
                data += [bytes(PAGE_SIZE)] * (DATA_PAGES - len(data))
                blocks = [np.frombuffer(each, np.uint8) for each in data]
                content = erasure.parity(blocks)[number].tobytes()
            file.take(page, bytes(content))
            done.parity_pages += 1
    finally:
        file.close()


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(prog="penumbra-mending", description="Make the model image whole.")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--slot", choices=m.SLOTS, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--refill", action="store_true")
    parser.add_argument("--parent", type=int, help="end when this process does")
    args = parser.parse_args(argv)
    return answer(
        lambda: (
            refill(args.images, args.slot) if args.refill else repair_slots(args.images, args.slot, args.gguf)
        ),
        args.parent,
    )


if __name__ == "__main__":
    sys.exit(main())
