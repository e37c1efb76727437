"""What every telecommand has: arguments, a hazard level, and how it is refused."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import msgspec


class Hazard(StrEnum):
    """What a command can do to the mission if sent by mistake."""

    NONE = "none"
    SERVICE = "service"
    """Can interrupt or starve the inference service; reversible by command."""
    HAZARDOUS = "hazardous"
    """Cannot be taken back by command, or can cost the node what it needs to serve: armed, then fired."""


class ArgumentCode(StrEnum):
    """Why an authentic command is refused; the code of its failed verification."""

    UNKNOWN_COMMAND = "unknown_command"
    BAD_ARGUMENT = "bad_argument"


class CommandError(ValueError):
    """Bytes that are no telecommand, or a telecommand that does not fit the dictionary.

    `code` is None for bytes that are no telecommand.
    """

    def __init__(self, reason: str, code: ArgumentCode | None = None) -> None:
        super().__init__(reason)
        self.code = code


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the arguments of every command."""

    name: ClassVar[str]
    hazard: ClassVar[Hazard]
