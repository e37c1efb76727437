"""Messages between supervisor and worker: each survives the wire, cut anywhere; garbage is refused."""

from __future__ import annotations

import struct
from typing import get_args

import msgpack
import msgspec
import pytest

from node.inference import protocol
from telemetry.packets import Certificate
from telemetry.sampling import Sampling

CERTIFICATE = Certificate(image_id="00" * 8, epoch=0, kv_digest=b"k" * 8, chain=b"c" * 32)
FROM_SUPERVISOR = [
    protocol.Start(job="a", prompt="Once", max_tokens=8, known_tokens=3),
    protocol.Start(job="b", prompt="Once", max_tokens=8, sampling=Sampling(temperature=0.5, stop=("\n",))),
    protocol.Park(job="a"),
    protocol.Cancel(job="a"),
    protocol.Cancel(job="a", finish="deadline"),
    protocol.Pace(duty=0.5),
    protocol.Pace(duty=0.5, threads=1, batch=4, redundant=True),
    protocol.Repair(weights=True, kv=False, compute=True),
    protocol.Ping(key=2**40),
    protocol.Shutdown(),
]
FROM_WORKER = [
    protocol.Ready(
        generation=1, pid=2, image_id="x", onnxruntime="1",
        resumed=[protocol.Resumed(job="a", tokens=9)], load_s=0.1,
    ),
    protocol.Pong(key=2**40),
    protocol.Block(
        job="a", first=0, tokens=[1], text=b"\xff", certificate=CERTIFICATE, prompt_tokens=[2], finish=None,
        logprobs=[-0.5],
    ),
    protocol.Block(
        job="a", first=1, tokens=[], text=b"", certificate=CERTIFICATE, prompt_tokens=None, finish="cancelled"
    ),
    protocol.Parked(job="a"),
    protocol.JobError(job="a", reason="too long"),
    protocol.Strike(
        region="kv", page=1, role="global", detected_ns=5, recovered_ns=None, method="none", evidence={"a": 1}
    ),
    protocol.Status(
        tokens_committed=1, tokens_discarded=0, epochs_clean=1, epochs_dirty=0, scan_ms=1.0, proof_ns=7,
        step_ms=2.0,
        scrub_pass_s=None, active=3, batch=8, threads=2, prefill_tokens=640, tokens_s=123.4,
    ),
    protocol.Fatal(reason="worn out"),
]  # fmt: skip


def test_every_message_is_tried() -> None:
    assert {type(m) for m in FROM_SUPERVISOR} == set(get_args(protocol.FromSupervisor))
    assert {type(m) for m in FROM_WORKER} == set(get_args(protocol.FromWorker))


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize(
    ("kind", "messages"), [(protocol.FromSupervisor, FROM_SUPERVISOR), (protocol.FromWorker, FROM_WORKER)]
)
def test_messages_survive_any_cut_of_the_stream(kind: object, messages: list[object], size: int) -> None:
    stream = b"".join(protocol.encode(m) for m in messages)  # type: ignore[arg-type]
    reader: protocol.Reader[object] = protocol.Reader(kind)
    found = [m for at in range(0, len(stream), size) for m in reader.feed(stream[at : at + size])]
    assert found == messages


GOLDEN = [
    (protocol.Ping(key=5), "0000001082a474797065a470696e67a36b657905"),
    (protocol.Park(job="a"), "0000001182a474797065a47061726ba36a6f62a161"),
    (protocol.Shutdown(), "0000000f81a474797065a873687574646f776e"),
    (protocol.Parked(job="a"), "0000001382a474797065a67061726b6564a36a6f62a161"),
]


@pytest.mark.parametrize(("message", "raw"), GOLDEN)
def test_the_wire_is_a_length_and_a_tagged_map(message: protocol.Message, raw: str) -> None:
    assert protocol.encode(message).hex() == raw


@pytest.mark.parametrize("message", [*FROM_SUPERVISOR, *FROM_WORKER])
def test_an_independent_codec_reads_every_field(message: protocol.Message) -> None:
    fields = msgpack.unpackb(protocol.encode(message)[4:])
    assert fields["type"] == type(message).__struct_config__.tag
    assert msgspec.convert(fields, type(message)) == message
    assert set(fields) == {"type", *message.__struct_fields__}


def test_old_orders_are_still_understood() -> None:
    """A supervisor that gives no more than the first version knew gets the defaults."""
    body = msgpack.packb({"type": "start", "job": "a", "prompt": "Once", "max_tokens": 8})
    assert list(protocol.Reader(protocol.FromSupervisor).feed(_framed(body))) == [
        protocol.Start(job="a", prompt="Once", max_tokens=8, known_tokens=0, sampling=Sampling())
    ]


def _framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", protocol.MAX_MESSAGE + 1),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 1) + msgpack.packb(1),
        _framed(msgpack.packb({"type": "no-such"})),
        _framed(msgpack.packb({"type": "ping", "key": "x"})),
        protocol.encode(protocol.Pong(key=1)),
    ],
)
def test_garbage_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"message"):
        list(protocol.Reader(protocol.FromSupervisor).feed(data))
