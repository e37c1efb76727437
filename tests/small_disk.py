"""A real file system of a few megabytes, for tests of a full disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of so many bytes; skip the test where that is not allowed."""
    directory.mkdir()
    mounted = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted, root is needed: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["/bin/umount", "--lazy", str(directory)], check=True)


def fill(path: Path, leave_bytes: int = 0) -> None:
    """Write a file that takes all the disk has but `leave_bytes`, as somebody else's data would."""
    with path.open("wb", buffering=0) as file:
        disk = os.statvfs(path.parent)
        left = disk.f_bavail * disk.f_frsize - leave_bytes
        while left > 0:
            try:
                left -= file.write(bytes(min(left, 4096)))
            except OSError:
                return


def replace(directory: Path, pattern: str, contents: dict[str, bytes]) -> None:
    """Remove files, and write others."""
    for path in directory.glob(pattern):
        path.unlink()
    for name, content in contents.items():
        (directory / name).write_bytes(content)


def contents(directory: Path, pattern: str) -> dict[str, bytes]:
    """Return what files hold."""
    return {path.name: path.read_bytes() for path in directory.glob(pattern)}


def used_bytes(directory: Path, prefix: str) -> int:
    """Return what the files of a database take together."""
    return sum(path.stat().st_size for path in directory.glob(f"{prefix}*"))
