"""The bench of the space link: its judge of order, and a small run of its parts on a real mosquitto."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hil.bench import link, link_load
from hil.mosquitto import Mosquitto, find_mosquitto
from telemetry.packets import PRIORITY, Stream


def test_a_backlog_has_every_stream_and_no_record_twice() -> None:
    packets = link_load.backlog(120)
    streams = {packet.stream for packet, _ in packets}
    assert streams >= {Stream.PRODUCT, Stream.HOUSEKEEPING, Stream.RESULT, Stream.EVENT, Stream.PLAN}
    assert packets == link_load.backlog(120)


@given(st.lists(st.sampled_from(sorted(set(PRIORITY.values()))), max_size=20))
def test_inversions_are_the_records_before_a_more_urgent_one(priorities: list[int]) -> None:
    expected = sum(any(later < p for later in priorities[at + 1 :]) for at, p in enumerate(priorities))
    assert link.inversions(priorities) == expected


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
async def test_small_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "RECORDS", 2000)
    monkeypatch.setattr(link, "BACKLOG_S", 60.0)
    monkeypatch.setattr(link, "PASS_BIT_S", 100e6)
    async with Mosquitto(tmp_path) as broker:
        assert await link._client_rate(broker.url) > 0
        (tmp_path / "chain").mkdir()
        assert await link._end_to_end_rate(broker.url, tmp_path / "chain") > 0
        (tmp_path / "pass").mkdir()
        contact = await link._pass(broker, tmp_path / "pass")
    assert contact.archived == contact.records
    assert contact.inversions <= contact.bulk_turns
