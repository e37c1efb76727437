"""When somebody is expected at the far end of the link, and how the link uses that."""

from __future__ import annotations

import asyncio
import itertools
import time

import aiomqtt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from node.contacts import FRESH_S, LEAD_NS, is_expected
from telemetry import link as link_module
from telemetry.bus import BusContact, ContactSpan
from telemetry.link import MqttLink

S = 1_000_000_000
SPAN = ContactSpan(start_ns=100 * S, end_ns=400 * S)


def told(*windows: ContactSpan, in_contact: bool = False) -> BusContact:
    return BusContact(t_ns=0, in_contact=in_contact, windows=list(windows))


@pytest.mark.parametrize(
    ("contact", "now_ns", "expected"),
    [
        (None, 0, True),
        (told(), 0, False),
        (told(in_contact=True), 0, True),
        (told(SPAN), 100 * S - LEAD_NS - 1, False),
        (told(SPAN), 100 * S - LEAD_NS, True),
        (told(SPAN), 400 * S, True),
        (told(SPAN), 400 * S + 1, False),
        (BusContact(t_ns=0, in_contact=False, next_start_ns=100 * S, next_end_ns=400 * S), 250 * S, True),
        (BusContact(t_ns=0, in_contact=False, next_start_ns=100 * S), 100 * S, True),
        (BusContact(t_ns=0, in_contact=False, next_start_ns=100 * S), 101 * S, False),
    ],
)
def test_a_contact_is_expected_in_its_window(contact: BusContact | None, now_ns: int, expected: bool) -> None:
    assert is_expected(contact, 0.0, now_ns, 1.0) is expected


@given(st.integers(0, 10**12), st.floats(FRESH_S, 1e6, exclude_min=True))
def test_a_bus_that_fell_silent_forbids_nothing(now_ns: int, age_s: float) -> None:
    assert is_expected(told(), 5.0, now_ns, 5.0 + age_s + 1e-6)


class Tried(MqttLink):
    """A link that finds nobody, and notes when it looked."""

    def __init__(self) -> None:
        super().__init__("mqtt://127.0.0.1:1", "t", [], lambda *_: None)
        self.tries: list[float] = []

    async def _session(self) -> None:
        self.tries.append(time.monotonic())
        raise aiomqtt.MqttError("nobody")


async def test_a_link_tries_seldom_while_nobody_is_expected_and_at_once_when_that_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "PROBE_S", 0.4)
    link = Tried()
    link.expect(False)
    task = asyncio.create_task(link.run(), name="test.link")
    try:
        await until(lambda: len(link.tries) == 3)
        gaps = [later - first for first, later in itertools.pairwise(link.tries)]
        assert min(gaps) > 0.39
        monkeypatch.setattr(link_module, "PROBE_S", 60.0)
        await until(lambda: len(link.tries) == 4)
        link.expect(True)
        await until(lambda: len(link.tries) == 6, 1.5)
        link.expect(True)  # The same again hurries nobody.
        link.expect(False)
        count = len(link.tries)
        await asyncio.sleep(0.8)
        assert len(link.tries) <= count + 1
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
