from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from waiting import until

from node.feed_gate import FeedGate, FeedLimits, LagBeat, PingReport, RestartRequested, Stopping
from node.loop_lag import LoopLag
from node.watchdog import (
    DeviceWatchdog,
    ParentWatchdog,
    Watchdog,
    WatchdogConfig,
    WatchdogKeeper,
    WatchdogSet,
    limits_for,
    open_watchdog,
)
from telemetry.errors import PenumbraError

NONE = WatchdogConfig()
DEVICE_LIKE = "/dev/null"


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_behind() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def read(self) -> bytes:
        os.set_blocking(self.reader, False)
        try:
            return os.read(self.reader, 1 << 20)
        except BlockingIOError:
            return b""


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe whose writing end the test hands over or closes."""
    made = Pipe()
    yield made
    os.close(made.reader)


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.settimeout(5)
        yield server


# --- kinds ---


def test_without_any_there_is_a_set_of_none() -> None:
    watchdog = open_watchdog({}, NONE)
    assert (watchdog.kind, watchdog.timeout_s) == ("none", None)
    watchdog.ready()
    watchdog.feed()
    watchdog.stopping()
    watchdog.close(ordered=True)


def test_the_parent_gets_one_byte_a_feed_and_the_pipe_is_not_inherited_any_further(pipe: Pipe) -> None:
    os.set_inheritable(pipe.writer, True)
    watchdog = open_watchdog({"PENUMBRA_WATCHDOG_FD": str(pipe.writer)}, NONE)
    assert watchdog.kind == "parent"
    assert not os.get_inheritable(pipe.writer)
    assert pipe.read() == b""
    watchdog.ready()
    assert pipe.read() == b""
    watchdog.feed()
    watchdog.feed()
    assert pipe.read() == b"\x01\x01"
    watchdog.close(ordered=True)
    assert os.read(pipe.reader, 1) == b"", "the end of the pipe"


def test_a_parent_that_does_not_read_never_blocks_the_node(pipe: Pipe) -> None:
    watchdog = ParentWatchdog(pipe.writer)
    for _ in range(70_000):
        watchdog.feed()
    assert len(pipe.read()) < 70_000
    watchdog.close(ordered=False)


def test_a_parent_that_is_gone_is_told() -> None:
    reader, writer = os.pipe()
    watchdog = WatchdogSet([ParentWatchdog(writer)])
    os.close(reader)
    with pytest.raises(OSError, match=r"could not be fed: parent \(Broken pipe\)"):
        watchdog.feed()
    watchdog.close(ordered=True)


@pytest.mark.parametrize("text", ["", "three", "-1", "987654", "99999999999999999999"])
def test_a_parent_descriptor_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PenumbraError, match=r"PENUMBRA_WATCHDOG_FD: .* not an open descriptor"):
        open_watchdog({"PENUMBRA_WATCHDOG_FD": text}, NONE)


def test_a_parent_descriptor_that_cannot_be_written_is_refused(pipe: Pipe) -> None:
    with pytest.raises(PenumbraError, match="not the writing end of a pipe"):
        open_watchdog({"PENUMBRA_WATCHDOG_FD": str(pipe.reader)}, NONE)
    os.close(pipe.writer)
    with (
        open(DEVICE_LIKE, "wb") as other,
        pytest.raises(PenumbraError, match="not the writing end of a pipe"),
    ):
        open_watchdog({"PENUMBRA_WATCHDOG_FD": str(other.fileno())}, NONE)


def test_systemd_is_told_and_fed(notify: socket.socket) -> None:
    env = {
        "NOTIFY_SOCKET": notify.getsockname(),
        "WATCHDOG_USEC": "8000000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    watchdog = open_watchdog(env, NONE)
    assert (watchdog.kind, watchdog.timeout_s) == ("systemd", 8.0)
    watchdog.ready()
    watchdog.feed()
    watchdog.stopping()
    assert [notify.recv(64) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]
    watchdog.close(ordered=True)


@pytest.mark.parametrize("env", [{}, {"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "1"}])
def test_systemd_that_waits_for_nothing_or_for_another_process_is_not_fed(
    notify: socket.socket, env: dict[str, str]
) -> None:
    watchdog = open_watchdog({"NOTIFY_SOCKET": notify.getsockname(), **env}, NONE)
    assert watchdog.timeout_s is None
    watchdog.feed()
    watchdog.ready()
    assert notify.recv(64) == b"READY=1"
    watchdog.close(ordered=True)


def test_the_abstract_name_space_of_systemd_is_understood() -> None:
    name = f"penumbra-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind("\0" + name)
        server.settimeout(5)
        watchdog = open_watchdog({"NOTIFY_SOCKET": "@" + name}, NONE)
        watchdog.ready()
        assert server.recv(64) == b"READY=1"
        watchdog.close(ordered=True)


@pytest.mark.parametrize("text", ["", "8s", "0", "-5", "1.5", "\u0665"])
def test_a_time_of_systemd_that_is_none_is_refused(notify: socket.socket, text: str) -> None:
    with pytest.raises(PenumbraError, match="WATCHDOG_USEC"):
        open_watchdog({"NOTIFY_SOCKET": notify.getsockname(), "WATCHDOG_USEC": text}, NONE)


def test_a_systemd_socket_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match="NOTIFY_SOCKET: cannot reach"):
        open_watchdog({"NOTIFY_SOCKET": str(tmp_path / "none")}, NONE)


def test_what_is_open_already_is_closed_when_another_is_refused(pipe: Pipe, tmp_path: Path) -> None:
    env = {"PENUMBRA_WATCHDOG_FD": str(pipe.writer), "NOTIFY_SOCKET": str(tmp_path / "none")}
    with pytest.raises(PenumbraError):
        open_watchdog(env, NONE)
    assert os.read(pipe.reader, 1) == b""


def test_a_device_is_set_to_its_timeout_and_may_round_it() -> None:
    asked: list[tuple[int, int]] = []

    def ioctl(descriptor: int, request: int, argument: bytes) -> bytes:
        asked.append((request, *struct.unpack("i", argument)))
        return struct.pack("i", 16)

    watchdog = DeviceWatchdog.open(DEVICE_LIKE, 15, ioctl)
    # WDIOC_SETTIMEOUT is _IOWR('W', 6, int).
    assert asked == [(3 << 30 | 4 << 16 | ord("W") << 8 | 6, 15)]
    assert watchdog.timeout_s == 16
    watchdog.close(ordered=True)


def test_a_device_is_disarmed_by_an_ordered_stop_only(pipe: Pipe) -> None:
    watchdog = DeviceWatchdog(os.dup(pipe.writer), 15)
    watchdog.feed()
    watchdog.stopping()
    fed = pipe.read()
    assert len(fed) == 1
    assert b"V" not in fed
    watchdog.close(ordered=False)
    assert pipe.read() == b""

    DeviceWatchdog(pipe.writer, 15).close(ordered=True)
    assert os.read(pipe.reader, 8) == b"V"


def test_what_is_no_watchdog_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, match in (
        (str(tmp_path / "file"), "is not a character device"),
        (str(tmp_path / "none"), "cannot open .*No such file"),
        (DEVICE_LIKE, "does not take a timeout"),
    ):
        with pytest.raises(PenumbraError, match=match) as refused:
            open_watchdog({}, WatchdogConfig(device=path))
        assert "[watchdog] device" in str(refused.value)
        assert refused.value.mend


@pytest.mark.parametrize("text", [b'{"timeout_s": 1}', b'{"timeout_s": 601}', b'{"timeout": 5}'])
def test_a_configuration_out_of_range_is_refused(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=WatchdogConfig)


class Counting(Watchdog):
    """Counts its feeds, or fails them."""

    def __init__(self, kind: str = "counting", timeout_s: float | None = None) -> None:
        self.kind = kind
        self.timeout_s = timeout_s
        self.feeds = 0
        self.fails = False

    def feed(self) -> None:
        if self.fails:
            raise OSError(5, "Input/output error")
        self.feeds += 1

    def ready(self) -> None: ...

    def stopping(self) -> None: ...

    def close(self, ordered: bool) -> None: ...


def test_every_member_of_a_set_is_fed_even_if_one_fails() -> None:
    first, second = Counting("first", 8.0), Counting("second", 4.0)
    watchdog = WatchdogSet([first, second])
    assert (watchdog.kind, watchdog.timeout_s) == ("first+second", 4.0)
    first.fails = True
    with pytest.raises(OSError, match=r"could not be fed: first \(Input/output error\)"):
        watchdog.feed()
    assert second.feeds == 1


def test_feeds_are_as_frequent_as_the_shortest_watchdog_needs() -> None:
    base = FeedLimits(period_s=1.0)
    assert limits_for(Counting(), base) == base
    assert limits_for(Counting(timeout_s=60.0), base).period_s == 1.0
    assert limits_for(Counting(timeout_s=2.0), base).period_s == 0.5


# --- keeper ---

LIMITS = FeedLimits(period_s=0.02, lag_s=0.25, report_s=0.5, start_s=60.0, stop_s=60.0)


class Kept:
    """A keeper, what it feeds, and what it said."""

    def __init__(self, limits: FeedLimits = LIMITS) -> None:
        self.watchdog = Counting()
        self.said: list[tuple[str, ...]] = []
        self.keeper = WatchdogKeeper(self.watchdog, FeedGate(limits, time.monotonic()), self.said.append)

    def tell_well(self) -> None:
        self.keeper.tell(PingReport(()), time.monotonic())


def test_the_loop_cannot_feed() -> None:
    with pytest.raises(TypeError, match="lag thread only"):
        Kept().keeper.tell(LagBeat(0.0), 0.0)


def test_a_feed_that_fails_is_told_once_and_counted_apart() -> None:
    kept = Kept(FeedLimits())
    kept.watchdog.fails = True
    kept.keeper.tell(PingReport(()), 0.0)
    kept.keeper.beat(0.0, 0.0)
    kept.keeper.tell(PingReport(()), 2.0)
    kept.keeper.beat(0.0, 2.0)
    assert kept.said == [("[Errno 5] Input/output error",)]
    assert not kept.keeper.is_fed
    assert (kept.keeper.feeds, kept.keeper.failures) == (0, 2)
    kept.watchdog.fails = False
    kept.keeper.tell(PingReport(()), 4.0)
    kept.keeper.beat(0.0, 4.0)
    assert kept.said[1:] == [()]
    assert kept.keeper.is_fed
    assert (kept.keeper.feeds, kept.keeper.failures) == (1, 2)


@pytest.fixture
async def kept() -> AsyncIterator[Kept]:
    """A keeper driven by the lag thread of the running loop; all is well, and the watchdog is fed."""
    made = Kept()
    lag = LoopLag(asyncio.get_running_loop(), made.keeper.beat, period_s=0.01)
    made.tell_well()
    lag.start()
    try:
        await until(lambda: made.watchdog.feeds > 0)
        yield made
    finally:
        lag.stop()
        assert lag.beat_errors == 0


async def feeds_go_on(kept: Kept) -> bool:
    """Return whether it is fed within several feed periods from now, all well but for what was done."""
    kept.tell_well()
    before = kept.watchdog.feeds
    for _ in range(20):
        await asyncio.sleep(0.01)
        kept.tell_well()
    return kept.watchdog.feeds > before + 1


async def test_it_is_fed_while_all_is_well(kept: Kept) -> None:
    assert await feeds_go_on(kept)
    assert kept.keeper.is_fed
    assert kept.said == []


async def test_it_is_not_fed_while_a_patient_is_out_of_limits(kept: Kept) -> None:
    kept.keeper.tell(PingReport(("jobs",)), time.monotonic())
    await until(lambda: not kept.keeper.is_fed)
    before = kept.watchdog.feeds
    for _ in range(10):
        kept.keeper.tell(PingReport(("jobs",)), time.monotonic())
        await asyncio.sleep(0.01)
    assert kept.watchdog.feeds == before
    assert kept.said == [("out of limits: jobs",)]
    assert await feeds_go_on(kept)
    assert kept.said[1:] == [()]


async def test_it_is_not_fed_while_the_loop_is_blocked(kept: Kept) -> None:
    begun_s = time.monotonic()
    while kept.keeper.is_fed and time.monotonic() - begun_s < 5:
        kept.tell_well()
        time.sleep(0.01)  # noqa: ASYNC251 - blocking the loop is the point
    assert "the event loop lags" in kept.said[0][0]
    before = kept.watchdog.feeds
    for _ in range(10):
        kept.tell_well()
        time.sleep(0.01)  # noqa: ASYNC251 - blocking the loop is the point
    assert kept.watchdog.feeds == before
    await until(lambda: kept.said[-1] == ())
    assert await feeds_go_on(kept)


async def test_it_is_not_fed_when_nobody_reports_the_pings(kept: Kept) -> None:
    await until(lambda: not kept.keeper.is_fed)
    before = kept.watchdog.feeds
    await asyncio.sleep(0.1)
    assert kept.watchdog.feeds == before
    assert "no account of the pings" in kept.said[0][0]


async def test_it_is_never_fed_again_once_a_restart_is_asked_for(kept: Kept) -> None:
    kept.keeper.tell(RestartRequested("node.restart"), time.monotonic())
    await until(lambda: not kept.keeper.is_fed)
    assert not await feeds_go_on(kept)
    kept.keeper.tell(Stopping(), time.monotonic())
    assert not await feeds_go_on(kept)


async def test_it_is_not_fed_when_the_thread_that_feeds_is_blocked() -> None:
    free = threading.Event()
    kept = Kept()
    beats = 0

    def beat(lag_s: float, now_s: float) -> None:
        nonlocal beats
        beats += 1
        if beats == 3:
            free.wait(10)
        kept.keeper.beat(lag_s, now_s)

    lag = LoopLag(asyncio.get_running_loop(), beat, period_s=0.03)
    lag.start()
    try:
        await until(lambda: beats == 3)
        assert not await feeds_go_on(kept)
        assert not lag.is_alive(max_age_s=0.1)
        free.set()
        assert await feeds_go_on(kept)
    finally:
        free.set()
        lag.stop()
