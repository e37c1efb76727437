"""`penumbra fly`: fly a scenario, compare with a fault-free run, judge, report."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hil.broker import EmbeddedBroker
from hil.debrief import debrief
from hil.ending import Ending, interrupt
from hil.flight import Flight
from hil.plant.plant import Plant
from hil.record import FlightRecord, JobFact, OverheadFact
from hil.reference import ReferenceJob, measure_overhead, run_reference
from hil.report import write_report
from hil.run_dir import SLOT, RunDir, make_run_dir, scenario_text
from hil.scenario import Scenario, load_scenario
from hil.shared_memory import remove_owned
from hil.verdict import exit_code, summarize
from node.boards import open_board
from node.inference.manifest import TOKENIZER, default_images_dir, load_manifest
from node.inference.tokenizer import Tokenizer
from telemetry.errors import PenumbraError
from telemetry.summary import Summary, write_json

_log = logging.getLogger(__name__)

MAX_SPEED = 1000.0
_TERMINAL_AS_BEFORE = b"\x1b[?1049l\x1b[?25h"
"""Leaves the screen of the live view, and shows the cursor."""


@dataclass(frozen=True)
class FlyOptions:
    """Options of `penumbra fly`."""

    scenario: str = "default"
    """Name of a packaged scenario, or path of a TOML file."""
    speed: float | None = None
    """Mission seconds a physical second; None takes the scenario's."""
    seed: int | None = None
    """None takes the scenario's."""
    board: str | None = None
    """Board driver; None takes the scenario's."""
    governor: str | None = None
    """Who decides the watts; None takes the scenario's."""
    live: bool = True
    """False for log lines instead of the live view."""
    json_path: Path | None = None
    """A second place for `summary.json`."""
    out_dir: Path = Path("runs")
    """Where the run directory is made."""
    images_dir: Path | None = None
    """Holds the model image; None for the default cache."""
    port: int = 0
    """Of the embedded broker; 0 takes a free one."""
    reference: bool = True
    """False leaves out the fault-free run and the measurement of the overhead."""
    overhead: bool = True
    """False leaves out the measurement of the overhead alone."""


def fly(options: FlyOptions, console: Console | None = None) -> int:
    """Fly; return the exit code: 0 no check failed, 1 a check failed, 130 interrupted.

    Raises
    ------
    PenumbraError
        Something the user must mend before this can fly.
    """
    console = console or Console()
    scenario = with_options(load_scenario(options.scenario), options)
    source = scenario_text(options.scenario)
    images_dir = options.images_dir or default_images_dir()
    manifest = load_manifest(images_dir / SLOT)
    if options.json_path is not None and not options.json_path.absolute().parent.is_dir():
        raise PenumbraError(f"--json {options.json_path}: no such directory", "make it first")
    plant = Plant(scenario)
    umbrae = plant.umbra_events()
    broker = EmbeddedBroker(options.port)
    broker.bind()  # what has no port to fly with leaves no run directory
    ending = Ending()
    with ExitStack() as stack:
        stack.callback(broker.release)
        stack.enter_context(ending.watching())
        stack.enter_context(ending.asking(lambda: None))  # from here on there will be a report
        run = make_run_dir(options.out_dir, scenario.scenario.name)
        stack.enter_context(_logging_to(run.bench_log))
        flight = Flight(scenario, source, run, images_dir=images_dir, plant=plant, broker=broker)
        ending.at_once = lambda: _abandon(flight, console)
        console.print(
            f"[bold]penumbra fly[/] {scenario.scenario.name}: {scenario.scenario.description}\n"
            f"{scenario.duration_s:.0f} s of mission time at x{scenario.scenario.speed:g}, "
            f"about {scenario.wall_s:.0f} s; everything goes to {run.path}"
        )
        with ending.asking(flight.stop):
            flown = asyncio.run(flight.fly(console, live=options.live))
        record = debrief(
            scenario, source, run, flown, umbrae=umbrae, contacts=flight.contacts, manifest=manifest
        )
        if options.reference and not flown.interrupted:
            _log.info("phase: reference")
            with suppress(KeyboardInterrupt), ending.asking(interrupt):
                record = with_reference(
                    record, scenario, images_dir / SLOT, console, overhead=options.overhead
                )
        _log.info("phase: report")
        summary = summarize(record)
        write_outputs(run, record, summary, options.json_path)
    show(summary, run, console)
    return exit_code(summary, record.interrupted)


def _abandon(flight: Flight, console: Console) -> None:
    """Leave no process, no shared memory and no spoilt terminal; the report is given up."""
    flight.kill_now()
    remove_owned()
    if console.is_terminal:
        with suppress(OSError):
            os.write(console.file.fileno(), _TERMINAL_AS_BEFORE)


