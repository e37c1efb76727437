"""The real broker: a mosquitto process on the loopback interface, started, stopped and killed by the bench.

It speaks MQTT 3.1.1 and 5. Its configuration is written into a directory of its own: a plain one, or the
hardened one of docs/deploy with its paths and port replaced.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from hil.tether import tied
from telemetry.errors import PenumbraError

HOST = "127.0.0.1"
START_BOUND_S = 10.0
STOP_BOUND_S = 5.0
POLL_S = 0.005

PLAIN = """\
listener 0 127.0.0.1
allow_anonymous true
persistence false
max_inflight_messages 64
max_queued_messages 10000
log_type error
log_type warning
"""
"""Enough for a bench on one machine."""


def find_mosquitto() -> Path | None:
    """Return where mosquitto is installed, or None."""
    found = shutil.which(
        "mosquitto", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    )
    return None if found is None else Path(found)


def render(template: str, settings: Mapping[str, str]) -> str:
    """Return a configuration with the values of some settings replaced.

    Raises
    ------
    ValueError
        A setting is not in it.
    """
    left = dict(settings)
    lines = []
    for line in template.splitlines():
        name = line.split(" ", 1)[0]
        lines.append(f"{name} {left.pop(name)}" if name in left else line)
    if left:
        raise ValueError(f"not in the configuration: {', '.join(left)}")
    return "\n".join(lines) + "\n"


class Mosquitto:
    """A mosquitto on 127.0.0.1. It can be started again on the same port after `stop` or `kill`.

    Parameters
    ----------
    directory
        For its configuration and its log.
    port
        TCP port, 0 for a free one, which is kept.
    template
        Its configuration.
    settings
        Values to be replaced in it.
    """

    def __init__(
        self,
        directory: Path,
        port: int = 0,
        *,
        template: str = PLAIN,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port
        self.log_file = directory / "mosquitto.log"
        self._config = directory / "mosquitto.conf"
        self._template = template
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address for clients that speak MQTT 5."""
        return f"mqtt5://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Its process; None while it does not run."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start it, and wait until it takes connections.

        Raises
        ------
        PenumbraError
            It is not installed, or ends, or does not listen in time.
        """
        program = find_mosquitto()
        if program is None:
            raise PenumbraError("mosquitto is not installed", "apt-get install mosquitto")
        if self.port == 0:
            self.port = _free_port()
        if _listens(self.port):
            raise PenumbraError(
                f"broker port {HOST}:{self.port} is in use", "choose another, or 0 for a free one"
            )
        text = render(self._template, {**self._settings, "listener": f"{self.port} {HOST}"})
        if os.geteuid() == 0:
            # Else it becomes a user who cannot read our files.
            text += "user root\n"
        self._config.write_text(text)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - forked within a few milliseconds
                tied([str(program), "-c", str(self._config)]), stdout=log, stderr=log, start_new_session=True
            )
        async with asyncio.timeout(START_BOUND_S):
            while not _listens(self.port):
                if self._process.poll() is not None:
                    self._process = None
                    raise PenumbraError(
                        f"mosquitto ended at its start: {self._last_words()}", f"see {self.log_file}"
                    )
                await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """End it in order, or by force after `STOP_BOUND_S`."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """End it as a crash would."""
        await self._end(signal.SIGKILL)

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            await asyncio.to_thread(process.wait, STOP_BOUND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    def _last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    async def __aenter__(self) -> Mosquitto:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((HOST, port)) == 0
