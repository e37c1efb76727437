"""Level 3: make the model image whole, from the other slot, or from the model file; in a process of its own.

The supervisor must not load the inference stack, so `node.inference.mending` does the work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from telemetry.errors import PenumbraError

_POLL_S: Final = 0.05
"""How often the process, the time and `cancel` are looked at, s."""
_LOG_BYTES: Final = 2000
"""What is kept of what a process said that failed, bytes."""


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


class _Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    what: str
    mend: str


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
    command = [sys.executable, "-m", "node.inference.mending", "--parent", str(os.getpid()), *arguments]
    deadline_s = time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log)
        except OSError as error:
            raise PenumbraError(f"image repair cannot be started: {error.strerror}") from error
        try:
            while process.poll() is None:
                if cancel is not None and cancel.wait(_POLL_S):
                    raise PenumbraError("image repair was cancelled")
                if cancel is None:
                    time.sleep(_POLL_S)
                if time.monotonic() > deadline_s:
                    raise PenumbraError(
                        f"image repair took more than {timeout_s:g} s and was killed",
                        "give it more time, or verify the slots: `penumbra model verify`",
                    )
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        out.seek(0)
        answer = out.read()
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
        said = log.read().decode("utf-8", "replace")
    try:
        if process.returncode == 0:
            return msgspec.json.decode(answer, type=ImageRepair)
        failure = msgspec.json.decode(answer, type=_Failure)
    except msgspec.DecodeError:
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        raise PenumbraError(f"image repair ended with code {process.returncode}: {last[0]}") from None
    raise PenumbraError(failure.what, failure.mend)
