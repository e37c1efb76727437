"""The command authenticator: what may be executed, once, and never again.

Checks, in this order: shape, key active, MAC in constant time, node, already accepted (redelivery), expiry,
window. The caller then persists before it executes:

    verdict = authenticator.check(payload, now_ns)
    if isinstance(verdict, Accepted):
        await database.run(lambda c: authenticator.commit(c, verdict))   # durable, or not executed
        ... execute; for each report: authenticator.record(c, verification) in the transaction that spools it

MQTT QoS 1 redelivers legally: the same sequence number with the same MAC is answered with the verification
reports stored for it, and not executed. It is recognised before expiry is looked at, since answering executes
nothing.
"""

from __future__ import annotations

import hmac
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from telemetry.commands import Command, CommandError, split_command
from telemetry.keys import Domain, KeyRing, KeyState
from telemetry.packets import SecurityReport, Verification

WINDOW = 64
"""Default forward window: seq last + 1 to last + window is accepted (assumed)."""
HISTORY = 256
"""Accepted commands per key whose redelivery is still recognised (assumed)."""


class RejectCode(StrEnum):
    """Why a telecommand was rejected before it was accepted."""

    MALFORMED = "malformed"
    """Not a telecommand: size, shape, version or times."""
    UNKNOWN_KEY = "unknown_key"
    """No key of that id."""
    KEY_RETIRED = "key_retired"
    """The key is known and must not be used any more."""
    BAD_MAC = "bad_mac"
    """Not signed with that key, or changed on its way."""
    WRONG_NODE = "wrong_node"
    """Authentic, but for another node."""
    SEQUENCE_REUSED = "sequence_reused"
    """Authentic, but another command was accepted with this sequence number."""
    EXPIRED = "expired"
    """Authentic, but its time is over."""
    OLD_SEQUENCE = "old_sequence"
    """Authentic, but not above the last sequence number accepted, and not one remembered."""
    OUTSIDE_WINDOW = "outside_window"
    """Authentic, but too far above the last sequence number accepted (`last_seq` in the security report)."""


@dataclass(frozen=True)
class Accepted:
    """Authentic, new and in time. To be committed, then executed."""

    command: Command
    mac: bytes = field(repr=False)


@dataclass(frozen=True)
class Redelivered:
    """Accepted before: to be answered with what is stored, not executed."""

    command: Command
    verifications: tuple[Verification, ...]


@dataclass(frozen=True)
class Rejected:
    """Not to be executed. What it claims about itself is to be believed only if `authentic`."""

    code: RejectCode
    text: str
    authentic: bool
    key_id: str | None = None
    seq: int | None = None
    name: str | None = None


Verdict = Accepted | Redelivered | Rejected


class ReplayError(RuntimeError):
    """A command was to be committed although its sequence number is not new any more: do not execute it."""


@dataclass
class _Seen:
    mac: bytes
    verifications: list[Verification] = field(default_factory=list)


_decoder = msgspec.msgpack.Decoder(Verification)


def _reject(command: Command, code: RejectCode, text: str, *, authentic: bool = True) -> Rejected:
    return Rejected(code, text, authentic, command.key_id[:40], command.seq, command.name[:40])


