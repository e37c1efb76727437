"""Level 3: make the model image whole, from the other slot, or from the model file; in a process of its own.

The supervisor must not load the inference stack, so `node.inference.mending` does the work.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import msgspec


class ImageRepair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was done to have a whole image."""

    method: Literal["whole", "page_copy", "other_slot", "rebuilt"]
    """`whole`: nothing was bad; `page_copy`: bad pages or files of the slot were written anew, from its parity or
    from the other slot; `other_slot`: the other slot is active now; `rebuilt`: made anew from the model file."""
    slot: Literal["a", "b"]
    """The slot to run from now on."""
    pages_from_parity: int = 0
    pages_from_other_slot: int = 0
    parity_pages: int = 0
    """Pages of the parity file computed anew."""
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

    The worker must not run meanwhile. In this order: bad pages and files of the slot are written anew from its
    parity or the other slot; else the other slot is made active, if it is whole; else the slot is built from
    the model file. Killed at any moment, it leaves slots that are whole or are found damaged.

    Parameters
    ----------
    images
        Directory of the slots.
    active
        The slot that runs.
    gguf
        The model file; None for the packaged one.
    timeout_s
        Time it may take, s; then the process is killed.
    cancel
        Set it from another thread to give up: the process is killed.

    Raises
    ------
    PenumbraError
        Nothing worked; it names each step and why it failed.
    """
    raise NotImplementedError


def refill_slot(
    images: Path, slot: Literal["a", "b"], *, timeout_s: float = 600.0, cancel: threading.Event | None = None
) -> None:
    """Fill a slot with the image of the other one, so that there are two again; blocks.

    Raises
    ------
    PenumbraError
        The other slot is damaged, or the disk is full.
    """
    raise NotImplementedError
