"""The ground station: archives what comes down, acknowledges it, sends the commands up.

A frame is acknowledged only after the archive's transaction is committed. The station talks to the broker
directly; whether the node hears it is decided by the space link (`hil.link_proxy`), and outside of contacts
the station keeps silent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from hil.uplink import Uplink
from telemetry import topics
from telemetry.ack import encode_ack
from telemetry.archive import Archive
from telemetry.block import BlockError, frames_in
from telemetry.database import StoreFull
from telemetry.flow import Flow, encode_flow
from telemetry.frame import Frame, FrameError, decode_frame
from telemetry.keys import KeyRing
from telemetry.link import LinkDown, MqttLink
from telemetry.packets import Packet, UploadReport, Verification
from telemetry.tls import TlsFiles
from telemetry.upload import Chunk, encode_chunk

_log = logging.getLogger(__name__)

REACK_S = 2.0
"""Interval of acknowledging everything anew while in contact, s: an acknowledgement can be lost too."""
UPLINK_TICK_S = 0.05
FULL_S = 1.0
"""Interval of trying again to number a command while the archive's disk is full, s."""
BATCH = 512
"""Most frames of one archive transaction."""
MAX_BACKLOG = 8192
"""Frames that may wait for the archive; the node is told to hold when they near it (assumed)."""
FLOW_S = 0.5
"""Interval of looking at the backlog, s."""
FLOW_VALID_S = 3.0
"""How long a word on flow holds, s: several intervals (assumed)."""


@dataclass
class GroundCounts:
    """What the station heard."""

    archived: int = 0
    duplicates: int = 0
    garbage: int = 0
    """Messages under the node's telemetry topics that are no frame of it."""
    unreadable: int = 0
    """Sound frames whose packet this ground cannot read; archived all the same."""
    not_archived: int = 0
    """Frames that found the archive's disk full; the node sends them again."""


