"""Level 3: make the model image whole, from the other slot, or from the model file; in a process of its own.

The supervisor must not load the inference stack, so `node.inference.mending` does the work.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from node.image_process import run_image_process


class ImageRepair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was done to have a whole image."""

    method: Literal["whole", "page_copy", "other_slot", "rebuilt"]
    """`whole`: nothing was bad; `page_copy`: bad pages or files of the slot were written anew, from parity or
    the other slot; `other_slot`: the other one is active now; `rebuilt`: made anew from the model."""
    slot: Literal["a", "b"]
    """The slot to run from now on."""
    pages_from_parity: int = 0
    pages_from_other_slot: int = 0
    pages_from_own_file: int = 0
    """Pages that were bad in the page cache only, or on the disk only."""
    parity_pages: int = 0
    """Pages of the parity file written anew."""
    files: tuple[str, ...] = ()
    """Files written anew as a whole."""
    notes: tuple[str, ...] = ()
    """What was tried before without success, and why not."""
    took_s: float = 0.0


def repair_image(
    images: Path,
    active: Literal["a", "b"],
    *,
    gguf: Path | None = None,
    timeout_s: float = 600.0,
    cancel: threading.Event | None = None,
) -> ImageRepair:
    """Make the image whole that is to run, or find another; blocks, so call it in a thread.

    The worker must not run meanwhile. In this order: bad pages and files of the slot are written anew, from
    its parity or the other slot; else the other slot is made active, mended if need be; else the slot is
    built from the model file. Killed at any moment, it leaves slots that are whole or are found damaged.

    Parameters
    ----------
    images
        Directory of the slots.
    active
        The slot that runs.
    gguf
        The model file; None for the packaged one, kept in ``gguf`` beside the images directory.
    timeout_s
        Time it may take, s; then the process is killed.
    cancel
        Set it from another thread to give up: the process is killed.

    Raises
    ------
    PenumbraError
        Nothing worked; it names each step and why it failed.
    """
    model = [] if gguf is None else ["--gguf", str(gguf)]
    return _run(["--images", str(images), "--slot", active, *model], timeout_s, cancel)


def refill_slot(
    images: Path, slot: Literal["a", "b"], *, timeout_s: float = 600.0, cancel: threading.Event | None = None
) -> ImageRepair:
    """Make a slot whole that does not run, if need be as a copy of the other one; blocks.

    It reads and writes the size of an image, so call it when there is power, after `other_slot` or `rebuilt`.

    Raises
    ------
    PenumbraError
        The other slot is damaged, or the disk is full.
    """
    return _run(["--images", str(images), "--slot", slot, "--refill"], timeout_s, cancel)


def _run(arguments: Sequence[str], timeout_s: float, cancel: threading.Event | None) -> ImageRepair:
    return run_image_process(
        "image repair", "node.inference.mending", arguments, ImageRepair, timeout_s=timeout_s, cancel=cancel
    )
