"""A model image as one file for the way up: a tar of its files, the same bytes for the same image."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from node.inference import manifest as m
from telemetry.errors import PenumbraError


def pack_image(image: Path, archive: Path) -> None:
    """Write the files of an image into a tar.

    Raises
    ------
    PenumbraError
        A file is missing, or the tar cannot be written.
    """
    m.load_manifest(image)
    try:
        with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in m.FILES:
                info = tarfile.TarInfo(name)
                info.size = (image / name).stat().st_size
                with (image / name).open("rb") as file:
                    tar.addfile(info, file)
    except OSError as error:
        raise PenumbraError(f"{error.filename or archive}: {error.strerror}") from error


def unpack_image(archive: Path, directory: Path) -> None:
    """Take the files of an image out of a tar, and nothing else. Whether they are whole is not looked at.

    Raises
    ------
    PenumbraError
        It is no tar, or holds anything but the files of an image, each once.
    """
    seen: set[str] = set()
    try:
        with tarfile.open(archive, "r:") as tar:
            for info in tar:
                if info.name not in m.FILES or info.name in seen or not info.isfile():
                    raise PenumbraError(
                        f"the archive holds {info.name[:100]!r}; an image is {', '.join(m.FILES)}, each once",
                        "pack it with `penumbra model pack`",
                    )
                seen.add(info.name)
                source = tar.extractfile(info)
                if source is None:
                    raise PenumbraError(f"the archive holds no bytes of {info.name}")
                with source, (directory / info.name).open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except tarfile.TarError as error:
        raise PenumbraError(f"no tar: {error}", "pack it with `penumbra model pack`") from error
    if missing := [name for name in m.FILES if name not in seen]:
        raise PenumbraError(f"the archive lacks {', '.join(missing)}")
