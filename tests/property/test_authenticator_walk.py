"""Random walk of the authenticator: no (key, seq) executes twice, and every rejection has the right code."""

from __future__ import annotations

import sqlite3

import strategies
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from telemetry import topics
from telemetry.authenticator import Accepted, Authenticator, Redelivered, RejectCode, Rejected
from telemetry.commands import Arguments
from telemetry.envelope import COMMAND_VERSION, Command, encode_command, make_command
from telemetry.keys import Domain, Key, KeyRing, KeyState
from telemetry.packets import Stage, Verification

NODE = "sat-1"
WINDOW = 5
KEYS = [Key("a", b"a" * 32), Key("b", b"b" * 32)]
RETIRED = Key("old", b"o" * 32, KeyState.RETIRED)
STRANGER = Key("stranger", b"s" * 32)
RING = KeyRing([*KEYS, RETIRED])
SIGNERS = KeyRing([*KEYS, Key("old", b"o" * 32), STRANGER])


class AuthenticatorWalk(RuleBasedStateMachine):
    """What is executed is kept in a model; SIGKILL is a new authenticator on the same database."""

    @initialize()
    def start(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.now_ns = 10**18
        self.executed: dict[tuple[str, int], bytes] = {}
        self.reports: dict[tuple[str, int], list[Verification]] = {}
        self.sent: list[bytes] = []
        self.kill()

    def teardown(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()

    @rule()
    def kill(self) -> None:
        self.authenticator = Authenticator(NODE, RING, window=WINDOW)
        self.authenticator.load(self.connection)

    def last(self, key_id: str) -> int:
        return max((seq for k, seq in self.executed if k == key_id), default=-1)

    def sign(
        self, key_id: str, seq: int, arguments: Arguments, node: str = NODE, life_ns: int = 10**9
    ) -> bytes:
        command = make_command(
            arguments,
            key_id=key_id,
            seq=seq,
            t_issue_ns=self.now_ns - 10**9,
            t_expire_ns=self.now_ns + life_ns,
            node=node,
        )
        # Both forms in turn: nothing but secrecy may depend on it.
        return encode_command(command, SIGNERS, sealed=seq % 2 == 1)

    def expect(self, payload: bytes, code: RejectCode) -> Rejected:
        before = self.authenticator.report()
        verdict = self.authenticator.check(payload, self.now_ns)
        assert isinstance(verdict, Rejected), verdict
        assert verdict.code is code
        after = self.authenticator.report()
        assert after.rejected.get(code.value, 0) == before.rejected.get(code.value, 0) + 1
        assert after.last_reason == code.value
        assert after.accepted == before.accepted
        return verdict

    @rule(
        key=st.sampled_from(KEYS),
        step=st.integers(1, WINDOW),
        arguments=strategies.arguments,
        done=st.booleans(),
    )
    def send_new(self, key: Key, step: int, arguments: Arguments, done: bool) -> None:
        seq = self.last(key.id) + step
        payload = self.sign(key.id, seq, arguments)
        verdict = self.authenticator.check(payload, self.now_ns)
        assert isinstance(verdict, Accepted)
        assert (key.id, seq) not in self.executed
        self.authenticator.commit(self.connection, verdict)
        self.executed[key.id, seq] = payload
        self.reports[key.id, seq] = []
        self.sent.append(payload)
        report = self.authenticator.report()
        assert (report.last_key_id, report.last_seq) == (key.id, seq)
        if done:
            verification = Verification(
                key_id=key.id,
                command_seq=seq,
                name=verdict.command.name,
                stage=Stage.COMPLETED,
                ok=True,
                code="ok",
            )
            self.authenticator.record(self.connection, verification)
            self.reports[key.id, seq].append(verification)

    @rule(key=st.sampled_from(KEYS), step=st.integers(1, WINDOW), arguments=strategies.arguments)
    def kill_before_commit(self, key: Key, step: int, arguments: Arguments) -> None:
        payload = self.sign(key.id, self.last(key.id) + step, arguments)
        assert isinstance(self.authenticator.check(payload, self.now_ns), Accepted)
        self.kill()

    @rule(data=st.data(), late_ns=st.integers(0, 10**13))
    def redeliver(self, data: st.DataObject, late_ns: int) -> None:
        if not self.sent:
            return
        payload = data.draw(st.sampled_from(self.sent))
        self.now_ns += late_ns
        verdict = self.authenticator.check(payload, self.now_ns)
        assert isinstance(verdict, Redelivered)
        key = (verdict.command.key_id, verdict.command.seq)
        assert list(verdict.verifications) == self.reports[key]

    @rule(data=st.data(), arguments=strategies.arguments)
    def reuse_sequence(self, data: st.DataObject, arguments: Arguments) -> None:
        if not self.executed:
            return
        key_id, seq = data.draw(st.sampled_from(sorted(self.executed)))
        payload = self.sign(key_id, seq, arguments, life_ns=data.draw(st.integers(2 * 10**9, 10**12)))
        if payload != self.executed[key_id, seq]:
            assert self.expect(payload, RejectCode.SEQUENCE_REUSED).authentic

    @rule(key=st.sampled_from(KEYS), data=st.data(), arguments=strategies.arguments)
    def send_old(self, key: Key, data: st.DataObject, arguments: Arguments) -> None:
        unused = [seq for seq in range(self.last(key.id)) if (key.id, seq) not in self.executed]
        if unused:
            payload = self.sign(key.id, data.draw(st.sampled_from(unused)), arguments)
            assert self.expect(payload, RejectCode.OLD_SEQUENCE).authentic

    @rule(key=st.sampled_from(KEYS), far=st.just(1) | st.integers(1, 2**40), arguments=strategies.arguments)
    def send_too_far(self, key: Key, far: int, arguments: Arguments) -> None:
        payload = self.sign(key.id, self.last(key.id) + WINDOW + far, arguments)
        assert self.expect(payload, RejectCode.OUTSIDE_WINDOW).authentic

    @rule(key=st.sampled_from(KEYS), late_ns=st.integers(0, 10**15), arguments=strategies.arguments)
    def send_late(self, key: Key, late_ns: int, arguments: Arguments) -> None:
        payload = self.sign(key.id, self.last(key.id) + 1, arguments, life_ns=0)
        self.now_ns += late_ns
        assert self.expect(payload, RejectCode.EXPIRED).authentic

    @rule(key=st.sampled_from(KEYS), node=strategies.node_names, arguments=strategies.arguments)
    def send_to_another_node(self, key: Key, node: str, arguments: Arguments) -> None:
        if node != NODE:
            payload = self.sign(key.id, self.last(key.id) + 1, arguments, node=node)
            assert self.expect(payload, RejectCode.WRONG_NODE).authentic

    @rule(key=st.sampled_from(KEYS), arguments=strategies.arguments, data=st.data())
    def forge(self, key: Key, arguments: Arguments, data: st.DataObject) -> None:
        payload = bytearray(self.sign(key.id, self.last(key.id) + 1, arguments))
        bit = data.draw(st.integers(8 * (len(payload) - 16), 8 * len(payload) - 1))
        payload[bit // 8] ^= 1 << bit % 8
        assert not self.expect(bytes(payload), RejectCode.BAD_MAC).authentic

    @rule(key=st.sampled_from(KEYS), arguments=strategies.arguments, data=st.data())
    def damage_anywhere(self, key: Key, arguments: Arguments, data: st.DataObject) -> None:
        payload = bytearray(self.sign(key.id, self.last(key.id) + 1, arguments))
        bit = data.draw(st.integers(0, 8 * len(payload) - 1))
        payload[bit // 8] ^= 1 << bit % 8
        verdict = self.authenticator.check(bytes(payload), self.now_ns)
        assert isinstance(verdict, Rejected)
        assert not verdict.authentic

    @rule(key=st.sampled_from(KEYS), arguments=strategies.arguments)
    def sign_for_another_purpose(self, key: Key, arguments: Arguments) -> None:
        seq = self.last(key.id) + 1
        seq += seq % 2  # In the clear: the MAC lies behind the array.
        body = self.sign(key.id, seq, arguments)[:-32]
        signed = topics.tc(NODE).encode() + b"\0" + body
        assert not self.expect(body + key.mac(Domain.ACK, signed), RejectCode.BAD_MAC).authentic

    @rule(
        key=st.sampled_from(KEYS),
        arguments=strategies.arguments,
        topic=st.sampled_from([topics.ack(NODE), topics.flow(NODE), topics.tc("sat-2"), ""]),
    )
    def play_back_on_another_topic(self, key: Key, arguments: Arguments, topic: str) -> None:
        payload = self.sign(key.id, self.last(key.id) + 1, arguments)
        verdict = self.authenticator.check(payload, self.now_ns, topic)
        assert isinstance(verdict, Rejected)
        assert verdict.code is RejectCode.WRONG_TOPIC

    @rule(arguments=strategies.arguments)
    def sign_with_a_key_that_is_not_active(self, arguments: Arguments) -> None:
        self.expect(self.sign(STRANGER.id, 0, arguments), RejectCode.UNKNOWN_KEY)
        self.expect(self.sign(RETIRED.id, 0, arguments), RejectCode.KEY_RETIRED)

    @rule(garbage=st.binary(max_size=100))
    def send_garbage(self, garbage: bytes) -> None:
        verdict = self.authenticator.check(garbage, self.now_ns)
        assert isinstance(verdict, Rejected)
        assert verdict.code is RejectCode.MALFORMED

    @rule(key=st.sampled_from(KEYS))
    def expire_before_issue(self, key: Key) -> None:
        command = Command(COMMAND_VERSION, key.id, 0, self.now_ns, self.now_ns, NODE, "ping", {})
        self.expect(encode_command(command, RING), RejectCode.MALFORMED)


TestAuthenticatorWalk = AuthenticatorWalk.TestCase
TestAuthenticatorWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
