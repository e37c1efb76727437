"""The MQTT link: publish with a deadline, receive by callback, reconnect for ever.

QoS 1 both ways, and a clean session on purpose: nothing relies on the broker's durability (design section 4).
What a broker kept while the link was away would be stale bus values in a burst; telemetry stays on the node's
disk until the archive acknowledges it, and the ground repeats a command until it is verified.

`mqtt://[user:password@]host[:port]` speaks MQTT 3.1.1, `mqtt5://...` speaks MQTT 5; `mqtts://...` and
`mqtts5://...` do so within TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import aiomqtt
import paho.mqtt.client as paho

from telemetry.errors import PenumbraError
from telemetry.tls import TlsFiles

QOS = 1
DEFAULT_PORT = 1883
DEFAULT_TLS_PORT = 8883
SCHEMES = ("mqtt", "mqtt5", "mqtts", "mqtts5")
FAILURE = 0x80
"""Reason codes from here on say no (MQTT 3.1.1 section 3.9.3, MQTT 5 section 2.4)."""
MAX_QUEUED = 1000
"""Received messages waiting for `on_message`; beyond it new ones are discarded (assumed)."""
GOODBYE_S = 0.5
"""How long an ordered disconnect may take, s (assumed)."""
MISC_S = 0.25
"""Interval of looking at the keep-alive, s."""
RENEW_S = 10.0
"""Interval of subscribing anew, s (assumed). A flipped bit in a SUBSCRIBE is a subscription to something
else, which the broker confirms: the link is up, and deaf to a topic. Said again, it is right."""
PROBE_S = 10.0
"""Interval of trying to connect while nobody is expected at the far end, s (assumed: a fraction of a pass
that is not in the plan)."""
STEADY_S = 5.0
"""A connection that lasted this long starts the back-off anew, s (assumed)."""

log = logging.getLogger("penumbra.link")
_mqtt_log = logging.getLogger("penumbra.link.mqtt")
_mqtt_log.setLevel(logging.ERROR)

OnMessage = Callable[[str, bytes], None]


class LinkDown(ConnectionError):
    """The message was not taken by the broker within the deadline. It may have arrived all the same."""


class Link(Protocol):
    """What the node and the ground need of a link."""

    connected: asyncio.Event
    """Set while connected and subscribed."""

    async def publish(self, topic: str, payload: bytes) -> None:
        """Hand a message to the broker; raise `LinkDown` if it did not confirm it in time."""

    async def run(self) -> None:
        """Keep the link up until cancelled."""


@dataclass(frozen=True)
class BrokerAddress:
    """A broker URL, taken apart. The password never shows in `repr`."""

    host: str
    port: int
    version5: bool
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Take a broker URL apart.

        Raises
        ------
        PenumbraError
            A scheme not in `SCHEMES`, no host, a port out of 1 to 65535, or anything after the port.
        """
        mend = "use mqtt://host:port (MQTT 3.1.1) or mqtt5://host:port (MQTT 5), mqtts and mqtts5 for TLS"
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname}" if parts.password else url
        if parts.scheme not in SCHEMES:
            raise PenumbraError(f"broker URL {shown!r}: scheme {parts.scheme!r} is not allowed", mend)
        if not parts.hostname:
            raise PenumbraError(f"broker URL {shown!r}: the host is missing", mend)
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise PenumbraError(f"broker URL {shown!r}: nothing may follow the port", mend)
        tls = parts.scheme.startswith("mqtts")
        try:
            port = (DEFAULT_TLS_PORT if tls else DEFAULT_PORT) if parts.port is None else parts.port
        except ValueError:
            port = 0
        if port == 0:
            raise PenumbraError(f"broker URL {shown!r}: the port is not a number from 1 to 65535", mend)
        return cls(
            parts.hostname,
            port,
            parts.scheme.endswith("5"),
            tls,
            None if parts.username is None else unquote(parts.username),
            None if parts.password is None else unquote(parts.password),
        )


