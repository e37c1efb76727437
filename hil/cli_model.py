"""`penumbra model`: build, prove and describe model images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec
import typer

if TYPE_CHECKING:
    from node.inference.builder import Progress
    from node.inference.image import ImageInfo
    from node.inference.manifest import Slot

model_app = typer.Typer(help="Build, prove and describe model images.", no_args_is_help=True)


class Slots(StrEnum):
    """Which slots a command is about."""

    A = "a"
    B = "b"
    BOTH = "both"


class OneSlot(StrEnum):
    """A slot."""

    A = "a"
    B = "b"


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `penumbra model build` did."""

    images: list[ImageInfo]
    wall_s: float
    """Time the whole command took, s."""
    stage_s: dict[str, float]
    """Time each stage took, s; a stage that was not needed is absent."""


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `penumbra model verify` found: there is a report only if every image is whole."""

    images: list[ImageInfo]
    wall_s: float


class SwitchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `penumbra model switch` and `rollback` did."""

    before: str
    active: str
    image_id: str


class PackReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `penumbra model pack` wrote."""

    archive: str
    size_bytes: int
    sha256: str
    """Of the archive: what an upload of it is named by."""
    image_id: str


class InfoReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `penumbra model info` tells."""

    images: list[ImageInfo]


Images: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the images; by default $PENUMBRA_IMAGES, else penumbra/images in the user's cache."
    ),
]
Json: TypeAlias = Annotated[
    Path | None, typer.Option("--json", help="Also write the outcome to this file, as JSON.")
]
SlotOption: TypeAlias = Annotated[Slots, typer.Option(help="Slot of the image.")]
ActiveOption: TypeAlias = Annotated[
    Slots | None, typer.Option(help="Slot of the image; by default the active one.")
]


@model_app.command()
def build(  # noqa: PLR0917 - options of the command
    gguf: Annotated[
        Path | None, typer.Option(help="GGUF of a Gemma 3 text model; by default the packaged Gemma 3 270M.")
    ] = None,
    images: Images = None,
    slot: SlotOption = Slots.A,
    force: Annotated[bool, typer.Option(help="Build even if the slot is up to date.")] = False,
    context: Annotated[
        int | None,
        typer.Option(help="Positions a text may have; by default 4,096, or the model's own limit if less."),
    ] = None,
    json: Json = None,
) -> None:
    """Build the image of a model. A second slot is a proven copy of the first."""
    from node.inference.builder import build_image  # noqa: PLC0415
    from node.inference.gguf_source import packaged_gguf  # noqa: PLC0415
    from node.inference.slot_files import copy_image  # noqa: PLC0415

    started = time.monotonic()
    directory = _directory(images)
    first, *others = _slots(slot)
    with _progress_bar() as (progress, stage_s):
        progress("assemble", 0.0)
        model = gguf if gguf is not None else packaged_gguf(directory.parent / "gguf")
        build_image(model, directory, first, force=force, context=context, progress=progress)
        for other in others:
            progress("copy", 1.0)
            copy_image(directory, first, other, force=force)
        progress("done", 1.0)
    infos = _describe(directory, slot)
    report = BuildReport(images=infos, wall_s=time.monotonic() - started, stage_s=stage_s)
    for info in infos:
        typer.echo(f"{info.directory}: image {info.image_id}, {info.model}, {info.total_bytes / 1e6:.0f} MB")
    _write(json, report)


@model_app.command()
def switch(
    slot: Annotated[OneSlot, typer.Argument(help="Slot to fly.")], images: Images = None, json: Json = None
) -> None:
    """Make a slot the active one, once its image is proven. The node takes it when it next starts."""
    from node.inference.slots import switch_slot  # noqa: PLC0415

    before = switch_slot(_directory(images), slot.value)
    _tell_switch(_directory(images), before, json)


@model_app.command()
def rollback(images: Images = None, json: Json = None) -> None:
    """Go back to the slot that was active before the last switch, once its image is proven."""
    from node.inference.slots import active_slot  # noqa: PLC0415
    from node.inference.slots import rollback as go_back  # noqa: PLC0415

    before = active_slot(_directory(images))
    go_back(_directory(images))
    _tell_switch(_directory(images), before, json)


@model_app.command()
def verify(images: Images = None, slot: ActiveOption = None, json: Json = None) -> None:
    """Prove images whole: every byte on the disk, and that they were built for this machine."""
    from node.inference.image import verify_image  # noqa: PLC0415

    started = time.monotonic()
    directory = _directory(images)
    chosen = slot or _active(directory)
    for name in _slots(chosen):
        verify_image(directory / name)
        typer.echo(f"{directory / name}: whole")
    _write(json, VerifyReport(images=_describe(directory, chosen), wall_s=time.monotonic() - started))


