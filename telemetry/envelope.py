"""The envelope of a telecommand: who sends it, when it holds, and the proof that nobody changed it.

In the clear, proven by HMAC-SHA-256 over domain, topic and the array as sent:

    msgpack [version, key id, seq, t_issue_ns, t_expire_ns, node, name, args] | MAC, 32 bytes

Sealed by AES-256-GCM, so that a stranger cannot read it either:

    msgpack [header, sealed]
    header: msgpack [version, key id, seq, t_issue_ns, t_expire_ns, node, nonce]; with domain and topic it is
            the additional data that the tag proves
    sealed: AES-256-GCM of msgpack [name, args], 16 bytes of tag at its end

The topic is proven with the rest: what was recorded on one topic proves nothing on another. The nonce, 12
bytes, is random: no count of it has to survive a crash of the ground, and 2^32 commands of one key keep the
chance of a repetition below 2^-32 (NIST SP 800-38D, 8.3). Whether the arguments make sense is a separate
question, answered by `telemetry.commands.parse_arguments`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from telemetry import topics
from telemetry.commands import Arguments, CommandError, parse_arguments
from telemetry.frame import MissionTime, Sequence
from telemetry.keys import MAC_BYTES, NONCE_BYTES, Domain, Key, KeyRing, KeyState

COMMAND_VERSION = 2
"""Version 1 proved the array alone, not the topic."""
MAX_COMMAND_BYTES = 128 * 1024
"""Largest telecommand read, bytes: a prompt of 16000 characters of 4 bytes, and room (assumed)."""
_SEALED_MARK = 0x92
"""First byte of a sealed command: msgpack's array of two."""


