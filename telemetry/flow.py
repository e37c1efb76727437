"""Flow control: how many records the ground can take at once.

    msgpack [version, key id, node, t_ns, records, valid_s] | HMAC-SHA-256, 32 bytes

A node without a fresh word uses its own limit: silence never stops
the downlink for good. `t_ns` must rise, so that an old word cannot be played again to stop it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from telemetry.frame import MissionTime
from telemetry.keys import Domain, Key, KeyRing
from telemetry.signed import open_signed, sign

FLOW_VERSION = 1
MAX_VALID_S = 60.0
"""Longest time a word holds, s: what a ground that died has granted must not hold a node up (assumed)."""


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """What the ground can take."""

    node: str
    t_ns: int
    """Clock of the ground at issue, UTC ns."""
    records: int
    """Records that may be under way, 0 to hold the downlink."""
    valid_s: float
    """How long this holds, physical s."""


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    key_id: str
    node: str
    t_ns: MissionTime
    records: Annotated[int, Meta(ge=0, le=1_000_000)]
    valid_s: Annotated[float, Meta(gt=0, le=MAX_VALID_S)]


_decoder = msgspec.msgpack.Decoder(_Wire)


def encode_flow(flow: Flow, key: Key) -> bytes:
    """Return the word signed with `key`."""
    wire = _Wire(FLOW_VERSION, key.id, flow.node, flow.t_ns, flow.records, flow.valid_s)
    return sign(wire, key, Domain.FLOW)


def decode_flow(data: bytes, ring: KeyRing) -> Flow:
    """Authenticate and decode. Raises `SignedError`."""
    wire = open_signed(data, _decoder, FLOW_VERSION, ring, Domain.FLOW)
    return Flow(node=wire.node, t_ns=wire.t_ns, records=wire.records, valid_s=wire.valid_s)
