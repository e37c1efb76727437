"""Build the wheel, install it with nothing editable, and use it outside the checkout. Run by `make smoke`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import importlib.resources as resources, fdir, hil.cli, node.runtime, telemetry.icd
assert "site-packages" in hil.cli.__file__, hil.cli.__file__
assert resources.files("hil").joinpath("scenarios/default.toml").is_file()
for package in (fdir, hil, node, telemetry):
    assert resources.files(package).joinpath("py.typed").is_file(), package
"""


def main() -> None:
    """Fail loudly when the wheel lacks anything the checkout has, or the core install lacks a library."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def run(*command: str | Path) -> None:
            subprocess.run(command, check=True, cwd=work)

        run(sys.executable, "-m", "build", "--wheel", "--outdir", work, ROOT)
        (wheel,) = work.glob("penumbra_node-*.whl")
        venv.create(work / "venv", with_pip=True)
        python = work / "venv" / "bin" / "python"
        quiet = ("--quiet", "--disable-pip-version-check")
        run(python, "-m", "pip", "install", *quiet, "-c", ROOT / "constraints.txt", wheel)
        run(python, "-c", PROGRAM)
        run(work / "venv" / "bin" / "penumbra", "--version")
    sys.stdout.write("wheel: all four packages, their data files and the command are in it\n")


if __name__ == "__main__":
    main()