class Command(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A telecommand. The order of the fields is the order on the wire."""

    version: int
    key_id: str
    """Key it is signed with; sequence numbers count per key."""
    seq: Sequence
    """Must be above the last one accepted with this key, by at most the window."""
    t_issue_ns: MissionTime
    """Mission time (UTC) of issue, ns since 1970."""
    t_expire_ns: MissionTime
    """Mission time (UTC) from which on it is not executed any more, ns since 1970."""
    node: str
    name: str
    args: dict[str, Any]


class _Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    key_id: str
    seq: Sequence
    t_issue_ns: MissionTime
    t_expire_ns: MissionTime
    node: str
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class _Content(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: str
    args: dict[str, Any]


_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(Command)
_sealed_decoder = msgspec.msgpack.Decoder(tuple[bytes, bytes])
_header_decoder = msgspec.msgpack.Decoder(_Header)
_content_decoder = msgspec.msgpack.Decoder(_Content)


@dataclass(frozen=True)
class Envelope:
    """A telecommand **that is not authenticated yet**: what it claims about itself."""

    claims: Command | _Header
    signed: bytes = field(repr=False)
    """What the proof is over, besides domain and topic."""
    proof: bytes = field(repr=False)
    """MAC, or nonce and tag: no two commands of a key have the same."""
    sealed: bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str | None:
        """Name of the command it claims to be; None when that is sealed."""
        return self.claims.name if isinstance(self.claims, Command) else None

    def open(self, key: Key, topic: str) -> Command | None:
        """Return the command if it was signed or sealed with this key for this topic, else None.

        Raises
        ------
        CommandError
            It was, and what it holds is no command all the same.
        """
        signed = topic.encode() + b"\0" + self.signed
        claims = self.claims
        if isinstance(claims, Command):
            return claims if key.verify(Domain.COMMAND, signed, self.proof) else None
        content = key.unseal(Domain.COMMAND, claims.nonce, self.sealed or b"", signed)
        if content is None:
            return None
        try:
            inner = _content_decoder.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CommandError(f"sealed, and not a telecommand: {error}") from None
        return Command(
            claims.version, claims.key_id, claims.seq, claims.t_issue_ns, claims.t_expire_ns, claims.node,
            inner.name, inner.args,
        )  # fmt: skip


def make_command(
    arguments: Arguments, *, key_id: str, seq: int, t_issue_ns: int, t_expire_ns: int, node: str
) -> Command:
    """Return a command, not yet signed.

    Raises
    ------
    CommandError
        An argument out of its range: what the node would refuse is not sent.
    """
    # As the node will read them: a tuple travels as an array.
    args = msgspec.msgpack.decode(_encoder.encode(arguments))
    parse_arguments(arguments.name, args)
    return Command(COMMAND_VERSION, key_id, seq, t_issue_ns, t_expire_ns, node, arguments.name, args)


def encode_command(command: Command, ring: KeyRing, *, sealed: bool = False) -> bytes:
    """Return the command signed with the key it names, for the command topic of its node; or sealed.

    Raises
    ------
    CommandError
        The ring has no active key of that id.
    """
    key = ring.get(command.key_id)
    if key is None or key.state is not KeyState.ACTIVE:
        raise CommandError(f"key {command.key_id!r} is unknown or not active: it cannot sign")
    topic = topics.tc(command.node).encode() + b"\0"
    if not sealed:
        body = _encoder.encode(command)
        return body + key.mac(Domain.COMMAND, topic + body)
    nonce = secrets.token_bytes(NONCE_BYTES)
    header = _encoder.encode(
        _Header(
            command.version, command.key_id, command.seq, command.t_issue_ns, command.t_expire_ns,
            command.node, nonce,
        )
    )  # fmt: skip
    content = _encoder.encode(_Content(command.name, command.args))
    return _encoder.encode((header, key.seal(Domain.COMMAND, nonce, content, topic + header)))


def read_envelope(payload: bytes) -> Envelope:
    """Return the envelope of a telecommand **that is not authenticated yet**.

    Raises
    ------
    CommandError
        Wrong size, version or shape, or an expiry that is not after the issue.
    """
    if not MAC_BYTES < len(payload) <= MAX_COMMAND_BYTES:
        raise CommandError(f"{len(payload)} bytes, {MAC_BYTES + 1} to {MAX_COMMAND_BYTES} allowed")
    try:
        envelope = _read_sealed(payload) if payload[0] == _SEALED_MARK else _read_clear(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CommandError(f"not a telecommand: {error}") from None
    claims = envelope.claims
    if claims.version != COMMAND_VERSION:
        raise CommandError(f"telecommand version {claims.version}, {COMMAND_VERSION} expected")
    if claims.t_expire_ns <= claims.t_issue_ns:
        raise CommandError("telecommand expires before it is issued")
    return envelope


def is_command(payload: bytes) -> bool:
    """Whether these bytes have the shape of a telecommand."""
    try:
        read_envelope(payload)
    except CommandError:
        return False
    return True


def _read_clear(payload: bytes) -> Envelope:
    body, mac = payload[:-MAC_BYTES], payload[-MAC_BYTES:]
    return Envelope(_command_decoder.decode(body), body, mac)


def _read_sealed(payload: bytes) -> Envelope:
    header, sealed = _sealed_decoder.decode(payload)
    if _encoder.encode((header, sealed)) != payload:
        # One message, one form: else a changed length prefix would be the same command in other bytes.
        raise msgspec.DecodeError("not in its shortest form")
    claims = _header_decoder.decode(header)
    return Envelope(claims, header, claims.nonce + sealed[-16:], sealed)


def open_command(payload: bytes, ring: KeyRing) -> Command:
    """Return a telecommand as the node it is for would read it: for whoever sends, or looks into a record.

    Raises
    ------
    CommandError
        Not a telecommand, or not authentic.
    """
    envelope = read_envelope(payload)
    key = ring.get(envelope.claims.key_id)
    command = None if key is None else envelope.open(key, topics.tc(envelope.claims.node))
    if command is None:
        raise CommandError("not signed with a key of this ring")
    return command
