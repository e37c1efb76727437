"""Dictionary of the quantities that rows of the FDIR table may watch.

A row names an item of this dictionary and states its limits in the item's unit; the table is refused when
either does not fit. Who samples an item is the integrator's business (`node.fdir_service`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class ItemType(StrEnum):
    """Type of an item's values."""

    FLOAT = "float"
    INT = "int"
    BOOL = "bool"


@dataclass(frozen=True)
class ItemKind:
    """What an item is."""

    type: ItemType
    unit: str
    """Unit of its values and of limits on it; `1` for counts and fractions, empty for a bool."""
    text: str
    """What it says, in words."""


def _float(unit: str, text: str) -> ItemKind:
    return ItemKind(ItemType.FLOAT, unit, text)


def _int(unit: str, text: str) -> ItemKind:
    return ItemKind(ItemType.INT, unit, text)


def _bool(text: str) -> ItemKind:
    return ItemKind(ItemType.BOOL, "", text)


ITEMS: Mapping[str, ItemKind] = MappingProxyType(
    {
        "worker.rss_bytes": _int("byte", "resident memory of the inference worker"),
        "worker.running": _bool("a worker runs and has proven its memory"),
        "worker.ping_silent_s": _float("s", "watched time the worker's outstanding ping has waited"),
        "node.rss_bytes": _int("byte", "resident memory of the supervisor"),
        "node.loop_lag_s": _float("s", "longest wait of the event loop since the last sample"),
        "node.open_files": _int("1", "open file descriptors of the supervisor"),
        "clock.locked": _bool("mission time is known from the bus"),
        "spool.fill": _float("1", "filled share of the telemetry spool, 0 to 1"),
        "jobs.queued": _int("1", "jobs that wait"),
        "commands.rejected": _int("1", "telecommands rejected since boot"),
        "sensor.rejected": _int("1", "sensor values of the bus rejected since boot"),
        "board.c": _float("degC", "temperature of the board"),
        "board.power_w": _float("W", "electrical power of the board"),
        "board.power_residual_w": _float("W", "power of the board above what load, clocks and heat explain"),
        "battery.soc": _float("1", "state of charge of the battery, 0 to 1"),
        "battery.v": _float("V", "voltage of the battery; unreadable while the bus is silent"),
        "eps.age_s": _float("s", "age of the latest values of the power system"),
        "scrub.pass_age_s": _float("s", "time since the last full pass of the memory scrub"),
    }
)
"""The dictionary, by name."""