@model_app.command()
def pack(
    archive: Annotated[Path, typer.Argument(help="Tar to write.")],
    images: Images = None,
    slot: Annotated[OneSlot | None, typer.Option(help="Slot to pack; the active one if not given.")] = None,
    json: Json = None,
) -> None:
    """Write an image into one file, for the way up."""
    from node.inference.image_tar import pack_image  # noqa: PLC0415
    from node.inference.manifest import image_id, load_manifest  # noqa: PLC0415

    directory = _directory(images)
    chosen = _active(directory).value if slot is None else slot.value
    pack_image(directory / chosen, archive)
    with archive.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report = PackReport(
        archive=str(archive),
        size_bytes=archive.stat().st_size,
        sha256=sha256,
        image_id=image_id(load_manifest(directory / chosen)),
    )
    typer.echo(f"{archive}: image {report.image_id} of slot {chosen}, {report.size_bytes / 1e6:.0f} MB")
    _write(json, report)


@model_app.command()
def info(images: Images = None, slot: ActiveOption = None, json: Json = None) -> None:
    """Describe images: what they were built from, and what each kind of tensor takes."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    directory = _directory(images)
    report = InfoReport(images=_describe(directory, slot or _active(directory)))
    console = Console()
    for image in report.images:
        table = Table(title=f"{image.directory}  image {image.image_id}", title_justify="left")
        for column in ("role", "tensors", "MB", "pages", "read by a step"):
            table.add_column(column, justify="left" if column == "role" else "right")
        for role, use in image.roles.items():
            read = "some rows" if use.by_row else "whole" if use.read else "no"
            table.add_row(role, str(use.tensors), f"{use.bytes / 1e6:.1f}", str(use.pages), read)
        console.print(table)
        console.print(
            f"{image.model}, GGUF {image.gguf_sha256[:16]}, ONNX Runtime {image.onnxruntime}, {image.cpu}\n"
            f"on disk {image.total_bytes / 1e6:.0f} MB, mapped {image.mapped_bytes / 1e6:.0f} MB, "
            f"read by every step {image.live_bytes / 1e6:.0f} MB, "
            f"read only while loading {image.original_bytes / 1e6:.0f} MB",
            highlight=False,
        )
    _write(json, report)


def _active(directory: Path) -> Slots:
    from node.inference.slots import active_slot  # noqa: PLC0415

    return Slots(active_slot(directory))


def _directory(images: Path | None) -> Path:
    from node.inference.manifest import default_images_dir  # noqa: PLC0415

    return images if images is not None else default_images_dir()


def _slots(slot: Slots) -> list[Slot]:
    choices: dict[Slots, list[Literal["a", "b"]]] = {Slots.A: ["a"], Slots.B: ["b"], Slots.BOTH: ["a", "b"]}
    return choices[slot]


def _describe(directory: Path, slot: Slots) -> list[ImageInfo]:
    from node.inference.image import image_info  # noqa: PLC0415

    return [image_info(directory / name) for name in _slots(slot)]


def _tell_switch(directory: Path, before: Slot, json: Path | None) -> None:
    from node.inference.image import image_info  # noqa: PLC0415
    from node.inference.slots import active_slot  # noqa: PLC0415

    active = active_slot(directory)
    image = image_info(directory / active)
    change = "was active before" if active == before else f"instead of {before}"
    typer.echo(f"{directory}: slot {active} is active, {change}; image {image.image_id}, {image.model}")
    _write(json, SwitchReport(before=before, active=active, image_id=image.image_id))


def _write(path: Path | None, report: msgspec.Struct) -> None:
    from telemetry.summary import write_json  # noqa: PLC0415

    if path is not None:
        write_json(path, report)


@contextmanager
def _progress_bar() -> Iterator[tuple[Progress, dict[str, float]]]:
    """Show progress; give the callback, and the seconds each stage took so far."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    stage_s: dict[str, float] = {}
    stage, since_s = "", time.monotonic()
    bar = Progress(TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn())
    with bar:
        task = bar.add_task("", total=1.0)

        def show(name: str, fraction: float) -> None:
            nonlocal stage, since_s
            if name != stage:
                now_s = time.monotonic()
                if stage:
                    stage_s[stage] = stage_s.get(stage, 0.0) + now_s - since_s
                stage, since_s = name, now_s
            bar.update(task, description=name, completed=fraction)

        yield show, stage_s
