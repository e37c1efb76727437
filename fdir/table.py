"""The FDIR table: every fault the node watches for, and what is done about it. Typed, and refused whole.

`load_table` returns an immutable table or raises; a table in use is only ever replaced by another whole one.
The packaged table is `fdir/table.toml`; `docs/fdir-table.md` is generated from it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from fdir import expr as expressions
from fdir.items import ITEMS, ItemType
from telemetry.errors import PenumbraError
from telemetry.packets import Level, Mode, Severity
from telemetry.strict_toml import convert_toml, parse_toml, shown

PACKAGED: Final = Path(__file__).with_name("table.toml")
"""The table of the software."""
ACTS_IN_WORKER: Final = frozenset({"weights.digest", "kv.digest", "compute.check"})
"""Rows the worker acts on by itself before it reports: they are enabled or disabled, never passive."""
_ID = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")


class Action(StrEnum):
    """What a row that fires asks for."""

    NONE = "none"
    """Report only."""
    REPAIR = "repair"
    """Mend the damage in place."""
    REDO = "redo"
    """Decode the epoch again."""
    RESTART_WORKER = "restart_worker"
    SWITCH_IMAGE = "switch_image"
    """Mend the model image, go to the other slot, or rebuild it."""
    RESTART_NODE = "restart_node"
    """End, to be started again by the watchdog."""
    SAFE_MODE = "safe_mode"
    POWER_CYCLE = "power_cycle"
    """Ask the bus to switch the board off and on."""
    REJECT = "reject"
    """Do not use the value."""

    @property
    def level(self) -> Level:
        """Recovery level of the action."""
        return _LEVELS[self]


_LEVELS: Mapping[Action, Level] = {
    Action.NONE: Level.IN_WORKER_REPAIR,
    Action.REJECT: Level.IN_WORKER_REPAIR,
    Action.REPAIR: Level.IN_WORKER_REPAIR,
    Action.REDO: Level.EPOCH_REDO,
    Action.RESTART_WORKER: Level.WORKER_RESTART,
    Action.SWITCH_IMAGE: Level.IMAGE_REBUILD,
    Action.RESTART_NODE: Level.NODE_RESTART,
    Action.POWER_CYCLE: Level.NODE_RESTART,
    Action.SAFE_MODE: Level.SAFE_MODE,
}


class RowState(StrEnum):
    """How far a row may go."""

    ENABLED = "enabled"
    PASSIVE = "passive"
    """Evaluated and reported, no action."""
    DISABLED = "disabled"
    """Not evaluated."""


class _Check(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    pass


class Limit(_Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="limit"):
    """The item is under `low` or above `high`."""

    low: float | None = None
    high: float | None = None
    unit: str
    """Unit of the limits; must be the item's."""


class Expected(_Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="expected"):
    """The item, of type int or bool, is not `value` in the bits of `mask`."""

    value: int | bool
    mask: Annotated[int, Meta(ge=1)] | None = None
    """Bits that count; all when not given."""


class Delta(_Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="delta"):
    """The item changed by less than `low` or more than `high` over so many samples."""

    low: float | None = None
    high: float | None = None
    unit: str
    """Unit of the change; must be the item's."""
    samples: Annotated[int, Meta(ge=1, le=10_000)] = 1
    """Samples back to the one compared with."""


