"""Keys shared by ground and node, for commands and acknowledgements.

A key file is TOML, readable by its owner only:

    [[key]]
    id = "ground-1"
    secret = "<64 or more hex digits>"
    state = "active"        # "standby": accepted once activated by command; "retired": never again
    use = "command"         # "recovery": see below

Two active keys may stand side by side, so that a key can be changed without a gap: the new one waits in
standby in both files, is activated by a command signed with the old one, and retires that one. A recovery
key is not bound to the window of sequence numbers, and may do little else than mend the others. A message
names the domain it was signed for, so an acknowledgement can never pass for a command.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from telemetry.errors import PenumbraError
from telemetry.strict_toml import parse_toml
from telemetry.voting import COPIES, Unvoted, seal, unseal, vote

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MIN_SECRET_BYTES = 32
"""Shortest secret, bytes: the output length of SHA-256, below which HMAC loses strength (RFC 2104)."""
MAC_BYTES = 32
NONCE_BYTES = 12
"""Nonce of AES-GCM, bytes (NIST SP 800-38D)."""
KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


class KeyState(StrEnum):
    """Whether a key may be used."""

    STANDBY = "standby"
    """Known, and not to be used before it is activated."""
    ACTIVE = "active"
    RETIRED = "retired"
    """Never to be used again."""


class KeyUse(StrEnum):
    """What a key is for."""

    COMMAND = "command"
    """Commands, acknowledgements, flow control."""
    RECOVERY = "recovery"
    """Mending keys and sequence numbers, when the keys for commands are locked out."""


class Domain(StrEnum):
    """What a message was signed for: put in front of the bytes that are authenticated."""

    COMMAND = "penumbra command 2"
    ACK = "penumbra ack 1"
    FLOW = "penumbra flow 1"
    UPLOAD = "penumbra upload 1"


class Key:
    """One shared secret, held in three copies and voted on each use. It never shows in `repr`.

    Parameters
    ----------
    id
        Names it in messages.
    secret
        Its bytes.
    state
        Whether it may be used.
    use
        What for.

    Attributes
    ----------
    repairs
        Copies that were struck, outvoted and written anew.
    """

    def __init__(
        self, id: str, secret: bytes, state: KeyState = KeyState.ACTIVE, use: KeyUse = KeyUse.COMMAND
    ) -> None:
        self.id = id
        self.state = state
        self.use = use
        self.repairs = 0
        self._copies = [bytearray(seal(secret)) for _ in range(COPIES)]

    def __repr__(self) -> str:
        return f"Key(id={self.id!r}, state={self.state!r})"

    @property
    def secret(self) -> bytes:
        """The secret, as the vote over its copies has it. Raises `Unvoted` beyond a vote."""
        copies = [bytes(copy) for copy in self._copies]
        sound = vote(copies)
        for number, copy in enumerate(copies):
            if copy != sound:
                self._copies[number][:] = sound
                self.repairs += 1
        return unseal(sound)

    def mac(self, domain: Domain, message: bytes) -> bytes:
        """Return the HMAC-SHA-256 (32 bytes) over the domain and the message. Raises as `secret`."""
        return hmac.new(self.secret, domain.value.encode() + b"\0" + message, hashlib.sha256).digest()

    def verify(self, domain: Domain, message: bytes, mac: bytes) -> bool:
        """Return whether `mac` is right, in constant time; with a secret beyond a vote nothing is."""
        try:
            return hmac.compare_digest(self.mac(domain, message), mac)
        except Unvoted:
            return False

    def seal(self, domain: Domain, nonce: bytes, content: bytes, proven: bytes) -> bytes:
        """Return the content under AES-256-GCM, with its tag of 16 bytes. Raises `Unvoted` as `secret`.

        Parameters
        ----------
        domain
            What it is for.
        nonce
            12 bytes, never used twice with this key.
        content
            What nobody else may read.
        proven
            What the tag proves besides, and everybody may read.
        """
        return self._cipher(domain).encrypt(nonce, content, self._data(domain, proven))

    def unseal(self, domain: Domain, nonce: bytes, sealed: bytes, proven: bytes) -> bytes | None:
        """Return what was sealed, None if it was not sealed so; with a secret beyond a vote nothing was."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - as in `_cipher`

        try:
            return self._cipher(domain).decrypt(nonce, sealed, self._data(domain, proven))
        except (InvalidTag, Unvoted):
            return None

    def _cipher(self, domain: Domain) -> AESGCM:
        # Three megabytes, which a node in safe mode that takes commands in the clear does without.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        # A key of its own: one secret is not to serve two algorithms.
        return AESGCM(self.mac(domain, b"AES-256-GCM"))

    @staticmethod
    def _data(domain: Domain, proven: bytes) -> bytes:
        return domain.value.encode() + b"\0" + proven


