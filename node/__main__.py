"""`python -m node CONFIG`: the flight software alone, without the bench."""

from __future__ import annotations

import sys
from pathlib import Path

from node.runtime import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m node CONFIG\n")
        sys.exit(2)
    sys.exit(main(Path(sys.argv[1])))