class Stale(_Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stale"):
    """No readable sample of the item has come for so long."""

    after_s: Annotated[float, Meta(gt=0)]


class Expr(_Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="expr"):
    """A boolean combination of the watch results of other rows holds, see `fdir.expr`."""

    rows: Annotated[str, Meta(min_length=1)]


class Report(_Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="report"):
    """A component of the node found it, and says so."""


Check: TypeAlias = Limit | Expected | Delta | Stale | Expr | Report
_CHECKS: Mapping[str, type[_Check]] = {
    str(kind.__struct_config__.tag): kind for kind in (Limit, Expected, Delta, Stale, Expr, Report)
}
_ON_ITEM: Final = (Limit, Expected, Delta, Stale)

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Positive = Annotated[float, Meta(gt=0)]


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of the table: one fault, its check, and what is done about it."""

    id: Text
    """Lower-case words joined by full stops, e.g. `worker.memory`."""
    text: Text
    """What is wrong when it fires, in words."""
    level: Level
    """Recovery level; must be the action's."""
    item: str = ""
    """Item watched (`fdir.items`); empty for the checks `expr` and `report`."""
    check: Check
    validity: str = ""
    """Item of type bool that must be true, else the row is not checked; empty: always valid."""
    modes: tuple[Mode, ...] = ()
    """Modes in which it is checked; empty: in all."""
    stale_after_s: Positive | None = None
    """Age of the last sample from which the result is stale; None: it stays."""
    persistence: Count = 1
    """Violations in a row until it counts as failed."""
    clear: Count = 1
    """Good results in a row until it counts as passed again."""
    state: RowState = RowState.ENABLED
    """State until the ground commands another."""
    severity: Severity
    """Of its events."""
    max_events: Annotated[int, Meta(ge=0, le=100_000)]
    """Violations announced within any hour, the first ones; 0: none. All are counted."""
    action: Action
    attempts: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Actions allowed within `window_s`, then it escalates; 0: without limit, it never escalates by count."""
    window_s: Positive = 3600.0
    cooldown_s: Annotated[float, Meta(ge=0)] = 0.0
    """Shortest time between two actions."""
    escalates_to: str = ""
    """Row of a higher level that takes over when the attempts are used up or the action fails; empty: none
    in the table (then the node goes to safe mode)."""
    clean_s: Positive = 600.0
    """Time without a violation after which its attempts are forgotten."""
    rearm: Literal["auto", "ground"] = "auto"
    """Who lets it fire again: `auto` its recovery or `clear` good results, `ground` only a telecommand."""
    injector: Text
    """Dotted name, in `hil`, of what makes the fault happen."""
    test: Text
    """Node id of the pytest test that proves the row."""

    @property
    def is_momentary(self) -> bool:
        """True when each report is an event of its own, which fires for itself: reports of levels 0 and 1."""
        return isinstance(self.check, Report) and self.level <= Level.EPOCH_REDO


class Table:
    """An immutable, checked table.

    Parameters
    ----------
    rows
        Its rows.
    where
        What messages call the table, e.g. its path.

    Raises
    ------
    PenumbraError
        The rows do not fit together: names the row, the field and the reason.
    """

    def __init__(self, rows: Iterable[Row], where: str = "FDIR table") -> None:
        self.rows: tuple[Row, ...] = tuple(rows)
        self._by_id = {row.id: row for row in self.rows}
        _check_table(self.rows, self._by_id, where)
        self.sha256: str = hashlib.sha256(self.encode()).hexdigest()
        """Digest of the rows, 64 hex digits; comments and order of keys in the file do not count."""

    def __contains__(self, row_id: object) -> bool:
        return row_id in self._by_id

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the rows, in order."""
        return tuple(self._by_id)

    def row(self, row_id: str) -> Row:
        """Return a row.

        Raises
        ------
        PenumbraError
            There is none of that id.
        """
        if (row := self._by_id.get(row_id)) is None:
            raise PenumbraError(
                f"{row_id!r} is no row of the FDIR table; rows: {', '.join(self._by_id)}", "name one of these"
            )
        return row

    def escalation(self, row_id: str) -> tuple[Row, ...]:
        """Return the rows a row escalates to, one after the other; raises as `row`."""
        found: list[Row] = []
        row = self.row(row_id)
        while row.escalates_to:
            row = self._by_id[row.escalates_to]
            found.append(row)
        return tuple(found)

    def encode(self) -> bytes:
        """Return the rows as bytes, the same for the same rows, see `decode_table`."""
        return msgspec.json.encode(self.rows, order="deterministic")


def load_table(path: Path | None = None) -> Table:
    """Return the table of a TOML file, None: the packaged one.

    Raises
    ------
    PenumbraError
        The file is missing or no TOML, or anything in it is not allowed: names the row, the field and why.
    """
    path = PACKAGED if path is None else path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PenumbraError(f"{path}: {error.strerror}", "give the path of a readable TOML file") from error
    return read_table(content, path)


def read_table(content: bytes, path: Path) -> Table:
    """Return the table that bytes of TOML hold; `path` is for messages. Raises as `load_table`."""
    raw = parse_toml(content, str(path))
    if unknown := sorted(raw.keys() - {"row"}):
        raise PenumbraError(f"{path}: unknown key {shown(unknown[0])}; allowed: row", "remove it")
    rows = raw.get("row")
    if not isinstance(rows, list) or not rows:
        raise PenumbraError(f"{path}: it holds no [[row]]", "add the rows of the FDIR table")
    return Table([_read_row(row, index, path) for index, row in enumerate(rows)], str(path))


def decode_table(encoded: bytes) -> Table:
    """Return the table that `Table.encode` gave.

    Raises
    ------
    PenumbraError
        The bytes are none, or their rows do not fit together.
    """
    try:
        rows = msgspec.json.decode(encoded, type=list[Row])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PenumbraError(f"bytes of an FDIR table: {error}") from error
    return Table(rows)


def _read_row(raw: Any, index: int, path: Path) -> Row:
    if not isinstance(raw, dict):
        raise PenumbraError(
            f"{path}: row[{index}] = {shown(raw)}: a table is expected", "write it as [[row]]"
        )
    named = raw.get("id")
    where = f"{path}: row {named[:80] if isinstance(named, str) and named else f'[{index}]'}"
    check = raw.get("check")
    if isinstance(check, dict):
        # On its own first: a message about a union of checks could not name the fields allowed.
        kind = check.get("type")
        if not isinstance(kind, str) or kind not in _CHECKS:
            raise PenumbraError(
                f"{where}: check.type = {shown(kind)}; allowed: {', '.join(_CHECKS)}", "name one of these"
            )
        convert_toml(check, _CHECKS[kind], Path(f"{where}: check"))
    return convert_toml(raw, Row, Path(where))


def _check_table(rows: Sequence[Row], by_id: Mapping[str, Row], where: str) -> None:
    if not rows:
        raise PenumbraError(f"{where}: it holds no row", "add the rows of the FDIR table")
    seen: set[str] = set()
    for row in rows:
        at = f"{where}: row {row.id}"
        if row.id in seen:
            raise PenumbraError(f"{at}: id: there are two rows of this id", "rename or remove one")
        seen.add(row.id)
        for field, problem, mend in (*_row_problems(row), *_reference_problems(row, by_id)):
            raise PenumbraError(f"{at}: {field}: {problem}", mend)
    _refuse_cycles(
        {row.id: {row.escalates_to} if row.escalates_to else set() for row in rows},
        where, "escalates_to", "let each row escalate to one of a higher level",
    )  # fmt: skip
    _refuse_cycles(
        {r.id: expressions.names(expressions.parse(r.check.rows)) for r in rows if isinstance(r.check, Expr)},
        where, "check.rows", "let no expression name itself, not even through others",
    )  # fmt: skip
    for row in rows:
        if row.escalates_to and by_id[row.escalates_to].level <= row.level:
            raise PenumbraError(
                f"{where}: row {row.id}: escalates_to = {row.escalates_to!r} of level"
                f" {by_id[row.escalates_to].level.value}, this row is of level {row.level.value}",
                "name a row of a higher level",
            )


_Problem: TypeAlias = tuple[str, str, str]
"""Field, what is wrong with it, how to mend it."""


def _row_problems(row: Row) -> Iterable[_Problem]:
    if not _ID.fullmatch(row.id):
        yield "id", f"{row.id!r}: lower-case words joined by full stops are allowed", "rename it"
    if row.action.level is not row.level:
        yield (
            "level",
            f"{row.level.value}, but action {row.action.value!r} is of level {row.action.level.value}",
            "set the level of the action",
        )
    if len(set(row.modes)) < len(row.modes):
        yield "modes", f"{[mode.value for mode in row.modes]} must name each mode once", "remove doubles"
    if isinstance(row.check, Report) and (row.persistence, row.clear) != (1, 1):
        yield (
            "persistence",
            f"{row.persistence}, clear: {row.clear}: a report is a finding by itself, only 1 is allowed",
            "remove both; `attempts` bounds the actions",
        )
    if row.id in ACTS_IN_WORKER and row.state is RowState.PASSIVE:
        yield "state", "'passive': the worker acts before it reports", "set `enabled` or `disabled`"
    if row.escalates_to and row.action in {Action.NONE, Action.REJECT}:
        yield "escalates_to", f"action {row.action.value!r} cannot fail", "remove it"
    if row.attempts and row.action in {Action.NONE, Action.REJECT}:
        yield "attempts", f"{row.attempts}: action {row.action.value!r} is not bounded", "remove it"
    for name, seconds in (
        ("window_s", row.window_s), ("cooldown_s", row.cooldown_s), ("clean_s", row.clean_s),
        ("stale_after_s", row.stale_after_s or 1.0),
    ):  # fmt: skip
        if not math.isfinite(seconds):
            yield name, f"{seconds!r}: finite numbers are allowed", "set a finite value"
    if not _is_dotted_in(row.injector, "hil"):
        yield "injector", f"{row.injector!r} is no dotted name in hil", "write e.g. hil.faults.draw_faults"
    if not re.fullmatch(r"tests/[\w/]+\.py::\w+", row.test):
        yield "test", f"{row.test!r} is no node id of a test", "write tests/<folder>/<file>.py::<test>"


def _is_dotted_in(name: str, package: str) -> bool:
    head, *rest = name.split(".")
    return head == package and len(rest) >= 2 and all(part.isidentifier() for part in rest)


def _reference_problems(row: Row, by_id: Mapping[str, Row]) -> Iterable[_Problem]:
    """Items and rows a row names."""
    check = row.check
    if not isinstance(check, _ON_ITEM):
        if row.item:
            yield "item", f"{row.item!r}: check {_tag(check)!r} watches no item", "remove it"
        if row.stale_after_s is not None:
            yield "stale_after_s", f"check {_tag(check)!r} has no samples to grow old", "remove it"
    elif row.item not in ITEMS:
        yield "item", f"{row.item!r} is unknown; items: {', '.join(ITEMS)}", "name one of these"
    else:
        yield from _item_problems(row)
    if row.validity and (row.validity not in ITEMS or ITEMS[row.validity].type is not ItemType.BOOL):
        allowed = ", ".join(name for name, kind in ITEMS.items() if kind.type is ItemType.BOOL)
        yield (
            "validity",
            f"{row.validity!r} is no item of type bool; these are: {allowed}",
            "name one of these",
        )
    if row.escalates_to and row.escalates_to not in by_id:
        yield "escalates_to", f"there is no row {row.escalates_to!r}", f"name one of {', '.join(by_id)}"
    if isinstance(check, Expr):
        try:
            named = expressions.names(expressions.parse(check.rows))
        except expressions.ExprError as error:
            yield "check.rows", f"{check.rows!r}: {error}", "write ids, and, or, xor, not and parentheses"
        else:
            if unknown := sorted(named - by_id.keys()):
                yield "check.rows", f"there is no row {unknown[0]!r}", f"name some of {', '.join(by_id)}"


def _item_problems(row: Row) -> Iterable[_Problem]:  # noqa: PLR0912 - one branch a rule
    kind = ITEMS[row.item]
    match row.check:
        case Limit() | Delta() as check:
            if kind.type is ItemType.BOOL:
                yield "check.type", f"{_tag(check)!r} on {row.item}, which is a bool", "use `expected`"
            if check.low is None and check.high is None:
                yield "check", "neither low nor high is given: a limit is missing", "give one or both"
            for name, bound in (("low", check.low), ("high", check.high)):
                if bound is not None and not math.isfinite(bound):
                    yield f"check.{name}", f"{bound!r}: finite numbers are allowed", "set a finite value"
            if check.low is not None and check.high is not None and check.low > check.high:
                yield "check.low", f"{check.low:g} is above high = {check.high:g}", "swap them"
            if check.unit != kind.unit:
                yield (
                    "check.unit",
                    f"{check.unit!r}, but {row.item} is in {kind.unit!r}",
                    "convert the limits",
                )
        case Expected() as check:
            if kind.type is ItemType.FLOAT:
                yield "check.type", f"'expected' on {row.item}, which is a float", "use `limit`"
            elif (kind.type is ItemType.BOOL) is not isinstance(check.value, bool):
                yield "check.value", f"{check.value!r} is not of type {kind.type.value}", "give one that is"
            if check.mask is not None and kind.type is ItemType.BOOL:
                yield "check.mask", f"{check.mask} on {row.item}, which is a bool", "remove it"
            elif check.mask is not None and check.value & ~check.mask:
                yield (
                    "check.value",
                    f"{check.value} has bits outside mask = {check.mask}: it can never be met",
                    "mend one of them",
                )
        case Stale() as check:
            if not math.isfinite(check.after_s):
                yield "check.after_s", f"{check.after_s!r}: finite numbers are allowed", "set a finite value"
            if row.stale_after_s is not None:
                yield "stale_after_s", "a check for staleness is never stale itself", "remove it"


def _tag(check: Check) -> str:
    return str(type(check).__struct_config__.tag)


def _refuse_cycles(graph: Mapping[str, set[str]], where: str, field: str, mend: str) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        path = list(reversed(error.args[1]))
        raise PenumbraError(
            f"{where}: row {path[0]}: {field}: goes in a circle: {' -> '.join(path)}", mend
        ) from None
