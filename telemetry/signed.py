"""Small signed messages of the ground: a msgpack array that begins [version, key id, ...], then its HMAC.

Telecommands have an envelope of their own (`telemetry.commands`): they are numbered, expire, may be sealed.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import msgspec

from telemetry.keys import MAC_BYTES, Domain, Key, KeyRing, KeyState, KeyUse


class SignedError(ValueError):
    """Bytes that are no such message, or not signed with an active key."""


class Wire(Protocol):
    """What the arrays have in common."""

    @property
    def version(self) -> int:
        """Of the message."""

    @property
    def key_id(self) -> str:
        """Key it is signed with."""


W = TypeVar("W", bound=Wire)

_encoder = msgspec.msgpack.Encoder()


def sign(wire: Any, key: Key, domain: Domain) -> bytes:
    """Return the message with its MAC, 32 bytes, at the end."""
    body = _encoder.encode(wire)
    return body + key.mac(domain, body)


def open_signed(
    data: bytes, decoder: msgspec.msgpack.Decoder[W], version: int, ring: KeyRing, domain: Domain
) -> W:
    """Authenticate a message and return its array.

    Raises
    ------
    SignedError
        No such shape, another version, a key that is unknown or not active, or a wrong MAC.
    """
    body, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
    try:
        wire = decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SignedError(f"not such a message: {error}") from None
    if wire.version != version:
        raise SignedError(f"version {wire.version}, {version} expected")
    key = ring.get(wire.key_id)
    if key is None or key.state is not KeyState.ACTIVE or key.use is not KeyUse.COMMAND:
        raise SignedError("signed with a key that is unknown or not active")
    if not key.verify(domain, body, mac):
        raise SignedError("a wrong MAC")
    return wire
