"""Slots as directories: filled, put in their place and copied so that no interruption spoils one."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.inference import manifest as m
from node.inference.image import verify_image
from telemetry.errors import PenumbraError


def copy_image(images: Path, source: m.Slot, slot: m.Slot, *, force: bool = False) -> Path:
    """Fill a slot with the image of the other one, which is proven first.

    Parameters
    ----------
    images
        Directory of the slots.
    source
        The slot to copy.
    slot
        The slot to fill.
    force
        Copy even if the slot holds that image by its manifest and the sizes of its files.

    Returns
    -------
    The slot's directory.

    Raises
    ------
    PenumbraError
        The source is damaged, or the directory cannot be written.
    """
    target = images / slot
    with exclusive(images):
        manifest = verify_image(images / source)
        if force or not holds(target, manifest):
            with new_slot(target) as work:
                for name in m.FILES:
                    shutil.copyfile(images / source / name, work / name)
                flush(work)
    return target


def flush(work: Path) -> None:
    """Bring all files to the disk: the golden copy must be there when the cached one is struck."""
    for path in (*work.iterdir(), work):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def holds(image: Path, manifest: m.Manifest) -> bool:
    """Tell whether a slot holds an image, by its manifest and the sizes of its files."""
    try:
        sizes = {name: (image / name).stat().st_size for name in manifest.sizes}
        return sizes == manifest.sizes and m.load_manifest(image) == manifest
    except (OSError, PenumbraError):
        return False


@contextmanager
def new_slot(target: Path) -> Iterator[Path]:
    """Give a directory to build in; it becomes the slot if nothing is raised, and is removed otherwise."""
    work = target.with_name(f".{target.name}.building")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        _replace(target, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(target: Path, work: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def exclusive(images: Path) -> Iterator[None]:
    """Hold the images directory, made if it is missing; what the system refuses becomes a `PenumbraError`."""
    try:
        images.mkdir(parents=True, exist_ok=True)
        with (images / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise PenumbraError(
            f"{error.filename or images}: cannot write the image: {error.strerror or error}",
            "the images directory must be writable, with about 8 times the size of the GGUF free",
        ) from error
