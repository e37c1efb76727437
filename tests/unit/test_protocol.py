"""Messages between supervisor and worker: each survives the wire, cut anywhere; garbage is refused."""

from __future__ import annotations

import struct
from typing import get_args

import msgpack
import pytest

from node.inference import protocol
from telemetry.packets import Certificate

CERTIFICATE = Certificate(image_id="00" * 8, epoch=0, kv_digest=b"k" * 8, chain=b"c" * 32)
FROM_SUPERVISOR = [
    protocol.Start(job="a", prompt="Once", max_tokens=8, known_tokens=3),
    protocol.Cancel(job="a"),
    protocol.Pace(duty=0.5),
    protocol.Ping(key=2**40),
    protocol.Shutdown(),
]
FROM_WORKER = [
    protocol.Ready(
        generation=1, pid=2, image_id="x", onnxruntime="1", resumed_job=None, resumed_tokens=0, load_s=0.1
    ),
    protocol.Pong(key=2**40),
    protocol.Block(
        job="a", first=0, tokens=[1], text=b"\xff", certificate=CERTIFICATE, prompt_tokens=[2], finish=None
    ),
    protocol.JobError(job="a", reason="too long"),
    protocol.Strike(
        region="kv", page=1, role="k", detected_ns=5, recovered_ns=None, method="none", evidence={"a": 1}
    ),
    protocol.Status(
        tokens_committed=1, tokens_discarded=0, epochs_clean=1, epochs_dirty=0, scan_ms=1.0, step_ms=2.0,
        scrub_pass_s=None,
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


def test_the_wire_is_a_length_and_a_tagged_map() -> None:
    assert protocol.encode(protocol.Ping(key=5)) == bytes.fromhex("0000001082a474797065a470696e67a36b657905")
    assert msgpack.unpackb(protocol.encode(protocol.Ping(key=5))[4:]) == {"type": "ping", "key": 5}


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
