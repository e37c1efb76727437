"""Commands: pinned bytes, every command, every range, every refusal."""

from __future__ import annotations

import math

import msgpack
import pytest

from telemetry import commands as c
from telemetry.keys import Domain, Key, KeyRing, KeyState
from telemetry.sampling import Sampling

KEY = Key("ground-1", bytes(range(32)))
RING = KeyRing([KEY, Key("old", b"o" * 32, KeyState.RETIRED)])
ISSUE_NS = 1_700_000_000_000_000_000
EXPIRE_NS = ISSUE_NS + 60 * 10**9
GOLDEN = bytes.fromhex(
    "9801a867726f756e642d3129cf17979cfe362a0000cf17979d0c2e715800a57361742d31ad7365745f706f7765725f636170"
    "81a7706f7765725f77cb401e000000000000d52472f8b25332519e21b584e7a442f293299b9291a8243a7c47f97bc2ffe968"
)
PLAIN_INFER = bytes.fromhex(
    "9801a867726f756e642d312acf17979cfe362a0000cf17979d0c2e715800a57361742d31a5696e66657283a36a6f62a56a6f62"
    "2d31a670726f6d7074b45768792069732074686520736b7920626c75653faa6d61785f746f6b656e7340c52b730ef9226e5d7a"
    "7f66cda4951d5c3ebef9dcd1b5b14c2c033210c119b7f3"
)
"""A job as it was asked for before jobs had sampling, priority and deadline."""
FULL_INFER = bytes.fromhex(
    "9801a867726f756e642d3129cf17979cfe362a0000cf17979d0c2e715800a57361742d31a5696e66657286a36a6f62a56a6f"
    "622d31a670726f6d7074a45768793faa6d61785f746f6b656e7340a873616d706c696e6787ab74656d7065726174757265cb"
    "3fe8000000000000a5746f705f6b28a5746f705f70cb3fe0000000000000b272657065746974696f6e5f70656e616c7479cb"
    "3ff4000000000000a47365656407a473746f7092a20a0aa3456e64a86c6f6770726f6273c3a87072696f7269747909ab6465"
    "61646c696e655f6e73cf17979d0c2e7158006a4e72d3db80f20f21f55c134e148e54d0e079b9e005b21530752bbeff124c36"
)
EXAMPLES: list[c.Arguments] = [
    c.Ping(),
    c.Infer(job="job-1", prompt="Why is the sky blue?", max_tokens=64),
    c.Infer(
        job="job-2",
        prompt="Why?",
        max_tokens=8,
        sampling=Sampling(temperature=0.7, seed=3, stop=(".",)),
        priority=0,
        deadline_ns=EXPIRE_NS,
    ),
    c.Cancel(job="job-1"),
    c.SetMode(mode="safe"),
    c.SetPowerCap(power_w=7.5),
    c.ReportLedger(),
    c.SetFdirRow(row="worker.ping", state="passive"),
    c.RearmFdir(row="*"),
    c.ExternalControl(on=True),
    c.ResetCounters(),
    c.LoadFdir(),
    c.ScrubNow(region="supervisor.code"),
    c.QueryFdir(recorder=True),
]

JOB: dict[str, object] = {"job": "a", "prompt": "x", "max_tokens": 1}


def make(arguments: c.Arguments, **changes: object) -> c.Command:
    fields: dict[str, object] = {
        "key_id": "ground-1",
        "seq": 41,
        "t_issue_ns": ISSUE_NS,
        "t_expire_ns": EXPIRE_NS,
        "node": "sat-1",
        **changes,
    }
    return c.make_command(arguments, **fields)  # type: ignore[arg-type]


def raw(name: str, args: object) -> c.Command:
    return c.Command(1, "ground-1", 0, ISSUE_NS, EXPIRE_NS, "sat-1", name, args)  # type: ignore[arg-type]


def test_golden_bytes() -> None:
    assert c.encode_command(make(c.SetPowerCap(power_w=7.5)), RING) == GOLDEN
    command, body, mac = c.split_command(GOLDEN)
    assert c.parse_arguments(command) == c.SetPowerCap(power_w=7.5)
    assert KEY.verify(Domain.COMMAND, body, mac)


