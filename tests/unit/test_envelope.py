"""Envelopes of telecommands: pinned bytes, both forms, and what is none."""

from __future__ import annotations

import hmac

import msgpack
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from telemetry import commands as c
from telemetry import envelope as e
from telemetry import topics
from telemetry.commands import CommandError
from telemetry.keys import Domain, Key, KeyRing, KeyState

KEY = Key("ground-1", bytes(range(32)))
RING = KeyRing([KEY, Key("old", b"o" * 32, KeyState.RETIRED), Key("next", b"n" * 32, KeyState.STANDBY)])
ISSUE_NS = 1_700_000_000_000_000_000
EXPIRE_NS = ISSUE_NS + 60 * 10**9
TOPIC = topics.tc("sat-1")


def make(arguments: c.Arguments, **changes: object) -> e.Command:
    fields: dict[str, object] = {
        "key_id": "ground-1",
        "seq": 41,
        "t_issue_ns": ISSUE_NS,
        "t_expire_ns": EXPIRE_NS,
        "node": "sat-1",
        **changes,
    }
    return e.make_command(arguments, **fields)  # type: ignore[arg-type]


CAP = make(c.SetPowerCap(power_w=7.5))
NONCE = bytes(range(100, 112))
GOLDEN = bytes.fromhex(
    "9802a867726f756e642d3129cf17979cfe362a0000cf17979d0c2e715800a57361742d31ad7365745f706f7765725f636170"
    "81a7706f7765725f77cb401e000000000000202d47c2046150cf10f28dbab66a281bed7dedc92b31ad74986b6b060041e40b"
)
GOLDEN_SEALED = bytes.fromhex(
    "92c4329702a867726f756e642d3129cf17979cfe362a0000cf17979d0c2e715800a57361742d31c40c6465666768696a6b6c"
    "6d6e6fc4319aea4a194e297acfa1a48971c384f33780b49fca95363136bb11015438a819303f9703fb47f4d3309b422b7dc9"
    "d3d3c5bb"
)


def test_golden_bytes_in_the_clear() -> None:
    assert e.encode_command(CAP, RING) == GOLDEN
    signed = b"penumbra command 2\0penumbra/sat-1/tc\0" + GOLDEN[:-32]
    assert hmac.digest(bytes(range(32)), signed, "sha256") == GOLDEN[-32:]
    assert e.read_envelope(GOLDEN).open(KEY, TOPIC) == CAP


def test_golden_bytes_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e.secrets, "token_bytes", lambda count: NONCE[:count])
    assert e.encode_command(CAP, RING, sealed=True) == GOLDEN_SEALED
    header, sealed = msgpack.unpackb(GOLDEN_SEALED)
    key = hmac.digest(bytes(range(32)), b"penumbra command 2\0AES-256-GCM", "sha256")
    proven = b"penumbra command 2\0penumbra/sat-1/tc\0" + header
    content = AESGCM(key).decrypt(NONCE, sealed, proven)
    assert msgpack.unpackb(content) == ["set_power_cap", {"power_w": 7.5}]
    assert msgpack.unpackb(header) == [2, "ground-1", 41, ISSUE_NS, EXPIRE_NS, "sat-1", NONCE]
    assert b"set_power_cap" not in GOLDEN_SEALED
    assert e.read_envelope(GOLDEN_SEALED).open(KEY, TOPIC) == CAP


@pytest.mark.parametrize("sealed", [False, True])
def test_no_single_bit_may_flip_and_no_byte_may_go(sealed: bool) -> None:
    payload = e.encode_command(CAP, RING, sealed=sealed)
    assert e.open_command(payload, RING) == CAP
    for bit in range(8 * len(payload)):
        struck = bytearray(payload)
        struck[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CommandError):
            e.open_command(bytes(struck), RING)
    for length in range(len(payload)):
        with pytest.raises(CommandError):
            e.open_command(payload[:length], RING)
    with pytest.raises(CommandError):
        e.open_command(payload + b"\0", RING)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_command_proves_nothing_on_another_topic_or_with_another_key(sealed: bool) -> None:
    envelope = e.read_envelope(e.encode_command(CAP, RING, sealed=sealed))
    assert envelope.open(KEY, TOPIC) == CAP
    assert envelope.open(KEY, topics.ack("sat-1")) is None
    assert envelope.open(KEY, topics.tc("sat-2")) is None
    assert envelope.open(Key("ground-1", b"x" * 32), TOPIC) is None