def tls_context(address: BrokerAddress, files: TlsFiles | None) -> ssl.SSLContext | None:
    """Return the TLS context for an address, None where it asks for none.

    Raises
    ------
    PenumbraError
        TLS without files or files without TLS, or a file is at fault.
    """
    if address.tls and files is None:
        raise PenumbraError(
            "TLS needs tls_ca", "name the certificate of the authority, or use mqtt:// or mqtt5://"
        )
    if files is not None and not address.tls:
        raise PenumbraError("tls_ca is given for a broker URL without TLS", "use mqtts:// or mqtts5://")
    return None if files is None else files.context()


@dataclass
class Backoff:
    """Waits between attempts to connect: doubling, bounded, spread by chance."""

    first_s: float = 0.2
    max_s: float = 2.0
    _next_s: float = 0.0

    def next(self, chance: float) -> float:
        """Return the next wait, s. `chance`, 0 to 1, spreads it from half to the whole of its nominal."""
        nominal = self._next_s or self.first_s
        self._next_s = min(self.max_s, 2 * nominal)
        return nominal * (0.5 + 0.5 * chance)

    def reset(self) -> None:
        """Start anew after success."""
        self._next_s = 0.0


class _Client(aiomqtt.Client):
    """One connection, which can also be taken down at once and without leaving a task behind.

    Its calls have no timeout of their own: aiomqtt bounds them by `asyncio.wait_for`, which in Python 3.11
    swallows a cancellation that meets the answer. Callers bound them by `asyncio.timeout`.
    """

    def __init__(
        self, address: BrokerAddress, client_id: str, connect_timeout_s: float, **options: object
    ) -> None:
        super().__init__(
            address.host,
            address.port,
            identifier=client_id,
            username=address.username,
            password=address.password,
            logger=_mqtt_log,
            timeout=math.inf,
            **options,  # type: ignore[arg-type]
        )
        self._client.connect_timeout = connect_timeout_s
        self._thread_done = asyncio.Event()

    def _client_connect(self) -> None:
        # aiomqtt connects in a thread, which cancelling the task does not stop.
        try:
            super()._client_connect()
        finally:
            with contextlib.suppress(RuntimeError):  # The loop may be gone by now.
                self._loop.call_soon_threadsafe(self._thread_done.set)

    def _on_message(self, client: Any, userdata: Any, message: Any) -> None:
        try:
            _ = message.topic
        except UnicodeDecodeError:
            # Damaged on its way. paho raises this out of the reading of the socket, and aiomqtt takes it for
            # the reason of a disconnection that is none of its own errors.
            _mqtt_log.warning("a message without a readable topic is dropped")
            return
        super()._on_message(client, userdata, message)

    def _on_disconnect(self, *args: Any, **kwargs: Any) -> None:
        # A wait for CONNACK that was cut short leaves a cancelled future, which aiomqtt would trip over.
        if not self._connected.cancelled():
            super()._on_disconnect(*args, **kwargs)

    async def _misc_loop(self) -> None:
        # aiomqtt looks at the keep-alive once a second: two of them more until a black hole is noticed.
        while self._client.loop_misc() == paho.MQTT_ERR_SUCCESS:  # noqa: ASYNC110 - paho has to be asked
            await asyncio.sleep(MISC_S)

    async def say_goodbye(self) -> None:
        """Disconnect in order if the broker answers soon."""
        # Also what paho raised over a damaged packet, which aiomqtt tells once more here.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(GOODBYE_S):
                await self.__aexit__(None, None, None)

    async def take_down(self) -> None:
        """Close the socket and wait for aiomqtt's own task; bounded by the connect timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._client.connect_timeout + 1):
                await self._thread_done.wait()
        raw = self._client.socket()
        if isinstance(raw, socket.socket):
            with contextlib.suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)
            # It reads what is left, sees the end of the stream, closes, and unregisters from the loop.
            try:
                while self._client.loop_read() == paho.MQTT_ERR_SUCCESS:
                    pass
            except Exception:
                self._client._sock_close()
        if self._misc_task is not None:
            self._misc_task.cancel()
            await asyncio.wait([self._misc_task])
        if self._disconnected.done() and not self._disconnected.cancelled():
            self._disconnected.exception()  # Taken note of: nobody is to be told about it later.


class MqttLink:
    """A link over aiomqtt. One owner runs `run` as a task; anyone on the same loop may publish.

    Parameters
    ----------
    url
        See the module.
    client_id
        Unique at the broker: a second client of the same id pushes the first one off.
    topics
        Topic filters to subscribe to.
    on_message
        Called on the loop with (topic, payload) of each message; must be quick, and must not raise: an
        exception from it is a fault of the program and ends `run`.
    on_retained
        Called instead for what the broker had kept before the node subscribed, of whatever age; it comes
        again with each renewed subscription. By default `on_message`, for messages that prove their age.
    keepalive_s
        MQTT keep-alive, s: a dead broker is noticed after twice that, and `2 * MISC_S`, even when nothing is
        published.
    publish_timeout_s
        Deadline of one publish and of one attempt to connect, s. When it is missed and nothing
        else was confirmed meanwhile, the connection is ended: a black hole must not swallow a pass.
    max_inflight
        Publishes under way at the same time.
    tls
        Files for TLS, needed for a URL that asks for it; only that one may have them.
    max_backoff_s
        Longest wait between two attempts to connect, s.
    renew_s
        Interval of subscribing anew, s.

    Raises
    ------
    PenumbraError
        The URL or a file for TLS is wrong, or one is given without the other.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        topics: Sequence[str],
        on_message: OnMessage,
        *,
        keepalive_s: int = 2,
        publish_timeout_s: float = 4.0,
        max_inflight: int = 16,
        max_backoff_s: float = 2.0,
        renew_s: float = RENEW_S,
        tls: TlsFiles | None = None,
        on_retained: OnMessage | None = None,
    ) -> None:
        self.connected = asyncio.Event()
        self.connections = 0
        """Connections made so far."""
        self.last_error: str | None = None
        """Why the link was last lost or not made."""
        self.url = url
        self._expected = True
        self._hurry = asyncio.Event()
        self._address = BrokerAddress.parse(url)
        self._tls = tls_context(self._address, tls)
        self._client_id = client_id
        self._topics = tuple(topics)
        self._on_message = on_message
        self._on_retained = on_retained or on_message
        self._keepalive_s = keepalive_s
        self._publish_timeout_s = publish_timeout_s
        self._max_inflight = max_inflight
        self._renew_s = renew_s
        self._slots = asyncio.Semaphore(max_inflight)
        self._backoff = Backoff(max_s=max_backoff_s)
        self._client: _Client | None = None
        self._broken = asyncio.Event()
        self._confirmed_s = 0.0

    async def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 1; return when the broker has confirmed it.

        A confirmation is no promise of durability: only the archive's acknowledgement is.

        Raises
        ------
        LinkDown
            Not connected, or no confirmation within the deadline; the time waiting for a free slot counts.
        """
        try:
            async with asyncio.timeout(self._publish_timeout_s):
                async with self._slots:
                    client = self._client
                    if client is None:
                        await asyncio.sleep(0)  # A caller that tries again at once must not starve the loop.
                        raise LinkDown("the link is down")
                    try:
                        await client.publish(topic, payload, qos=QOS)
                    except aiomqtt.MqttError as error:
                        self._lose(client, str(error))
                        raise LinkDown(str(error)) from None
                    self._confirmed_s = time.monotonic()
        except TimeoutError:
            text = f"no confirmation within {self._publish_timeout_s:g} s"
            if time.monotonic() - self._confirmed_s >= self._publish_timeout_s:
                self._lose(self._client, text)
            raise LinkDown(text) from None

    def _lose(self, client: _Client | None, why: str) -> None:
        if client is not None and client is self._client:
            # At once, not when the session ends: whoever tries again must find the link down and wait.
            self.last_error = why
            self._client = None
            self.connected.clear()
            self._broken.set()

    def expect(self, expected: bool) -> None:
        """Say whether somebody is expected at the far end.

        If not, it is tried seldom; when that begins, at once. A connection that there is stays.
        """
        if expected and not self._expected:
            self._backoff.reset()
            self._hurry.set()
        self._expected = expected

    async def run(self) -> None:
        """Keep the link up until cancelled. A broken link is no error: it is made anew after a back-off.

        After a cancel it leaves no task behind, at worst after the connect timeout plus 1.5 s.
        """
        while True:
            started = time.monotonic()
            try:
                await self._session()
            except aiomqtt.MqttError as error:
                self.last_error = str(error)
            except TimeoutError:
                self.last_error = f"no connection within {self._publish_timeout_s:g} s"
            log.info("link of %s is down: %s", self._client_id, self.last_error)
            if time.monotonic() - started > STEADY_S:
                self._backoff.reset()
            chance = random.random()  # noqa: S311 - spreads load, no secret
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._backoff.next(chance) if self._expected else PROBE_S):
                    await self._hurry.wait()

    async def _session(self) -> None:
        version = aiomqtt.ProtocolVersion.V5 if self._address.version5 else aiomqtt.ProtocolVersion.V311
        client = _Client(
            self._address,
            self._client_id,
            self._publish_timeout_s,
            protocol=version,
            # MQTT 5 spells the same choice `clean_start`, and a session that expires at once.
            clean_session=None if self._address.version5 else True,
            clean_start=True if self._address.version5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
            keepalive=self._keepalive_s,
            tls_context=self._tls,
            max_queued_incoming_messages=MAX_QUEUED,
            max_inflight_messages=self._max_inflight,
        )
        client.pending_calls_threshold = self._max_inflight + 1
        self._broken.clear()
        up = False
        try:
            async with asyncio.timeout(self._publish_timeout_s):
                await self._open(client)
            up = True
            self._client = client
            self._confirmed_s = time.monotonic()
            self.connections += 1
            self.last_error = None
            self.connected.set()
            log.info("link of %s is up", self._client_id)
            await self._receive_until_broken(client)
        finally:
            self.connected.clear()
            self._client = None
            try:
                if up and not self._broken.is_set():
                    await client.say_goodbye()
            finally:
                await client.take_down()

    async def _open(self, client: _Client) -> None:
        await client.__aenter__()
        await self._subscribe(client)

    async def _subscribe(self, client: _Client) -> None:
        if self._topics:
            granted = await client.subscribe([(topic, QOS) for topic in self._topics])
            if any((code if isinstance(code, int) else code.value) >= FAILURE for code in granted):
                raise aiomqtt.MqttError(f"the broker refused to subscribe to {', '.join(self._topics)}")

    async def _renew(self, client: _Client) -> None:
        """Subscribe anew again and again; a broker that does not confirm it is not there any more."""
        while True:
            await asyncio.sleep(self._renew_s)
            try:
                async with asyncio.timeout(self._publish_timeout_s):
                    await self._subscribe(client)
            except aiomqtt.MqttError as error:
                self._lose(client, str(error))
                return
            except TimeoutError:
                self._lose(client, f"no answer to SUBSCRIBE within {self._publish_timeout_s:g} s")
                return

    async def _receive_until_broken(self, client: _Client) -> None:
        failure: aiomqtt.MqttError | None = None

        async def receive() -> None:
            nonlocal failure
            messages = aiter(client.messages)
            while True:
                try:
                    message = await anext(messages)
                except StopAsyncIteration:
                    break
                except aiomqtt.MqttError as error:
                    failure = error
                    break
                except Exception as error:
                    failure = aiomqtt.MqttError(f"not MQTT: {type(error).__name__}: {error}")
                    break
                if isinstance(message.payload, bytes):
                    take = self._on_retained if message.retain else self._on_message
                    take(message.topic.value, message.payload)
            self._broken.set()

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(receive(), name=f"{self._client_id}.link.receive"),
                group.create_task(self._renew(client), name=f"{self._client_id}.link.renew"),
            ]
            await self._broken.wait()
            for task in tasks:
                task.cancel()
        if failure is not None:
            raise failure
