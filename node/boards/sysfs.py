"""Reading sysfs: files that may be missing, forbidden, garbage, or gone between two reads.

No read raises. What could not be read is None, and the reason is kept for `penumbra node --probe`: a value
that is unknown is never taken as 0.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DENIED: Final = {errno.EACCES, errno.EPERM}
LONGEST: Final = 65_536
"""Bytes read of a file at most: no file here is longer."""


@dataclass(frozen=True)
class Trouble:
    """A file that gave no value."""

    path: Path
    why: str
    """`missing`, `denied`, `garbage` with what was there, or what the kernel said."""

    @property
    def denied(self) -> bool:
        """Whether a permission is all that is missing."""
        return self.why == "denied"


class Sysfs:
    """Files under a root, `/` on a board.

    Parameters
    ----------
    root
        Directory that stands for `/`: tests and recordings have their own trees.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.troubles: dict[Path, Trouble] = {}
        """Files that gave no value when last read."""

    def path(self, name: str) -> Path:
        """Return the path of an absolute name under the root."""
        return self.root / name.lstrip("/")

    def glob(self, pattern: str) -> list[Path]:
        """Return the paths that match, sorted; none when a directory cannot be listed."""
        try:
            return sorted(self.root.glob(pattern.lstrip("/")))
        except OSError:
            return []

    def text(self, path: Path) -> str | None:
        """Return the text of a file without trailing white space or NUL."""
        try:
            with path.open("rb") as file:
                raw = file.read(LONGEST)
        except OSError as error:
            self._note(path, _why(error))
            return None
        self.troubles.pop(path, None)
        return raw.decode(errors="replace").rstrip("\0\n\r\t ")

    def number(self, path: Path) -> int | None:
        """Return the integer in a file."""
        text = self.text(path)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            self._note(path, f"garbage: {text[:40]!r}")
            return None

    def write(self, path: Path, text: str) -> Trouble | None:
        """Write a file; return what was wrong, None when it was written."""
        try:
            path.write_text(text)
        except OSError as error:
            trouble = Trouble(path, _why(error))
            self.troubles[path] = trouble
            return trouble
        return None

    def _note(self, path: Path, why: str) -> None:
        self.troubles[path] = Trouble(path, why)


def _why(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "missing"
    if error.errno in DENIED:
        return "denied"
    return error.strerror or type(error).__name__
