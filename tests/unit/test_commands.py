"""The dictionary of commands: every command, every range, every refusal."""

from __future__ import annotations

import math
from pathlib import Path

import crc32c
import msgspec
import pytest

from telemetry import commands as c
from telemetry.dictionary.codes import FailureCode
from telemetry.sampling import Sampling

DEADLINE_NS = 1_700_000_060_000_000_000
SHA256 = "0123456789abcdef" * 4
EXAMPLES: list[c.Arguments] = [
    c.Ping(),
    c.Infer(job="job-1", prompt="Why is the sky blue?", max_tokens=64),
    c.Infer(
        job="job-2",
        prompt="Why?",
        max_tokens=8,
        sampling=Sampling(temperature=0.7, seed=3, stop=(".",)),
        priority=0,
        deadline_ns=DEADLINE_NS,
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
    c.ActivateKey(key="ground-2"),
    c.RetireKey(key="ground-1"),
    c.Resync(key="ground-1", last_seq=100),
    c.Arm(command="retire_key", args={"key": "ground-1"}),
    c.ScheduleInsert(t_ns=DEADLINE_NS, command="ping"),
    c.ScheduleDelete(entry=1),
    c.ScheduleShift(by_s=-1.5),
    c.ScheduleList(),
    c.SequenceLoad(sequence="dawn", steps=(c.make_step(c.SetPowerCap(power_w=5.0), 2.0),)),
    c.SequenceStart(sequence="dawn"),
    c.SequenceStop(sequence="dawn"),
    c.RestartWorker(),
    c.RecomputeBaseline(region="config"),
    c.SetRates(housekeeping_s=5.0),
    c.DumpMemory(region="worker.weights", first_byte=4096, size_bytes=4096),
    c.ResendProduct(product="dump-1-1", first=3, last=5),
    c.DeleteProduct(product="dump-1-1"),
    c.UploadBegin(kind="image", sha256=SHA256, size_bytes=1 << 20, chunk_bytes=16384),
    c.UploadStatus(),
    c.UploadAbort(),
    c.UploadCommit(sha256=SHA256),
    c.SwitchImage(slot="b"),
    c.RollbackImage(),
]

UPLOAD: dict[str, object] = {"kind": "image", "sha256": SHA256, "size_bytes": 9, "chunk_bytes": 256}
JOB: dict[str, object] = {"job": "a", "prompt": "x", "max_tokens": 1}


def test_every_command_has_an_example_a_hazard_and_a_text() -> None:
    assert {type(example) for example in EXAMPLES} == set(c.COMMANDS.values())
    for name, kind in c.COMMANDS.items():
        assert kind.name == name
        assert kind.hazard in c.Hazard
        assert kind.__doc__


def test_taking_the_power_cap_away() -> None:
    assert c.parse_arguments("set_power_cap", {"power_w": None}) == c.SetPowerCap(power_w=None)
    assert c.parse_arguments("set_power_cap", {"power_w": 5}) == c.SetPowerCap(power_w=5.0)


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
        ("activate_key", {"key": ""}),
        ("retire_key", {"key": "a b"}),
        ("resync", {"key": "a", "last_seq": -1}),
        ("arm", {"command": "Retire"}),
        ("arm", {"command": "retire_key", "args": []}),
        ("schedule_insert", {"t_ns": 2**63, "command": "ping"}),
        ("schedule_insert", {"t_ns": 1}),
        ("schedule_delete", {"entry": 0}),
        ("schedule_shift", {"by_s": math.inf}),
        ("schedule_shift", {"by_s": 1e7 + 1}),
        ("sequence_load", {"sequence": "a", "steps": []}),
        ("sequence_load", {"sequence": "a/b", "steps": [{"delay_s": 0, "command": "ping", "crc32c": 0}]}),
        ("sequence_load", {"sequence": "a", "steps": [{"delay_s": -1, "command": "ping", "crc32c": 0}]}),
        ("sequence_load", {"sequence": "a", "steps": [{"delay_s": 0, "command": "ping"}]}),
        ("sequence_start", {"sequence": ""}),
        ("recompute_baseline", {"region": "*"}),
        ("set_rates", {"housekeeping_s": 0.04}),
        ("set_rates", {"ledger_s": 1e6}),
        ("load_fdir", {"source": "/etc/passwd"}),
        ("dump_memory", {"region": "0x7f001000"}),
        ("dump_memory", {"region": "config", "first_byte": -1}),
        ("dump_memory", {"region": "config", "size_bytes": 0}),
        ("dump_memory", {"region": "config", "size_bytes": (16 << 20) + 1}),
        ("resend_product", {"product": "../x"}),
        ("delete_product", {}),
        ("upload_begin", {**UPLOAD, "kind": "software"}),
        ("upload_begin", {**UPLOAD, "sha256": "0" * 63}),
        ("upload_begin", {**UPLOAD, "sha256": "G" * 64}),
        ("upload_begin", {**UPLOAD, "size_bytes": 0}),
        ("upload_begin", {**UPLOAD, "chunk_bytes": 255}),
        ("upload_begin", {**UPLOAD, "chunk_bytes": 65537}),
        ("upload_commit", {}),
        ("switch_image", {"slot": "c"}),
        ("rollback_image", {"slot": "a"}),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, args: dict[str, object]) -> None:
    with pytest.raises(c.CommandError, match=name) as caught:
        c.parse_arguments(name, args)
    assert caught.value.code is c.ArgumentCode.BAD_ARGUMENT


def test_an_unknown_command_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(c.CommandError, match="there are ping, infer") as caught:
        c.parse_arguments("self_destruct", {})
    assert caught.value.code is c.ArgumentCode.UNKNOWN_COMMAND


@pytest.mark.parametrize("arguments", EXAMPLES, ids=lambda a: a.name)
def test_round_trip(arguments: c.Arguments) -> None:
    args = msgspec.msgpack.decode(msgspec.msgpack.encode(arguments))
    assert c.parse_arguments(arguments.name, args) == arguments


def test_the_crc_of_a_step_does_not_depend_on_the_order_of_its_map() -> None:
    assert c.step_crc("infer", {"job": "a", "prompt": "b"}) == c.step_crc(
        "infer", {"prompt": "b", "job": "a"}
    )
    assert c.step_crc("infer", {"job": "a"}) != c.step_crc("infer", {"job": "b"})
    assert c.step_crc("ping", {}) == crc32c.crc32c(b"\x92\xa4ping\x80")


def test_a_recovery_key_can_mend_keys_and_little_else() -> None:
    assert {"ping", "report_ledger", "set_mode", "activate_key", "retire_key", "resync", "arm"} == c.RECOVERY
    assert c.COMMANDS.keys() >= c.RECOVERY


def test_every_failure_code_is_given_somewhere() -> None:
    node = Path(__file__).parents[2] / "node"
    text = "".join(path.read_text() for path in node.glob("*.py"))
    unused = [code for code in FailureCode if f"FailureCode.{code.name}" not in text]
    assert unused == []
