"""`penumbra campaign`: thousands of seeded faults against live flight software, and what became of each."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from telemetry.errors import PenumbraError

campaign_app = typer.Typer(
    help="Fault campaigns against live flight software, with exact intervals.", no_args_is_help=True
)
run_app = typer.Typer(help="Run a campaign, or the rest of one that was broken off.", no_args_is_help=True)
campaign_app.add_typer(run_app, name="run")

Out: TypeAlias = Annotated[
    Path, typer.Option(help="Directory of the campaign; one of the same plan goes on.")
]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Chooses every fault.")]
Images: TypeAlias = Annotated[
    Path | None, typer.Option(help="Directory of model images; the active slot is struck.")
]


@contextmanager
def _status() -> Iterator[Callable[[str, float], None]]:
    """Say what is being done, on a terminal in place, else a line every tenth."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("...") as shown:
            yield lambda text, part: shown.update(f"{text} ({100 * part:.0f} %)")
        return
    last = [-1]

    def say(text: str, part: float) -> None:
        if int(part * 20) != last[0]:
            last[0] = int(part * 20)
            sys.stderr.write(f"{text} ({100 * part:.0f} %)\n")
            sys.stderr.flush()

    yield say


def _image(images: Path | None) -> Path:
    from node.inference.manifest import default_images_dir
    from node.inference.slots import active_image

    return active_image(images or default_images_dir())


@run_app.command()
def strikes(
    out: Out,
    trials: Annotated[int, typer.Option(min=1, help="Strikes of each stratum that count.")] = 3000,
    seed: Seed = 1,
    images: Images = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads of the worker.")] = 2,
    strata: Annotated[
        list[str] | None, typer.Option("--stratum", help="Strike this memory only; may be repeated.")
    ] = None,
) -> None:
    """Flip bits of weights, scales, norms, embedding, head and KV of a worker while it decodes."""
    from hil.campaign.strata import Stratum
    from hil.campaign.strike_run import Plan, run_strikes
    from hil.campaign.strike_worker import WorkerSettings

    known = {stratum.value: stratum for stratum in Stratum}
    for name in strata or ():
        if name not in known:
            raise PenumbraError(f"--stratum {name!r}: {', '.join(known)} allowed", "name one of these")
    settings, only = WorkerSettings(threads=threads), tuple(known[name] for name in strata or ())
    plan = Plan(trials=trials, seed=seed, settings=settings, strata=only)
    with _status() as say:
        asyncio.run(run_strikes(_image(images), out, plan, say))
    _show(out)


@run_app.command()
def kills(
    out: Out,
    trials: Annotated[int, typer.Option(min=1, help="Faults of each kind: four kinds.")] = 100,
    seed: Seed = 1,
    images: Images = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads of the worker.")] = 2,
) -> None:
    """SIGKILL and SIGSTOP a worker and a node at random moments of decoding."""
    from hil.campaign.kill_run import run_kills
    from hil.campaign.live_node import LiveSettings
    from node.inference.manifest import default_images_dir

    directory = images or default_images_dir()
    with _status() as say:
        asyncio.run(
            run_kills(
                directory, out, trials=trials, seed=seed, settings=LiveSettings(threads=threads), say=say
            )
        )
    _show(out)


@run_app.command()
def memory(
    out: Out,
    worker: Annotated[int, typer.Option(min=0, help="Flips in the worker's resident memory.")] = 1000,
    node: Annotated[int, typer.Option(min=0, help="Flips in the supervisor's resident memory.")] = 500,
    seed: Seed = 1,
    images: Images = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads of the worker.")] = 2,
) -> None:
    """Flip single bits anywhere in the resident memory of worker and supervisor."""
    from hil.campaign.live_node import LiveSettings
    from hil.campaign.memory_run import run_memory
    from node.inference.manifest import default_images_dir

    directory, settings = images or default_images_dir(), LiveSettings(threads=threads)
    with _status() as say:
        asyncio.run(
            run_memory(
                directory, out, worker_trials=worker, node_trials=node, seed=seed, settings=settings, say=say
            )
        )
    _show(out)


@run_app.command()
def latchup(
    out: Out,
    trials: Annotated[int, typer.Option(min=1, help="Emulated latch-ups.")] = 2000,
    seed: Seed = 1,
) -> None:
    """Emulate latch-ups on real load traces, beside a fixed threshold."""
    from hil.campaign.records import SUMMARY, Header, write_header, write_json
    from hil.latchup_trials import run_latchup

    write_header(out, Header(plan="latchup", seed=seed, settings={"trials": trials}))
    write_json(out / SUMMARY, run_latchup(trials, seed))
    _show(out)


@run_app.command()
def link(
    out: Out,
    trials: Annotated[int, typer.Option(min=1, help="Random schedules of kills, cuts and lies.")] = 1000,
    at_once: Annotated[
        int, typer.Option(min=1, max=32, help="Schedules side by side: they mostly wait.")
    ] = 4,
    seed: Seed = 1,
) -> None:
    """Kill node, broker and ground, cut and spoil their link; then compare the books record by record."""
    from hil.campaign.link_run import run_link

    with _status() as say:
        asyncio.run(run_link(out, trials=trials, seed=seed, at_once=at_once, say=say))
    _show(out)


@run_app.command()
def fuzz(
    out: Out,
    inputs: Annotated[int, typer.Option(min=100, help="Mutated messages for all decoders.")] = 10_000_000,
    commands: Annotated[int, typer.Option(min=1, help="Mutated telecommands.")] = 1_000_000,
    fields: Annotated[
        int,
        typer.Option(
            min=0, help="Bus messages with one field mutated, to a running node; half as many others."
        ),
    ] = 200_000,
    seed: Seed = 1,
) -> None:
    """Mutated messages of every kind, by bytes and by single fields, and commands of strangers."""
    from hil.campaign.fuzz_run import run_fuzz

    with _status() as say:
        run_fuzz(out, inputs=inputs, command_inputs=commands, fields=fields, seed=seed, say=say)
    _show(out)


@run_app.command()
def ends(
    out: Out,
    trials: Annotated[int, typer.Option(min=1, help="Flights of each kind: six kinds.")] = 50,
    at_once: Annotated[int, typer.Option(min=1, max=8, help="Flights side by side.")] = 2,
    seed: Seed = 1,
    images: Images = None,
) -> None:
    """End flights by signals, a closed terminal, a closed pipe, a full output; look at what is left."""
    from hil.campaign.ends_run import run_ends
    from node.inference.manifest import default_images_dir

    directory = images or default_images_dir()
    with _status() as say:
        asyncio.run(run_ends(directory, out, trials=trials, seed=seed, at_once=at_once, say=say))
    _show(out)


@campaign_app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories of campaigns.")],
    markdown: Annotated[Path | None, typer.Option(help="Write the report here; stdout if not given.")] = None,
) -> None:
    """Report campaigns as Markdown: rates with exact intervals, latencies, commands."""
    from hil.campaign.report import make_report

    text = make_report(directories)
    if markdown is None:
        typer.echo(text)
    else:
        try:
            markdown.write_text(text, encoding="utf-8")
        except OSError as error:
            raise PenumbraError(
                f"--markdown {markdown}: {error.strerror or error}", "give a file that can be written"
            ) from None


def _show(out: Path) -> None:
    from hil.campaign.report import make_report

    typer.echo(make_report([out]))
