"""`penumbra ground` and `penumbra products`: a station at a broker, and what its archive holds."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TypeAlias

import typer

from telemetry.errors import PenumbraError

if TYPE_CHECKING:
    from hil.ground import GroundStation
    from telemetry.archive import Archive
    from telemetry.ground_report import GroundReport
    from telemetry.keys import KeyRing
    from telemetry.tls import TlsFiles

NodeName: TypeAlias = Annotated[str, typer.Option("--node", help="Name of the node.")]
ArchivePath: TypeAlias = Annotated[
    Path, typer.Option("--archive", help="The archive, made if it is missing.")
]
Json: TypeAlias = Annotated[Path | None, typer.Option("--json", help="Write the outcome here, as JSON.")]
FINAL_S = 2.0
"""Time for the last acknowledgements before the station leaves, s."""


def ground(
    keys: Annotated[Path, typer.Option(help="Key file of the node, mode 0600.")],
    broker: Annotated[str, typer.Option(help="Broker, e.g. mqtt://127.0.0.1:1883.")] = "mqtt://127.0.0.1",
    node: NodeName = "penumbra-1",
    archive: ArchivePath = Path("ground.db"),
    sealed: Annotated[bool, typer.Option(help="Encrypt telecommands (AES-256-GCM).")] = False,
    chunk_bytes: Annotated[
        int, typer.Option(min=256, max=65536, help="Bytes of a chunk of an upload: less for a slow link.")
    ] = 16384,
    tls_ca: Annotated[str, typer.Option(help="Certificate of the authority, for mqtts and mqtts5.")] = "",
    tls_certificate: Annotated[str, typer.Option(help="Certificate of the station.")] = "",
    tls_key: Annotated[str, typer.Option(help="Its private key, mode 0600.")] = "",
    json: Json = None,
) -> None:
    """Run a ground station: archive, acknowledge, and give the commands that are read from standard input.

    One command a line in UTF-8, arguments as JSON: `ping`, `set_power_cap {"power_w": 9}`,
    `fire switch_image {"slot": "b"}`, `upload image images/b`, `products dumps`. At the end of the input the
    station leaves; exit code 1 if a command failed. On a terminal, end it with Ctrl-D.
    """
    from telemetry.archive import Archive
    from telemetry.keys import KeyRing
    from telemetry.summary import write_json
    from telemetry.tls import TlsFiles
    from telemetry.topics import check_node_name

    ring, files = KeyRing.load(keys), TlsFiles.of(tls_ca, tls_certificate, tls_key)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # What the locale cannot print ends nothing.
    opened = Archive.open(archive)
    try:
        report = asyncio.run(
            _run(
                broker, check_node_name(node), opened, ring, files, sealed=sealed, chunk_bytes=chunk_bytes
            )
        )  # fmt: skip
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        opened.close()
    if json is not None:
        write_json(json, report)
    raise typer.Exit(1 if report.failures else 0)


def products(
    archive: Annotated[Path, typer.Argument(help="Archive of a station, or of a flight.")],
    node: NodeName = "penumbra-1",
    out: Annotated[Path, typer.Option(help="Directory they are written to.")] = Path("products"),
    json: Json = None,
) -> None:
    """Put dumped memory together out of an archive, and prove it against its SHA-256."""
    from hil.operator import describe_products, write_products
    from telemetry.archive import Archive
    from telemetry.summary import write_json

    opened = Archive.read(archive)
    try:
        report = write_products(opened, node, out)
    finally:
        opened.close()
    for line in describe_products(report):
        typer.echo(line)
    if json is not None:
        write_json(json, report)


async def _run(
    broker: str,
    node: str,
    archive: Archive,
    ring: KeyRing,
    files: TlsFiles | None,
    *,
    sealed: bool,
    chunk_bytes: int,
) -> GroundReport:
    from hil.ground import GroundStation
    from hil.operator import MAX_LINE_BYTES, Operator
    from telemetry.ground_report import GroundReport

    station = GroundStation(
        broker,
        node,
        archive,
        ring,
        now_ns=time.time_ns,
        on_packet=lambda _, packet: operator.tell(packet),
        sealed=sealed,
        tls=files,
    )
    operator = Operator(station, archive, node, typer.echo, chunk_bytes=chunk_bytes)
    station.in_contact = True
    async with asyncio.TaskGroup() as group:
        running = group.create_task(station.run(), name="hil.ground.run")
        saying = group.create_task(_say_link(station), name="hil.ground.say-link")
        try:
            async for line in _lines(MAX_LINE_BYTES):
                await operator.execute(line)
        except PenumbraError as error:
            operator.refuse(error)
        await asyncio.sleep(FINAL_S)
        for task in (running, saying):
            task.cancel()
    if not station.connections:
        operator.failures += 1
        typer.echo(f"the broker was never reached: {station.link_error or 'no answer'}", err=True)
    counts = station.counts
    typer.echo(
        f"{counts.archived} frames archived, {counts.duplicates} came again, {counts.garbage} were garbage; "
        f"{operator.failures} commands failed",
        err=True,
    )
    return GroundReport(
        node=node,
        archived=counts.archived,
        duplicates=counts.duplicates,
        garbage=counts.garbage,
        failures=operator.failures,
        commands=operator.ends,
    )


async def _say_link(station: GroundStation) -> None:
    """Tell when the broker cannot be reached: else nothing would ever happen, and nobody know why."""
    told: str | None = None
    while True:
        await asyncio.sleep(1.0)
        error = None if station.connected.is_set() else station.link_error
        if error != told:
            told = error
            typer.echo("connected" if error is None else f"no connection to the broker: {error}", err=True)


async def _lines(most_bytes: int) -> AsyncIterator[bytes]:
    """Yield the lines of standard input, whatever it is; of a longer one than `most_bytes` one byte more.

    A thread waits for them, which nobody has to wait for: Ctrl-C ends the command although no line comes.

    Raises
    ------
    PenumbraError
        It cannot be read on.
    """
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[bytes | OSError]()

    def put(line: bytes | OSError) -> None:
        with suppress(RuntimeError):  # The loop may be gone by now.
            loop.call_soon_threadsafe(lines.put_nowait, line)

    def read() -> None:
        try:
            if sys.stdin is not None:
                # A reader of its own: Python cannot close that of `sys.stdin` while a thread waits in it.
                with open(sys.stdin.fileno(), "rb", closefd=False) as file:
                    while line := _line(file, most_bytes):
                        put(line)
            put(b"")
        except OSError as error:
            put(error)

    threading.Thread(target=read, name="hil.ground.stdin", daemon=True).start()
    while line := await lines.get():
        if isinstance(line, OSError):
            raise PenumbraError(f"standard input: {line.strerror}", "give commands from a file or a terminal")
        yield line


def _line(file: BinaryIO, most_bytes: int) -> bytes:
    """Read a line; the rest of one that is longer than `most_bytes` is read and left out."""
    line = rest = file.readline(most_bytes + 1)
    while len(rest) > most_bytes and not rest.endswith(b"\n"):
        rest = file.readline(most_bytes + 1)
    return line
