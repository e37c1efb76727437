"""What a component knows, as plain values that can be compared: whether a message has changed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from enum import Enum

import msgspec


def plain(value: object) -> object:
    """Return an object with all that it holds as nested tuples; NaN equals NaN."""
    match value:
        case None | bool() | int() | str() | bytes() | Enum():
            return value
        case float():
            return repr(value)
        case msgspec.Struct():
            names = value.__struct_fields__
            return type(value).__name__, tuple((name, plain(getattr(value, name))) for name in names)
        case Mapping():
            return tuple((plain(key), plain(each)) for key, each in value.items())
        case Sequence() | Set():
            return tuple(
                plain(each) for each in (sorted(value, key=repr) if isinstance(value, Set) else value)
            )
        case _:
            held = vars(value) if hasattr(value, "__dict__") else None
            return id(value) if held is None else (type(value).__name__, plain(held))
