"""Telecommands about what is moved in pieces: dumps, products, uploads, image slots."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from telemetry.dictionary.base import Arguments, Hazard
from telemetry.dictionary.fdir import RegionName


class DumpMemory(Arguments, frozen=True, kw_only=True):
    """Send what a region of memory holds now, as a product. Its completion names the product."""

    name: ClassVar[str] = "dump_memory"
    hazard: ClassVar[Hazard] = Hazard.NONE

    region: RegionName
    first_byte: Annotated[int, Meta(ge=0, le=2**40, description="0 to 2^40")] = 0
    """Where to begin within the region."""
    size_bytes: Annotated[int, Meta(ge=1, le=16 << 20, description="1 to 16,777,216 byte")] = 1 << 20
    """Most bytes to send."""


ProductName = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z", description="1 to 64 of a-z, 0-9, '.', '_', '-'")
]


ChunkIndex = Annotated[int, Meta(ge=0, lt=2**32, description="0 to 2^32 - 1")]


class ResendProduct(Arguments, frozen=True, kw_only=True):
    """Send a product's head and some of its chunks once more: what the ground's archive lacks."""

    name: ClassVar[str] = "resend_product"
    hazard: ClassVar[Hazard] = Hazard.NONE

    product: ProductName
    first: ChunkIndex = 0
    last: ChunkIndex | None = None
    """Last chunk, included; None: to the end."""


class DeleteProduct(Arguments, frozen=True, kw_only=True):
    """Drop a product, and what of it was not sent yet. The ground has it, or does not want it."""

    name: ClassVar[str] = "delete_product"
    hazard: ClassVar[Hazard] = Hazard.NONE

    product: ProductName


Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 hexadecimal digits")]


MAX_CHUNK_BYTES = 64 * 1024
MAX_UPLOAD_BYTES = 16 << 30


class UploadBegin(Arguments, frozen=True, kw_only=True):
    """Open an upload, or go on with it if it is open. One is open at a time; it survives restarts."""

    name: ClassVar[str] = "upload_begin"
    hazard: ClassVar[Hazard] = Hazard.NONE

    kind: Literal["image", "fdir_table"]
    """`image`: a tar of the files of a model image; `fdir_table`: TOML, see docs/fdir-table.md."""
    sha256: Sha256
    """Of the whole; names the upload."""
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_UPLOAD_BYTES, description="1 to 2^34 byte")]
    chunk_bytes: Annotated[int, Meta(ge=256, le=MAX_CHUNK_BYTES, description="256 to 65,536 byte")]
    """Size of every chunk but the last."""


class UploadStatus(Arguments, frozen=True, kw_only=True):
    """Send which chunks of the open upload are missing."""

    name: ClassVar[str] = "upload_status"
    hazard: ClassVar[Hazard] = Hazard.NONE


class UploadAbort(Arguments, frozen=True, kw_only=True):
    """Drop the open upload."""

    name: ClassVar[str] = "upload_abort"
    hazard: ClassVar[Hazard] = Hazard.SERVICE


class UploadCommit(Arguments, frozen=True, kw_only=True):
    """Prove the open upload, and take it over. Nothing that is in use changes.

    An image goes into the slot that is not in use, whose own is gone with that; a table becomes the one that
    `load_fdir` calls `uplinked`. Chunks that the proof finds damaged on board are missing again, and can be
    sent anew.
    """

    name: ClassVar[str] = "upload_commit"
    hazard: ClassVar[Hazard] = Hazard.HAZARDOUS

    sha256: Sha256
    """The upload that is meant."""


class SwitchImage(Arguments, frozen=True, kw_only=True):
    """Run the worker from the other image slot, once the image in it is proven. Survives restarts.

    Jobs that have begun end as failed if the image is another one: no text is written by two models. If no
    worker comes up from it, the slot before is used again.
    """

    name: ClassVar[str] = "switch_image"
    hazard: ClassVar[Hazard] = Hazard.HAZARDOUS

    slot: Literal["a", "b"]


class RollbackImage(Arguments, frozen=True, kw_only=True):
    """Go back to the slot that was used before the last switch: `switch_image`, without arming."""

    name: ClassVar[str] = "rollback_image"
    hazard: ClassVar[Hazard] = Hazard.SERVICE
