"""`make walks`: every random walk of `tests/property/walk_*.py` over 100,000 steps, as a Markdown table."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

PROPERTY = Path(__file__).with_name("property")


def main() -> int:
    parser = argparse.ArgumentParser(description="Walk every state machine.")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    args = parser.parse_args()
    sys.path[:0] = [str(PROPERTY), str(PROPERTY.parent)]
    print("| state machine | steps | seeds | invariants broken | steps/s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    broken_all = 0
    for path in sorted(PROPERTY.glob("walk_*.py")):
        walk = importlib.import_module(path.stem).walk
        started_s, broken = time.perf_counter(), 0
        for seed in args.seeds:
            try:
                walk(args.steps, seed)
            except AssertionError as error:
                broken += 1
                sys.stderr.write(f"{path.stem}, seed {seed}: {error}\n")
        rate = len(args.seeds) * args.steps / (time.perf_counter() - started_s)
        name = path.stem.removeprefix("walk_").replace("_", " ")
        seeds = ", ".join(map(str, args.seeds))
        print(f"| {name} | {len(args.seeds) * args.steps:,} | {seeds} | {broken} | {rate:,.0f} |", flush=True)
        broken_all += broken
    return broken_all


if __name__ == "__main__":
    sys.exit(main())
