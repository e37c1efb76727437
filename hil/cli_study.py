"""`penumbra study`: many simulated orbits at once."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

study_app = typer.Typer(
    help="Many simulated orbits, without a model and without a broker.", no_args_is_help=True
)


@study_app.callback()
def _root() -> None:
    pass


@study_app.command()
def power(
    orbits: Annotated[int, typer.Option(min=2, max=200, help="Length of each run.")] = 12,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Draws of orders and errors for each cell.")
    ] = 1,
    governor: Annotated[
        list[str] | None, typer.Option(help="A governor to compare with; all if not given. May be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Every other value of each axis.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes; all cores if not given.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here, as JSON.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the result here, as Markdown, and a plot beside it.")
    ] = None,
) -> None:
    """Hold the node's planner, and other governors, against the clairvoyant optimum over a sweep."""
    from rich.progress import Progress

    from hil.study import report
    from hil.study.governors import GOVERNORS
    from hil.study.power import study_power
    from telemetry.errors import PenumbraError
    from telemetry.summary import write_json

    names = governor if governor else list(GOVERNORS)
    for name in names:
        if name not in GOVERNORS:
            raise PenumbraError(
                f"--governor {name}: unknown, allowed are {', '.join(GOVERNORS)}", "choose one of them"
            )
    with Progress(transient=True) as bar:
        task = bar.add_task("runs")
        result = study_power(
            orbits=orbits,
            seeds=range(1, seeds + 1),
            governors=names,
            quick=quick,
            workers=workers or len(os.sched_getaffinity(0)),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    plot = markdown.with_suffix(".png") if markdown is not None else None
    text = report.markdown(result, shlex.join(["penumbra", *sys.argv[1:]]), plot.name if plot else None)
    typer.echo(text)
    if json_path is not None:
        write_json(json_path, result)
    if markdown is not None and plot is not None:
        from hil.study.plots import draw

        draw(result, plot)
        try:
            markdown.write_text(text, "utf-8")
        except OSError as error:
            raise PenumbraError(
                f"{markdown}: cannot be written: {error.strerror}", "choose a writable place"
            ) from None
