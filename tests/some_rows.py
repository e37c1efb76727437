"""Rows of FDIR tables as the tests need them."""

from __future__ import annotations

from typing import Any

import msgspec

from fdir.table import Action, Limit, Report, Row, Table
from telemetry.packets import Severity


def make_row(id: str, *, action: Action = Action.NONE, **values: Any) -> Row:
    """A row with an injector and a test, and what a test cares for."""
    settings: dict[str, Any] = {
        "text": f"{id} is wrong",
        "level": action.level,
        "check": Report(),
        "severity": Severity.MEDIUM,
        "max_events": 1000,
        "injector": "hil.row_faults.trigger",
        "test": "tests/x.py::test_x",
    }
    return Row(id=id, action=action, **(settings | values))


def hot(id: str = "board.hot", **values: Any) -> Row:
    """A row that watches the board's temperature: over 50 degC is wrong."""
    return make_row(id, **({"item": "board.c", "check": Limit(high=50.0, unit="degC")} | values))


def ladder_table(**values: Any) -> Table:
    """A row of each level, each escalating to the next."""
    bounds = {"attempts": 2, "window_s": 100.0, "clean_s": 50.0}
    return Table(
        [
            make_row("m.repair", action=Action.REPAIR, **bounds, escalates_to="m.worker"),
            make_row("m.worker", action=Action.RESTART_WORKER, **bounds, escalates_to="m.image"),
            make_row("m.image", action=Action.SWITCH_IMAGE, **bounds, escalates_to="m.node"),
            make_row("m.node", action=Action.RESTART_NODE, **bounds, escalates_to="node.resets"),
            make_row("node.resets", action=Action.SAFE_MODE),
            make_row("m.free", action=Action.RESTART_WORKER, cooldown_s=5.0),
            make_row("m.note"),
        ]
    )


def changed(table: Table, row: str, **values: Any) -> Table:
    """A table with a row changed."""
    return Table([msgspec.structs.replace(r, **values) if r.id == row else r for r in table.rows])
