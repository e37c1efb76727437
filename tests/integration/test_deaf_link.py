"""A flipped bit in the node's SUBSCRIBE: the link is up, sends, and hears nothing. It is made anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from hil.bench.link import EVENT, _chain, _fill, _running
from hil.link_proxy import LinkProxy
from hil.mosquitto import Mosquitto, find_mosquitto
from node.downlink import DownlinkWindow

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")


class OneBit(LinkProxy):
    """Flips one bit of the topic of acknowledgements in the first SUBSCRIBE."""

    flipped = 0

    def _corrupted(self, data: bytes) -> bytes:
        if self.flipped == 0 and b"/ack" in data:
            self.flipped += 1
            return data.replace(b"/ack", b"/acc")
        return data


async def test_a_damaged_subscription_holds_the_downlink_up_for_a_while_only(tmp_path: Path) -> None:
    async with (
        Mosquitto(tmp_path) as broker,
        OneBit(broker.port, version5=True) as proxy,
        _chain(broker.url, proxy.url, tmp_path) as chain,
    ):
        await _fill(chain.database, chain.spool, [(EVENT, seq) for seq in range(100)])
        chain.downlink._window = DownlinkWindow(2048, 0.2)
        await proxy.open()
        async with _running(chain.ground, chain.link, chain.downlink):
            await chain.drained()
        assert proxy.flipped == 1
        assert chain.link.connections == 2
        assert len(chain.archive.frames("penumbra-1")) == 100
