"""A link without a broker, for unit tests."""

from __future__ import annotations

import asyncio

from telemetry.link import LinkDown


class MemoryLink:
    """Keeps what is published; goes down when told."""

    def __init__(self, *, up: bool = True) -> None:
        self.connected = asyncio.Event()
        self.published: list[tuple[str, bytes]] = []
        self.failing = False
        if up:
            self.connected.set()

    async def publish(self, topic: str, payload: bytes) -> None:
        await asyncio.sleep(0)
        if self.failing or not self.connected.is_set():
            raise LinkDown("down")
        self.published.append((topic, payload))

    async def run(self) -> None:
        await asyncio.Event().wait()