def test_a_sealed_command_has_one_form_only() -> None:
    header, sealed = msgpack.unpackb(GOLDEN_SEALED)
    longer = b"\x92\xc5" + len(header).to_bytes(2, "big") + header + msgpack.packb(sealed)
    with pytest.raises(CommandError, match="shortest"):
        e.read_envelope(longer)


def test_what_is_sealed_may_be_no_command() -> None:
    header = msgpack.packb([2, "ground-1", 41, ISSUE_NS, EXPIRE_NS, "sat-1", NONCE])
    proven = TOPIC.encode() + b"\0" + header
    sealed = KEY.seal(Domain.COMMAND, NONCE, b"\xc0", proven)
    with pytest.raises(CommandError, match="sealed, and not"):
        e.read_envelope(msgpack.packb([header, sealed])).open(KEY, TOPIC)


def test_two_commands_sealed_alike_have_other_nonces() -> None:
    first, second = (e.encode_command(CAP, RING, sealed=True) for _ in range(2))
    assert first != second
    assert e.read_envelope(first).proof != e.read_envelope(second).proof


def test_the_limits_themselves_are_allowed() -> None:
    for tokens in (1, 2048):
        make(c.Infer(job="a" * 64, prompt="x" * 16000, max_tokens=tokens))
    longest = make(c.Infer(job="a", prompt="\U0001f6f0" * 16000, max_tokens=1))
    for sealed in (False, True):
        encoded = e.encode_command(longest, RING, sealed=sealed)
        assert len(encoded) <= e.MAX_COMMAND_BYTES
        assert e.open_command(encoded, RING) == longest


def test_what_the_node_would_refuse_is_not_made() -> None:
    with pytest.raises(CommandError, match="max_tokens"):
        make(c.Infer(job="a", prompt="x", max_tokens=0))


@pytest.mark.parametrize("key_id", ["old", "next", "nobody"])
def test_signing_needs_an_active_key(key_id: str) -> None:
    with pytest.raises(CommandError, match="cannot sign"):
        e.encode_command(make(c.Ping(), key_id=key_id), RING)


MAC = b"\x00" * 32


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "allowed"),
        (MAC, "allowed"),
        (b"\x00" * (e.MAX_COMMAND_BYTES + 1), "allowed"),
        (b"\x00" * 40, "not a telecommand"),
        (b"\x91" * 5000 + b"\x00" * 33, "not a telecommand"),
        (msgpack.packb([1, "k", 0, 0, 1, "n", "ping", {}]) + MAC, "version 1"),
        (msgpack.packb([2, "k", 0, 1, 1, "n", "ping", {}]) + MAC, "expires before"),
        (msgpack.packb([2, "k", -1, 0, 1, "n", "ping", {}]) + MAC, "not a telecommand"),
        (msgpack.packb([2, "k", 0, 0, 1, "n", "ping", []]) + MAC, "not a telecommand"),
        (msgpack.packb([2, "k", 0, 0, 1, "n", "ping", {}, 0]) + MAC, "not a telecommand"),
        (msgpack.packb([2, "k", 0, 0, 1, "n", "ping", {"a": 1}])[:-1] + MAC, "not a telecommand"),
        (msgpack.packb([b"header", MAC]), "not a telecommand"),
        (msgpack.packb([msgpack.packb([2, "k", 0, 0, 1, "n", b"short"]), MAC]), "not a telecommand"),
    ],
)
def test_what_is_no_telecommand(payload: bytes, why: str) -> None:
    with pytest.raises(CommandError, match=why) as caught:
        e.read_envelope(payload)
    assert caught.value.code is None
    assert not e.is_command(payload)
