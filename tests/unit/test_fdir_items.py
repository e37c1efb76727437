"""Every item of the dictionary is sampled, what rows are valid by first."""

from __future__ import annotations

import ast
import inspect
import os

from fdir.items import ITEMS
from fdir.table import load_table
from node import fdir_items


def sampled() -> list[str]:
    """Names of the items in the order in which they are sampled."""
    (function,) = ast.parse(inspect.getsource(fdir_items.sample)).body
    (literal,) = [node for node in ast.walk(function) if isinstance(node, ast.Dict)]
    return [key.value for key in literal.keys if isinstance(key, ast.Constant)]


def test_items_sampled_are_those_of_the_dictionary():
    assert sorted(sampled()) == sorted(ITEMS)


def test_what_a_row_is_valid_by_is_sampled_before_what_it_watches():
    order = sampled()
    rows = [row for row in load_table().rows if row.validity]
    assert rows
    for row in rows:
        assert order.index(row.validity) < order.index(row.item), row.id


def test_memory_of_a_process_is_told_and_of_none_that_is_not():
    used = fdir_items.resident_bytes(os.getpid())
    assert used is not None
    assert used > 10_000_000
    assert fdir_items.resident_bytes(None) is None
    assert fdir_items.resident_bytes(2**22 - 3) is None
    assert fdir_items.open_files() is not None