class _KeyEntry(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    secret: Annotated[str, Meta(pattern="^(?:[0-9A-Fa-f]{2})*$")]
    state: KeyState = KeyState.ACTIVE
    use: KeyUse = KeyUse.COMMAND


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    key: Annotated[list[_KeyEntry], Meta(min_length=1)]


class KeyRing:
    """All keys a side knows, by id.

    Parameters
    ----------
    keys
        Ids must differ; `ValueError` if they do not.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys: dict[str, Key] = {}
        for key in keys:
            if key.id in self._keys:
                raise ValueError(f"key id {key.id!r} twice")
            self._keys[key.id] = key

    def __repr__(self) -> str:
        return f"KeyRing({list(self._keys.values())!r})"

    @classmethod
    def load(cls, path: Path) -> KeyRing:
        """Read a key file.

        Raises
        ------
        PenumbraError
            Missing, unreadable, readable by others, not valid, a secret under 32 bytes, an id twice,
            or no active key.
        """
        raw = parse_toml(_read_private(path), f"key file {path}")
        try:
            content = msgspec.convert(raw, _KeyFile)
        except msgspec.ValidationError as error:
            # The error names the field, never its value: a secret must not reach a log.
            raise PenumbraError(
                f"key file {path}: {error}",
                "it must hold [[key]] tables with id, secret (hex), "
                'state = "active", "standby" or "retired", use = "command" or "recovery"',
            ) from None
        keys = []
        for number, entry in enumerate(content.key, 1):
            if not KEY_ID.fullmatch(entry.id):
                raise PenumbraError(
                    f"key file {path}: key {number}: id {entry.id!r} is not allowed",
                    "use 1 to 32 of A-Z, a-z, 0-9, '.', '_' and '-', the first a letter or digit",
                )
            secret = bytes.fromhex(entry.secret)
            if len(secret) < MIN_SECRET_BYTES:
                raise PenumbraError(
                    f"key file {path}: key {entry.id!r}: the secret has {len(secret)} bytes, "
                    f"{MIN_SECRET_BYTES} or more are needed",
                    "delete the file and have it generated again",
                )
            keys.append(Key(entry.id, secret, entry.state, entry.use))
        try:
            ring = cls(keys)
        except ValueError as error:
            raise PenumbraError(f"key file {path}: {error}", "give every key its own id") from None
        if not ring.active():
            raise PenumbraError(
                f"key file {path}: no key for commands is active", 'set state = "active" on one of them'
            )
        return ring

    @property
    def repairs(self) -> int:
        """Struck copies of secrets that were written anew."""
        return sum(key.repairs for key in self._keys.values())

    def get(self, key_id: str) -> Key | None:
        """Return the key of that id, active or not, or None."""
        return self._keys.get(key_id)

    def __iter__(self) -> Iterator[Key]:
        """Iterate over all keys, in the order of the file."""
        return iter(self._keys.values())

    def active(self) -> list[Key]:
        """Return the keys for commands that are active, in the order of the file."""
        return [key for key in self if key.state is KeyState.ACTIVE and key.use is KeyUse.COMMAND]

    def signing_key(self) -> Key:
        """Return the first active key for commands, for signing.

        Raises
        ------
        ValueError
            No such key is active.
        """
        for key in self.active():
            return key
        raise ValueError("no key of the ring is active")


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise PenumbraError(
                    f"key file {path}: mode {mode:04o} lets others read or write it, 0600 is needed",
                    f"chmod 600 {shlex.quote(str(path))}",
                )
            return file.read()
    except OSError as error:
        raise PenumbraError(
            f"key file {path}: {error.strerror or error}", "generate one, or correct its path"
        ) from None


def generate_key_file(path: Path, key_id: str = "ground-1") -> None:
    """Write a key file with one new random active key, mode 0600. Never overwrites.

    Raises
    ------
    PenumbraError
        The file exists, or cannot be written.
    """
    if not KEY_ID.fullmatch(key_id):
        raise PenumbraError(
            f"key id {key_id!r} is not allowed", "use 1 to 32 of A-Z, a-z, 0-9, '.', '_', '-'"
        )
    text = f'[[key]]\nid = "{key_id}"\nsecret = "{secrets.token_hex(MIN_SECRET_BYTES)}"\nstate = "active"\n'
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise PenumbraError(
            f"key file {path}: exists already", "delete it first if its key may be given up"
        ) from None
    except OSError as error:
        raise PenumbraError(
            f"key file {path}: {error.strerror or error}", "choose a writable place"
        ) from None
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
