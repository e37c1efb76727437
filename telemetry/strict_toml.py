"""Read a TOML file into a typed struct, and say exactly what is wrong when it does not fit."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from telemetry.errors import PenumbraError

T = TypeVar("T", bound=msgspec.Struct)
_AT = re.compile(r"(?s)(?P<what>.*) - at `\$\.?(?P<path>.*)`")
_FIELD = re.compile(r"field `(?P<name>[^`]+)`")


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
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PenumbraError(f"{path}: {error.strerror}", "give the path of a readable TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PenumbraError(
            f"{path}: no TOML: {error}", "mend the syntax where the message points"
        ) from error
    return convert_toml(raw, kind, path)


def convert_toml(raw: dict[str, Any], kind: type[T], path: Path) -> T:
    """Return the struct of a parsed TOML document; `path` is only for the messages. Raises as `load_toml`."""
    _refuse_non_finite(raw, path, "")
    for field in msgspec.structs.fields(kind):
        item = _list_item(field.type)
        values = raw.get(field.encode_name)
        if item is not None and isinstance(values, list):
            # One by one: msgspec does not tell which element of a list it refused.
            for index, value in enumerate(values):
                _convert(value, item, path, f"{field.encode_name}[{index}]")
    return typing.cast(T, _convert(raw, kind, path, ""))


def _refuse_non_finite(value: Any, path: Path, where: str) -> None:
    """TOML knows `nan` and `inf`; no setting of ours does, and NaN slips through comparisons."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_non_finite(inner, path, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_non_finite(inner, path, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise PenumbraError(f"{path}: {where} = {value!r}: finite numbers are allowed", "set a finite value")


def _convert(raw: Any, kind: Any, path: Path, prefix: str) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        match = _AT.fullmatch(str(error))
        what, inner = (match["what"], match["path"]) if match else (str(error), "")
        keys = [key for key in inner.split(".") if key]
        where = ".".join(part for part in (prefix, *keys) if part)
        raise _explain(f"{path}: ", what, where, _value(raw, keys), _field_names(kind, keys)) from error


def _explain(file: str, what: str, where: str, value: Any, names: list[str]) -> PenumbraError:
    named = _FIELD.search(what)
    if named and "unknown field" in what:
        close = difflib.get_close_matches(named["name"], names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return PenumbraError(
            f"{file}unknown key {named['name']!r} in [{where}]; allowed: {', '.join(sorted(names))}",
            f"{hint}Rename or remove the key",
        )
    if named and "missing required field" in what:
        full = f"{where}.{named['name']}" if where else named["name"]
        return PenumbraError(f"{file}{full} is missing", "add it")
    return PenumbraError(f"{file}{where or 'file'} = {value!r}: {what}", "set an allowed value")


def _value(raw: Any, keys: list[str]) -> Any:
    for key in keys:
        if not isinstance(raw, dict) or key not in raw:
            break
        raw = raw[key]
    return raw


def _list_item(kind: Any) -> type[msgspec.Struct] | None:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is list and isinstance(args[0], type) and issubclass(args[0], msgspec.Struct):
        return args[0]
    return None


def _struct(kind: Any) -> type[msgspec.Struct] | None:
    """Return the struct in a type such as `Orbit | None`."""
    for candidate in (kind, *typing.get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None


def _field_names(kind: Any, keys: list[str]) -> list[str]:
    struct = _struct(kind)
    for key in keys:
        if struct is None:
            return []
        struct = next((_struct(f.type) for f in msgspec.structs.fields(struct) if f.encode_name == key), None)
    return [f.encode_name for f in msgspec.structs.fields(struct)] if struct is not None else []
