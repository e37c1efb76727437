"""The directory of a campaign: one JSON line a trial, written as it ends, so that a broken run goes on.

    campaign.json   what is run: plan, seed, image, settings (`Header`)
    trials.jsonl    one line a trial, in order of their ends
    notes.jsonl     what belongs to no single trial: tokens compared, worker restarts; a `remark` is printed
    summary.json    the result of a plan that keeps no single trials
    machine.json    where it was begun

A line that was cut short by a crash is dropped when the campaign goes on; its trial is run again. A trial is
a function of the seed and its number alone, so the rest is the same whoever runs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

import msgspec

from hil.bench.machine import describe_machine, load_average
from telemetry.errors import PenumbraError
from telemetry.figures import Machine

HEADER: Final = "campaign.json"
TRIALS: Final = "trials.jsonl"
NOTES: Final = "notes.jsonl"
SUMMARY: Final = "summary.json"
MACHINE: Final = "machine.json"
FORMAT: Final = 1

Value = str | int | float | bool | None
Note = dict[str, Value]


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a campaign runs. Two runs with the same header may share a directory."""

    format: int = FORMAT
    plan: str
    seed: int
    image_id: str = ""
    """Model image; empty where none takes part."""
    settings: dict[str, Value] = {}
    """What of the plan can be set, but for the number of trials."""


T = TypeVar("T", bound=msgspec.Struct)


class Records(Generic[T]):
    """An open campaign directory.

    Parameters
    ----------
    path
        The directory; made if missing.
    header
        What is run.
    kind
        Type of a trial's record, with a field `index`.

    Raises
    ------
    PenumbraError
        The directory holds another campaign, or a record that cannot be read.
    """

    def __init__(self, path: Path, header: Header, kind: type[T]) -> None:
        write_header(path, header)
        self.path = path
        self.header = header
        _drop_torn_line(path / TRIALS)
        _drop_torn_line(path / NOTES)
        self.trials: list[T] = list(read_lines(path / TRIALS, kind))
        with _told(path):
            self._trials = (path / TRIALS).open("ab")
            self._notes = (path / NOTES).open("ab")

    @property
    def done(self) -> set[int]:
        """Numbers of the trials on record."""
        return {int(getattr(trial, "index")) for trial in self.trials}  # noqa: B009 - a field of every T

    def add(self, *trials: T) -> None:
        """Put trials on record; they are on the disk when this returns."""
        self.trials += trials
        with _told(self.path):
            self._trials.write(b"".join(msgspec.json.encode(trial) + b"\n" for trial in trials))
            _flush(self._trials)

    def note(self, **values: Value) -> None:
        """Write a note."""
        with _told(self.path):
            self._notes.write(msgspec.json.encode(values) + b"\n")
            _flush(self._notes)

    def close(self) -> None:
        """Close the files."""
        self._trials.close()
        self._notes.close()

    def __enter__(self) -> Records[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_header(path: Path, header: Header) -> None:
    """Make a campaign directory, or check that it is one of this campaign. Raises as `Records`."""
    with _told(path):
        path.mkdir(parents=True, exist_ok=True)
    known = read_header(path) if (path / HEADER).exists() else None
    if known is not None and known != header:
        raise PenumbraError(
            f"{path} holds another campaign: {_differs(known, header)}",
            "give another --out, or the same plan, seed and settings to go on with it",
        )
    if known is None:
        write_json(path / HEADER, header)
    if not (path / MACHINE).exists():
        cores = len(os.sched_getaffinity(0))
        write_json(path / MACHINE, describe_machine(cores, peers=False, load_before=load_average()))


def read_machine(path: Path) -> Machine | None:
    """Read where a campaign was begun; None when that was not noted."""
    try:
        return msgspec.json.decode((path / MACHINE).read_bytes(), type=Machine)
    except (OSError, msgspec.DecodeError):
        return None


def read_header(path: Path) -> Header:
    """Read what a campaign directory runs.

    Raises
    ------
    PenumbraError
        There is no campaign, or its header cannot be read.
    """
    try:
        return msgspec.json.decode((path / HEADER).read_bytes(), type=Header)
    except OSError as error:
        raise PenumbraError(
            f"{path / HEADER}: {error.strerror}: {path} is no campaign directory",
            "name the directory given to `penumbra campaign run` by --out",
        ) from None
    except msgspec.DecodeError as error:
        raise PenumbraError(f"{path / HEADER}: damaged: {error}", "run the campaign again") from None


def read_lines(path: Path, kind: Any) -> Iterator[Any]:
    """Yield the whole lines of a file of JSON lines; none of a file that does not exist.

    Raises
    ------
    PenumbraError
        A whole line is not of this kind.
    """
    if not path.exists():
        return
    decoder = msgspec.json.Decoder(kind)
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield decoder.decode(line)
        except msgspec.DecodeError as error:
            raise PenumbraError(
                f"{path}, line {number}: {error}", "take the line out; its trial is run again"
            ) from None


def read_notes(path: Path) -> list[Note]:
    """Read the notes of a campaign directory."""
    return list(read_lines(path / NOTES, Note))


def write_json(path: Path, value: object) -> None:
    """Write a file of JSON at once: after a crash it is there whole, or as it was before."""
    part = path.with_name(path.name + ".part")
    with _told(path.parent):
        with part.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
            _flush(file)
        part.replace(path)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into what the user has to mend."""
    try:
        yield
    except OSError as error:
        raise PenumbraError(
            f"campaign directory {path}: cannot be written: {error.strerror or error}",
            "free its disk, or give another --out; a broken campaign goes on where it was",
        ) from None


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _differs(known: Header, wanted: Header) -> str:
    one, other = (msgspec.to_builtins(header) for header in (known, wanted))
    return ", ".join(
        f"{key} {one[key]!r} there, {other[key]!r} here" for key in one if one[key] != other[key]
    )
