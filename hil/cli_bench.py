"""`penumbra bench` and `penumbra calibrate`: performance figures, each measured beside its peers."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    import msgspec

    from hil.calibrate import Point


class BoardKind(StrEnum):
    """Boards there are drivers for."""

    SIM = "sim"
    X86 = "x86"
    JETSON = "jetson"


bench_app = typer.Typer(help="Performance figures, each measured beside its peers.", no_args_is_help=True)

Images: TypeAlias = Annotated[
    Path | None, typer.Option(help="Directory of model images; the active slot is measured.")
]
Gguf: TypeAlias = Annotated[
    Path | None, typer.Option(help="GGUF the image was built from; by default the packaged Gemma 3 270M.")
]
Json: TypeAlias = Annotated[Path | None, typer.Option("--json", help="Write the result here, as JSON.")]
Markdown: TypeAlias = Annotated[Path | None, typer.Option(help="Write the result here, as Markdown.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, max=256, help="Threads of each contender; all cores if not given.")
]
Peers: TypeAlias = Annotated[bool, typer.Option(help="Measure llama.cpp beside (extra `peers`).")]


@bench_app.command()
def inference(
    images: Images = None,
    gguf: Gguf = None,
    json_path: Json = None,
    markdown: Markdown = None,
    runs: Annotated[int | None, typer.Option(min=1, max=100, help="Rounds; 7 if not given.")] = None,
    threads: Threads = None,
    quick: Annotated[bool, typer.Option(help="A look of some minutes; not for quoting.")] = False,
    peers: Peers = True,
) -> None:
    """Decode and prefill with protection off, on and with compute checks, beside llama.cpp."""
    image, source = _model(images, gguf, peers)
    from hil.bench import render
    from hil.bench.inference import Plan, run_inference

    plan = Plan.quick() if quick else Plan()
    if runs is not None:
        plan = replace(plan, runs=runs)
    with _status() as say:
        result = run_inference(
            image, source, plan, threads=threads or _cores(), peers=peers, quick=quick,
            progress=lambda text, fraction: say(text),
        )  # fmt: skip
    _leave(result, render.inference(result, _command()), json_path, markdown)


@bench_app.command()
def perplexity(
    images: Images = None,
    gguf: Gguf = None,
    json_path: Json = None,
    markdown: Markdown = None,
    tokens: Annotated[int, typer.Option(min=64, max=4000, help="Tokens of the fixed text.")] = 4000,
    threads: Threads = None,
    peers: Peers = True,
) -> None:
    """Judge the image, a float32 reference and llama.cpp by one fixed English text."""
    image, source = _model(images, gguf, peers)
    from hil.bench import render
    from hil.bench.perplexity import run_perplexity

    with _status() as say:
        say("reading the text")
        result = run_perplexity(image, source, threads=threads or _cores(), peers=peers, tokens=tokens)
    _leave(result, render.perplexity(result, _command()), json_path, markdown)


@bench_app.command()
def tokens(
    strings: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="Strings to generate, beside pieces and corpus.")
    ] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Strings and corpus follow from it.")] = 1,
    gguf: Gguf = None,
    json_path: Json = None,
    markdown: Markdown = None,
) -> None:
    """Hold our token ids against those of llama.cpp; exit code 1 when a difference is unexplained."""
    source = _source(gguf)
    from hil.bench import render
    from hil.bench.tokens import run_tokens

    with _status() as say:
        result = run_tokens(source, strings=strings, seed=seed, progress=say)
    _leave(result, render.tokens(result, _command()), json_path, markdown)
    if result.unexplained:
        raise typer.Exit(1)


@bench_app.command()
def ceiling(
    images: Images = None,
    json_path: Json = None,
    markdown: Markdown = None,
    threads: Threads = None,
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Caps in a row, eight seconds each.")] = 30,
) -> None:
    """How well the governor holds a cap that changes, on a real worker of the sim board."""
    from hil.bench import render
    from hil.bench.ceiling import bench_ceiling
    from node.inference.manifest import default_images_dir
    from node.inference.slots import active_image

    image = active_image(images if images is not None else default_images_dir())
    with _status() as say:
        result = bench_ceiling(image, threads=threads or _cores(), steps=steps, progress=say)
    _leave(result, render.ceiling(result, _command()), json_path, markdown)


@bench_app.command()
def link(
    json_path: Json = None,
    markdown: Markdown = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds of each rate; the pass is one.")] = 7,
) -> None:
    """Codec, spool, and spool to archive through a real mosquitto, beside the bare client; and a pass."""
    from hil.bench import render
    from hil.bench.link import bench_link

    command = _command()
    with _status() as say:
        result = bench_link(rounds=rounds, command=command, progress=say)
    _leave(result, render.link(result, command), json_path, markdown)


def calibrate(
    images: Images = None,
    board: Annotated[BoardKind, typer.Option(help="Board driver.")] = BoardKind.SIM,
    config: Annotated[
        Path | None, typer.Option(help="Node configuration whose [board] table is taken instead.")
    ] = None,
    json_path: Json = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.5, max=600, help="Time for each point, s.")] = 5.0,
    power_mode: Annotated[
        list[str] | None, typer.Option(help="Power mode to measure in, by name. May be repeated.")
    ] = None,
    checked: Annotated[bool, typer.Option(help="With compute checks.")] = False,
) -> None:
    """Measure tokens/s, CPU share, watts and heat of each operating point here, through a real worker."""
    from hil.bench import render
    from hil.calibrate import calibrate as measure
    from node.boards import BoardSettings
    from node.config import NodeConfig
    from node.inference.manifest import default_images_dir
    from node.inference.slots import active_image

    settings = BoardSettings(kind=board.value) if config is None else NodeConfig.load(config).board
    image = active_image(images if images is not None else default_images_dir())
    with _status() as say:

        def before(point: Point) -> None:
            mode = "" if point.power_mode is None else f", mode {point.power_mode}"
            say(f"{point.threads} threads, {point.batch} together, duty {point.duty:g}{mode}")

        result = measure(
            image, board=settings, threads=threads or _cores(), seconds=seconds,
            power_modes=power_mode or (), checked=checked, progress=before,
        )  # fmt: skip
    text = render.calibration(result)
    if not result.board_measures:
        text += f"\nBoard {result.board} computes its draw from CPU time: it measures no watts.\n"
    _leave(result, text, json_path, None)


def _model(images: Path | None, gguf: Path | None, peers: bool) -> tuple[Path, Path]:
    """Return the active image and the file it was built from.

    Raises
    ------
    PenumbraError
        There is no image, or it was built from another file; or the peer is wanted and not installed.
    """
    from hil.bench.llama import require_peer
    from node.inference.manifest import default_images_dir, load_manifest
    from node.inference.slots import active_image
    from telemetry.errors import PenumbraError

    if peers:
        require_peer()
    directory = images if images is not None else default_images_dir()
    image = active_image(directory)
    manifest = load_manifest(image)
    source = _source(gguf)
    from node.inference.gguf_file import GgufFile

    if GgufFile(source).sha256() != manifest.gguf_sha256:
        raise PenumbraError(
            f"{image} was not built from {source}",
            f"give the GGUF with SHA-256 {manifest.gguf_sha256[:16]}... with --gguf",
        )
    return image, source


def _source(gguf: Path | None) -> Path:
    """Return the GGUF that is given, or the packaged one.

    Raises
    ------
    PenumbraError
        It cannot be read: the extra `gemma` is not installed.
    """
    from node.inference.manifest import default_images_dir
    from telemetry.errors import PenumbraError

    try:
        from node.inference.gguf_source import packaged_gguf
    except ImportError as error:
        raise PenumbraError(f"a GGUF cannot be read: {error}", "pip install 'penumbra-node[gemma]'") from None
    return gguf if gguf is not None else packaged_gguf(default_images_dir().parent / "gguf")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _command() -> str:
    return shlex.join(["penumbra", *sys.argv[1:]])


def _leave(result: msgspec.Struct, text: str, json_path: Path | None, markdown: Path | None) -> None:
    from telemetry.errors import PenumbraError
    from telemetry.summary import write_json

    typer.echo(text)
    if json_path is not None:
        write_json(json_path, result)
    if markdown is not None:
        try:
            markdown.write_text(text, "utf-8")
        except OSError as error:
            raise PenumbraError(
                f"{markdown}: cannot be written: {error.strerror}", "choose a writable place"
            ) from None


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is done now."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        yield lambda text: console.print(text, highlight=False)
