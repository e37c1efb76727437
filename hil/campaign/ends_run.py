"""`penumbra campaign run ends`: flights whose bench is ended, or whose output is, at a random moment.

Each trial is the command of a user in a process of its own: a short flight with everything a flight has. One
undisturbed flight comes first, to know how long they are. What is left is found by a mark in the environment,
which every process of a trial inherits.
"""

from __future__ import annotations

import asyncio
import os
import pty
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from hil.campaign.records import Header, Records
from hil.ending import ECHO_S, EXIT_INTERRUPTED
from hil.node_process import until
from hil.processes import Process, all_processes, same
from hil.run_dir import RunDir, scenario_text
from hil.shared_memory import MARK, clear_left
from node.config import NodeConfig
from node.inference.arena_layout import SHARED_MEMORY
from node.inference.manifest import image_id, load_manifest
from telemetry.errors import PenumbraError

Kind: TypeAlias = Literal["hup", "term", "twice", "kill", "pipe", "full"]
KINDS: Final[tuple[Kind, ...]] = ("hup", "term", "twice", "kill", "pipe", "full")
REPORT_DUE: Final = {"hup", "term", "pipe", "full"}
SHORT: Final = {
    "duration_orbits": "0.05", "speed": "300.0", "positions": "256", "max_tokens": "[24]",
    "min_flips_injected": "0", "min_contacts": "0",
}  # fmt: skip
"""What makes a flight of a second of the packaged scenario."""
END_S: Final = 120.0
"""Longest wait for a bench to end, s; then it hangs."""
GONE_S: Final = 10.0
"""Longest wait for what a dead bench started to be gone, s."""
POLL_S: Final = 0.02
STARTING: Final = "starting"
ENDED: Final = "ended"
ENVIRONMENT: Final = "PENUMBRA_TRIAL"
AS_BY_A_USER: Final = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
if sys.argv[1] == "terminal":
    os.login_tty(0)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts a flight. A campaign under `nohup` would hand down its ignored SIGHUP, and the flight obey that."""
ENDED_EARLY: Final = {"loading the model", "flying"}
"""Phases in which a signal must show in the return code."""


class EndRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One flight and how it ended."""

    index: int
    kind: Kind
    variant: bool
    """Of `hup`: a terminal that closes instead of a signal. Of `pipe` and `full`: standard error as well."""
    moment_s: float
    """After the beginning of the phase that was drawn, s."""
    phase: str
    """In which phase that was in the end."""
    code: int | None
    """Return code; None if it hung and was killed."""
    end_s: float
    """From the moment, of `twice` from the second signal, to the end of the bench, s."""
    processes_left: int
    shared_left: int
    """Pieces of shared memory left once the next flight has begun."""
    cleared: int
    """Pieces that were there for the next flight to clear."""
    begun: bool
    """Whether there is a run directory: from then on a report is due."""
    report: bool
    """Whether there is a whole report."""
    problems: list[str] = []

    @property
    def is_right(self) -> bool:
        """Whether it ended as it should."""
        return not self.problems


async def run_ends(
    images: Path,
    out: Path,
    *,
    trials: int,
    seed: int,
    at_once: int = 2,
    say: Callable[[str, float], None] = lambda text, part: None,
) -> None:
    """Run so many flights of each kind, or the rest of them.

    Raises
    ------
    PenumbraError
        The undisturbed flight fails, or the directory holds another campaign.
    """
    header = Header(plan="ends", seed=seed, image_id=image_id(load_manifest(images / "a")))
    with Records(out, header, EndRecord) as records:
        left = [index for index in range(trials * len(KINDS)) if index not in records.done]
        if not left:
            return
        say("an undisturbed flight", 0.0)
        phases_s = await undisturbed(images)
        waiting, count = iter(left), 0

        async def work() -> None:
            nonlocal count
            for index in waiting:
                records.add(await run_trial(images, index, seed, phases_s))
                count += 1
                say(f"flight {count} of {len(left)}", count / len(left))

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work(), name="hil.campaign.ends")


