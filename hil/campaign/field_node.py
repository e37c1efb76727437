"""A running node in safe mode with a broker, a ground and a bus: what single-field mutations are sent to.

It is the flight's own process. In safe mode it has no worker; its way in, view of the spacecraft, mission
clock and power loop are those of every mode.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

from hil.bench.link_load import NODE, T0_NS
from hil.broker import EmbeddedBroker
from hil.campaign.field_seeds import NS, TRUTH, bus_messages
from hil.ground import GroundStation
from hil.mosquitto import Mosquitto, find_mosquitto
from hil.node_process import NodeProcess
from hil.run_dir import to_toml
from hil.shared_memory import owned
from node import power_service, state
from node.clock import SILENT_S
from node.config import NodeConfig
from telemetry import bus, topics
from telemetry.archive import Archive
from telemetry.dictionary.codes import DropCode
from telemetry.errors import PenumbraError
from telemetry.frame import Frame
from telemetry.keys import KeyRing, generate_key_file
from telemetry.link import LinkDown, MqttLink
from telemetry.packets import Event, Housekeeping, Packet

NODE_COMMAND: Final = [sys.executable, "-m", "node"]
UP_S: Final = 60.0
STILL_S: Final = 20.0
"""Counts of the node that stand still for so long, and are not what was sent: messages were lost."""
PERIOD_S: Final = 0.1
INFLIGHT: Final = 64
SHOWN_S: Final = 2 * power_service.PERIOD_S + PERIOD_S
"""Time after which housekeeping shows what a message has changed: two turns of the power loop, which asks
the forecast, and a packet."""
CLOCK_S: Final = 5.0
"""Mission time may be off by so much, the way of a packet to the ground included, s (assumed)."""
ROUNDS: Final = 60
"""Rounds of sound messages in which the node must know all of them (a sensor needs ten readings)."""
FROM_BUS: Final = (DropCode.MALFORMED, DropCode.REFUSED, DropCode.FAILED, DropCode.RETAINED)
"""Why messages of the bus are dropped; what the ground sends is counted by other codes. None here is sent
retained: one that counts as such is counted otherwise than expected."""


class FieldNode:
    """The node, and all it needs. An async context.

    Parameters
    ----------
    folder
        For its state, keys and logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = AsyncExitStack()
        self._last: Housekeeping | None = None
        self._newest = (0, -1)
        self._clock_off_s = 0.0
        self._spoke_s = 0.0
        self.power_failures = 0
        """Reports of the power loop that it failed on what the bus had said."""
        self._started_s = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> FieldNode:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _open(self) -> None:
        if find_mosquitto() is None:
            broker: Mosquitto | EmbeddedBroker = EmbeddedBroker()
        else:
            broker = Mosquitto(self._folder)
        await self._stack.enter_async_context(broker)
        self._write_config(broker.url)
        archive = Archive.open(self._folder / "archive.db")
        self._stack.callback(archive.close)
        ring = KeyRing.load(self._folder / "keys.toml")
        self._ground = GroundStation(
            broker.url, NODE, archive, ring, now_ns=self.now_ns, on_packet=self._on_packet
        )
        self._ground.in_contact = True
        self._bus = MqttLink(
            broker.url, f"bus-{NODE}", [], lambda _topic, _payload: None,
            max_inflight=INFLIGHT, publish_timeout_s=STILL_S,
        )  # fmt: skip
        self._process = NodeProcess(
            [*NODE_COMMAND, str(self._folder / "node.toml")], self._folder / "node.log"
        )
        self._stack.enter_context(owned(NodeConfig.load(self._folder / "node.toml").arena_path))
        self._stack.push_async_callback(self._end_tasks)
        for service in (self._ground, self._bus, self._process):
            self._tasks.append(
                asyncio.create_task(service.run(), name=f"hil.campaign.{type(service).__name__}")
            )
        await self.until(
            lambda: self._last is not None and self._bus.connected.is_set(), "housekeeping", UP_S
        )
        # A node whose link to the bus is not up yet hears nothing.
        hello = bus.encode(bus.BusThermal(t_ns=T0_NS, board_c=20.0, radiator_c=5.0))
        for _ in range(round(UP_S / PERIOD_S)):
            await self._publish([("thermal", hello)])
            await asyncio.sleep(PERIOD_S)
            if self.taken:
                break

    def now_ns(self) -> int:
        """Return mission time, UTC ns."""
        return T0_NS + round((time.monotonic() - self._started_s) * NS)

    @property
    def hk(self) -> Housekeeping:
        """The node's last housekeeping packet."""
        assert self._last is not None  # noqa: S101 - waited for
        return self._last

    @property
    def taken(self) -> int:
        """Messages of the bus that the node has taken."""
        return self.hk.bus_messages

    @property
    def answers(self) -> Counter[str]:
        """Messages of the bus by what the node made of them, since its boot."""
        return Counter(
            {"accepted": self.taken, **{code.value: self.hk.dropped.get(code, 0) for code in FROM_BUS}}
        )

    async def send(self, messages: Sequence[tuple[str, bytes]]) -> Counter[str]:
        """Send messages (channel, payload); return what the node made of them.

        The counts add up to less than was sent when messages were lost.
        """
        before = self.answers
        await self._publish(messages)
        count, seen, since_s = before.total() + len(messages), -1, time.monotonic()
        while self.answers.total() < count and time.monotonic() - since_s < STILL_S:
            if self.answers.total() != seen:
                seen, since_s = self.answers.total(), time.monotonic()
            self._look()
            await asyncio.sleep(PERIOD_S / 2)
        # One more packet: what was counted in the last one is shown whole in the next.
        last = self.hk
        await self.until(lambda: self.hk is not last, "housekeeping", UP_S)
        return self.answers - before

    async def speak(self) -> int:
        """Send a sound message of each channel; return how many were taken."""
        sound = bus_messages(self.now_ns(), random.Random(0))  # noqa: S311 - contents
        sound["eps"] = bus.BusEps(
            **{name: getattr(TRUTH, name) for name in TRUTH.__struct_fields__ if name not in {"t_ns"}},
            t_ns=self.now_ns(),
        )
        messages = [(channel, bus.encode(message)) for channel, message in sound.items()]
        self._spoke_s = time.monotonic()
        answers = await self.send(messages)
        return answers["accepted"]

    async def learn(self) -> dict[str, Any]:
        """Speak until the node knows all that the bus says; return `knows`.

        It takes more than a round: mission time steps by the second of two samples that agree (ADR 0021).

        Raises
        ------
        PenumbraError
            It does not come to know all within `ROUNDS`.
        """
        for _ in range(ROUNDS):
            await self.speak()
            known = await self.look()
            missing = [name for name, value in known.items() if value is None or value is False]
            if not missing:
                return known
        raise PenumbraError(
            f"after {ROUNDS} rounds of sound messages the node does not know {', '.join(missing)}",
            f"read {self._folder / 'node.log'}",
        )

    async def look(self) -> dict[str, Any]:
        """Let what was sent last show in housekeeping; return `knows`."""
        await asyncio.sleep(SHOWN_S)
        last = self.hk
        await self.until(lambda: self.hk is not last, "housekeeping", UP_S)
        return self.knows()

    def knows(self) -> dict[str, Any]:
        """Return what housekeeping shows of what the node knows by the bus."""
        hk = self.hk
        # On a busy machine a batch may take so long that the node may call the bus silent.
        silent = time.monotonic() - self._spoke_s >= SILENT_S
        return {
            "clock_locked": hk.clock_locked or silent,
            "clock_right": abs(self._clock_off_s) <= CLOCK_S,
            "sunlit": hk.sunlit,
            "eclipse_entry_s": None if hk.eclipse_entry_ns is None else round(hk.eclipse_entry_ns / NS),
            "eclipse_exit_s": None if hk.eclipse_exit_ns is None else round(hk.eclipse_exit_ns / NS),
            "battery_soc": hk.battery_soc,
            "array_w": hk.array_w,
            "board_c": hk.board_c,
            "eps_source": hk.eps_source,
            "mode": hk.mode,
        }

    async def stop(self) -> str:
        """Stop the node in order; return how it ended."""
        return await self._process.stop()

    @property
    def restarts(self) -> int:
        """Times the node had to be started again."""
        return self._process.restarts

    async def until(self, met: Callable[[], bool], what: str, bound_s: float) -> None:
        """Wait for something. Raises `PenumbraError` when it does not come."""
        deadline_s = time.monotonic() + bound_s
        while not met():
            self._look()
            if time.monotonic() > deadline_s:
                raise PenumbraError(
                    f"no {what} of the node within {bound_s:g} s", f"read {self._folder / 'node.log'}"
                )
            await asyncio.sleep(PERIOD_S / 4)

    def _look(self) -> None:
        """Raise what a task has ended by."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def _publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        async def publish(channel: str, payload: bytes) -> None:
            # What does not arrive is missing in the node's counts.
            with suppress(LinkDown):
                await self._bus.publish(topics.bus(NODE, channel), payload)

        async with asyncio.TaskGroup() as group:
            for message in messages:
                group.create_task(publish(*message), name="hil.campaign.publish")

    def _on_packet(self, frame: Frame, packet: Packet) -> None:
        # What is sent again comes late: it must not pass for the newest.
        if isinstance(packet, Housekeeping) and (frame.boot, frame.seq) > self._newest:
            self._newest, self._last = (frame.boot, frame.seq), packet
            self._clock_off_s = (frame.t_ns - self.now_ns()) / NS
        self.power_failures += isinstance(packet, Event) and packet.name == "power.failed"

    def _write_config(self, url: str) -> None:
        generate_key_file(self._folder / "keys.toml")
        sections: dict[str, dict[str, Any]] = {
            "node": {"name": NODE, "state_dir": "state"},
            "model": {"images_dir": "images"},
            "bus": {"url": url},
            "link": {"url": url},
            "keys": {"file": "keys.toml"},
            "telemetry": {"housekeeping_period_s": PERIOD_S, "ledger_period_s": 5.0},
        }
        (self._folder / "node.toml").write_text(to_toml(sections), encoding="utf-8")
        # It boots into safe mode, as one that was put there by command.
        (self._folder / "state").mkdir(mode=0o700, exist_ok=True)
        connection = sqlite3.connect(self._folder / "state" / "node.db", isolation_level=None)
        state.create(connection)
        state.set_safe(connection, True)
        connection.close()

    async def _end_tasks(self) -> None:
        await self._process.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
