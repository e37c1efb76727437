"""The spacecraft on the bus: mission time held, then flown; load heard; every channel published."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from hil.broker import EmbeddedBroker
from hil.plant.plant import Plant
from hil.scenario import Scenario, load_scenario
from hil.spacecraft import HOLD_LEAD_S, HOLD_RATE, LOAD_SILENT_S, FlightClock, Spacecraft
from telemetry import topics
from telemetry.bus import EARLIEST_NS, BusLoad, BusMessage, BusTime, decode, encode
from telemetry.link import MqttLink

NODE = "penumbra-1"


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load_scenario("default-short")


async def until(done: Callable[[], object]) -> None:
    for _ in range(500):
        if done():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


def test_held_clock_creeps_up_to_the_start_and_not_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = FlightClock(5_000_000_000, 60.0)
    assert clock.rate == HOLD_RATE
    assert clock.elapsed_s == -HOLD_LEAD_S
    now[0] += 100.0
    assert clock.elapsed_s == pytest.approx(-HOLD_LEAD_S + 0.1)
    now[0] += 10_000.0
    assert clock.elapsed_s == 0.0
    clock.start()
    assert (clock.rate, clock.elapsed_s, clock.now_ns) == (60.0, 0.0, 5_000_000_000)
    now[0] += 2.0
    assert clock.elapsed_s == 120.0
    assert clock.now_ns == 125_000_000_000
    assert clock.start_host_ns is not None


class Bus:
    """A node's side of the bus."""

    def __init__(self, url: str) -> None:
        self.heard: Counter[str] = Counter()
        self.last: dict[str, BusMessage] = {}
        self.link = MqttLink(url, "node", [topics.bus(NODE, "+")], self._on_message)

    def _on_message(self, topic: str, payload: bytes) -> None:
        channel = topic.rpartition("/")[2]
        self.heard[channel] += 1
        if channel != "load":
            self.last[channel] = decode(channel, payload)


async def test_every_channel_is_published_and_the_load_is_heard(scenario: Scenario) -> None:
    plant, clock = Plant(scenario), FlightClock(scenario.start_ns, 60.0)
    seen: list[float] = []
    async with EmbeddedBroker() as broker:
        craft = Spacecraft(
            broker.url, NODE, plant, clock, idle_w=4.0, on_state=lambda s: seen.append(s.payload_w)
        )
        bus = Bus(broker.url)
        tasks = [asyncio.create_task(craft.run()), asyncio.create_task(bus.link.run())]
        await until(lambda: {"time", "eps", "thermal", "contact", "orbit"} <= set(bus.heard))
        held = bus.last["time"]
        assert isinstance(held, BusTime)
        assert held.rate == HOLD_RATE
        assert held.t_ns < scenario.start_ns
        assert craft.samples == []
        assert seen == []
        assert craft.load_w == 4.0

        clock.start()
        await bus.link.publish(topics.bus(NODE, "load"), encode(BusLoad(t_ns=EARLIEST_NS, power_w=9.5)))
        await until(lambda: 9.5 in seen)
        await bus.link.publish(topics.bus(NODE, "load"), b"garbage")
        await bus.link.publish(topics.bus(NODE, "load"), encode(BusLoad(t_ns=EARLIEST_NS, power_w=8.5)))
        await until(lambda: 8.5 in seen)
        assert craft.garbage == 1
        await until(lambda: len(craft.samples) >= 5)
        flying = bus.last["time"]
        assert isinstance(flying, BusTime)
        assert flying.rate == 60.0
        assert flying.t_ns > scenario.start_ns
        times = [s.t_s for s in craft.samples]
        assert times == sorted(times)
        assert {s.platform_w for s in craft.samples} == {scenario.spacecraft.platform_w}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("hil.spacecraft")]


def test_a_board_that_is_silent_counts_as_idle(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = FlightClock(scenario.start_ns, 60.0)
    craft = Spacecraft("mqtt://127.0.0.1:1", NODE, Plant(scenario), clock, idle_w=4.0)
    craft._on_message("", encode(BusLoad(t_ns=EARLIEST_NS, power_w=11.0)))
    assert craft.load_w == 11.0
    now[0] += LOAD_SILENT_S + 0.1
    assert craft.load_w == 4.0


def test_samples_survive_json(scenario: Scenario) -> None:
    from hil.record import PlantSample
    from hil.spacecraft import sample

    taken = sample(Plant(scenario).state, scenario.start_ns)
    assert taken.t_s == 0.0
    assert taken.soc == scenario.spacecraft.battery.soc_start
    assert msgspec.json.decode(msgspec.json.encode(taken), type=PlantSample) == taken
