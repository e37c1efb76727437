"""The directory of one flight: made, filled with what the node needs, and described for the report."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from hil.record import Constant
from hil.scenario import PACKAGED, Scenario
from node.config import SOCKET_PATH_BYTES, FdirSection, Section, WorkerSection
from telemetry.errors import PenumbraError
from telemetry.keys import generate_key_file

SLOT = "a"
TAGS = ("measured", "estimated", "assumed")
_KEY = re.compile(r"^\s*(?P<key>[a-z0-9_]+)\s*=\s*(?P<value>[^#]+?)\s*(?:#\s*(?P<note>.*))?$")
_SECTION = re.compile(r"^\s*\[+(?P<name>[a-z_.]+)\]+")
_PHYSICAL = ("orbit", "spacecraft", "board", "radiation")


@dataclass(frozen=True)
class RunDir:
    """Paths of one flight."""

    path: Path

    @property
    def node_config(self) -> Path:
        """Configuration of the node."""
        return self.path / "node.toml"

    @property
    def keys(self) -> Path:
        """Key file of ground and node."""
        return self.path / "keys.toml"

    @property
    def state(self) -> Path:
        """State directory of the node."""
        return self.path / "state"

    @property
    def database(self) -> Path:
        """The node's database."""
        return self.state / "node.db"

    @property
    def archive(self) -> Path:
        """The ground's archive."""
        return self.path / "archive.db"

    @property
    def node_log(self) -> Path:
        """What the node wrote to standard output and error."""
        return self.path / "node.log"

    @property
    def worker_log(self) -> Path:
        """What the worker wrote to standard output and error."""
        return self.state / "worker.log"

    @property
    def bench_log(self) -> Path:
        """Log of the bench."""
        return self.path / "bench.log"

    @property
    def summary(self) -> Path:
        """The result for machines."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The result for people."""
        return self.path / "report.html"

    @property
    def record(self) -> Path:
        """All facts of the flight."""
        return self.path / "flight.json"

    @property
    def faults(self) -> Path:
        """The list of faults, as drawn before the flight."""
        return self.path / "faults.json"


def make_run_dir(parent: Path, scenario: str) -> RunDir:
    """Make `parent/<time>-<scenario>`, a new directory.

    Raises
    ------
    PenumbraError
        It cannot be made, or its path is too long for the node's socket.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    socket = RunDir(parent.absolute() / f"{stamp}-{scenario}").state / "worker.sock"
    over = len(bytes(socket)) - SOCKET_PATH_BYTES
    if over > 0:
        raise PenumbraError(
            f"run directory {socket.parent.parent}: {over} bytes too long for a Unix socket in it",
            "give a shorter one with --out",
        )
    for number in range(100):
        path = parent / (f"{stamp}-{scenario}" + (f"-{number}" if number else ""))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.exists():  # a file stands where a directory should be
                raise PenumbraError(
                    f"run directory {parent}: not a directory", "give another --out"
                ) from None
            continue
        except OSError as error:
            raise PenumbraError(
                f"run directory {path}: cannot be made: {error.strerror or error}",
                "give a writable directory with --out",
            ) from None
        return RunDir(path.resolve())
    raise PenumbraError(f"run directory {parent}/{stamp}-{scenario}: exists a hundred times", "wait a second")


def write_inputs(
    run: RunDir, scenario: Scenario, source: str, *, images_dir: Path, bus_url: str, link_url: str
) -> None:
    """Write key file, node configuration and the scenario's own text into the run directory."""
    generate_key_file(run.keys)
    (run.path / "scenario.toml").write_text(source, encoding="utf-8")
    node = scenario.node
    sections: dict[str, Mapping[str, object]] = {
        "node": {"name": node.name, "state_dir": run.state.name},
        "model": {"images_dir": str(images_dir.resolve()), "slot": SLOT, "threads": node.threads},
        "bus": {"url": bus_url},
        "link": {"url": link_url},
        "keys": {"file": run.keys.name},
        "worker": {
            "batch": node.batch,
            "seats": node.seats,
            "checked": node.checked,
            "redundant_modes": node.redundant_modes,
            "overhead_budget": node.overhead_budget,
            "epoch_tokens": node.epoch_tokens,
            "positions": node.positions,
            "epoch_s": node.epoch_s,
            "retries": node.retries,
            **_stretched(WorkerSection(), node.patience, "ping_warn_s", "ping_fatal_s", "start_timeout_s"),
        },
        "fdir": _stretched(FdirSection(), node.patience, "ping_warn_s", "ping_fatal_s", "lag_limit_s"),
        "power": msgspec.to_builtins(node.governor),
        **_tables("planner", msgspec.to_builtins(node.planner)),
        "telemetry": {
            "housekeeping_period_s": node.housekeeping_s,
            "spool_max_bytes": node.spool_bytes,
            "database_max_bytes": max(1 << 26, 4 * node.spool_bytes),
        },
        "board": msgspec.to_builtins(scenario.board),
    }
    run.node_config.write_text(to_toml(sections), encoding="utf-8")


def _stretched(section: Section, factor: float, *names: str) -> dict[str, float]:
    """Return time limits of a section, times a factor."""
    return {name: factor * getattr(section, name) for name in names}


def _tables(name: str, table: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """Return a table of tables as flat ones."""
    flat: dict[str, Mapping[str, object]] = {
        name: {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    }
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _tables(f"{name}.{key}", value)
    return flat


def to_toml(sections: Mapping[str, Mapping[str, object]]) -> str:
    """Return flat tables of strings, numbers, truth values and lists of them as TOML; None is left out."""
    lines = []
    for section, table in sections.items():
        lines.append(f"[{section}]")
        # JSON's strings, numbers, truth values and lists are TOML's.
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def scenario_text(path_or_name: str) -> str:
    """Return the text of a scenario that has been loaded before."""
    path = Path(path_or_name)
    if path.suffix != ".toml" and path_or_name == path.name:
        return (PACKAGED / f"{path.name}.toml").read_text(encoding="utf-8")
    return path.read_text(encoding="utf-8")


def constants(text: str) -> list[Constant]:
    """Return the physical constants of a scenario's text with their tags.

    The tag is the first word of the comment after a value; a constant without one is assumed, as the
    scenarios say at their head.
    """
    found, section = [], ""
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            section = heading["name"]
            continue
        match = _KEY.match(line)
        if match is None or section.split(".")[0] not in _PHYSICAL:
            continue
        note = match["note"] or ""
        tag = next((t for t in TAGS if note.startswith(t)), "assumed")
        note = note.removeprefix(tag).lstrip(": ")
        found.append(
            Constant(name=f"{section}.{match['key']}", value=match["value"].strip('"'), tag=tag, note=note)
        )
    return found


def host_manifest(image_id: str, weights_mib: float) -> dict[str, str]:
    """Return what flew: versions of code and libraries, the image, the host."""
    manifest = {
        "penumbra": _version("penumbra-node"),
        "git": _git(),
        "image": f"{image_id} ({weights_mib:.0f} MiB of protected weights)",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
    }
    for name in ("onnxruntime", "numpy", "aiomqtt", "amqtt", "sgp4", "skyfield"):
        manifest[name] = _version(name)
    return manifest


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git() -> str:
    """Return the commit the code is of, with a + when files differ from it; empty outside of git."""
    git = shutil.which("git")
    if git is None:
        return ""
    here = Path(__file__).parent

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            [git, *arguments], cwd=here, capture_output=True, text=True, check=False, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = ask("rev-parse", "--short=12", "HEAD")
    return commit + ("+" if commit and ask("status", "--porcelain", "--untracked-files=no") else "")


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