async def run_trial(images: Path, index: int, seed: int, phases_s: dict[str, float]) -> EndRecord:
    """Fly, end it in one of `phases_s`, which says how long they last, and look at what is left."""
    rng = random.Random(f"{seed} {index}")  # noqa: S311 - moments of faults
    kind, variant = KINDS[index % len(KINDS)], rng.random() < 0.5
    phase, share = rng.choice(list(phases_s)), rng.random()
    if kind == "full":
        phase, share = STARTING, 0.0
    with _folder() as folder:
        flight = _Flight(images, folder, kind, variant)
        await flight.start()
        try:
            while flight.phase() not in {*list(phases_s)[list(phases_s).index(phase) :], ENDED}:
                await flight.until_ended(POLL_S)
            moment_s = share * phases_s[phase]
            await flight.until_ended(moment_s)
            phase = flight.phase()
            await flight.strike()
            struck_s = time.monotonic()
            code = await flight.until_ended(END_S)
            end_s = time.monotonic() - struck_s
            processes_left = await flight.end_what_is_left()
        finally:
            await flight.close()
        before = flight.shared()
        if kind == "kill":
            clear_left()  # as the next flight does before anything else
        run = flight.run_dir()
        record = EndRecord(
            index=index, kind=kind, variant=variant, moment_s=round(moment_s, 3), phase=phase, code=code,
            end_s=round(end_s, 3), processes_left=processes_left, shared_left=len(flight.shared()),
            cleared=len(before) if kind == "kill" else 0, begun=run is not None,
            report=run is not None and is_whole(run.report),
        )  # fmt: skip
        found = list(problems(record, flight.said()))
        if found:
            shutil.copytree(folder, keep := Path(tempfile.mkdtemp(prefix="ends-")), dirs_exist_ok=True)
            found.append(f"kept in {keep}")
        return msgspec.structs.replace(record, problems=found)


def problems(record: EndRecord, said: str) -> Iterator[str]:
    """Yield what is wrong with how a flight ended; `said` is what came on its standard error."""
    if record.code is None:
        yield "the bench hung"
    if record.processes_left:
        yield f"{record.processes_left} processes left"
    if record.shared_left:
        yield f"{record.shared_left} pieces of shared memory left"
    if record.kind in REPORT_DUE and record.begun and not record.report:
        yield "no whole report"
    if record.kind in {"pipe", "full"} and not record.begun:
        yield "no run directory"
    if "Traceback" in said:
        yield "a traceback"
    codes: set[int | None] = {0, 1}
    if record.kind in {"hup", "term", "twice"}:
        codes = {EXIT_INTERRUPTED} if record.phase in ENDED_EARLY else {*codes, EXIT_INTERRUPTED}
    if record.kind == "kill":
        codes.add(-signal.SIGKILL)
    if not record.begun:  # nothing to end in order yet
        codes |= {EXIT_INTERRUPTED, -signal.SIGHUP, -signal.SIGTERM, -signal.SIGINT}
    if record.code is not None and record.code not in codes:
        yield f"return code {record.code}"


def is_whole(report: Path) -> bool:
    """Return whether there is a report, written to its end."""
    return report.is_file() and report.read_text(encoding="utf-8").endswith("</html>\n")


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a directory with a short path: the node's socket lies some levels below."""
    with tempfile.TemporaryDirectory(prefix="pe-", ignore_cleanup_errors=True) as name:
        yield Path(name)


async def undisturbed(images: Path) -> dict[str, float]:
    """Fly once; return the phases in their order and how long each took, s. Raises as `run_ends`."""
    with _folder() as folder:
        flight = _Flight(images, folder, "full", variant=False)
        begun_s = {STARTING: time.monotonic()}
        await flight.start()
        try:
            while (code := await flight.until_ended(POLL_S)) is None:
                begun_s.setdefault(flight.phase(), time.monotonic())
        finally:
            await flight.end_what_is_left()
            await flight.close()
        run = flight.run_dir()
        if code not in {0, 1} or run is None or not is_whole(run.report):
            raise PenumbraError(
                f"an undisturbed flight fails with code {code}: {flight.said()}", "fly one by itself"
            )
        ends_s = [*list(begun_s.values())[1:], time.monotonic()]
        return {phase: end_s - begun_s[phase] for phase, end_s in zip(begun_s, ends_s, strict=True)}


