"""Everything that arrives by MQTT: sorted by topic, read, counted; garbage is dropped and reported.

Nothing a sender can put on a topic raises here. Reports of garbage are throttled, its count is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from node.recorder import Evidence, Recorder, Throttle
from telemetry import topics
from telemetry.ack import Ack, AckError, decode_ack
from telemetry.bus import CHANNELS, FROM_NODE, BusMessage, decode, decode_eps
from telemetry.envelope import is_command
from telemetry.errors import PenumbraError
from telemetry.flow import Flow, decode_flow
from telemetry.keys import KeyRing
from telemetry.packets import Severity
from telemetry.signed import SignedError

BUS_CHANNELS = tuple(c for c in CHANNELS if c not in FROM_NODE)
"""Channels the node listens to."""
REPORT_PERIOD_S = 10.0
"""Time between two events about garbage, s (assumed)."""
RETAINED_PERIOD_S = 3600.0
"""The same about retained messages: each comes again with every renewed subscription, s (assumed)."""
FLOW_FRESH_NS = 600 * 1_000_000_000
"""A word on flow further from mission time than this is an old one played again, ns (assumed)."""


class Intake:
    """Sort and read messages.

    Parameters
    ----------
    node
        Node name, for the topics.
    ring
        Keys that acknowledgements are signed with.
    recorder
        For events.
    on_command
        Takes the bytes of a telecommand, and the topic they came on.
    on_upload
        Takes the bytes of a chunk of an upload; raises SignedError when it is not authentic.
    on_ack
        Takes an authenticated acknowledgement.
    on_flow
        Takes an authenticated and fresh word on flow.
    on_bus
        Takes a message of the bus; raises ValueError or PenumbraError when its content is impossible.
    on_retained
        The same for one the broker had kept; returns why it is not taken, None if it is. By default none is.
    """

    def __init__(
        self,
        node: str,
        ring: KeyRing,
        recorder: Recorder,
        *,
        on_command: Callable[[bytes, str], None],
        on_upload: Callable[[bytes], None],
        on_ack: Callable[[Ack], None],
        on_flow: Callable[[Flow], None],
        on_bus: Callable[[BusMessage], None],
        on_retained: Callable[[BusMessage], str | None] = lambda _: "a live one is needed",
    ) -> None:
        self.garbage = 0
        """Messages that could not be read, since boot."""
        self.retained = 0
        """Retained messages of the bus that were not taken, since boot."""
        self._ring = ring
        self._recorder = recorder
        self._on_command = on_command
        self._on_upload = on_upload
        self._on_ack = on_ack
        self._on_flow = on_flow
        self._on_bus = on_bus
        self._on_retained = on_retained
        self._node = node
        self._open = True
        self._tc = topics.tc(node)
        self._ack = topics.ack(node)
        self._flow = topics.flow(node)
        self._up = topics.up(node)
        self._bus = {topics.bus(node, channel): channel for channel in BUS_CHANNELS}
        self._throttles: dict[str, Throttle] = {}

    @property
    def link_topics(self) -> list[str]:
        """Topics to subscribe to on the space link."""
        return [self._tc, self._ack, self._flow, self._up]

    @property
    def bus_topics(self) -> list[str]:
        """Topics to subscribe to on the bus."""
        return list(self._bus)

    def close(self) -> None:
        """Drop everything from now on: the node is stopping."""
        self._open = False

    def on_retained(self, topic: str, payload: bytes) -> None:
        """Take one message that the broker had kept: of the bus, it may be of any age."""
        self.on_message(topic, payload, retained=True)

    def on_message(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        """Take one message."""
        if not self._open:
            return
        try:
            if topic == self._tc:
                self._on_command(payload, topic)
            elif topic == self._ack:
                self._on_ack(decode_ack(payload, self._ring))
            elif topic == self._up:
                self._on_upload(payload)
            elif topic == self._flow:
                self._take_flow(decode_flow(payload, self._ring))
            elif topic in self._bus:
                self._take_bus(topic, payload, retained=retained)
            else:
                raise ValueError("nothing is expected on this topic")
        except (AckError, SignedError) as error:
            if is_command(payload):
                # Played back where it does not belong: the authenticator counts it.
                self._on_command(payload, topic)
            else:
                self._report(topic, f"refused: {error}")
        except (ValueError, RecursionError) as error:
            self._report(topic, str(error))
        except PenumbraError as error:
            self._report(topic, error.what)

    def _take_bus(self, topic: str, payload: bytes, *, retained: bool) -> None:
        channel = self._bus[topic]
        # A sensor that gives nonsense costs its value, not the message.
        message = decode_eps(payload) if channel == "eps" else decode(channel, payload)
        if not retained:
            self._on_bus(message)
            return
        why = self._on_retained(message)
        if why is None:
            return
        self.retained += 1
        throttle = self._throttles.setdefault(f"retained {topic}", Throttle(RETAINED_PERIOD_S))
        count = throttle.admit(time.monotonic())
        if count is not None:
            text = f"retained message on {topic} is not taken: {why}"
            evidence: Evidence = {"topic": topic, "since_last_report": count, "total": self.retained}
            self._recorder.event(Severity.LOW, "bus.retained", text, evidence)

    def _take_flow(self, flow: Flow) -> None:
        if flow.node != self._node or abs(self._recorder.now_ns() - flow.t_ns) > FLOW_FRESH_NS:
            raise SignedError("for another node, or old")
        self._on_flow(flow)

    def _report(self, topic: str, why: str) -> None:
        self.garbage += 1
        # A topic nobody expects is named by its sender: all such share one throttle.
        known = topic in (self._ack, self._flow, self._up) or topic in self._bus
        throttle = self._throttles.setdefault(topic if known else "", Throttle(REPORT_PERIOD_S))
        count = throttle.admit(time.monotonic())
        if count is not None:
            text = f"unreadable message on {topic[:100]}: {why[:200]}"
            evidence: Evidence = {"topic": topic[:100], "since_last_report": count, "total": self.garbage}
            self._recorder.event(Severity.LOW, "garbage.received", text, evidence)
