"""The command authenticator: what may be executed, once, and never again.

Checks, in this order: shape, key active, MAC or seal in constant time, topic, node (`authenticate`, at
reception, so that nobody without a key takes room in a queue); then already accepted (redelivery), expiry,
what the key may do, window (`place`, when its turn comes). The caller then persists before it executes:

    verdict = authenticator.check(payload, now_ns)     # both
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

from telemetry import topics
from telemetry.commands import RECOVERY, CommandError, Resync
from telemetry.envelope import Command, Envelope, read_envelope
from telemetry.keys import Key, KeyRing, KeyState, KeyUse
from telemetry.packets import KeyReport, SecurityReport, Verification

WINDOW = 64
"""Default forward window: seq last + 1 to last + window is accepted (assumed)."""
MAX_ACTIVE = 2
"""Keys for commands that may be active at once: the old one and the new one of a rollover."""
HISTORY = 256
"""Accepted commands per key whose redelivery is still recognised (assumed)."""


class RejectCode(StrEnum):
    """Why a telecommand was rejected before it was accepted."""

    MALFORMED = "malformed"
    """Not a telecommand: size, shape, version or times."""
    UNKNOWN_KEY = "unknown_key"
    """No key of that id."""
    KEY_STANDBY = "key_standby"
    """The key is known and not activated yet."""
    KEY_RETIRED = "key_retired"
    """The key is known and must not be used any more."""
    NOT_SEALED = "not_sealed"
    """In the clear, and this node is configured to take sealed commands only."""
    BAD_MAC = "bad_mac"
    """Not signed or sealed with that key, or changed on its way."""
    WRONG_TOPIC = "wrong_topic"
    """Authentic, but for another topic of this node."""
    WRONG_NODE = "wrong_node"
    """Authentic, but for another node."""
    SEQUENCE_REUSED = "sequence_reused"
    """Authentic, but another command was accepted with this sequence number."""
    EXPIRED = "expired"
    """Authentic, but its time is over."""
    NOT_PERMITTED = "not_permitted"
    """Authentic, but not one of the commands this key may give."""
    RATE_LIMITED = "rate_limited"
    """Authentic, but more commands came than the node takes in the time; it may be sent again unchanged."""
    OLD_SEQUENCE = "old_sequence"
    """Authentic, but not above the last sequence number accepted, and not one remembered."""
    OUTSIDE_WINDOW = "outside_window"
    """Authentic, but too far above the last sequence number accepted (`last_seq` in the security report)."""


@dataclass(frozen=True)
class Authentic:
    """From a holder of the key, for this node; whether it is to be executed is still open."""

    command: Command
    mac: bytes = field(repr=False)


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


def _reject(command: Command, code: RejectCode, text: str) -> Rejected:
    return Rejected(code, text, True, command.key_id[:40], command.seq, command.name[:40])


def _refuse(envelope: Envelope, code: RejectCode, text: str) -> Rejected:
    claims = envelope.claims
    name = None if envelope.name is None else envelope.name[:40]
    return Rejected(code, text, False, claims.key_id[:40], claims.seq, name)


def _not_active(key: Key) -> tuple[RejectCode, str]:
    if key.state is KeyState.STANDBY:
        return RejectCode.KEY_STANDBY, "the key is not activated yet"
    return RejectCode.KEY_RETIRED, "the key is retired"


class KeyChangeError(ValueError):
    """A change of keys or sequence numbers that would lock somebody out, or let an old command in."""


class Authenticator:
    """Anti-replay state per key, in memory for `check` and in the database for good.

    Parameters
    ----------
    node
        Commands for other nodes are rejected.
    ring
        The keys.
    window
        How far above the last accepted one a sequence number may be, 1 or more. A recovery key has none.
    require_sealed
        Whether commands in the clear are rejected.

    States of keys that were changed by command are taken over into the ring; a key that its file calls
    retired stays so.
    """

    def __init__(
        self, node: str, ring: KeyRing, window: int = WINDOW, *, require_sealed: bool = False
    ) -> None:
        if window < 1:
            raise ValueError(f"window {window}, 1 or more needed")
        self._node = node
        self._ring = ring
        self._topic = topics.tc(node)
        self._window = window
        self._require_sealed = require_sealed
        self._filed = {key.id: key.state for key in ring}
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
        connection.execute(
            "CREATE TABLE IF NOT EXISTS auth_key_state (key_id TEXT PRIMARY KEY, state TEXT NOT NULL)"
        )
        commanded = dict(connection.execute("SELECT key_id, state FROM auth_key_state"))
        for key in self._ring:
            filed = self._filed[key.id]
            retired = filed is KeyState.RETIRED
            key.state = filed if retired else KeyState(commanded.get(key.id, filed))
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

    def check(self, payload: bytes, now_ns: int, topic: str | None = None) -> Verdict:
        """Judge a telecommand as received: `authenticate`, then `place`.

        Parameters
        ----------
        payload
            The bytes of the message, from anyone.
        now_ns
            Mission time (UTC), ns since 1970.
        topic
            Where it came; None for the command topic of this node.
        """
        found = self.authenticate(payload, topic)
        return found if isinstance(found, Rejected) else self.place(found, now_ns)

    def authenticate(self, payload: bytes, topic: str | None = None) -> Authentic | Rejected:
        """Tell whether a telecommand is from a holder of a key, for this node and topic."""
        try:
            found = self._authenticate(payload, self._topic if topic is None else topic)
        except CommandError as error:
            found = Rejected(RejectCode.MALFORMED, str(error), authentic=False)
        if isinstance(found, Rejected):
            self._count(found)
        return found

    def place(self, authentic: Authentic, now_ns: int) -> Verdict:
        """Tell whether an authentic telecommand is to be executed now, at mission time `now_ns` (UTC)."""
        verdict = self._place(authentic.command, authentic.mac, now_ns)
        if isinstance(verdict, Rejected):
            self._count(verdict)
        elif isinstance(verdict, Redelivered):
            self._redelivered += 1
        return verdict

    def hold_back(self, accepted: Accepted) -> Rejected:
        """Count a command that is not executed because too many came; its number may be used again."""
        rejected = _reject(accepted.command, RejectCode.RATE_LIMITED, "too many commands in the time")
        self._count(rejected)
        return rejected

    def _count(self, rejected: Rejected) -> None:
        self._rejected[rejected.code.value] += 1
        self._last_reason = rejected.code

    def _authenticate(self, payload: bytes, topic: str) -> Authentic | Rejected:
        envelope = read_envelope(payload)
        key = self._usable_key(envelope)
        if isinstance(key, Rejected):
            return key
        meant = topics.tc(envelope.claims.node)
        command = envelope.open(key, topic)
        if command is None and meant != topic:
            # Authentic where it belongs, and played back here: worth another alarm than a forgery.
            command = envelope.open(key, meant)
        if command is None:
            return _refuse(envelope, RejectCode.BAD_MAC, "the MAC or seal is wrong")
        if command.node != self._node:
            return _reject(command, RejectCode.WRONG_NODE, f"it is for node {command.node[:40]!r}")
        if meant != topic:
            return _reject(command, RejectCode.WRONG_TOPIC, f"it came on {topic[:100]!r}")
        return Authentic(command, envelope.proof)

    def _usable_key(self, envelope: Envelope) -> Key | Rejected:
        key = self._ring.get(envelope.claims.key_id)
        if key is None:
            return _refuse(envelope, RejectCode.UNKNOWN_KEY, "no key of this id")
        if key.state is not KeyState.ACTIVE:
            return _refuse(envelope, *_not_active(key))
        if self._require_sealed and envelope.sealed is None:
            return _refuse(envelope, RejectCode.NOT_SEALED, "this node takes sealed commands only")
        return key

    def _place(self, command: Command, mac: bytes, now_ns: int) -> Verdict:
        key = self._ring.get(command.key_id)
        if key is None or key.state is not KeyState.ACTIVE:
            # Retired by a command that was before it in the queue.
            return _reject(command, RejectCode.KEY_RETIRED, "the key is not active any more")
        seen = self._seen.get((key.id, command.seq))
        if seen is not None:
            if hmac.compare_digest(seen.mac, mac):
                return Redelivered(command, tuple(seen.verifications))
            text = f"another command was accepted as {command.seq}"
            return _reject(command, RejectCode.SEQUENCE_REUSED, text)
        fault = self._fault(command, key, now_ns)
        return Accepted(command, mac) if fault is None else _reject(command, *fault)

    def _fault(self, command: Command, key: Key, now_ns: int) -> tuple[RejectCode, str] | None:
        """Return why a new command is not to be executed, None if it is."""
        if now_ns >= command.t_expire_ns:
            late_s = (now_ns - command.t_expire_ns) / 1e9
            return RejectCode.EXPIRED, f"it expired {late_s:.1f} s ago"
        recovery = key.use is KeyUse.RECOVERY
        permitted = command.name in RECOVERY if recovery else command.name != Resync.name
        if not permitted:
            text = f"key {key.id!r}, for {key.use}, may not give {command.name[:40]!r}"
            return RejectCode.NOT_PERMITTED, text
        last = self._last.get(key.id, -1)
        if command.seq <= last:
            return RejectCode.OLD_SEQUENCE, f"sequence {command.seq} is not above {last}"
        if command.seq > last + self._window and not recovery:
            text = f"sequence {command.seq} is more than {self._window} above {last}"
            return RejectCode.OUTSIDE_WINDOW, text
        return None

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

    def activate(self, connection: sqlite3.Connection, key_id: str) -> None:
        """Make a key in standby usable; `load` after the commit. Raises `KeyChangeError`."""
        key = self._known(key_id)
        if key.state is KeyState.RETIRED:
            raise KeyChangeError(f"key {key_id!r} is retired, for good")
        others = [k.id for k in self._ring.active() if k.id != key_id]
        if key.use is KeyUse.COMMAND and len(others) >= MAX_ACTIVE:
            raise KeyChangeError(f"{', '.join(others)} are active already: retire one of them first")
        self._set_state(connection, key_id, KeyState.ACTIVE)

    def retire(self, connection: sqlite3.Connection, key_id: str, signed_with: str) -> None:
        """Make a key unusable for good; `load` after the commit. Raises `KeyChangeError`.

        It takes another key to do so, which thereby proves that it works.
        """
        self._known(key_id)
        if key_id == signed_with:
            raise KeyChangeError(f"key {key_id!r} cannot retire itself: sign with the one that stays")
        if not [k for k in self._ring.active() if k.id != key_id]:
            raise KeyChangeError(f"key {key_id!r} is the last active one for commands")
        self._set_state(connection, key_id, KeyState.RETIRED)

    def resync(self, connection: sqlite3.Connection, key_id: str, last_seq: int) -> None:
        """Raise the last accepted number of a key; `load` after the commit. Raises `KeyChangeError`."""
        self._known(key_id)
        last = self._last.get(key_id, -1)
        if last_seq < last:
            raise KeyChangeError(f"key {key_id!r} is at {last} already: going back would let old commands in")
        connection.execute(
            "INSERT INTO auth_key VALUES (?, ?) "
            "ON CONFLICT (key_id) DO UPDATE SET last_seq = excluded.last_seq",
            (key_id, last_seq),
        )

    def _known(self, key_id: str) -> Key:
        key = self._ring.get(key_id)
        if key is None:
            raise KeyChangeError(f"no key {key_id!r} in the key file of this node")
        return key

    @staticmethod
    def _set_state(connection: sqlite3.Connection, key_id: str, state: KeyState) -> None:
        connection.execute(
            "INSERT INTO auth_key_state VALUES (?, ?) "
            "ON CONFLICT (key_id) DO UPDATE SET state = excluded.state",
            (key_id, state.value),
        )

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
            keys={
                key.id: KeyReport(state=key.state.value, use=key.use.value, last_seq=self._last.get(key.id))
                for key in self._ring
            },
        )