class Authenticator:
    """Anti-replay state per key, in memory for `check` and in the database for good.

    Parameters
    ----------
    node
        Commands for other nodes are rejected.
    ring
        The keys.
    window
        How far above the last accepted one a sequence number may be, 1 or more.
    """

    def __init__(self, node: str, ring: KeyRing, window: int = WINDOW) -> None:
        if window < 1:
            raise ValueError(f"window {window}, 1 or more needed")
        self._node = node
        self._ring = ring
        self._window = window
        self._last: dict[str, int] = {}
        self._seen: dict[tuple[str, int], _Seen] = {}
        self._accepted = 0
        self._redelivered = 0
        self._rejected: Counter[str] = Counter()
        self._last_accepted: tuple[str, int] | None = None
        self._last_reason: RejectCode | None = None

    def load(self, connection: sqlite3.Connection) -> None:
        """Create the tables if they are new, and take over what they hold. Called before the first `check`.

        Also to be called when the transaction of a `commit` failed, so that memory follows the disk.
        """
        connection.execute(
            "CREATE TABLE IF NOT EXISTS auth_key (key_id TEXT PRIMARY KEY, last_seq INTEGER NOT NULL)"
        )
        connection.execute(
            "CREATE TABLE IF NOT EXISTS auth_command (id INTEGER PRIMARY KEY, key_id TEXT NOT NULL, "
            "seq INTEGER NOT NULL, mac BLOB NOT NULL, UNIQUE (key_id, seq))"
        )
        connection.execute(
            "CREATE TABLE IF NOT EXISTS auth_verification (id INTEGER PRIMARY KEY, key_id TEXT NOT NULL, "
            "seq INTEGER NOT NULL, packet BLOB NOT NULL)"
        )
        connection.execute(
            "CREATE INDEX IF NOT EXISTS auth_verification_of ON auth_verification (key_id, seq)"
        )
        last = dict(connection.execute("SELECT key_id, last_seq FROM auth_key"))
        seen = {
            (key_id, seq): _Seen(mac)
            for key_id, seq, mac in connection.execute(
                "SELECT key_id, seq, mac FROM auth_command ORDER BY id"
            )
        }
        for key_id, seq, packet in connection.execute(
            "SELECT key_id, seq, packet FROM auth_verification ORDER BY id"
        ):
            if (key_id, seq) in seen:
                seen[key_id, seq].verifications.append(_decoder.decode(packet))
        self._last, self._seen = last, seen
        self._last_accepted = next(reversed(seen), None)

    def check(self, payload: bytes, now_ns: int) -> Verdict:
        """Judge a telecommand as received.

        Parameters
        ----------
        payload
            The bytes of the message, from anyone.
        now_ns
            Mission time (UTC), ns since 1970.
        """
        verdict = self._judge(payload, now_ns)
        if isinstance(verdict, Rejected):
            self._rejected[verdict.code.value] += 1
            self._last_reason = verdict.code
        elif isinstance(verdict, Redelivered):
            self._redelivered += 1
        return verdict

    def _judge(self, payload: bytes, now_ns: int) -> Verdict:
        try:
            command, body, mac = split_command(payload)
        except CommandError as error:
            return Rejected(RejectCode.MALFORMED, str(error), authentic=False)
        return self._authenticate(command, body, mac) or self._place(command, mac, now_ns)

    def _authenticate(self, command: Command, body: bytes, mac: bytes) -> Rejected | None:
        key = self._ring.get(command.key_id)
        if key is None:
            return _reject(command, RejectCode.UNKNOWN_KEY, "no key of this id", authentic=False)
        if key.state is not KeyState.ACTIVE:
            return _reject(command, RejectCode.KEY_RETIRED, "the key is retired", authentic=False)
        if not key.verify(Domain.COMMAND, body, mac):
            return _reject(command, RejectCode.BAD_MAC, "the MAC is wrong", authentic=False)
        if command.node != self._node:
            return _reject(command, RejectCode.WRONG_NODE, f"it is for node {command.node[:40]!r}")
        return None

    def _place(self, command: Command, mac: bytes, now_ns: int) -> Verdict:
        key_id, seq = command.key_id, command.seq
        seen = self._seen.get((key_id, seq))
        if seen is not None:
            if hmac.compare_digest(seen.mac, mac):
                return Redelivered(command, tuple(seen.verifications))
            return _reject(command, RejectCode.SEQUENCE_REUSED, f"another command was accepted as {seq}")
        if now_ns >= command.t_expire_ns:
            late_s = (now_ns - command.t_expire_ns) / 1e9
            return _reject(command, RejectCode.EXPIRED, f"it expired {late_s:.1f} s ago")
        last = self._last.get(key_id, -1)
        if seq <= last:
            return _reject(command, RejectCode.OLD_SEQUENCE, f"sequence {seq} is not above {last}")
        if seq > last + self._window:
            text = f"sequence {seq} is more than {self._window} above {last}"
            return _reject(command, RejectCode.OUTSIDE_WINDOW, text)
        return Accepted(command, mac)

    def commit(self, connection: sqlite3.Connection, accepted: Accepted) -> None:
        """Make it durable that this command was accepted. Only when that is committed may it be executed.

        Raises
        ------
        ReplayError
            Its sequence number was committed meanwhile (the same message checked twice): do not execute it.
        """
        key_id, seq = accepted.command.key_id, accepted.command.seq
        row = connection.execute("SELECT last_seq FROM auth_key WHERE key_id = ?", (key_id,)).fetchone()
        # The database decides, not the memory: this may be a second run after a lost transaction.
        if row is not None and seq <= row[0]:
            raise ReplayError(f"command {seq} of key {key_id!r} is not above {row[0]}: committed already")
        connection.execute(
            "INSERT INTO auth_key VALUES (?, ?) "
            "ON CONFLICT (key_id) DO UPDATE SET last_seq = excluded.last_seq",
            (key_id, seq),
        )
        connection.execute(
            "INSERT INTO auth_command (key_id, seq, mac) VALUES (?, ?, ?)", (key_id, seq, accepted.mac)
        )
        for table in ("auth_command", "auth_verification"):
            connection.execute(
                f"DELETE FROM {table} WHERE key_id = ? AND seq <= ?",  # noqa: S608 - two fixed names
                (key_id, seq - HISTORY),
            )
        if self._last.get(key_id, -1) < seq:
            self._last[key_id] = seq
            self._seen[key_id, seq] = _Seen(accepted.mac)
            self._forget(key_id, seq - HISTORY)
            self._accepted += 1
            self._last_accepted = (key_id, seq)

    def _forget(self, key_id: str, upto: int) -> None:
        for old in [k for k in self._seen if k[0] == key_id and k[1] <= upto]:
            del self._seen[old]

    def record(self, connection: sqlite3.Connection, verification: Verification) -> None:
        """Store a verification report, to be given again when its command is redelivered."""
        key = (verification.key_id, verification.command_seq)
        connection.execute(
            "INSERT INTO auth_verification (key_id, seq, packet) VALUES (?, ?, ?)",
            (*key, msgspec.msgpack.encode(verification)),
        )
        seen = self._seen.get(key)
        if seen is not None and verification not in seen.verifications:
            seen.verifications.append(verification)

    def report(self) -> SecurityReport:
        """Return the counters since boot, and key and sequence number last accepted (durable)."""
        key_id, seq = self._last_accepted or (None, None)
        return SecurityReport(
            accepted=self._accepted,
            redelivered=self._redelivered,
            rejected=dict(self._rejected),
            last_key_id=key_id,
            last_seq=seq,
            last_reason=None if self._last_reason is None else self._last_reason.value,
        )
