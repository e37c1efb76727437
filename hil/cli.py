"""The `penumbra` command. Sub-commands import what they need when they run: the node loads no bench."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from hil.cli_model import model_app
from telemetry.errors import PenumbraError

app = typer.Typer(
    name="penumbra",
    help="Flight software of an AI payload computer in orbit, and the bench that proves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(model_app, name="model")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penumbra {version('penumbra-node')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def node(config: Annotated[Path, typer.Argument(help="Node configuration, TOML.")]) -> None:
    """Run the flight software alone, as on the board."""
    from node.runtime import main as run_node

    raise typer.Exit(run_node(config))


def main() -> None:
    """Entry point: a `PenumbraError` becomes one message and an exit code."""
    try:
        app()
    except PenumbraError as error:
        sys.stderr.write(f"penumbra: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
