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
    """Fail loudly when the wheel lacks anything the checkout has."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = {"check": True, "cwd": work}
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(work), str(ROOT)], **run)
        (wheel,) = work.glob("penumbra_node-*.whl")
        venv.create(work / "venv", with_pip=True)
        bin_dir = work / "venv" / "bin"
        subprocess.run(
            [bin_dir / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             "-c", ROOT / "constraints.txt", f"{wheel}[bench]"], **run,
        )  # fmt: skip
        subprocess.run([bin_dir / "python", "-W", "error::SyntaxWarning", "-c", PROGRAM], **run)
        subprocess.run([bin_dir / "penumbra", "--version"], **run)
        subprocess.run([bin_dir / "penumbra", "fly", "--help"], **run, stdout=subprocess.DEVNULL)
    sys.stdout.write("wheel: all four packages, data files and the command are in it\n")


if __name__ == "__main__":
    main()
