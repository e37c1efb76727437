"""Read a TOML file into a typed struct, and say exactly what is wrong when it does not fit."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
import tomllib
import typing
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from telemetry.errors import PenumbraError

T = TypeVar("T", bound=msgspec.Struct)
_AT = re.compile(r"(?s)(?P<what>.*) - at (?:`key` in )?`\$\.?(?P<path>.*)`")
_FIELD = re.compile(r"field `(?P<name>[^`]+)`")
_STEP = re.compile(r"[^.\[\]]+|\.\.\.")
MAX_DEPTH: Final = 32
"""Levels of tables and lists that are read (assumed: ours have six); deep ones exhaust Python's stack."""
_INT_64: Final = range(-(2**63), 2**63)
"""Integers TOML promises to keep."""


class _Shown(reprlib.Repr):
    """A value as messages show it: long ones in part."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """Return the digits; of too many for Python to print, how many bits they are."""
        return repr(x) if x in _INT_64 else f"an integer of {x.bit_length()} bits"


shown = _Shown().repr
"""`repr` for messages: a long or deep value is shown in part."""


def load_toml(path: Path, kind: type[T]) -> T:
    """Return the struct of a TOML file.

    Parameters
    ----------
    path
        The file.
    kind
        Struct with `forbid_unknown_fields=True` all the way down.

    Raises
    ------
    PenumbraError
        The file cannot be read, is no TOML, or a key is unknown, missing, of a wrong type or out of range:
        names the file, the field, the value and what is allowed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PenumbraError(f"{path}: {error.strerror}", "give the path of a readable TOML file") from error
    return convert_toml(parse_toml(content, str(path)), kind, path)


def parse_toml(content: bytes, name: str) -> dict[str, Any]:
    """Return the tables of a TOML document in UTF-8, with or without a byte order mark.

    Raises
    ------
    PenumbraError
        It is no TOML, or nested too deep. `name` says in the message what was read; no value is in it.
    """
    try:
        raw = tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError:
        deep = True
    except ValueError as error:  # Also UnicodeDecodeError, and an integer of too many digits.
        raise PenumbraError(
            f"{name}: no TOML: {error}", "correct the syntax where the message points, and save it as UTF-8"
        ) from None
    else:
        deep = is_deep(raw)
    if deep:
        raise PenumbraError(
            f"{name}: no TOML that can be read: nested deeper than {MAX_DEPTH} levels", "remove the nesting"
        )
    return raw


def convert_toml(raw: dict[str, Any], kind: type[T], path: Path) -> T:
    """Return the struct of a parsed TOML document; `path` is only for the messages. Raises as `load_toml`."""
    _refuse_numbers(raw, path, "")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        match = _AT.fullmatch(str(error))
        what, where = (match["what"], match["path"]) if match else (str(error), "")
        steps = _STEP.findall(where)
        raise _explain(f"{path}: ", what, where, _value(raw, steps), _field_names(kind, steps)) from error


def is_deep(raw: object) -> bool:
    """Return whether tables and lists are nested deeper than `MAX_DEPTH`; without recursion."""
    level = [raw]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _refuse_numbers(value: Any, path: Path, where: str) -> None:
    """Refuse what Python reads, but no setting takes: NaN slips through comparisons."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_numbers(inner, path, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_numbers(inner, path, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise PenumbraError(f"{path}: {where} = {value!r}: finite numbers are allowed", "set a finite value")
    elif isinstance(value, int) and value not in _INT_64:
        raise PenumbraError(
            f"{path}: {where} = {shown(value)}: integers of 64 bits are allowed", "set an allowed value"
        )


def _explain(file: str, what: str, where: str, value: Any, names: list[str]) -> PenumbraError:
    named = _FIELD.search(what)
    if named and "unknown field" in what:
        close = difflib.get_close_matches(named["name"], names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        place = f"[{where}]" if where else "the file"
        return PenumbraError(
            f"{file}unknown key {shown(named['name'])} in {place}; allowed: {', '.join(sorted(names))}",
            f"{hint}Rename or remove the key",
        )
    if named and "missing required field" in what:
        full = f"{where}.{named['name']}" if where else named["name"]
        return PenumbraError(f"{file}{full} is missing", "add it")
    return PenumbraError(f"{file}{where or 'file'} = {shown(value)}: {what}", "set an allowed value")


def _value(raw: Any, steps: list[str]) -> Any:
    """Return what lies at the end of the steps; of a table with free keys msgspec does not say which: it."""
    for step in steps:
        if isinstance(raw, dict) and step in raw:
            raw = raw[step]
        elif isinstance(raw, list) and step.isdecimal():
            raw = raw[int(step)]
        else:
            break
    return raw


def _struct(kind: Any) -> type[msgspec.Struct] | None:
    """Return the struct in a type such as `Orbit | None` or `list[Station]`."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    return next(filter(None, map(_struct, typing.get_args(kind))), None)


def _field_names(kind: Any, steps: list[str]) -> list[str]:
    struct = _struct(kind)
    for step in steps:
        if step.isdecimal() or step == "...":
            continue  # An item: `_struct` has looked into its list or table already.
        if struct is None:
            return []
        struct = next(
            (_struct(f.type) for f in msgspec.structs.fields(struct) if f.encode_name == step), None
        )
    return [f.encode_name for f in msgspec.structs.fields(struct)] if struct is not None else []
