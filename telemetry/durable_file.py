"""Files that are replaced as a whole, and are on the disk when that is done."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in the place of a file, or make it.

    An interruption at any moment leaves the old or the new. What is not done lies beside it, ``.<name>.new``;
    where the disk is full, it is removed.

    Raises
    ------
    OSError
        The directory is missing or cannot be written, or the disk is full.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        # Half a file would hold the last room of a full disk.
        new.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
