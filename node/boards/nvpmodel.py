"""Power modes of a Jetson: `nvpmodel`, by name, with read-back.

A mode is a set of clock limits, not of watts. Its number differs between modules and releases, so modes are
found by name in the configuration file. Setting one may fail without a word: a mode that changes which cores
are online needs a reboot, asks for it at a prompt, and leaves the old one in force. What counts is what
`nvpmodel -q` and the clocks say afterwards.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from node.boards.sysfs import Sysfs
from telemetry.errors import PenumbraError

CONFIG: Final = "/etc/nvpmodel.conf"
TIMEOUT_S: Final = 15.0
_MODEL = re.compile(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>$")
_DEFAULT = re.compile(r"^<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>$")
UNCAPPED: Final = -1

Runner = Callable[[Sequence[str]], tuple[int, str]]
"""Runs a command without input; returns its exit code and output."""


@dataclass(frozen=True)
class PowerMode:
    """One mode of the file."""

    number: int
    name: str
    limits: dict[tuple[str, str], int] = field(default_factory=dict)
    """By (unit, limit), as `("GPU", "MAX_FREQ")`: Hz for GPU and EMC, kHz for cores."""

    @property
    def gpu_max_hz(self) -> int | None:
        """Highest clock of the GPU; None where the mode does not say, or leaves it uncapped."""
        limit = self.limits.get(("GPU", "MAX_FREQ"))
        return None if limit is None or limit == UNCAPPED else limit

    @property
    def cores(self) -> int | None:
        """Cores that are online; None where the mode does not say."""
        states = [value for (unit, _), value in self.limits.items() if unit == "CPU_ONLINE"]
        return sum(value == 1 for value in states) if states else None


def parse_modes(text: str) -> list[PowerMode]:
    """Return the modes of a configuration file, in its order.

    Raises
    ------
    PenumbraError
        There is none, or two have one name.
    """
    modes: list[PowerMode] = []
    here: PowerMode | None = None
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        begins = _MODEL.match(line)
        if begins:
            here = PowerMode(int(begins[1]), begins[2])
            modes.append(here)
        elif line.startswith("<"):
            here = None
        elif here is not None:
            fields = line.split()
            if len(fields) == 3 and re.fullmatch(r"-?\d+", fields[2]):
                here.limits[fields[0], fields[1]] = int(fields[2])
    names = [mode.name for mode in modes]
    if not modes:
        raise PenumbraError(f"{CONFIG}: no < POWER_MODEL ID=n NAME=x > in it", "install nvpmodel's own file")
    if len(set(names)) < len(names):
        raise PenumbraError(f"{CONFIG}: two power modes have one name: {', '.join(names)}", "mend the file")
    return modes


def run_command(argv: Sequence[str]) -> tuple[int, str]:
    """Run a command with no input, so that a prompt cannot hold it; return exit code and output."""
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return 127, f"{argv[0]}: not found"
    except subprocess.TimeoutExpired:
        return 124, f"{argv[0]}: no end within {TIMEOUT_S:g} s"
    except OSError as error:
        return 126, f"{argv[0]}: {error.strerror}"
    return done.returncode, done.stdout.decode(errors="replace")


class NvPModel:
    """The power modes of this module.

    Parameters
    ----------
    sysfs
        Where the configuration file is.
    gpu_max_hz
        Reads the highest clock the GPU may have now, Hz; None when it cannot be read.
    run
        Runs `nvpmodel`.
    """

    def __init__(self, sysfs: Sysfs, gpu_max_hz: Callable[[], int | None], run: Runner = run_command) -> None:
        self._sysfs = sysfs
        self._gpu_max_hz = gpu_max_hz
        self._run = run

    def modes(self) -> list[PowerMode]:
        """Return the modes there are; none without a configuration file.

        Raises
        ------
        PenumbraError
            The file is there, and no such file.
        """
        text = self._sysfs.text(self._sysfs.path(CONFIG))
        return [] if text is None else parse_modes(text)

    def current(self) -> str | None:
        """Return the name of the mode in force, None when it cannot be told."""
        code, output = self._run(["nvpmodel", "-q"])
        found = re.search(r"NV Power Mode:[ \t]*(\S+)", output)  # its number is on the next line
        return found[1] if code == 0 and found else None

    def set(self, name: str) -> None:
        """Set a mode, and read it back.

        Raises
        ------
        PenumbraError
            There is no such mode, it could not be set, or it is not in force afterwards.
        """
        modes = {mode.name: mode for mode in self.modes()}
        if name not in modes:
            raise PenumbraError(
                f"power mode {name!r}: unknown, {', '.join(modes) or 'none'} are allowed on this module",
                "take a name from `penumbra node --probe`",
            )
        mode = modes[name]
        code, output = self._run(["nvpmodel", "-m", str(mode.number)])
        last = output.strip().splitlines()[-1:] or [""]
        held = self.current()
        if code != 0 or held != name:
            raise PenumbraError(
                f"power mode {name!r} is not in force: nvpmodel ended with {code} ({last[0][:80]}), and tells"
                f" {held or 'no mode'}",
                "a mode with other cores online needs a reboot: set it by hand, as root, and reboot",
            )
        wanted, clock = mode.gpu_max_hz, self._gpu_max_hz()
        if wanted is not None and clock is not None and clock > wanted:
            raise PenumbraError(
                f"power mode {name!r} is told as in force, but the GPU may still run at {clock} Hz, above the"
                f" mode's {wanted} Hz",
                "set it by hand, as root, and look at the clocks",
            )
