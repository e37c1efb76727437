"""The watchdog above the node: what resets the board, or restarts the process, when it is no longer fed.

Three kinds, of which every one that is there is fed:

- `device`: a Linux watchdog such as `/dev/watchdog`, named in the configuration. It resets the board. It is
  disarmed (magic close) only after an ordered stop.
- `systemd`: when the service has `WatchdogSec=` (`NOTIFY_SOCKET`, `WATCHDOG_USEC`). It restarts the node.
- `parent`: the pipe of `penumbra node --supervise` (`PENUMBRA_WATCHDOG_FD`), one byte a feed, the first of
  which arms it. It restarts the node.

`node.feed_gate` decides when they are fed. `WatchdogKeeper` brings the two together, and is driven by the
beats of `node.loop_lag`, in that thread: a blocked event loop cannot feed, and neither can a blocked thread.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from node.feed_gate import Feed, FeedGate, FeedLimits, GateEvent, LagBeat, Resumed, Withheld
from telemetry.errors import PenumbraError

log = logging.getLogger("penumbra.watchdog")

PARENT_FD_ENV = "PENUMBRA_WATCHDOG_FD"
FEED_BYTE = b"\x01"
FEEDS_PER_TIMEOUT = 4
"""Feeds within the time of the shortest watchdog: three may go missing (assumed)."""
_WDIOC_SETTIMEOUT = 0xC0045706
_WDIOC_KEEPALIVE_BYTE = b"\0"
_MAGIC_CLOSE = b"V"


class WatchdogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The watchdog the node opens itself. Those of systemd and of `--supervise` come by the environment."""

    device: Annotated[str, Meta(max_length=4096)] = ""
    """Device such as `/dev/watchdog`; empty: none."""
    timeout_s: Annotated[int, Meta(ge=2, le=600)] = 15
    """Time without a feed after which the device resets the board, whole s."""


class Watchdog(Protocol):
    """What is fed."""

    kind: str
    timeout_s: float | None
    """Time without a feed after which it acts, s; None: it does not act, or does not say when."""

    def feed(self) -> None:
        """Feed it. Raises OSError when that fails: then it will act."""

    def ready(self) -> None:
        """Say that the node is up."""

    def stopping(self) -> None:
        """Say that an ordered stop has begun."""

    def close(self, ordered: bool) -> None:
        """Let go of it. Disarmed only if the stop was `ordered`; otherwise it is to act."""


class DeviceWatchdog:
    """A Linux watchdog device, see Documentation/watchdog/watchdog-api.rst of the kernel.

    Parameters
    ----------
    descriptor
        The open device; owned from here on.
    timeout_s
        The timeout it was set to, s.
    """

    kind = "device"

    def __init__(self, descriptor: int, timeout_s: float) -> None:
        self._descriptor = descriptor
        self.timeout_s: float | None = timeout_s

    @classmethod
    def open(cls, path: str, timeout_s: int, ioctl: Callable[..., Any] = fcntl.ioctl) -> DeviceWatchdog:
        """Open the device, which arms it, and set its timeout; it may round that.

        Raises
        ------
        PenumbraError
            The path cannot be opened, or is no watchdog device.
        """
        mend = "name the watchdog device of the board in [watchdog] device, or leave it empty for none"
        try:
            if not stat.S_ISCHR(Path(path).stat().st_mode):
                raise PenumbraError(f"[watchdog] device: {path} is not a character device", mend)
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PenumbraError(f"[watchdog] device: cannot open {path}: {error.strerror}", mend) from None
        try:
            answer = ioctl(descriptor, _WDIOC_SETTIMEOUT, struct.pack("i", timeout_s))
        except OSError as error:
            os.close(descriptor)
            raise PenumbraError(
                f"[watchdog] device: {path} does not take a timeout of {timeout_s} s: {error.strerror}", mend
            ) from None
        (granted_s,) = struct.unpack("i", answer)
        return cls(descriptor, granted_s)

    def feed(self) -> None:
        """Write one byte that is not the magic one."""
        os.write(self._descriptor, _WDIOC_KEEPALIVE_BYTE)

    def ready(self) -> None:
        """Nothing to say: opening it armed it."""

    def stopping(self) -> None:
        """Nothing to say: it stays armed during the stop."""

    def close(self, ordered: bool) -> None:
        """Close it; after an ordered stop with the magic character, which disarms it."""
        try:
            if ordered:
                os.write(self._descriptor, _MAGIC_CLOSE)
        finally:
            os.close(self._descriptor)