def test_a_job_without_the_newer_fields_has_the_bytes_it_always_had() -> None:
    plain = c.Infer(job="job-1", prompt="Why is the sky blue?", max_tokens=64)
    assert c.encode_command(make(plain, seq=42), RING) == PLAIN_INFER
    command, body, mac = c.split_command(PLAIN_INFER)
    assert c.parse_arguments(command) == plain
    assert KEY.verify(Domain.COMMAND, body, mac)


def test_golden_bytes_of_a_job_with_every_field() -> None:
    full = c.Infer(
        job="job-1",
        prompt="Why?",
        max_tokens=64,
        sampling=Sampling(
            temperature=0.75,
            top_k=40,
            top_p=0.5,
            repetition_penalty=1.25,
            seed=7,
            stop=("\n\n", "End"),
            logprobs=True,
        ),
        priority=9,
        deadline_ns=EXPIRE_NS,
    )
    assert c.encode_command(make(full), RING) == FULL_INFER
    assert c.parse_arguments(c.split_command(FULL_INFER)[0]) == full


def test_every_command_has_an_example_a_hazard_and_a_text() -> None:
    assert {type(example) for example in EXAMPLES} == set(c.COMMANDS.values())
    for name, kind in c.COMMANDS.items():
        assert kind.name == name
        assert kind.hazard in c.Hazard
        assert kind.__doc__


@pytest.mark.parametrize("arguments", EXAMPLES, ids=lambda a: a.name)
def test_round_trip(arguments: c.Arguments) -> None:
    command, _, _ = c.split_command(c.encode_command(make(arguments), RING))
    assert c.parse_arguments(command) == arguments


def test_taking_the_power_cap_away() -> None:
    assert c.parse_arguments(raw("set_power_cap", {"power_w": None})) == c.SetPowerCap(power_w=None)
    assert c.parse_arguments(raw("set_power_cap", {"power_w": 5})) == c.SetPowerCap(power_w=5.0)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("ping", {"loud": True}),
        ("infer", {}),
        ("infer", {"job": "", "prompt": "x", "max_tokens": 1}),
        ("infer", {"job": "a/b", "prompt": "x", "max_tokens": 1}),
        ("infer", {"job": "a\n", "prompt": "x", "max_tokens": 1}),
        ("infer", {"job": "-a", "prompt": "x", "max_tokens": 1}),
        ("infer", {"job": "a" * 65, "prompt": "x", "max_tokens": 1}),
        ("infer", {"job": "a", "prompt": "", "max_tokens": 1}),
        ("infer", {"job": "a", "prompt": "x" * 16001, "max_tokens": 1}),
        ("infer", {"job": "a", "prompt": "x", "max_tokens": 0}),
        ("infer", {"job": "a", "prompt": "x", "max_tokens": 2049}),
        ("infer", {"job": "a", "prompt": "x", "max_tokens": 1.5}),
        ("infer", {"job": "a", "prompt": b"x", "max_tokens": 1}),
        ("infer", {**JOB, "priority": 10}),
        ("infer", {**JOB, "priority": -1}),
        ("infer", {**JOB, "priority": 1.5}),
        ("infer", {**JOB, "deadline_ns": 2**63}),
        ("infer", {**JOB, "deadline_ns": 1.0}),
        ("infer", {**JOB, "sampling": None}),
        ("infer", {**JOB, "sampling": {"temperature": 2.1}}),
        ("infer", {**JOB, "sampling": {"temperature": math.nan}}),
        ("infer", {**JOB, "sampling": {"top_k": 0}}),
        ("infer", {**JOB, "sampling": {"top_p": 0}}),
        ("infer", {**JOB, "sampling": {"repetition_penalty": 0.9}}),
        ("infer", {**JOB, "sampling": {"seed": -1}}),
        ("infer", {**JOB, "sampling": {"stop": ["a"] * 5}}),
        ("infer", {**JOB, "sampling": {"stop": [""]}}),
        ("infer", {**JOB, "sampling": {"warmth": 1}}),
        ("cancel", {"job": 3}),
        ("set_mode", {"mode": "eclipse"}),
        ("set_mode", {"mode": "boot"}),
        ("set_power_cap", {"power_w": 0}),
        ("set_power_cap", {"power_w": -1.0}),
        ("set_power_cap", {"power_w": 1000.1}),
        ("set_power_cap", {"power_w": math.nan}),
        ("set_power_cap", {"power_w": math.inf}),
        ("set_power_cap", {}),
        ("report_ledger", {"x": None}),
        ("set_fdir_row", {"row": "worker.ping", "state": "off"}),
        ("set_fdir_row", {"row": "worker.ping"}),
        ("set_fdir_row", {"row": "", "state": "passive"}),
        ("set_fdir_row", {"row": "**", "state": "passive"}),
        ("set_fdir_row", {"row": "worker.ping\n", "state": "passive"}),
        ("rearm_fdir", {"row": "a." + "b" * 64}),
        ("rearm_fdir", {}),
        ("external_control", {"on": 1}),
        ("reset_counters", {"row": "*"}),
        ("scrub_now", {"region": "*"}),
        ("scrub_now", {"region": "/etc/passwd"}),
        ("query_fdir", {"recorder": "yes"}),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, args: dict[str, object]) -> None:
    with pytest.raises(c.CommandError, match=name) as caught:
        c.parse_arguments(raw(name, args))
    assert caught.value.code is c.ArgumentCode.BAD_ARGUMENT


