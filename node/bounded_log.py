"""A log file that another process appends to, kept short.

It must have been opened for appending: then what is written next goes to the new end.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)

MAX_BYTES = 256 << 10
"""Size at which a log is cut (assumed: thousands of lines, a hundredth of the smallest disk in use)."""
LOOK_S = 1.0
"""How often its size is looked at, s (assumed)."""


def cut(path: Path, max_bytes: int = MAX_BYTES) -> bool:
    """Keep the latest lines, half of `max_bytes` at most, of a file that is longer; return whether it was.

    Lines that are written meanwhile may be lost. Raises `OSError`.
    """
    size = path.stat().st_size
    if size <= max_bytes:
        return False
    with path.open("rb") as file:
        file.seek(size - max_bytes // 2)
        latest = file.read(max_bytes // 2)
    # The room first: the disk may be full.
    os.truncate(path, 0)
    with path.open("ab") as file:
        file.write(latest[latest.find(b"\n") + 1 :])
    return True


async def keep(path: Path) -> None:
    """Keep a log short until cancelled."""
    while True:
        try:
            await asyncio.to_thread(cut, path)
        except OSError as error:
            _log.warning("%s cannot be cut: %s", path, error)
        await asyncio.sleep(LOOK_S)
