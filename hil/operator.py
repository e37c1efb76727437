"""The operator's line: one command a line, what becomes of it printed, for a person or a script.

    ping                                       a command of the dictionary (docs/icd.md)
    infer {"job": "a", "prompt": "Why?", "max_tokens": 64}     with its arguments as JSON
    fire switch_image {"slot": "b"}            a hazardous one, and no other: armed, then given
    upload image DIR_OF_A_SLOT                 a model image, or a tar of `penumbra model pack`
    upload fdir_table FILE.toml                an FDIR table
    products DIR                               write down the products that are whole; tell the others

Lines are UTF-8, whatever the locale is, and executed one after the other. One that cannot be read or executed
is refused with its reason and counted; the next ones go on.
"""

from __future__ import annotations

import asyncio
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from hil.ground import GroundStation
from hil.products import products
from hil.uploader import CHUNK_BYTES, outcome_of, upload
from node.inference.image_tar import pack_image
from telemetry.archive import Archive
from telemetry.commands import Arguments, Arm, CommandError, Hazard, UploadStatus, parse_arguments
from telemetry.errors import PenumbraError
from telemetry.ground_report import CommandEnd, ProductsReport, ProductState
from telemetry.packets import Event, Packet, Severity, Stage, Verification
from telemetry.strict_toml import MAX_DEPTH, is_deep

UPLOADS: dict[str, Literal["image", "fdir_table"]] = {"image": "image", "fdir_table": "fdir_table"}


SILENCE_S = 10.0
"""Time after which a command that has not ended is spoken of, s."""
MAX_TOLD = 10_000
"""Reports that are remembered, so that a repeated one is not told twice (assumed)."""
MAX_LINE_BYTES = 1 << 20
"""Longest line (assumed: a telecommand with the longest prompt has 64,000 bytes)."""


class Operator:
    """Executes lines.

    Parameters
    ----------
    station
        Runs.
    archive
        Its archive.
    node
        The node.
    say
        Prints a line.
    chunk_bytes
        Size of the chunks of uploads.
    """

    def __init__(
        self,
        station: GroundStation,
        archive: Archive,
        node: str,
        say: Callable[[str], None],
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.failures = 0
        """Lines that could not be executed, or whose command failed."""
        self.ends: list[CommandEnd] = []
        """How commands ended, in this order."""
        self._station = station
        self._archive = archive
        self._node = node
        self._say = say
        self._chunk_bytes = chunk_bytes
        self._told: set[Verification] = set()

    async def execute(self, line: bytes) -> None:
        """Execute a line; whatever is wrong with it is printed."""
        try:
            text = _decode(line)
            if text and not text.startswith("#"):
                await self._execute(text)
        except PenumbraError as error:
            self.refuse(error)
        except OSError as error:  # Of a path in the line.
            self.refuse(PenumbraError(f"{_excerpt(line)}: {error.strerror or error}"))

    def refuse(self, error: PenumbraError) -> None:
        """Print why something could not be done, and count it."""
        self.failures += 1
        self._say(str(error))

    def tell(self, packet: Packet) -> None:
        """Print a packet that is for the operator, a report that was repeated once."""
        if isinstance(packet, Verification):
            if packet in self._told:
                return
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told.add(packet)
        if isinstance(packet, Verification) and (packet.stage is Stage.COMPLETED or not packet.ok):
            self.ends.append(
                CommandEnd(
                    name=packet.name,
                    command_seq=packet.command_seq,
                    ok=packet.ok,
                    code=packet.code,
                    reason=packet.reason,
                )
            )
        match packet:
            case Verification(name=UploadStatus.name, ok=True):
                pass  # The upload says how far it is.
            case Verification():
                about = f"entry {packet.entry}, {packet.name}" if packet.entry is not None else packet.name
                how = (
                    f"{packet.stage} {packet.code}"
                    if packet.ok
                    else f"failed at {packet.stage}: {packet.code}"
                )
                reason = f": {packet.reason}" if packet.reason else ""
                self._say(f"{about} {packet.command_seq} {how}{reason}")
            case Event() if packet.severity >= Severity.MEDIUM:
                self._say(f"event {packet.severity.name.lower()} {packet.name}: {packet.text}")
            case _:
                pass

    async def _execute(self, line: str) -> None:
        word, rest = _first_word(line)
        match word:
            case "upload":
                await self._upload(_words(rest))
            case "products":
                await self._write_products(_words(rest))
            case "fire":
                name, args = _first_word(rest)
                arguments = _parse(name, args)
                if arguments.hazard is not Hazard.HAZARDOUS:
                    raise PenumbraError(
                        f"fire {name}: not sent: {name} needs no arming, its hazard is {arguments.hazard}",
                        f"give it without fire: {name} {args}".rstrip(),
                    )
                if await self._give(Arm(command=arguments.name, args=_plain(arguments))):
                    await self._give(arguments)
            case _:
                await self._give(_parse(word, rest))

    async def _give(self, arguments: Arguments) -> bool:
        (ticket,) = self._station.uplink.queue([arguments])
        waiting = asyncio.create_task(outcome_of(ticket), name="hil.operator.wait")
        try:
            await asyncio.wait({waiting}, timeout=SILENCE_S)
            if not waiting.done():
                self._say(f"{arguments.name}: no end of it yet; it is sent again until the node answers")
            outcome = await waiting
        finally:
            waiting.cancel()
        self.failures += not outcome.ok
        return outcome.ok

    async def _upload(self, words: list[str]) -> None:
        if len(words) != 2 or words[0] not in UPLOADS:
            raise PenumbraError(
                f"upload {' '.join(words)}: a kind ({', '.join(UPLOADS)}) and a path are expected",
                "e.g. upload image images/a",
            )
        kind, path = UPLOADS[words[0]], Path(words[1])
        with tempfile.TemporaryDirectory() as directory:
            if kind == "image" and await asyncio.to_thread(path.is_dir):
                packed = Path(directory) / "image.tar"
                await asyncio.to_thread(pack_image, path, packed)
                path = packed
            await upload(self._station, path, kind, chunk_bytes=self._chunk_bytes, say=self._progress())

    def _progress(self) -> Callable[[str, float], None]:
        told = [-1]

        def say(text: str, share: float) -> None:
            step = int(share * 20)
            if text != "sending" or step != told[0]:
                told[0] = step
                self._say(f"{text} ({100 * share:.0f} %)" if text == "sending" else text)

        return say

    async def _write_products(self, words: list[str]) -> None:
        if len(words) != 1:
            raise PenumbraError("products: one directory is expected", "e.g. products dumps")
        report = await asyncio.to_thread(write_products, self._archive, self._node, Path(words[0]))
        for line in describe_products(report):
            self._say(line)


def write_products(archive: Archive, node: str, directory: Path) -> ProductsReport:
    """Write every product that is whole into a directory, its head beside it; return what there is.

    Raises
    ------
    PenumbraError
        The directory cannot be written.
    """
    states = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for found in products(archive, node):
            head, file = found.head, None
            if found.content is not None:
                file = directory / f"{head.product}.bin"
                file.write_bytes(found.content)
                described = msgspec.json.format(msgspec.json.encode(head), indent=2)
                (directory / f"{head.product}.json").write_bytes(described)
            states.append(
                ProductState(
                    product=head.product,
                    name=head.name,
                    first_byte=head.first_byte,
                    size_bytes=head.size_bytes,
                    sha256=head.sha256,
                    state=found.state,
                    missing=list(found.missing),
                    file=None if file is None else str(file),
                )
            )
    except OSError as error:
        raise PenumbraError(f"{error.filename or directory}: {error.strerror}") from error
    return ProductsReport(node=node, products=states)


def describe_products(report: ProductsReport) -> list[str]:
    """Return a line about each product."""
    lines = []
    for one in report.products:
        chunks = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in one.missing[:8])
        lines.append(
            f"{one.product}: {one.name} from byte {one.first_byte}, {one.size_bytes} bytes: {one.state}"
            + (f", chunks missing: {chunks}" if chunks else "")
        )
    return lines or [f"no product of {report.node} is archived"]


