"""Every row of the FDIR table names an injector and a test; the test fails when the row is disabled."""

from __future__ import annotations

from pathlib import Path

import pytest
from fdir_trace import disabled_problems, injector_problem, test_problem

from fdir.table import Row, load_table

ROOT = Path(__file__).parents[2]
ROWS = load_table().rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_has_an_injector_and_a_test(row: Row) -> None:
    assert injector_problem(row.injector) == ""
    assert test_problem(row, ROOT) == ""


@pytest.mark.timeout(300)
def test_the_tests_of_the_rows_fail_when_their_rows_are_disabled(tmp_path: Path) -> None:
    assert disabled_problems(ROWS, ROOT, tmp_path / "rows.xml") == {}
