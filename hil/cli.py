"""The `penumbra` command. Sub-commands import what they need when they run: the node loads no bench."""

from __future__ import annotations

import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from hil.cli_bench import BoardKind, bench_app, calibrate
from hil.cli_campaign import campaign_app
from hil.cli_ground import ground, products
from hil.cli_model import model_app
from hil.cli_study import study_app
from hil.ending import EXIT_INTERRUPTED, end_as_by_ctrl_c, was_interrupted
from hil.output import Outputs, a_view
from telemetry.errors import PenumbraError

app = typer.Typer(
    name="penumbra",
    help="Flight software of an AI payload computer in orbit, and the bench that proves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(model_app, name="model")
app.add_typer(bench_app, name="bench")
app.add_typer(campaign_app, name="campaign")
app.add_typer(study_app, name="study")
app.command()(calibrate)
app.command()(ground)
app.command()(products)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penumbra {version('penumbra-node')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "node":  # it has its own order of ending
        end_as_by_ctrl_c()


class Policy(StrEnum):
    """Who can decide the watts."""

    PLANNER = "planner"
    RULES = "rules"
    THRESHOLD = "threshold"


@app.command()
def fly(
    scenario: Annotated[str, typer.Argument(help="Packaged scenario, or path of a TOML file.")] = "default",
    speed: Annotated[
        float | None, typer.Option(help="Mission seconds a second; the scenario's if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of faults; the scenario's if not given.")] = None,
    board: Annotated[
        BoardKind | None, typer.Option(help="Board driver; the scenario's if not given.")
    ] = None,
    governor: Annotated[
        Policy | None, typer.Option(help="Who decides the watts, to compare; the scenario's if not given.")
    ] = None,
    live: Annotated[bool, typer.Option(help="Live view, or one log line every few seconds.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write summary.json here as well.")] = None,
    out: Annotated[Path, typer.Option(help="Where the directory of the run is made.")] = Path("runs"),
    images: Annotated[Path | None, typer.Option(help="Directory of model images.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the broker; 0 takes a free one.")] = 0,
    reference: Annotated[
        bool, typer.Option(help="Compare with a fault-free run, and measure what protection costs.")
    ] = True,
) -> None:
    """Fly a scenario with the real model, and judge it. Exit code 0: no check failed."""
    from hil.fly import FlyOptions
    from hil.fly import fly as run_flight

    options = FlyOptions(
        scenario=scenario,
        speed=speed,
        seed=seed,
        board=None if board is None else board.value,
        governor=None if governor is None else governor.value,
        live=live,
        json_path=json_path,
        out_dir=out,
        images_dir=images,
        port=port,
        reference=reference,
    )
    with a_view():
        code = run_flight(options)
    raise typer.Exit(code)


class Memory(StrEnum):
    """What `penumbra inject` can strike."""

    WEIGHTS = "weights"
    KV = "kv"


@app.command()
def inject(
    target: Annotated[Memory, typer.Argument(help="Memory to strike.")],
    config: Annotated[Path, typer.Argument(help="Configuration of the running node.")],
    seed: Annotated[int | None, typer.Option(help="Chooses the bit; a new choice if not given.")] = None,
) -> None:
    """Flip one random bit in the worker of a running node, from outside."""
    from hil.faults import Target
    from hil.injector import inject_once

    strike = inject_once(config, Target(target.value), seed)
    typer.echo(
        f"flipped bit {strike.bit} of byte {strike.byte} in page {strike.page} "
        f"({strike.role}, {strike.tensor}): {strike.before:#04x} -> {strike.after:#04x}"
    )


@app.command()
def node(
    config: Annotated[Path, typer.Argument(help="Node configuration, TOML.")],
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Under a small parent that starts it anew when it must.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Tell what the board offers and what is missing, and end.")
    ] = False,
) -> None:
    """Run the flight software alone, as on the board."""
    if probe:
        _probe(config)
        return
    if supervise:
        from node.config import NodeConfig
        from node.supervise import main as run_parent
        from node.supervise import node_command
        from node.supervision import Limits

        limits = Limits(feed_s=float(NodeConfig.load(config).watchdog.timeout_s))
        raise typer.Exit(
            run_parent(node_command(config), limits, lambda text: typer.echo(f"supervise: {text}", err=True))
        )
    from node.runtime import main as run_node

    raise typer.Exit(run_node(config))


def _probe(config: Path) -> None:
    """Show what the board of a configuration offers."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from node.boards import open_board
    from node.config import NodeConfig

    board = open_board(NodeConfig.load(config).board, for_flight=False)
    table = Table(title=f"board {board.name}: {board.identity}", title_justify="left")
    for head in ("what", "state", "found", "how to get it"):
        table.add_column(head, overflow="fold")
    colours = {"ok": "green", "missing": "yellow", "denied": "red", "bad": "red"}
    for offer in board.probe():
        state = f"[{colours[offer.state]}]{offer.state}[/]"
        table.add_row(offer.what, state, escape(offer.detail), escape(offer.mend))
    Console().print(table)


def main() -> None:
    """Entry point: a `PenumbraError` becomes one message and an exit code."""
    outputs = Outputs.install()
    try:
        try:
            app()
        except SystemExit as end:
            if not end.code:
                outputs.check()
            raise
    except PenumbraError as error:
        sys.stderr.write(f"penumbra: {error}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, Exception) as error:
        if not was_interrupted(error):
            raise
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