class _Flight:
    """One flight under way."""

    def __init__(self, images: Path, folder: Path, kind: Kind, variant: bool) -> None:
        self._kind, self._variant, self._folder = kind, variant, folder
        self._mark = f"{ENVIRONMENT}={secrets.token_hex(8)}"
        self._ends: dict[str, int] = {}
        """Our ends of the flight's output, by name."""
        self._process: asyncio.subprocess.Process | None = None
        text = scenario_text("default-short")
        for key, value in SHORT.items():
            text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        (folder / "short.toml").write_text(text, encoding="utf-8")
        self._command = [
            *(sys.executable, "-m", "hil.start", "fly", str(folder / "short.toml")),
            *("--images", str(images), "--out", str(folder / "r")),
        ]  # fmt: skip

    async def start(self) -> None:
        """Start the command, with its output where the kind of trial wants it."""
        given, terminal = [], self._kind == "hup" and self._variant
        command = [sys.executable, "-I", "-c", AS_BY_A_USER, "terminal" if terminal else "", *self._command]
        errors = os.open(self._folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        given.append(errors)
        if terminal:
            self._ends["terminal"], out = pty.openpty()
        elif self._kind == "pipe":
            self._ends["pipe"], out = os.pipe()
        else:
            out = os.open("/dev/full" if self._kind == "full" else os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        given.append(out)
        both = terminal or (self._kind in {"pipe", "full"} and self._variant)
        name, _, value = self._mark.partition("=")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=out if terminal else asyncio.subprocess.DEVNULL, stdout=out,
                stderr=out if both else errors, env={**os.environ, name: value},
            )  # fmt: skip
        finally:
            for descriptor in given:
                os.close(descriptor)

    async def until_ended(self, bound_s: float) -> int | None:
        """Wait for the end of the bench; return its code, None if it goes on."""
        assert self._process is not None  # noqa: S101 - started
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._process.wait(), bound_s)
        return None

    async def strike(self) -> None:
        """Do what this kind of trial is about, if the bench has not ended."""
        match self._kind:
            case "hup" if self._variant:
                os.close(self._ends.pop("terminal"))
            case "pipe":
                os.close(self._ends.pop("pipe"))
            case "hup":
                self._signal(signal.SIGHUP)
            case "kill":
                self._signal(signal.SIGKILL)
            case "term":
                self._signal(signal.SIGTERM)
            case "twice":
                self._signal(signal.SIGTERM)
                await self.until_ended(ECHO_S + 0.1)
                self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None  # noqa: S101 - started
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def run_dir(self) -> RunDir | None:
        """Return the run directory; None while there is none."""
        found = list((self._folder / "r").glob("*"))
        return RunDir(found[0]) if found else None

    def phase(self) -> str:
        """Return the phase the flight is in."""
        assert self._process is not None  # noqa: S101 - started
        if self._process.returncode is not None:
            return ENDED
        run = self.run_dir()
        if run is None:
            return STARTING
        log = run.bench_log.read_text(encoding="utf-8") if run.bench_log.exists() else ""
        return str(re.findall(r"phase: (.*)$", f"phase: {STARTING}\n{log}", re.MULTILINE)[-1])

    def said(self) -> str:
        """Return what came on standard error, where that was kept."""
        return (self._folder / "stderr").read_text(encoding="utf-8", errors="replace")

    def shared(self) -> list[Path]:
        """Return the shared memory of this flight that is there."""
        assert self._process is not None  # noqa: S101 - started
        found = list(SHARED_MEMORY.glob(f"penumbra-*-{self._process.pid}-*"))
        run = self.run_dir()
        if run is not None:
            with suppress(PenumbraError):  # not written yet: no node was started
                arena = NodeConfig.load(run.node_config).arena_path
                found += [path for path in (arena, arena.with_name(arena.name + MARK)) if path.exists()]
        return found

    async def end_what_is_left(self) -> int:
        """Wait for all of its processes to be gone; kill and count those that stay."""
        await until(lambda: not self._processes(), GONE_S)
        left = self._processes()
        for process in left:
            if same(process):
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        return len(left)

    def _processes(self) -> list[Process]:
        mark, found = self._mark.encode(), []
        for process in all_processes():
            with suppress(OSError):
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    found.append(process)
        return found

    async def close(self) -> None:
        """End the bench if it has not ended, and close what is open."""
        self._signal(signal.SIGKILL)
        await self.until_ended(END_S)
        for descriptor in self._ends.values():
            os.close(descriptor)
        self._ends.clear()