class GroundStation:
    """One station for one node.

    Parameters
    ----------
    url
        The broker.
    node
        The node's name.
    archive
        Where frames go.
    ring
        Keys for acknowledgements and commands.
    now_ns
        Mission time, UTC ns.
    on_packet
        Called with each new frame and its packet, in order of arrival, before it is archived.
    sealed
        Whether telecommands are encrypted.
    reack_s
        Interval of acknowledging everything anew, s.
    tls
        Files for TLS to the broker, where its URL asks for it.
    """

    def __init__(
        self,
        url: str,
        node: str,
        archive: Archive,
        ring: KeyRing,
        *,
        now_ns: Callable[[], int],
        on_packet: Callable[[Frame, Packet], None] = lambda frame, packet: None,
        sealed: bool = False,
        reack_s: float = REACK_S,
        tls: TlsFiles | None = None,
    ) -> None:
        self.counts = GroundCounts()
        self.uplink = Uplink(node, ring, lambda key_id: archive.next_sequence(node, key_id), sealed=sealed)
        self.in_contact = False
        """Set by the flight as contacts begin and end."""
        self._node = node
        self._archive = archive
        self._ring = ring
        self._reack_s = reack_s
        self._now_ns = now_ns
        self._on_packet = on_packet
        self._archive_full = False
        self.upload: UploadReport | None = None
        """What the node said last of the upload that is open."""
        self.upload_reports = 0
        """How often it did."""
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._link = MqttLink(url, f"ground-{node}", [topics.tm(node, "#")], self._on_message, tls=tls)

    @property
    def connected(self) -> asyncio.Event:
        """Set while the station hears the broker."""
        return self._link.connected

    @property
    def connections(self) -> int:
        """Times the broker was reached."""
        return self._link.connections

    @property
    def link_error(self) -> str | None:
        """Why the broker is not heard; None when that is not known, or it is."""
        return self._link.last_error

    @property
    def backlog(self) -> int:
        """Frames received and not yet archived."""
        return self._frames.qsize()

    async def send_chunk(self, sha256: bytes, index: int, data: bytes) -> bool:
        """Send a chunk of an upload up; return whether the link took it; the node tells what arrived."""
        if not self.in_contact:
            return False
        chunk = Chunk(node=self._node, sha256=sha256, index=index, data=data)
        return await self._publish(topics.up(self._node), encode_chunk(chunk, self._ring.signing_key()))

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run(), name="hil.ground.link")
            group.create_task(self._archive_frames(), name="hil.ground.archive")
            group.create_task(self._send_commands(), name="hil.ground.uplink")
            group.create_task(self._acknowledge_again(), name="hil.ground.reack")
            group.create_task(self._control_flow(), name="hil.ground.flow")

    def _on_message(self, topic: str, payload: bytes) -> None:
        try:
            frames = frames_in(topic, payload)
        except BlockError as error:
            self.counts.garbage += 1
            _log.info("garbage on %s: %s", topic, error)
            return
        for each in frames:
            self._on_frame(topic, each)

    def _on_frame(self, topic: str, payload: bytes) -> None:
        try:
            frame = decode_frame(payload)
            allowed = (topics.tm(frame.node, frame.stream), topics.tm_block(frame.node))
            if topic not in allowed or frame.node != self._node:
                raise FrameError(f"frame of {frame.node} {frame.stream.value} on {topic}")
        except FrameError as error:
            self.counts.garbage += 1
            _log.info("garbage on %s: %s", topic, error)
            return
        self._frames.put_nowait(payload)
        try:
            packet = frame.packet()
        except FrameError:
            self.counts.unreadable += 1
            return
        if isinstance(packet, Verification):
            self.uplink.on_verification(packet)
        elif isinstance(packet, UploadReport):
            self.upload = packet
            self.upload_reports += 1
        self._on_packet(frame, packet)

    async def _archive_frames(self) -> None:
        while True:
            batch = [await self._frames.get()]
            while len(batch) < BATCH and not self._frames.empty():
                batch.append(self._frames.get_nowait())
            try:
                done = await asyncio.to_thread(self._archive.ingest, batch)
            except StoreFull as error:
                self.counts.not_archived += len(batch)
                self._archive_full = True
                _log.error("not archived, not acknowledged: %s", error)
                continue
            self._archive_full = False
            self.counts.archived += done.new
            self.counts.duplicates += done.duplicate
            touched = [(boot, stream) for _, boot, stream in done.touched]
            for ack in await asyncio.to_thread(self._archive.acks, self._node, touched):
                await self._publish(topics.ack(self._node), encode_ack(ack, self._ring.signing_key()))

    async def _acknowledge_again(self) -> None:
        while True:
            await asyncio.sleep(self._reack_s)
            if self.in_contact:
                for ack in await asyncio.to_thread(self._archive.acks, self._node):
                    await self._publish(topics.ack(self._node), encode_ack(ack, self._ring.signing_key()))

    async def _control_flow(self) -> None:
        """Tell the node how much we can take, while that is less than it may send by itself."""
        bounded = False
        while True:
            grant = 0 if self._archive_full else max(0, MAX_BACKLOG - self.backlog)
            was, bounded = bounded, grant < MAX_BACKLOG // 2
            if self.in_contact and (bounded or was):
                flow = Flow(node=self._node, t_ns=self._now_ns(), records=grant, valid_s=FLOW_VALID_S)
                await self._publish(topics.flow(self._node), encode_flow(flow, self._ring.signing_key()))
            await asyncio.sleep(FLOW_S)

    async def _send_commands(self) -> None:
        while True:
            in_contact = self.in_contact and self.connected.is_set()
            try:
                sends = self.uplink.tick(time.monotonic(), self._now_ns(), in_contact=in_contact)
            except StoreFull as error:
                # Without a number that is durable nothing is signed; the command waits.
                _log.error("no command sent: %s", error)
                await asyncio.sleep(FULL_S)
                continue
            for send in sends:
                await self._publish(topics.tc(self._node), send.payload)
            await asyncio.sleep(UPLINK_TICK_S)

    async def _publish(self, topic: str, payload: bytes) -> bool:
        try:
            await self._link.publish(topic, payload)
        except LinkDown as error:
            # Acknowledgements and commands are both repeated: nothing is lost with this one.
            _log.info("not sent on %s: %s", topic, error)
            return False
        return True
