"""Frames: the bytes are pinned, every rule has a frame that breaks it, and nothing bad is generated."""

from __future__ import annotations

import struct
import subprocess
import sys

import crc32c
import msgpack
import msgspec
import pytest

from telemetry.frame import MAX_FRAME_BYTES, Frame, FrameError, decode_frame, encode_frame
from telemetry.packets import BY_TYPE, PACKETS, PRIORITY, Event, Housekeeping, Result, Severity, Stream

EVENT = Event(severity=Severity.MEDIUM, name="worker.restarted", text="silent", evidence={"generation": 2})
GOLDEN = bytes.fromhex(
    "9901a57361742d3107a56576656e74cd012ccf17979cfe362a000001a56576656e7484a8736576657269747903a46e616d65"
    "b0776f726b65722e726573746172746564a474657874a673696c656e74a865766964656e636581aa67656e65726174696f6e"
    "02db1cc22a"
)


def seal(array: list[object]) -> bytes:
    body = msgpack.packb(array)
    return body + struct.pack(">I", crc32c.crc32c(body))


def good(**changes: object) -> bytes:
    fields = {
        "version": 1,
        "node": "sat-1",
        "boot": 7,
        "stream": "event",
        "seq": 300,
        "t_ns": 5,
        "priority": 1,
        "type": "event",
        "body": {"severity": 1, "name": "a", "text": "b"},
    }
    return seal(list({**fields, **changes}.values()))


def test_golden_bytes() -> None:
    arguments = {"node": "sat-1", "boot": 7, "seq": 300, "t_ns": 1_700_000_000_000_000_000}
    assert encode_frame(**arguments, packet=EVENT) == GOLDEN
    frame = decode_frame(GOLDEN)
    assert frame.packet() == EVENT
    assert frame.stream is Stream.EVENT


def test_the_crc_is_castagnoli_over_the_array() -> None:
    assert crc32c.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C (RFC 3720, B.4 uses it)
    assert GOLDEN[-4:] == struct.pack(">I", crc32c.crc32c(GOLDEN[:-4]))


def test_another_msgpack_library_writes_frames_we_read() -> None:
    frame = decode_frame(good())
    assert frame.packet() == Event(severity=Severity.INFO, name="a", text="b")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "version 2"),
        ({"version": "1"}, "not a frame"),
        ({"node": "Sat"}, "node name"),
        ({"node": "sat\n"}, "node name"),
        ({"boot": -1}, "not a frame"),
        ({"boot": 2**32}, "not a frame"),
        ({"stream": "video"}, "not a frame"),
        ({"seq": -1}, "not a frame"),
        ({"seq": 2**63}, "not a frame"),
        ({"t_ns": 1.5}, "not a frame"),
        ({"priority": 8}, "not a frame"),
        ({"type": 3}, "not a frame"),
        ({"one": "too many"}, "not a frame"),
    ],
)
def test_a_sealed_frame_that_breaks_a_rule_is_rejected(changes: dict[str, object], why: str) -> None:
    with pytest.raises(FrameError, match=why):
        decode_frame(good(**changes))


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x00" * 4, seal([]), seal([1, "n"])])
def test_what_is_no_frame_is_rejected(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(data)


def test_bytes_after_the_array_are_rejected_even_under_the_crc() -> None:
    body = good()[:-4] + b"\xc0"
    with pytest.raises(FrameError, match="not a frame"):
        decode_frame(body + struct.pack(">I", crc32c.crc32c(body)))


def test_the_crc_is_checked_before_anything_is_decoded() -> None:
    with pytest.raises(FrameError, match="CRC"):
        decode_frame(good(version=2)[:-1] + b"\x00")


def test_an_unknown_type_keeps_its_identity_but_gives_no_packet() -> None:
    frame = decode_frame(good(type="thermal-map"))
    assert frame.seq == 300
    with pytest.raises(FrameError, match="unknown packet type"):
        frame.packet()


@pytest.mark.parametrize("name", BY_TYPE)
def test_a_packet_in_the_wrong_stream_is_refused(name: str) -> None:
    wrong = Stream.PLAN if BY_TYPE[name].stream is not Stream.PLAN else Stream.EVENT
    with pytest.raises(FrameError, match="in stream"):
        decode_frame(good(type=name, stream=wrong.value)).packet()


@pytest.mark.parametrize(
    "body",
    [{}, {"severity": 9, "name": "a", "text": "b"}, {"severity": 1, "name": "a", "text": "b", "x": 1}, 3],
)
def test_a_body_out_of_its_schema_is_refused(body: object) -> None:
    with pytest.raises(FrameError, match="event:"):
        decode_frame(good(body=body)).packet()


def test_a_text_that_is_not_utf8_is_refused() -> None:
    raw = good().replace(b"\xa5sat-1", b"\xa5sat\xff1")[:-4]
    with pytest.raises(FrameError, match="not a frame"):
        decode_frame(raw + struct.pack(">I", crc32c.crc32c(raw)))


@pytest.mark.parametrize(
    "bad", [{"node": "UP"}, {"boot": -1}, {"seq": -1}, {"seq": 2**63}, {"t_ns": 2**63}, {"priority": 8}]
)
def test_a_frame_the_ground_would_refuse_is_not_generated(bad: dict[str, object]) -> None:
    arguments: dict[str, object] = {"node": "n", "boot": 0, "seq": 0, "t_ns": 0, "packet": EVENT, **bad}
    with pytest.raises((FrameError, OverflowError)):
        encode_frame(**arguments)  # type: ignore[arg-type]


def test_a_packet_out_of_its_schema_is_not_generated() -> None:
    packet = Event(severity="loud", name="a", text="b")  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="severity"):
        encode_frame(node="n", boot=0, seq=0, t_ns=0, packet=packet)


