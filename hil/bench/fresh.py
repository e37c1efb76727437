"""A new process, from nothing to the first token, and the most memory it ever held.

The module is its own program: ``python -m hil.bench.fresh CONTENDER MODEL THREADS SEQUENCES STARTED`` loads
the model, decodes, and writes one line of JSON. What is timed is the load, not the disk: the files are in
the page cache, as far as the loader leaves them there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from hil.bench.machine import peak_bytes
from hil.bench.stats import spread
from hil.tether import die_with
from telemetry.errors import PenumbraError
from telemetry.figures import FreshStart

Contender = Literal["penumbra", "llama.cpp"]

SEQUENCES: Final = (1, 8)
"""Numbers of sequences the peak is taken for; times are those of the first."""
STEPS: Final = 32
PROMPT: Final = (2, 105, 110, 120, 130, 140)
"""A short prompt; any ids do, the text is not looked at."""
_TIMEOUT_S: Final = 120.0


class Start(msgspec.Struct, frozen=True):
    """What one process tells."""

    import_s: float
    load_s: float
    first_token_s: float
    """From the start of the load."""
    peak_bytes: int


def measure_starts(
    image: Path,
    gguf: Path | None,
    threads: int,
    starts: int,
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> list[FreshStart]:
    """Start processes of each contender in turn.

    Parameters
    ----------
    image
        Directory of the image slot.
    gguf
        The file for llama.cpp; None leaves it out.
    threads
        Threads of each.
    starts
        Processes of each contender, 1 or more; one more of each for the peak of many sequences.

    Raises
    ------
    PenumbraError
        A process failed; the message carries its last words.
    """
    models: dict[Contender, Path] = {"penumbra": image}
    if gguf is not None:
        models["llama.cpp"] = gguf
    found: dict[Contender, list[Start]] = {name: [] for name in models}
    few, many = SEQUENCES
    for number in range(starts):
        progress(f"fresh processes {number + 1} of {starts}", number / starts)
        for name in [*models][:: 1 if number % 2 == 0 else -1]:
            found[name].append(_run(name, models[name], threads, few))
    return [
        FreshStart(
            contender=name,
            import_s=spread([start.import_s for start in runs]),
            load_s=spread([start.load_s for start in runs]),
            first_token_s=spread([start.first_token_s for start in runs]),
            peak_bytes={
                str(few): max(start.peak_bytes for start in runs),
                str(many): _run(name, models[name], threads, many).peak_bytes,
            },
        )
        for name, runs in found.items()
    ]


def _run(name: Contender, model: Path, threads: int, sequences: int) -> Start:
    command = [sys.executable, "-m", __name__, name, str(model), str(threads), str(sequences)]
    command += [str(os.getpid()), str(time.monotonic())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode:
        words = [line for line in done.stderr.strip().splitlines() if not line.startswith(" ")]
        last = words[-1] if words else f"exit code {done.returncode}"
        raise PenumbraError(f"a fresh process of {name} failed: {last}")
    return msgspec.json.decode(done.stdout, type=Start)


def _penumbra(model: Path, threads: int, sequences: int, started_s: float) -> Start:
    from hil.bench.engine import VerifiedEngine  # noqa: PLC0415
    from node.inference.model import open_model  # noqa: PLC0415

    imported = time.monotonic()
    loaded = open_model(model, threads)
    ready = time.monotonic()
    with VerifiedEngine(loaded, threads, seats=sequences) as engine:
        engine.prefill(PROMPT)
        first = time.monotonic()
        engine.begin(sequences)
        engine.decode(STEPS)
        engine.end()
        return Start(imported - started_s, ready - imported, first - imported, peak_bytes())


def _llama(model: Path, threads: int, sequences: int, started_s: float) -> Start:
    from hil.bench.engine import LlamaEngine  # noqa: PLC0415
    from hil.bench.llama import LlamaPeer, require_peer  # noqa: PLC0415

    require_peer()
    imported = time.monotonic()
    peer = LlamaPeer(model, threads)
    ready = time.monotonic()
    engine = LlamaEngine(peer)
    engine.prefill(PROMPT)
    first = time.monotonic()
    engine.begin(sequences)
    engine.decode(STEPS)
    engine.end()
    return Start(imported - started_s, ready - imported, first - imported, peak_bytes())


def main(arguments: list[str]) -> None:
    """Run one contender and tell what it took; `started_s` is when its process was asked for, monotonic."""
    name, model, threads, sequences, parent, started_s = arguments
    die_with(int(parent))
    run = _penumbra if name == "penumbra" else _llama
    start = run(Path(model), int(threads), int(sequences), float(started_s))
    sys.stdout.write(msgspec.json.encode(start).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
