from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.intake import BUS_CHANNELS, FLOW_FRESH_NS, Intake
from telemetry import bus, topics
from telemetry.ack import Ack, encode_ack
from telemetry.commands import Ping
from telemetry.dictionary.codes import DropCode
from telemetry.envelope import encode_command, make_command
from telemetry.errors import PenumbraError
from telemetry.flow import Flow, encode_flow
from telemetry.keys import Key, KeyRing
from telemetry.packets import Stream
from telemetry.upload import Chunk, decode_chunk, encode_chunk

KEY = Key("g", b"k" * 32)
OTHER = Key("g", b"x" * 32)
NOW_NS = 10**18


class Events:
    """Stands for the recorder."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def now_ns(self) -> int:
        return NOW_NS

    def event(self, severity: object, name: str, text: str, evidence: object = None) -> None:
        self.names.append(name)


class Sink:
    def __init__(self) -> None:
        self.events = Events()
        self.taken: list[Any] = []
        self.error: Exception | None = None
        recorder: Any = self.events
        self.intake = Intake(
            "n",
            KeyRing([KEY]),
            recorder,
            on_command=lambda payload, topic: self.taken.append((payload, topic)),
            on_upload=self.on_upload,
            on_ack=self.taken.append,
            on_flow=self.taken.append,
            on_bus=self.on_bus,
        )

    def on_upload(self, payload: bytes) -> None:
        self.taken.append(decode_chunk(payload, KeyRing([KEY]), "n"))

    def on_bus(self, message: bus.BusMessage) -> None:
        if self.error is not None:
            raise self.error
        self.taken.append(message)


def test_each_topic_goes_to_its_handler() -> None:
    sink = Sink()
    ack = Ack(node="n", boot=1, stream=Stream.EVENT, upto=3)
    time = bus.BusTime(t_ns=NOW_NS, rate=2.0)
    sink.intake.on_message(topics.tc("n"), b"anything")
    sink.intake.on_message(topics.ack("n"), encode_ack(ack, KEY))
    sink.intake.on_message(topics.bus("n", "time"), bus.encode(time))
    flow = Flow(node="n", t_ns=NOW_NS, records=3, valid_s=1.0)
    sink.intake.on_message(topics.flow("n"), encode_flow(flow, KEY))
    chunk = Chunk(node="n", sha256=bytes(32), index=7, data=b"piece")
    sink.intake.on_message(topics.up("n"), encode_chunk(chunk, KEY))
    assert sink.taken == [(b"anything", topics.tc("n")), ack, time, flow, chunk]
    assert sink.intake.garbage == 0
    assert set(sink.intake.link_topics) == {
        each("n") for each in (topics.tc, topics.ack, topics.flow, topics.up)
    }
    assert set(sink.intake.bus_topics) == {topics.bus("n", c) for c in BUS_CHANNELS}
    assert "load" not in BUS_CHANNELS


def test_a_command_on_another_topic_goes_to_the_authenticator_to_be_counted() -> None:
    sink = Sink()
    command = make_command(Ping(), key_id="k", seq=1, t_issue_ns=0, t_expire_ns=1, node="n")
    payload = encode_command(command, KeyRing([Key("k", b"k" * 32)]))
    others = (topics.ack("n"), topics.flow("n"), topics.up("n"))
    for topic in others:
        sink.intake.on_message(topic, payload)
    assert sink.taken == [(payload, topic) for topic in others]
    assert sink.intake.garbage == 0


def test_a_forged_acknowledgement_deletes_nothing_and_is_counted() -> None:
    sink = Sink()
    ack = Ack(node="n", boot=1, stream=Stream.EVENT, upto=3)
    sink.intake.on_message(topics.ack("n"), encode_ack(ack, OTHER))
    assert sink.taken == []
    assert sink.intake.garbage == 1
    assert sink.events.names == ["garbage.received"]


@pytest.mark.parametrize(
    ("node", "t_ns", "key"),
    [("n", NOW_NS, OTHER), ("other", NOW_NS, KEY), ("n", NOW_NS - FLOW_FRESH_NS - 1, KEY)],
)
def test_a_word_on_flow_that_is_forged_or_misled_or_old_holds_nothing_up(
    node: str, t_ns: int, key: Key
) -> None:
    sink = Sink()
    flow = Flow(node=node, t_ns=t_ns, records=0, valid_s=1.0)
    sink.intake.on_message(topics.flow("n"), encode_flow(flow, key))
    assert sink.taken == []
    assert sink.intake.garbage == 1


@pytest.mark.parametrize(("node", "key"), [("n", OTHER), ("other", KEY)])
def test_a_chunk_of_an_upload_that_is_forged_or_for_another_node_is_refused(node: str, key: Key) -> None:
    sink = Sink()
    chunk = Chunk(node=node, sha256=bytes(32), index=0, data=b"piece")
    sink.intake.on_message(topics.up("n"), encode_chunk(chunk, key))
    assert sink.taken == []
    assert sink.intake.garbage == 1


@pytest.mark.parametrize("error", [ValueError("v"), PenumbraError("p")])
def test_content_the_node_refuses_is_garbage(error: Exception) -> None:
    sink = Sink()
    sink.error = error
    sink.intake.on_message(topics.bus("n", "time"), bus.encode(bus.BusTime(t_ns=NOW_NS)))
    assert sink.intake.garbage == 1


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("z"), TypeError("t"), OverflowError("o"), RecursionError("r"), KeyError("k"),
     AssertionError("a"), MemoryError(), StopIteration(), UnicodeDecodeError("utf-8", b"x", 0, 1, "u")],
)  # fmt: skip
def test_whatever_a_consumer_raises_is_counted_and_reported_and_no_more(error: Exception) -> None:
    sink = Sink()
    sink.error = error
    payload = bus.encode(bus.BusTime(t_ns=NOW_NS))
    for _ in range(100):
        sink.intake.on_message(topics.bus("n", "time"), payload)
    foreseen = isinstance(error, ValueError)
    assert sink.intake.dropped == {DropCode.REFUSED if foreseen else DropCode.FAILED: 100}
    assert sink.events.names == ["garbage.received" if foreseen else "message.failed"]
    assert sink.intake.bus_messages == 0
    sink.error = None
    sink.intake.on_message(topics.bus("n", "time"), payload)
    assert sink.intake.bus_messages == 1


def test_a_failure_of_any_consumer_ends_nothing() -> None:
    events: Any = Events()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("float division by zero")

    intake = Intake(
        "n", KeyRing([KEY]), events,
        on_command=fail, on_upload=fail, on_ack=fail, on_flow=fail, on_bus=fail,
    )  # fmt: skip
    command = make_command(Ping(), key_id="g", seq=1, t_issue_ns=0, t_expire_ns=1, node="n")
    payload = encode_command(command, KeyRing([KEY]))
    intake.on_message(topics.tc("n"), payload)
    intake.on_message(topics.ack("n"), payload)
    intake.on_message(topics.ack("n"), encode_ack(Ack(node="n", boot=1, stream=Stream.EVENT, upto=3), KEY))
    flow = Flow(node="n", t_ns=NOW_NS, records=3, valid_s=1.0)
    intake.on_message(topics.flow("n"), encode_flow(flow, KEY))
    intake.on_message(topics.up("n"), b"chunk")
    intake.on_message(topics.bus("n", "time"), bus.encode(bus.BusTime(t_ns=NOW_NS)))
    assert intake.dropped == {DropCode.FAILED: 6}


def test_each_reason_has_its_code() -> None:
    sink = Sink()
    sink.intake.on_message(topics.bus("n", "time"), b"\x81" * 5000)
    sink.intake.on_message(topics.bus("n", "eps"), b"\x91" * 5000 + b"\x01")
    sink.intake.on_message(topics.ack("n"), b"x")
    sink.intake.on_message("elsewhere", b"x")
    assert sink.intake.dropped == {
        DropCode.MALFORMED: 2, DropCode.NOT_AUTHENTIC: 1, DropCode.WRONG_TOPIC: 1,
    }  # fmt: skip


def test_reports_are_throttled_by_topic_and_the_count_is_not() -> None:
    sink = Sink()
    for _ in range(50):
        for topic in (topics.ack("n"), topics.bus("n", "eps"), topics.bus("other", "eps"), "x/y", "z"):
            sink.intake.on_message(topic, b"\xc1")
    assert sink.intake.garbage == 250
    assert len(sink.events.names) == 3


def test_a_retained_message_of_the_bus_is_judged_apart_and_reported_once_an_hour() -> None:
    sink = Sink()
    topic, message = topics.bus("n", "time"), bus.BusTime(t_ns=bus.EARLIEST_NS)
    for _ in range(50):
        sink.intake.on_retained(topic, bus.encode(message))
    assert sink.taken == []
    assert sink.intake.dropped == {DropCode.RETAINED: 50}
    assert sink.events.names == ["bus.retained"]
    sink.intake.on_retained(topic, b"\xc1")
    assert sink.intake.dropped == {DropCode.RETAINED: 50, DropCode.MALFORMED: 1}
    # What proves its own age is judged by that.
    ack = Ack(node="n", boot=1, stream=Stream.EVENT, upto=3)
    sink.intake.on_retained(topics.ack("n"), encode_ack(ack, KEY))
    assert sink.taken == [ack]


def test_a_closed_intake_drops_everything() -> None:
    sink = Sink()
    sink.intake.close()
    sink.intake.on_message(topics.tc("n"), b"x")
    sink.intake.on_message("x", b"x")
    assert sink.taken == []
    assert sink.intake.garbage == 0


@given(
    st.sampled_from([topics.ack("n"), *(topics.bus("n", c) for c in BUS_CHANNELS), "other"]),
    st.binary(max_size=200),
)
def test_no_bytes_raise(topic: str, payload: bytes) -> None:
    sink = Sink()
    sink.intake.on_message(topic, payload)
    assert sink.intake.garbage + len(sink.taken) == 1
