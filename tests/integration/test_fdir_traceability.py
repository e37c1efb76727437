"""Every row of the FDIR table names an injector and a test; the test fails when the row is disabled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fdir_trace import disabled_problem, injector_problem, test_problem

from fdir.table import Row, load_table

ROOT = Path(__file__).parents[2]
ROWS = load_table().rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_has_an_injector_and_a_test(row: Row) -> None:
    assert injector_problem(row.injector) == ""
    assert test_problem(row, ROOT) == ""


@pytest.mark.timeout(300)
def test_the_test_of_a_row_fails_when_the_row_is_disabled(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda row: disabled_problem(row, ROOT, tmp_path / f"{row.id}.xml"), ROWS)
        problems = {row.id: problem for row, problem in zip(ROWS, found, strict=True) if problem}
    assert problems == {}
