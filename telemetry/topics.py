"""MQTT topics (design section 4)."""

from __future__ import annotations

import re

from telemetry.errors import PenumbraError
from telemetry.packets import Stream

ROOT = "penumbra"
NODE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
BUS_CHANNELS = ("time", "orbit", "eps", "thermal", "contact", "load", "request")


def check_node_name(node: str) -> str:
    """Return `node` if it may stand in a topic, else raise.

    Raises
    ------
    PenumbraError
        `node` is not 1 to 31 characters of a-z, 0-9 and '-', beginning with a letter or digit.
    """
    if not NODE_NAME.fullmatch(node):
        raise PenumbraError(
            f"node name {node!r}: 1 to 31 of a-z, 0-9 and '-' are allowed, the first not '-'",
            "choose another name in [node] name",
        )
    return node


def tm(node: str, stream: Stream | str) -> str:
    """Telemetry of one stream, node to ground."""
    return f"{ROOT}/{node}/tm/{stream}"


def tm_block(node: str) -> str:
    """Telemetry of several streams in compressed blocks, node to ground."""
    return f"{ROOT}/{node}/tm/block"


def is_block(topic: str) -> bool:
    """Whether a topic carries blocks."""
    return topic.endswith("/tm/block")


def tc(node: str) -> str:
    """Telecommands, ground to node."""
    return f"{ROOT}/{node}/tc"


def ack(node: str) -> str:
    """Archive acknowledgements, ground to node."""
    return f"{ROOT}/{node}/ack"


def flow(node: str) -> str:
    """Flow control, ground to node."""
    return f"{ROOT}/{node}/flow"


def up(node: str) -> str:
    """Chunks of an upload, ground to node."""
    return f"{ROOT}/{node}/up"


def bus(node: str, channel: str) -> str:
    """Spacecraft bus channel, from the bus to the node; `load` and `request` go the other way."""
    return f"{ROOT}/{node}/bus/{channel}"