def _decode(line: bytes) -> str:
    """Return the text of a line, without the byte order mark that editors begin a file with."""
    if len(line) > MAX_LINE_BYTES:
        raise PenumbraError(
            f"{_excerpt(line)}: a line of more than {MAX_LINE_BYTES} bytes", "one command a line is expected"
        )
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise PenumbraError(
            f"{_excerpt(line)}: not UTF-8: {error.reason} at byte {error.start} of the line",
            "save the input as UTF-8",
        ) from None


def _excerpt(line: bytes) -> str:
    return line[:60].decode("utf-8", "backslashreplace").strip()


def _first_word(text: str) -> tuple[str, str]:
    """Return the first word, and what follows it."""
    word, *rest = text.split(maxsplit=1) or [""]
    return word, rest[0] if rest else ""


def _words(text: str) -> list[str]:
    if "\0" in text:
        raise PenumbraError(f"{text[:60]!r}: a path holds no NUL character", "remove it")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise PenumbraError(f"{text!r}: {error}", "put a path with spaces or quotes in quotes") from None


def _parse(name: str, args: str) -> Arguments:
    example = f'e.g. {name} {{"key": "value"}}'
    try:
        given = msgspec.json.decode(args or "{}", type=dict)
        deep = is_deep(given)
    except RecursionError:
        deep = True
    except msgspec.DecodeError as error:
        raise PenumbraError(f"{name}: its arguments are no JSON object: {error}", example) from None
    if deep:
        raise PenumbraError(f"{name}: its arguments are nested deeper than {MAX_DEPTH} levels", example)
    try:
        arguments = parse_arguments(name, given)
        msgspec.msgpack.encode(arguments)
    except CommandError as error:
        raise PenumbraError(str(error), "see docs/icd.md") from None
    except OverflowError:
        raise PenumbraError(
            f"{name}: an integer in its arguments has more than 64 bits", "see docs/icd.md"
        ) from None
    return arguments


def _plain(arguments: Arguments) -> dict[str, object]:
    plain: dict[str, object] = msgspec.msgpack.decode(msgspec.msgpack.encode(arguments))
    return plain