def with_options(scenario: Scenario, options: FlyOptions) -> Scenario:
    """Return the scenario with what the command line overrides.

    Raises
    ------
    PenumbraError
        A value out of range, or a board whose draw cannot be measured here.
    """
    flight = scenario.scenario
    if options.speed is not None:
        if not 0 < options.speed <= MAX_SPEED:
            raise PenumbraError(
                f"--speed {options.speed:g}: above 0 up to {MAX_SPEED:g} is allowed",
                "60 flies an orbit in 93 s",
            )
        flight = msgspec.structs.replace(flight, speed=options.speed)
    if options.seed is not None:
        if not 0 <= options.seed < 2**63:
            raise PenumbraError(f"--seed {options.seed}: 0 to {2**63 - 1} is allowed")
        flight = msgspec.structs.replace(flight, seed=options.seed)
    board = scenario.board
    if options.board is not None:
        board = msgspec.structs.replace(board, kind=cast(Literal["sim", "x86", "jetson"], options.board))
        open_board(board)  # refused here, with its reason, rather than by the node later
    node = scenario.node
    if options.governor is not None:
        policy = cast(Literal["planner", "rules", "threshold"], options.governor)
        node = msgspec.structs.replace(node, planner=msgspec.structs.replace(node.planner, policy=policy))
    return msgspec.structs.replace(scenario, scenario=flight, node=node, board=board)


def with_reference(
    record: FlightRecord, scenario: Scenario, image_dir: Path, console: Console, *, overhead: bool = True
) -> FlightRecord:
    """Return the record with the fault-free run of its jobs and the cost of protection.

    Ctrl-C leaves out what is not done yet: its checks are inconclusive then.
    """
    jobs = [
        ReferenceJob(job.job, job.prompt, len(job.tokens), job.sampling)
        for job in record.jobs
        if job.tokens and job.prompt
    ]
    node = scenario.node
    try:
        with _progress(console, "fault-free run of the same jobs") as advance:
            texts = run_reference(
                image_dir, jobs, positions=node.positions, threads=node.threads, progress=advance
            )
        tokenizer = Tokenizer(image_dir / TOKENIZER)
        referred = [_referred(job, texts, tokenizer) for job in record.jobs]
        record = msgspec.structs.replace(record, jobs=referred)
        if not overhead:
            return record
        with console.status("measuring the cost of protection in paired runs"):
            cost = measure_overhead(
                image_dir,
                epoch_tokens=node.epoch_tokens,
                epoch_s=node.epoch_s,
                budget=node.overhead_budget,
                threads=node.threads,
            )
    except KeyboardInterrupt:
        return record
    return msgspec.structs.replace(
        record,
        overhead=OverheadFact(
            median_pct=cost.median_pct,
            min_pct=cost.min_pct,
            max_pct=cost.max_pct,
            pairs=cost.pairs,
            tokens=cost.tokens,
        ),
    )


def _referred(job: JobFact, texts: dict[str, list[int]], tokenizer: Tokenizer) -> JobFact:
    if job.job not in texts:
        return job
    tokens = texts[job.job]
    return msgspec.structs.replace(job, reference=tokens, reference_text=tokenizer.token_bytes(tokens))


def write_outputs(run: RunDir, record: FlightRecord, summary: Summary, json_path: Path | None) -> None:
    """Write the report, `summary.json` and the record; and the summary to `json_path`.

    Raises
    ------
    PenumbraError
        One of them cannot be written; the others are, where they can be.
    """
    writes: list[Callable[[], None]] = [
        lambda: write_report(run.report, record, summary),
        lambda: write_json(run.summary, summary),
        lambda: write_json(run.record, record),
    ]
    if json_path is not None:
        writes.append(lambda: write_json(json_path, summary))
    failures = []
    for write in writes:
        try:
            write()
        except PenumbraError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def show(summary: Summary, run: RunDir, console: Console) -> None:
    """Print the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for name in ("", "check", "measured", "limit"):
        table.add_column(name, no_wrap=True, justify="right" if name in {"measured", "limit"} else "left")
    table.add_column("")
    words = {True: "[green]PASS[/]", False: "[bold red]FAIL[/]", None: "[yellow]OPEN[/]"}
    for check in summary.verdict:
        # What passed needs one line; what did not is told in full.
        text = Text(check.text, no_wrap=check.ok is True, overflow="ellipsis" if check.ok else "fold")
        table.add_row(words[check.ok], check.name, _short(check.measured), _short(check.limit), text)
    console.print(table)
    passed = summary.passed()
    overall = {True: "[green]PASS[/]", False: "[bold red]FAIL[/]", None: "[yellow]INCONCLUSIVE[/]"}[passed]
    console.print(f"{overall}  report: {run.report}", soft_wrap=True)


def _short(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


@contextmanager
def _progress(console: Console, text: str) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=1.0)
        yield lambda fraction: progress.update(task, completed=fraction)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send the bench's log to a file: the terminal shows the flight."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:], root.level = [handler], logging.INFO
    try:
        yield
    finally:
        root.handlers[:], root.level = before, level
        handler.close()
