"""Runs tests as aarch64 code, emulated: `python tests/aarch64.py [--cpu cortex-a76] [what pytest takes]`.

Emulation by qemu-user is exact for integer and IEEE arithmetic, so kernels of ONNX Runtime give what they
give on such a CPU; only speed and races differ. What is needed comes from Debian (qemu-user 10 or newer, a
root for arm64 with Python) and the package index (wheels for aarch64), into `build/aarch64`, once.

Needs apt and dpkg of a Debian host; any of its releases will do.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / "build" / "aarch64"
SUITE: Final = "trixie"
"""Release of Debian that all comes from: qemu 7.2 of the one before crashes in ONNX Runtime (measured)."""
PYTHON: Final = "3.13"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES: Final = (f"python{PYTHON}", "libstdc++6", "libgomp1")
EXTRAS: Final = ("gemma", "ground", "bench", "dev")
LEFT_OUT: Final = ("penumbra-node", "mypy", "ruff", "import-linter", "build")
PLATFORMS: Final = (
    "manylinux_2_34",
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_26",
    "manylinux_2_17",
    "manylinux2014",
)
SOURCE_ONLY: Final = ("forbiddenfruit",)
"""Pure Python without a wheel in the index: one is made here."""
TESTS: Final = (
    *(f"tests/unit/test_{name}.py" for name in (
        "operators", "graph", "screen", "head", "image", "packing", "calibration", "compute_checks",
        "erasure", "parity", "protected_weights", "tokenizer", "sampling", "arena", "verified", "mending",
    )),
    "tests/property/test_screen_proof.py",
    "tests/integration/test_emulated_flight.py",
)  # fmt: skip
"""What rests on the arithmetic of the CPU, and a flight with the tiny model."""
SLOWER: Final = 25
"""Times an emulated test takes longer, about: what the time limit of a test is multiplied by (measured)."""
_SITE = """\
# A child is started by the path in sys.executable: that of the emulator's script, not of the emulated Python.
import os
import sys

sys.executable = os.environ["PENUMBRA_PYTHON"]
"""


class SetupError(Exception):
    """What is missing, and how to get it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up what is missing and run; returns the exit code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", default="cortex-a76", help="CPU model of qemu (default: %(default)s)")
    parser.add_argument("--setup", action="store_true", help="set up only, and print the Python to use")
    options, rest = parser.parse_known_args(arguments)
    try:
        python = set_up()
    except SetupError as error:
        print(f"aarch64: {error}", file=sys.stderr)
        return 2
    if options.setup:
        print(python)
        return 0
    command = [
        python,
        "-m",
        "pytest",
        "-m",
        "not gemma",
        "-p",
        "no:cacheprovider",
        f"--timeout={120 * SLOWER}",
    ]
    if not [each for each in rest if not each.startswith("-")]:
        rest = [*rest, *TESTS]
    environment = os.environ | {"PENUMBRA_QEMU_CPU": options.cpu}
    return subprocess.run([*map(str, command), *rest], cwd=ROOT, env=environment, check=False).returncode


def set_up() -> Path:
    """Get what is missing; return the script that stands for the emulated Python."""
    done = FOLDER / "python"
    wanted = _wanted()
    stamp = FOLDER / "wanted.txt"
    if done.exists() and stamp.exists() and stamp.read_text() == wanted:
        return done
    for tool in ("apt-get", "dpkg", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SetupError(f"{tool} is not here: the emulator and its root come from Debian's packages")
    if not KEYRING.exists():
        raise SetupError(f"{KEYRING} is missing: apt-get install debian-archive-keyring")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    mirror = _mirror()
    host = _output("dpkg", "--print-architecture").strip()
    print(f"aarch64: getting qemu-user, Python {PYTHON} for arm64 and wheels into {FOLDER}", file=sys.stderr)
    _unpack(mirror, host, ("qemu-user",), FOLDER / "qemu", depends=False)
    _unpack(mirror, "arm64", PACKAGES, FOLDER / "root", depends=True)
    lib = FOLDER / "root" / "lib"
    if not lib.exists():
        lib.symlink_to("usr/lib")
    _wheels(FOLDER / "site")
    (FOLDER / "site" / "sitecustomize.py").write_text(_SITE)
    _script(done)
    version = _output(str(done), "-c", "import platform; print(platform.machine())").strip()
    if version != "aarch64":
        raise SetupError(f"{done} does not run: it says {version!r}")
    stamp.write_text(wanted)
    return done


def _wanted() -> str:
    return "\n".join(
        (SUITE, PYTHON, *PACKAGES, *_requirements(), (ROOT / "constraints.txt").read_text(), _SITE)
    )


def _requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for extra in EXTRAS for each in project["optional-dependencies"][extra]]
    return [each for each in (*project["dependencies"], *extras) if not each.startswith(LEFT_OUT)]


def _mirror() -> str:
    """Return the address this host takes Debian's packages from."""
    found = _output("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Identifier: Packages")
    for line in found.splitlines():
        origin, _, address = line.partition(" ")
        if origin == "Debian" and "security" not in address:
            return address
    raise SetupError("apt has no list of Debian's packages: run `apt-get update` on a Debian host first")


def _unpack(mirror: str, architecture: str, names: Sequence[str], into: Path, *, depends: bool) -> None:
    """Download packages of the suite and unpack them; with `depends`, all they need too."""
    apt = FOLDER / f"apt-{architecture}"
    archives = apt / "cache" / "archives"
    for folder in (apt / "lists" / "partial", archives / "partial", into):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {SUITE} main\n")
    settings = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": apt / "lists",
        "Dir::State::Status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _run("apt-get", *options, "-qq", "update")
    if depends:
        _run("apt-get", *options, "-qq", "--yes", "--download-only", "install", *names)
    else:
        _run("apt-get", *options, "-qq", "download", *names, cwd=archives)
    for package in sorted(archives.glob("*.deb")):
        _run("dpkg-deb", "--extract", str(package), str(into))


def _wheels(site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = FOLDER / "wheels"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    _run(*pip, "wheel", "--no-deps", "--wheel-dir", str(made), *constraints, *SOURCE_ONLY)
    platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_aarch64")]
    _run(
        *pip, "install", "--target", str(site), "--find-links", str(made), "--only-binary=:all:",
        "--implementation", "cp", "--python-version", PYTHON, *platforms, *constraints, *_requirements(),
    )  # fmt: skip


def _script(path: Path) -> None:
    qemu, root = FOLDER / "qemu" / "usr" / "bin" / "qemu-aarch64", FOLDER / "root"
    python = root / "usr" / "bin" / f"python{PYTHON}"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", FOLDER / "site")))
    path.write_text(
        "#!/bin/sh\n"
        f"export PENUMBRA_PYTHON={shlex.quote(str(path))} PYTHONPATH={shlex.quote(paths)}\n"
        f'exec {shlex.quote(str(qemu))} -cpu "${{PENUMBRA_QEMU_CPU:-cortex-a76}}" '
        f'-L {shlex.quote(str(root))} {shlex.quote(str(python))} "$@"\n'
    )
    path.chmod(0o755)


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{shlex.join(command[:4])} ...: {(done.stderr or done.stdout).strip()[-800:]}")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{shlex.join(command)}: {done.stderr.strip()[-800:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
