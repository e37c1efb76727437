"""A model image on the disk: prove it whole, describe it. `node.inference.model` loads one.

`node.inference.builder` makes images; `node.inference.manifest` says what is in one.
"""

from __future__ import annotations

import hashlib
import mmap
from collections import defaultdict
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fdir.pages import PAGE_SIZE, page_digests
from node.inference import manifest as m
from telemetry.errors import PenumbraError

_REBUILD = "build the image again: `penumbra model build --force`"


class RoleInfo(msgspec.Struct, frozen=True):
    """What the tensors of one role take."""

    tensors: int
    bytes: int
    pages: int
    read: bool
    """Whether steps read them; otherwise only loading does."""
    by_row: bool
    """Whether a step reads some rows only."""


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is and what it takes."""

    directory: str
    image_id: str
    model: str
    gguf_sha256: str
    onnxruntime: str
    cpu: str
    format: int
    builder: int
    shape: m.GemmaShape
    files: dict[str, int]
    """Bytes of each file."""
    total_bytes: int
    mapped_bytes: int
    """What a loaded model maps, its checks included."""
    live_bytes: int
    """What every step of a checked model reads, and one scan hashes."""
    original_bytes: int
    """What only loading reads."""
    roles: dict[str, RoleInfo]
    """Mapped tensors by role."""


def verify_image(image_dir: Path) -> m.Manifest:
    """Prove an image whole: every byte of every file, and that it was built for this machine.

    Files are read as any program would read them, so what is proven is what loading will map.

    Parameters
    ----------
    image_dir
        Directory of the slot.

    Returns
    -------
    Its manifest.

    Raises
    ------
    PenumbraError
        A file is missing, cut short or damaged (the message names the first bad page, its byte offset and its
        tensor), or the image is of another format, CPU or ONNX Runtime.
    """
    manifest = m.load_manifest(image_dir)
    m.check_machine(manifest, image_dir, ort.__version__)
    for name, size in manifest.sizes.items():
        path = image_dir / name
        if not path.is_file():
            raise PenumbraError(f"{path}: no such file", _REBUILD)
        if path.stat().st_size != size:
            raise PenumbraError(f"{path}: {path.stat().st_size} bytes, {size} by the manifest", _REBUILD)
    for name, digest in manifest.sha256.items():
        if hashlib.sha256((image_dir / name).read_bytes()).hexdigest() != digest:
            raise PenumbraError(f"{image_dir / name}: damaged: its SHA-256 is not {digest}", _REBUILD)
    table = m.load_page_table(image_dir, manifest)
    _verify_pages(image_dir / m.WEIGHTS, table.pages, manifest)
    _verify_pages(image_dir / m.PARITY, table.parity, None)
    return manifest


def image_info(image_dir: Path) -> ImageInfo:
    """Describe an image from its manifest, without proving its files.

    Raises
    ------
    PenumbraError
        The manifest is missing or damaged.
    """
    manifest = m.load_manifest(image_dir)
    groups = defaultdict(list)
    for tensor in manifest.tensors:
        groups[tensor.role].append(tensor)
    sizes = manifest.sizes | {m.MANIFEST: (image_dir / m.MANIFEST).stat().st_size}
    return ImageInfo(
        directory=str(image_dir),
        image_id=m.image_id(manifest),
        model=manifest.model,
        gguf_sha256=manifest.gguf_sha256,
        onnxruntime=manifest.onnxruntime,
        cpu=manifest.cpu,
        format=manifest.format,
        builder=manifest.builder,
        shape=manifest.shape,
        files=sizes,
        total_bytes=sum(sizes.values()),
        mapped_bytes=sum(tensor.length for tensor in manifest.tensors),
        live_bytes=sum(tensor.length for tensor in manifest.tensors if tensor.read and not tensor.rows),
        original_bytes=sum(tensor.length for tensor in manifest.originals),
        roles={
            role: RoleInfo(
                tensors=len(tensors),
                bytes=sum(tensor.length for tensor in tensors),
                pages=sum(tensor.page_count for tensor in tensors),
                read=any(tensor.read for tensor in tensors),
                by_row=any(tensor.rows for tensor in tensors),
            )
            for role, tensors in sorted(groups.items())
        },
    )


def _verify_pages(path: Path, digests: NDArray[np.uint64], manifest: m.Manifest | None) -> None:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
        memoryview(mapping) as data,
    ):
        bad = np.flatnonzero(page_digests(data) != digests)
    if len(bad):
        page = int(bad[0])
        more = f"; {len(bad) - 1} more pages are damaged" if len(bad) > 1 else ""
        owner = f" of {_owner(manifest, page)}" if manifest else ""
        raise PenumbraError(
            f"{path}: page {page} (byte offset {page * PAGE_SIZE}){owner} is damaged{more}", _REBUILD
        )


def _owner(manifest: m.Manifest, page: int) -> str:
    for tensor in (*manifest.tensors, *manifest.originals):
        if tensor.first_page <= page < tensor.first_page + tensor.page_count:
            layer = "" if tensor.layer is None else f", layer {tensor.layer}"
            return f"tensor {tensor.name} (role {tensor.role}{layer})"
    return "no tensor"
