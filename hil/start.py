"""Where the `penumbra` command begins: nothing is loaded yet, and Ctrl-C ends it without a traceback."""

from __future__ import annotations

import signal


def main() -> None:
    """Load the command line, then run it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hil.cli import main as run  # noqa: PLC0415 - this is what takes its time

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