def test_a_frame_over_the_limit_is_not_generated() -> None:
    packet = Event(severity=Severity.INFO, name="a", text="x" * MAX_FRAME_BYTES)
    with pytest.raises(FrameError, match="allowed"):
        encode_frame(node="n", boot=0, seq=0, t_ns=0, packet=packet)


def test_types_and_streams_agree() -> None:
    assert len(BY_TYPE) == len(PACKETS)
    assert {packet.stream for packet in PACKETS} == set(Stream) == set(PRIORITY)
    assert all(0 <= priority <= 7 for priority in PRIORITY.values())
    assert msgspec.structs.fields(Frame)[0].name == "version"


def test_telemetry_needs_no_inference_stack() -> None:
    """Safe mode must come up without it."""
    code = (
        "import pkgutil, sys, importlib, telemetry\n"
        "for m in pkgutil.iter_modules(telemetry.__path__): importlib.import_module(f'telemetry.{m.name}')\n"
        "heavy = {'numpy', 'onnxruntime', 'onnx', 'sentencepiece', 'scipy', 'amqtt'} & sys.modules.keys()\n"
        "ours = {m.split('.')[0] for m in sys.modules} & {'node', 'fdir', 'hil'}\n"
        "sys.exit(str(heavy | ours) if heavy | ours else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


OLD_RESULT = bytes.fromhex(
    "9901a57361742d3101a6726573756c74020303a6726573756c7487a36a6f62a56a6f622d31a5666972737400a6746f6b656e73"
    "920708a474657874c4026162ab636572746966696361746584a8696d6167655f6964b030303131323233336161626263636464"
    "a565706f636800a96b765f646967657374c4080001020304050607a5636861696ec420000102030405060708090a0b0c0d0e0f"
    "101112131415161718191a1b1c1d1e1fad70726f6d70745f746f6b656e73920205a666696e697368a66c656e677468ef0491ea"
)
OLD_HOUSEKEEPING = bytes.fromhex(
    "9901a57361742d3101a2686b030405ac686f7573656b656570696e67de001fa46d6f6465a76e6f6d696e616ca8757074696d65"
    "5f73cb3ff8000000000000ac636c6f636b5f6c6f636b6564c3a673756e6c6974cb3ff0000000000000b065636c697073655f65"
    "6e7472795f6e73c0af65636c697073655f657869745f6e73c0ab626174746572795f736f63cb3fe0000000000000a761727261"
    "795f77cb4022000000000000a66c6f61645f77cb401c000000000000a96365696c696e675f77cb4020000000000000a4647574"
    "79cb3fe8000000000000a7626f6172645f63c0ac776f726b65725f7374617465a772756e6e696e67b1776f726b65725f67656e"
    "65726174696f6e01af776f726b65725f726573746172747300af746f6b656e735f72656c656173656440b0746f6b656e735f64"
    "697363617264656400ad746f6b656e5f726174655f687acb4034000000000000ac65706f6368735f636c65616e02ac65706f63"
    "68735f646972747900b0737472696b65735f646574656374656400b0737472696b65735f726570616972656400a77363616e5f"
    "6d73cb4026000000000000ab6a6f62735f71756575656401a96a6f62735f646f6e6500ad73706f6f6c5f7265636f7264730"
    "3ab73706f6f6c5f627974657364a76c696e6b5f7570c3b1636f6d6d616e64735f616363657074656401b1636f6d6d616e64735"
    "f72656a656374656400b0676172626167655f6d657373616765730053b3127a"
)


def test_frames_of_the_version_before_are_still_read() -> None:
    result = decode_frame(OLD_RESULT).packet()
    assert isinstance(result, Result)
    assert (result.job, result.tokens, result.finish) == ("job-1", [7, 8], "length")
    assert result.logprobs is None
    housekeeping = decode_frame(OLD_HOUSEKEEPING).packet()
    assert isinstance(housekeeping, Housekeeping)
    assert (housekeeping.duty, housekeeping.jobs_queued) == (0.75, 1)
    assert (housekeeping.jobs_active, housekeeping.batch, housekeeping.compute_trips) == (0, 0, 0)
