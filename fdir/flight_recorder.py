"""The flight recorder: the last stimuli and actions of the FDIR, told when something grave happens.

Every event that went into a decision and every action that came out is noted in the order in which it
happened, with the names and fields of the classes themselves, so that the decisions can be followed, and
made again, on the ground. Tables and rows are noted by name: the ground has the table.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Any

import msgspec

CAPACITY = 400
"""Entries held (assumed: over a minute of sampling, and the storm of events of a fault)."""
MAX_BYTES = 24_000
"""Largest dump, bytes (assumed: half a second of a 384 kbit/s link)."""
MAX_TEXT = 200
"""Characters kept of a text."""
_MAX_DEPTH = 3
_MAX_ITEMS = 64


class EntryKind(StrEnum):
    """Which way an entry went."""

    STIMULUS = "stimulus"
    ACTION = "action"


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A noted stimulus or action."""

    t_ns: int
    """CLOCK_REALTIME, ns."""
    kind: EntryKind
    machine: str
    """Who decided: `monitors`, `ladder`, `recovery`, `health`, `boot`, ..."""
    name: str
    """Class of the event or action, or a word for one that has none."""
    fields: dict[str, Any]


def shrink(value: object, depth: int = 0) -> Any:
    """Return a value as plain data of bounded size: numbers, short texts, lists and maps of them.

    An object that has an `id` (a row of the FDIR table) is named by it, a table by its digest.
    """
    plain: Any
    match value:
        case None | bool() | float():
            plain = value
        case Enum():
            plain = shrink(value.value, depth)
        case int():
            plain = value if -(1 << 63) <= value < 1 << 64 else str(value)[:MAX_TEXT]
        case str():
            plain = value[:MAX_TEXT]
        case bytes():
            plain = value[:MAX_TEXT].hex()
        case _ if depth >= _MAX_DEPTH:
            plain = type(value).__name__
        case Mapping():
            items = list(value.items())[:_MAX_ITEMS]
            plain = {str(key)[:MAX_TEXT]: shrink(item, depth + 1) for key, item in items}
        case set() | frozenset():
            plain = shrink(sorted(value, key=str), depth)
        case list() | tuple():
            plain = [shrink(item, depth + 1) for item in value[:_MAX_ITEMS]]
        case _:
            plain = _shrink_object(value, depth)
    return plain


def _shrink_object(value: object, depth: int) -> Any:
    for name in ("id", "sha256"):
        named = getattr(value, name, None)
        if isinstance(named, str):
            return named[:MAX_TEXT]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    elif isinstance(value, msgspec.Struct):
        names = list(value.__struct_fields__)
    else:
        return type(value).__name__
    return {name: shrink(getattr(value, name), depth + 1) for name in names}


class FlightRecorder:
    """Hold the last entries.

    Parameters
    ----------
    capacity
        Most entries held, at least 1.
    max_bytes
        Largest dump, bytes, at least 1000.

    Raises
    ------
    ValueError
        An argument is under its bound.
    """

    def __init__(self, capacity: int = CAPACITY, max_bytes: int = MAX_BYTES) -> None:
        if capacity < 1 or max_bytes < 1000:
            raise ValueError(f"capacity >= 1 and max_bytes >= 1000 are required: {capacity}, {max_bytes}")
        self.noted = 0
        """Entries noted since the start."""
        self._entries: deque[bytes] = deque(maxlen=capacity)
        self._max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()

    def __len__(self) -> int:
        return len(self._entries)

    def stimulus(self, machine: str, event: object, t_ns: int) -> None:
        """Note an event that a decision is about to be made on."""
        self._note(EntryKind.STIMULUS, machine, event, t_ns)

    def action(self, machine: str, action: object, t_ns: int) -> None:
        """Note an action that is about to be carried out."""
        self._note(EntryKind.ACTION, machine, action, t_ns)

    def dump(self) -> bytes:
        """Return the latest entries as a msgpack array, oldest first, see `read_dump`."""
        chosen: list[bytes] = []
        # Room for the head of the array: 5 bytes at most.
        left = self._max_bytes - 5
        for entry in reversed(self._entries):
            left -= len(entry)
            if left < 0:
                break
            chosen.append(entry)
        return self._encoder.encode([msgspec.Raw(entry) for entry in reversed(chosen)])

    def _note(self, kind: EntryKind, machine: str, what: object, t_ns: int) -> None:
        if isinstance(what, Mapping):
            name, fields = "values", shrink(what)
        elif isinstance(what, str):
            name, fields = what[:MAX_TEXT], {}
        else:
            name, told = type(what).__name__, shrink(what)
            fields = told if isinstance(told, dict) else {"value": told}
        encoded = self._encoder.encode(Entry(t_ns, kind, machine, name, fields))
        if len(encoded) > self._max_bytes // 4:
            # One giant must not push everything else out.
            encoded = self._encoder.encode(Entry(t_ns, kind, machine, name, {"left_out_bytes": len(encoded)}))
        self._entries.append(encoded)
        self.noted += 1


def read_dump(dump: bytes) -> list[Entry]:
    """Return the entries of a dump, oldest first.

    Raises
    ------
    ValueError
        The bytes are no dump.
    """
    try:
        return msgspec.msgpack.decode(dump, type=list[Entry])
    except msgspec.DecodeError as error:
        raise ValueError(f"no dump of a flight recorder: {error}") from error
