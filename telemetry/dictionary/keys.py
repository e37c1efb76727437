"""Telecommands about keys."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from telemetry.dictionary.base import Arguments, Hazard
from telemetry.frame import Sequence

KeyId = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z", description="id of a key in the node's key file")
]


class ActivateKey(Arguments, frozen=True, kw_only=True):
    """Make a key in standby usable. At most two keys for commands are active at once. Survives restarts."""

    name: ClassVar[str] = "activate_key"
    hazard: ClassVar[Hazard] = Hazard.SERVICE

    key: KeyId


class RetireKey(Arguments, frozen=True, kw_only=True):
    """Make a key unusable for good. To be signed with another key, which thereby proves that it works."""

    name: ClassVar[str] = "retire_key"
    hazard: ClassVar[Hazard] = Hazard.HAZARDOUS

    key: KeyId


class Resync(Arguments, frozen=True, kw_only=True):
    """Raise the last accepted sequence number of a key, when the ground is out of its window.

    Only a recovery key may give it; the security report tells the number of each key.
    """

    name: ClassVar[str] = "resync"
    hazard: ClassVar[Hazard] = Hazard.NONE

    key: KeyId
    last_seq: Sequence
    """Numbers above this one are accepted from now on, within the window. Never below the last accepted."""