class SystemdWatchdog:
    """The notification socket of systemd, see sd_notify(3).

    Parameters
    ----------
    address
        Path of the socket; a leading '@' stands for the abstract name space.
    timeout_s
        Of `WatchdogSec=`, s; None: systemd is told when the node is up, and does not wait for feeds.
    """

    kind = "systemd"

    def __init__(self, address: str, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        try:
            self._socket.connect("\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            self._socket.close()
            raise PenumbraError(
                f"NOTIFY_SOCKET: cannot reach {address!r}: {error}", "start the node from its systemd unit"
            ) from None

    def feed(self) -> None:
        """Send WATCHDOG=1, if systemd waits for it."""
        if self.timeout_s is not None:
            self._socket.send(b"WATCHDOG=1")

    def ready(self) -> None:
        """Send READY=1."""
        self._socket.send(b"READY=1")

    def stopping(self) -> None:
        """Send STOPPING=1."""
        self._socket.send(b"STOPPING=1")

    def close(self, ordered: bool) -> None:
        """Close the socket. systemd sees by itself how the process ended."""
        self._socket.close()


class ParentWatchdog:
    """The pipe to `penumbra node --supervise`.

    Parameters
    ----------
    descriptor
        Its writing end; owned from here on, and not inherited any further.
    """

    kind = "parent"
    timeout_s: float | None = None

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)

    def feed(self) -> None:
        """Write one byte. A pipe that is full has feeds enough in it."""
        try:
            os.write(self._descriptor, FEED_BYTE)
        except BlockingIOError:
            log.debug("the supervising parent reads its feeds late")

    def ready(self) -> None:
        """Nothing to say: the first feed arms it."""

    def stopping(self) -> None:
        """Nothing to say: it is fed during the stop."""

    def close(self, ordered: bool) -> None:
        """Close the pipe. The parent sees by itself how the process ended."""
        os.close(self._descriptor)


class WatchdogSet:
    """All watchdogs there are, fed as one; none is a set of no members.

    Parameters
    ----------
    members
        The watchdogs; owned from here on.
    """

    def __init__(self, members: Sequence[Watchdog]) -> None:
        self._members = tuple(members)
        self.kind = "+".join(member.kind for member in self._members) or "none"
        times_s = [member.timeout_s for member in self._members if member.timeout_s is not None]
        self.timeout_s: float | None = min(times_s, default=None)

    def feed(self) -> None:
        """Feed every one. Raises OSError naming those that could not be fed, after all were tried."""
        self._each("fed", lambda member: member.feed())

    def ready(self) -> None:
        """Tell every one that the node is up. Raises OSError as `feed` does."""
        self._each("told", lambda member: member.ready())

    def stopping(self) -> None:
        """Tell every one that an ordered stop has begun. Raises OSError as `feed` does."""
        self._each("told", lambda member: member.stopping())

    def close(self, ordered: bool) -> None:
        """Let go of every one; disarm them only if the stop was `ordered`. Raises OSError as `feed` does."""
        members, self._members = self._members, ()
        self._each("let go of", lambda member: member.close(ordered), members)

    def _each(
        self, done: str, what: Callable[[Watchdog], None], members: Sequence[Watchdog] | None = None
    ) -> None:
        failed: list[str] = []
        for member in self._members if members is None else members:
            try:
                what(member)
            except OSError as error:
                failed.append(f"{member.kind} ({error.strerror or error})")
        if failed:
            raise OSError(f"watchdog could not be {done}: {', '.join(failed)}")


def open_watchdog(env: Mapping[str, str], config: WatchdogConfig) -> WatchdogSet:
    """Open every watchdog that the environment and the configuration name.

    Raises
    ------
    PenumbraError
        One is named and cannot be used. Nothing stays open then.
    """
    members: list[Watchdog] = []
    try:
        # The device last: opening it arms it, and an error of the others must not reset the board.
        if PARENT_FD_ENV in env:
            members.append(_open_parent(env[PARENT_FD_ENV]))
        if env.get("NOTIFY_SOCKET"):
            members.append(SystemdWatchdog(env["NOTIFY_SOCKET"], _systemd_timeout_s(env)))
        if config.device:
            members.append(DeviceWatchdog.open(config.device, config.timeout_s))
    except PenumbraError:
        WatchdogSet(members).close(ordered=True)
        raise
    return WatchdogSet(members)


def _open_parent(text: str) -> ParentWatchdog:
    mend = f"let `penumbra node --supervise` set {PARENT_FD_ENV}, or unset it"
    try:
        descriptor = int(text)
        mode = os.fstat(descriptor).st_mode
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except (ValueError, OverflowError, OSError):
        raise PenumbraError(f"{PARENT_FD_ENV}: {text!r} is not an open descriptor", mend) from None
    if not stat.S_ISFIFO(mode) or access == os.O_RDONLY:
        raise PenumbraError(f"{PARENT_FD_ENV}: descriptor {text} is not the writing end of a pipe", mend)
    return ParentWatchdog(descriptor)


def _systemd_timeout_s(env: Mapping[str, str]) -> float | None:
    """Return what systemd waits for a feed, s; None: it does not wait, or for another process."""
    text = env.get("WATCHDOG_USEC")
    if text is None or env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise PenumbraError(
            f"WATCHDOG_USEC: {text!r} is not a number of microseconds", "let systemd set it by WatchdogSec="
        )
    return int(text) / 1e6


def limits_for(watchdog: Watchdog, limits: FeedLimits) -> FeedLimits:
    """Return `limits` with feeds as often as the shortest of the watchdogs needs them."""
    if watchdog.timeout_s is None:
        return limits
    return replace(limits, period_s=min(limits.period_s, watchdog.timeout_s / FEEDS_PER_TIMEOUT))


class WatchdogKeeper:
    """Feeds the watchdog as the gate allows. Methods may be called from any thread.

    Parameters
    ----------
    watchdog
        What to feed; its owner closes it.
    gate
        Decides.
    on_change
        Called in the thread of the beats when the watchdog is no longer fed (with the reasons), or is fed
        again (with none): whether it failed or was withheld. It must hand over, not work.
    """

    def __init__(
        self, watchdog: Watchdog, gate: FeedGate, on_change: Callable[[tuple[str, ...]], None]
    ) -> None:
        self.watchdog = watchdog
        self._gate = gate
        self._on_change = on_change
        self._lock = threading.Lock()
        self._failure: str | None = None
        self.failures = 0
        """Feeds that failed."""

    @property
    def feeds(self) -> int:
        """Feeds so far, those that failed left out."""
        with self._lock:
            return self._gate.feeds - self.failures

    @property
    def is_fed(self) -> bool:
        """True while the watchdog is neither withheld its feeds nor out of reach."""
        with self._lock:
            return not self._gate.withheld and self._failure is None

    def tell(self, event: GateEvent, now_s: float) -> None:
        """Tell the gate what the loop knows: pings, a restart asked for, a stop. Never feeds."""
        if isinstance(event, LagBeat):
            raise TypeError("a beat comes from the lag thread only, see `beat`")
        with self._lock:
            self._gate.handle(event, now_s)

    def beat(self, lag_s: float, now_s: float) -> None:
        """Take one beat of the lag thread, see `node.loop_lag.LoopLag`; feed if the gate says so."""
        changes: list[tuple[str, ...]] = []
        with self._lock:
            for action in self._gate.handle(LagBeat(lag_s), now_s):
                match action:
                    case Feed():
                        changes += self._feed()
                    case Withheld(reasons):
                        changes.append(reasons)
                    case Resumed():
                        changes.append(())
        for reasons in changes:
            self._on_change(reasons)

    def _feed(self) -> list[tuple[str, ...]]:
        before = self._failure
        try:
            self.watchdog.feed()
        except OSError as error:
            self.failures += 1
            self._failure = str(error)
        else:
            self._failure = None
        if self._failure == before:
            return []
        return [() if self._failure is None else (self._failure,)]
