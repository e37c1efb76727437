"""Commands as strangers send them, by kind of attack, and what the authenticator answers to each."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from typing import Final

from hil.bench.link_load import NODE, T0_NS
from telemetry import topics
from telemetry.authenticator import Accepted, Authenticator, Redelivered, Rejected, Verdict
from telemetry.commands import Arguments, Cancel, Ping, Resync
from telemetry.envelope import encode_command, make_command
from telemetry.keys import Domain, Key, KeyRing, KeyState, KeyUse

KEY: Final = Key("ground-1", bytes(range(32)))
RETIRED: Final = Key("ground-0", b"r" * 32, KeyState.RETIRED)
STANDBY: Final = Key("ground-2", b"s" * 32, KeyState.STANDBY)
RECOVERY: Final = Key("recovery", b"m" * 32, use=KeyUse.RECOVERY)
RING: Final = KeyRing([KEY, RETIRED, STANDBY, RECOVERY])
HOLDER: Final = KeyRing([Key(k.id, k.secret) for k in RING] + [Key("stranger", b"x" * 32)])
"""All of these keys, each able to sign: what a stranger has who knows them."""
LIFE_NS: Final = 10**12


class Attacked:
    """An authenticator that has accepted ten commands, the last with number 1,000."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.authenticator = Authenticator(NODE, RING)
        self.authenticator.load(self.connection)
        self.accepted = [self.sign(seq) for seq in range(10, 1001, 50)] + [self.sign(1000)]
        for payload in self.accepted:
            verdict = self.authenticator.check(payload, T0_NS)
            if not isinstance(verdict, Accepted):
                raise RuntimeError(f"a sound command is not accepted: {verdict}")
            self.authenticator.commit(self.connection, verdict)

    def sign(self, seq: int, key_id: str = KEY.id, *, node: str = NODE, expire_ns: int = T0_NS + LIFE_NS,
             arguments: Arguments | None = None) -> bytes:  # fmt: skip
        """Return a command, in the clear or sealed in turn."""
        command = make_command(
            Ping() if arguments is None else arguments, key_id=key_id, seq=seq,
            t_issue_ns=T0_NS - 2 * LIFE_NS, t_expire_ns=expire_ns, node=node,
        )  # fmt: skip
        return encode_command(command, HOLDER, sealed=seq % 2 == 1)


Attack = Callable[[Attacked, int], tuple[bytes, str]]
TC: Final = topics.tc(NODE)


def _forged(a: Attacked, n: int) -> tuple[bytes, str]:
    payload = bytearray(a.sign(1001 + n % 60))
    payload[-1 - n % 16] ^= 1 + n % 255
    return bytes(payload), TC


def _signed_for_another_purpose(a: Attacked, n: int) -> tuple[bytes, str]:
    body = a.sign(1002 + 2 * (n % 30))[:-32]
    return body + KEY.mac(Domain.ACK, TC.encode() + b"\0" + body), TC


ATTACKS: Final[dict[str, Attack]] = {
    "forged": _forged,
    "signed for another purpose": _signed_for_another_purpose,
    "replayed, remembered": lambda a, n: (a.accepted[-1 - n % 5], TC),
    "replayed, forgotten": lambda a, n: (a.accepted[n % 10], TC),
    "reordered": lambda a, n: (a.sign(800 + n % 190 + (n % 190 % 50 == 10)), TC),
    "far ahead": lambda a, n: (a.sign(1065 + n), TC),
    "expired": lambda a, n: (a.sign(1001 + n % 60, expire_ns=T0_NS - n), TC),
    "wrong node": lambda a, n: (a.sign(1001 + n % 60, node="penumbra-2"), TC),
    "wrong node, its topic": lambda a, n: (a.sign(1001 + n % 60, node="penumbra-2"), topics.tc("penumbra-2")),
    "wrong topic": lambda a, n: (a.sign(1001 + n % 60), topics.ack(NODE)),
    "retired key": lambda a, n: (a.sign(1001 + n % 60, RETIRED.id), TC),
    "key in standby": lambda a, n: (a.sign(1001 + n % 60, STANDBY.id), TC),
    "unknown key": lambda a, n: (a.sign(1001 + n % 60, "stranger"), TC),
    "recovery key out of its rights": lambda a, n: (
        a.sign(n, RECOVERY.id, arguments=Cancel(job="j")), TC
    ),
    "resync with a key for commands": lambda a, n: (
        a.sign(1001 + n % 60, arguments=Resync(key=KEY.id, last_seq=5000)), TC
    ),
}  # fmt: skip


def hostile_commands(count: int) -> dict[str, dict[str, int]]:
    """Return what the authenticator answers to each kind of attack, so many times each."""
    attacked = Attacked()
    answers: dict[str, dict[str, int]] = {}
    for name, attack in ATTACKS.items():
        told: Counter[str] = Counter()
        for number in range(count):
            payload, topic = attack(attacked, number)
            told[_answer(attacked.authenticator.check(payload, T0_NS, topic))] += 1
        answers[name] = dict(told)
    attacked.connection.close()
    return answers


def _answer(verdict: Verdict) -> str:
    match verdict:
        case Rejected(code=code):
            return code.value
        case Redelivered():
            return "redelivered"
        case _:
            return "accepted"