def test_an_unknown_command_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(c.CommandError, match="there are ping, infer") as caught:
        c.parse_arguments(raw("self_destruct", {}))
    assert caught.value.code is c.ArgumentCode.UNKNOWN_COMMAND


def test_the_limits_themselves_are_allowed() -> None:
    for tokens in (1, 2048):
        make(c.Infer(job="a" * 64, prompt="x" * 16000, max_tokens=tokens))
    encoded = c.encode_command(make(c.Infer(job="a", prompt="\U0001f6f0" * 16000, max_tokens=1)), RING)
    assert len(encoded) <= c.MAX_COMMAND_BYTES
    c.split_command(encoded)


def test_what_the_node_would_refuse_is_not_made() -> None:
    with pytest.raises(c.CommandError, match="max_tokens"):
        make(c.Infer(job="a", prompt="x", max_tokens=0))


@pytest.mark.parametrize("key_id", ["old", "nobody"])
def test_signing_needs_an_active_key(key_id: str) -> None:
    with pytest.raises(c.CommandError, match="cannot sign"):
        c.encode_command(make(c.Ping(), key_id=key_id), RING)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "allowed"),
        (b"\x00" * 32, "allowed"),
        (b"\x00" * (c.MAX_COMMAND_BYTES + 1), "allowed"),
        (b"\x00" * 40, "not a telecommand"),
        (b"\x91" * 5000 + b"\x00" * 33, "not a telecommand"),
        (msgpack.packb([2, "k", 0, 0, 1, "n", "ping", {}]) + b"\x00" * 32, "version 2"),
        (msgpack.packb([1, "k", 0, 1, 1, "n", "ping", {}]) + b"\x00" * 32, "expires before"),
        (msgpack.packb([1, "k", -1, 0, 1, "n", "ping", {}]) + b"\x00" * 32, "not a telecommand"),
        (msgpack.packb([1, "k", 0, 0, 1, "n", "ping", []]) + b"\x00" * 32, "not a telecommand"),
        (msgpack.packb([1, "k", 0, 0, 1, "n", "ping", {}, 0]) + b"\x00" * 32, "not a telecommand"),
        (msgpack.packb([1, "k", 0, 0, 1, "n", "ping", {"a": 1}])[:-1] + b"\x00" * 32, "not a telecommand"),
    ],
)
def test_what_is_no_telecommand(payload: bytes, why: str) -> None:
    with pytest.raises(c.CommandError, match=why) as caught:
        c.split_command(payload)
    assert caught.value.code is None
