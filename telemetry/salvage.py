"""Copy what can still be read of a damaged SQLite database into a new one.

One struck byte makes SQLite refuse a whole table, though all its pages but one are sound. Each table is read
forwards until the damage, then backwards until the damage, which leaves out only what lies between. What a
row says is not judged here: whoever owns a table checks its rows.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("penumbra.salvage")


class SalvageError(Exception):
    """Not even the list of tables can be read."""


@dataclass
class Salvage:
    """What was saved of a damaged database."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows saved, by table."""
    incomplete: list[str] = field(default_factory=list)
    """Tables of which something could not be read or not be stored."""


@dataclass(frozen=True)
class _Table:
    name: str
    columns: tuple[str, ...]
    order: str
    """What its rows lie in order of on disk, as SQL."""


def salvage(damaged: Path, fresh: Path) -> Salvage:
    """Copy every table and row of `damaged` that can be read into the new file `fresh`.

    Text that is no UTF-8 any more is stored with replacement characters.

    Raises
    ------
    SalvageError
        The schema cannot be read or is itself damaged. `fresh` is removed then.
    """
    saved = Salvage()
    try:
        with (
            closing(sqlite3.connect(damaged, isolation_level=None)) as source,
            closing(sqlite3.connect(fresh, isolation_level=None)) as target,
        ):
            source.text_factory = lambda data: data.decode("utf-8", "replace")
            target.execute("PRAGMA synchronous=FULL")
            target.execute("BEGIN")
            for table in _create(source, target):
                saved.rows[table.name] = _copy(source, target, table, saved)
            for (sql,) in _schema(source, "index"):
                target.execute(sql)
            target.execute("COMMIT")
    except (sqlite3.Error, UnicodeDecodeError) as error:
        fresh.unlink(missing_ok=True)
        raise SalvageError(f"{damaged}: {error}") from error
    return saved


def _schema(source: sqlite3.Connection, kind: str) -> list[tuple[str]]:
    return source.execute(
        "SELECT sql FROM sqlite_master WHERE type = ? AND sql IS NOT NULL AND name NOT LIKE 'sqlite_%'",
        (kind,),
    ).fetchall()


def _create(source: sqlite3.Connection, target: sqlite3.Connection) -> list[_Table]:
    """Create the tables in `target`; return them."""
    for (sql,) in _schema(source, "table"):
        target.execute(sql)
    tables: list[_Table] = []
    names = target.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
    for name, sql in names:
        if name.startswith("sqlite_"):
            continue
        info = target.execute(f'PRAGMA table_info("{name}")').fetchall()
        columns = [column[1] for column in info]
        key = [column for _, column, *_, rank in sorted(info, key=lambda c: c[5]) if rank]
        if "WITHOUT ROWID" not in sql.upper():
            if not any(kind.upper() == "INTEGER" and rank for _, _, kind, _, _, rank in info):
                columns.append("rowid")  # it has no column of its own
            key = ["rowid"]
        tables.append(_Table(name, tuple(columns), ", ".join(key)))
    return tables


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, table: _Table, saved: Salvage) -> int:
    """Copy the rows of one table; return how many."""
    columns = ", ".join(f'"{column}"' for column in table.columns)
    marks = ", ".join("?" for _ in table.columns)
    insert = f'INSERT OR IGNORE INTO "{table.name}" ({columns}) VALUES ({marks})'  # noqa: S608
    kept, whole = 0, True
    for direction in ("ASC", "DESC"):
        order = ", ".join(f"{key} {direction}" for key in table.order.split(", "))
        # NOT INDEXED: an index may be damaged where its table is not.
        query = f'SELECT {columns} FROM "{table.name}" NOT INDEXED ORDER BY {order}'  # noqa: S608
        try:
            for row in source.execute(query):
                try:
                    stored = target.execute(insert, row).rowcount
                except sqlite3.IntegrityError:
                    stored = 0
                kept += stored
                whole = whole and (bool(stored) or direction == "DESC")
            break
        except sqlite3.DatabaseError as error:
            log.warning("table %s is damaged: %s", table.name, error)
            whole = False
    if not whole:
        saved.incomplete.append(table.name)
    return kept
