"""Which of the two image slots flies: a file of one letter, replaced atomically.

``<images>/active`` holds ``a`` or ``b`` and, on a second line, the slot that was active before, if any.
Without the file slot ``a`` is active.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from node.inference import manifest as m
from telemetry.durable_file import replace_file
from telemetry.errors import PenumbraError

ACTIVE: Final = "active"
"""Name of the file in the images directory."""
_DEFAULT: Final[m.Slot] = "a"


def active_slot(images: Path) -> m.Slot:
    """Return the slot that is to fly.

    Raises
    ------
    PenumbraError
        The file names no slot.
    """
    return _read(images)[0]


def active_image(images: Path) -> Path:
    """Return the directory of the slot that is to fly.

    Raises
    ------
    PenumbraError
        The file names no slot.
    """
    return images / active_slot(images)


def slot_before(images: Path) -> m.Slot | None:
    """Return the slot that was active before the last switch, None if there was none.

    Raises
    ------
    PenumbraError
        The file names no slot.
    """
    _, *before = _read(images)
    return before[0] if before else None


def switch_slot(images: Path, slot: m.Slot) -> m.Slot:
    """Make a slot the active one, once its image is proven whole and built for this machine.

    A running node is not disturbed; it takes the new slot when it next starts.

    Parameters
    ----------
    images
        Directory of the slots.
    slot
        The slot to fly.

    Returns
    -------
    The slot that was active.

    Raises
    ------
    PenumbraError
        The slot's image is missing or damaged (nothing is changed then), or the file cannot be written.
    """
    # The node's supervisor reads which slot is active: it must not load ONNX Runtime for that.
    from node.inference.image import verify_image  # noqa: PLC0415

    if not (images / slot / m.MANIFEST).exists():
        raise PenumbraError(
            f"{images / slot} is not a model image", f"build it: `penumbra model build --slot {slot}`"
        )
    verify_image(images / slot)
    before = active_slot(images)
    if before != slot:
        _write(images, (slot, before))
    return before


def rollback(images: Path) -> m.Slot:
    """Go back to the slot that was active before the last switch, once its image is proven.

    Returns
    -------
    The slot that is active now.

    Raises
    ------
    PenumbraError
        There was no switch, or the image of the slot before is damaged (nothing is changed then).
    """
    before = slot_before(images)
    if before is None:
        raise PenumbraError(
            f"{images}: there is no slot to go back to: {active_slot(images)} was always active",
            "switch with `penumbra model switch`",
        )
    switch_slot(images, before)
    return before


def _read(images: Path) -> tuple[m.Slot, ...]:
    """Return the active slot and, if there was a switch, the one before it."""
    path = images / ACTIVE
    try:
        lines = path.read_bytes().split()
    except FileNotFoundError:
        return (_DEFAULT,)
    known: dict[bytes, m.Slot] = {b"a": "a", b"b": "b"}
    if not 1 <= len(lines) <= 2 or any(line not in known for line in lines):
        raise PenumbraError(
            f"{path}: damaged: it names no slot", "delete it and run `penumbra model switch a` (or b)"
        )
    return tuple(known[line] for line in lines)


def _write(images: Path, slots: tuple[m.Slot, ...]) -> None:
    path = images / ACTIVE
    try:
        replace_file(path, "".join(f"{slot}\n" for slot in slots).encode("ascii"))
    except OSError as error:
        raise PenumbraError(f"{path}: cannot be written: {error.strerror}") from error
