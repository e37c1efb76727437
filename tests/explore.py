"""`make explore`, `make walks`: walks and properties of `tests/property` with many seeds, a Markdown table.

A walk is one file: `walk_*.py`, whose `walk(steps, seed)` is called, or a file of Hypothesis tests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
PROPERTY = TESTS / "property"
LINES = 40
"""How much of a failure is printed: its end, where the example is."""


class Ran(NamedTuple):
    """What one seed did: examples or steps, and each failure with the command that runs it again."""

    seed: int
    count: int
    failures: list[tuple[str, list[str]]]


def main(argv: list[str], folder: Path = PROPERTY) -> int:
    parser = argparse.ArgumentParser(prog="explore", description="Run walks and properties with new seeds.")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds each walk takes")
    parser.add_argument("--first-seed", type=int, help="default: of the clock, so that seeds are new")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit, spread over the walks")
    parser.add_argument("--steps", type=int, default=2_000, help="steps of a walk_*.py with each seed")
    parser.add_argument("walks", nargs="*", help="names of files in tests/property without .py; default: all")
    args = parser.parse_args(argv)
    known = {path.stem: path for path in sorted(folder.glob("*.py")) if is_walk(path)}
    for name in args.walks:
        if name not in known:
            parser.error(f"no walk {name!r}; there are: {', '.join(known)}")
    chosen = args.walks or list(known)
    first = int(time.time()) if args.first_seed is None else args.first_seed
    seeds = range(first, first + args.seeds)
    ends_s = time.monotonic() + 60 * args.minutes
    sys.path[:0] = [str(folder), str(TESTS)]

    print("| walk | seeds | examples or steps | failures | seconds |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    all_sound = True
    for place, name in enumerate(chosen):
        began_s = time.monotonic()
        limit_s = (ends_s - began_s) / (len(chosen) - place)
        runs = (
            walked(name, args.steps, seeds, limit_s)
            if name.startswith("walk_")
            else examined(known[name], seeds, limit_s)
        )
        done = count = failed = 0
        for ran in runs:
            done, count, failed = done + 1, count + ran.count, failed + bool(ran.failures)
            for said, command in ran.failures:
                end = "\n".join(said.splitlines()[-LINES:])
                sys.stderr.write(f"{name}, seed {ran.seed}:\n{end}\nagain: {shlex.join(command)}\n\n")
        which = f"{first} to {first + done - 1}" if done else "no time left"
        took_s = time.monotonic() - began_s
        print(f"| {name} | {which} | {count:,} | {failed} | {took_s:,.0f} |", flush=True)
        all_sound &= not failed
    return 0 if all_sound else 1


def is_walk(path: Path) -> bool:
    if path.stem.startswith("test_"):
        return "from hypothesis" in path.read_text(encoding="utf-8")
    return path.stem.startswith("walk_")


def walked(name: str, steps: int, seeds: range, limit_s: float) -> Iterator[Ran]:
    """Take so many steps of a `walk_*.py` with each seed."""
    walk = importlib.import_module(name).walk
    ends_s = time.monotonic() + limit_s
    for seed in seeds:
        if time.monotonic() >= ends_s:
            return
        failures = []
        try:
            walk(steps, seed)
        except Exception as error:  # whatever it is, the other seeds are run
            options = ["--first-seed", str(seed), "--seeds", "1", "--steps", str(steps)]
            again = [sys.executable, "tests/explore.py", name, *options]
            failures.append((f"{type(error).__name__}: {error}", again))
        yield Ran(seed, steps, failures)


def examined(path: Path, seeds: range, limit_s: float) -> Iterator[Ran]:
    """Run the Hypothesis tests of a file with each seed, in one child process."""
    with tempfile.TemporaryDirectory(prefix="penumbra-explore-") as scratch:
        results, said = Path(scratch, "results"), Path(scratch, "said")
        results.touch()
        arguments = [str(path), str(seeds.start), str(len(seeds)), str(limit_s), str(results)]
        with said.open("w") as output:
            command = [sys.executable, str(TESTS / "explore_file.py"), *arguments]
            ended = subprocess.run(command, check=False, cwd=TESTS.parent, stdout=output, stderr=output)
        seed, failed = seeds.start, False
        for line in map(json.loads, results.read_text(encoding="utf-8").splitlines()):
            seed, count, failures = line["seed"], line["count"], line["failures"]
            options = ["--hypothesis-profile", "explore", "--hypothesis-seed", str(seed)]
            again = [sys.executable, "-m", "pytest", *options]
            tests = {f"{path}::{test.partition('::')[2]}": text for test, text in failures.items()}
            yield Ran(seed, count, [(text, [*again, test]) for test, text in tests.items()])
            seed, failed = seed + 1, failed or bool(failures)
        if ended.returncode and not failed:  # the child died, or there was nothing to run
            yield Ran(
                seed, 0, [(f"{said.read_text(encoding='utf-8')}\nended with {ended.returncode}", command)]
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
