from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from waiting import until

from node.loop_lag import LoopLag

PERIOD_S = 0.01


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "loop-lag"]


class Beats:
    """What the thread said, each beat."""

    def __init__(self) -> None:
        self.lags_s: list[float] = []
        self.threads: set[str] = set()

    def __call__(self, lag_s: float, now_s: float) -> None:
        self.lags_s.append(lag_s)
        self.threads.add(threading.current_thread().name)


async def test_an_idle_loop_lags_less_than_the_thread_waits() -> None:
    beats = Beats()
    lag = LoopLag(asyncio.get_running_loop(), beats, period_s=PERIOD_S)
    assert lag.beat_age_s is None
    assert not lag.is_alive()
    lag.start()
    try:
        await until(lambda: len(beats.lags_s) >= 10)
        assert beats.threads == {"loop-lag"}
        # Of ten beats at least one found the last callback answered at once.
        assert min(beats.lags_s) < PERIOD_S
        assert lag.is_alive(max_age_s=5)
        assert lag.beat_errors == 0
    finally:
        lag.stop()
    assert not lag.is_alive(max_age_s=1e9)


async def test_a_blocked_loop_is_seen_while_it_is_blocked() -> None:
    beats = Beats()
    lag = LoopLag(asyncio.get_running_loop(), beats, period_s=PERIOD_S)
    lag.start()
    try:
        await until(lambda: len(beats.lags_s) >= 3)
        seen_s = 0.2
        begun_s = time.monotonic()
        while max(beats.lags_s) < seen_s and time.monotonic() - begun_s < 5:
            time.sleep(PERIOD_S)  # noqa: ASYNC251 - blocking the loop is the point
        # Nothing of the loop has run since it was blocked: the thread found out by itself.
        assert max(beats.lags_s) >= seen_s
        block_s = time.monotonic() - begun_s
        seen = len(beats.lags_s)
        await until(lambda: len(beats.lags_s) > seen + 1)
        assert lag.take_max_s() >= seen_s
        await until(lambda: lag.lag_s < block_s / 2)
        lag.take_max_s()
        assert lag.take_max_s() < block_s / 2
    finally:
        lag.stop()


async def test_time_in_which_the_thread_was_held_up_is_not_held_against_the_loop() -> None:
    """The thread is held up in its own beat, together with the loop: as when the process is stopped."""
    held_s = 0.6
    held = threading.Event()

    def beat(lag_s: float, now_s: float) -> None:
        if not held.is_set():
            held.set()
            time.sleep(held_s)

    loop = asyncio.get_running_loop()
    lag = LoopLag(loop, beat, period_s=PERIOD_S, stall_s=0.05)
    lag.start()
    try:
        await until(held.is_set)
        time.sleep(held_s)  # noqa: ASYNC251 - blocking the loop is the point
        await until(lambda: (lag.beat_age_s or 1) < 0.1)
        assert lag.take_max_s() < held_s / 2
    finally:
        lag.stop()


async def test_what_fails_in_a_beat_is_counted_and_the_thread_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    beats: list[float] = []

    def beat(lag_s: float, now_s: float) -> None:
        beats.append(lag_s)
        if len(beats) == 1:
            raise OSError("no watchdog")

    lag = LoopLag(asyncio.get_running_loop(), beat, period_s=PERIOD_S)
    lag.start()
    try:
        await until(lambda: len(beats) >= 3)
    finally:
        lag.stop()
    assert lag.beat_errors == 1
    assert "no watchdog" in caplog.text


def test_a_loop_that_closes_ends_the_thread() -> None:
    beats = Beats()
    loop = asyncio.new_event_loop()
    lag = LoopLag(loop, beats, period_s=PERIOD_S)
    lag.start()
    loop.run_until_complete(until(lambda: len(beats.lags_s) >= 2))
    loop.close()
    for _ in range(500):
        if not lag.is_alive(1e9):
            break
        time.sleep(0.01)
    assert not lag.is_alive(1e9)
    lag.stop()


async def test_one_that_was_never_started_may_be_stopped() -> None:
    LoopLag(asyncio.get_running_loop()).stop()


@pytest.mark.parametrize(("period_s", "stall_s"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.5)])
async def test_times_that_contradict_each_other_are_refused(period_s: float, stall_s: float) -> None:
    with pytest.raises(ValueError, match="0 < period_s <= stall_s"):
        LoopLag(asyncio.get_running_loop(), period_s=period_s, stall_s=stall_s)
