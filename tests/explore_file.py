"""Run the Hypothesis tests of one file with many seeds, in one process: `explore.py` starts this.

Arguments: file, first seed, number of seeds, limit in seconds, file of results. There each seed leaves one
line of JSON: its number, its examples, and of each failed test the node id and what it said.
"""

from __future__ import annotations

import json
import re
import sys
import time

import pytest

EXAMPLES = re.compile(r"(\d+) passing, (\d+) failing")
TIMEOUT_S = 600
"""Limit of one test with one seed (assumed): 5 times that of `make test`, for a busy machine."""


class Seeds:
    """A pytest plugin that runs what was collected once with each seed."""

    def __init__(self, seeds: range, limit_s: float, results: str) -> None:
        self.seeds, self.ends_s, self.results = seeds, time.monotonic() + limit_s, results
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None  # pytest itself reports what could not be collected
        from hypothesis import core  # not above: pytest wants to import its plugin's module first

        items = session.items
        for seed in self.seeds:
            if time.monotonic() >= self.ends_s:
                break
            core.global_force_seed = seed
            self.failures, examples = {}, 0
            # After the last one stays open what the first one is in, but not that test: it is set up again.
            for item, following in zip(items, [*items[1:], items[0].parent], strict=True):
                item.hypothesis_statistics = ""
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                counts = EXAMPLES.findall(item.hypothesis_statistics)
                examples += sum(int(count) for pair in counts for count in pair)
            with open(self.results, "a", encoding="utf-8") as file:
                line = {"seed": seed, "count": examples, "failures": self.failures}
                file.write(json.dumps(line) + "\n")
        return True


def main(path: str, first: str, count: str, limit_s: str, results: str) -> int:
    seeds = Seeds(range(int(first), int(first) + int(count)), float(limit_s), results)
    options = [
        "--hypothesis-profile",
        "explore",
        "-m",
        "hypothesis",
        "-p",
        "no:cacheprovider",
        "--tb",
        "short",
    ]
    return pytest.main([path, *options, "--timeout", str(TIMEOUT_S)], plugins=[seeds])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
