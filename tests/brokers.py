"""Brokers of the tests: the embedded one, and mosquitto, plain or hardened as shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from hil.certificates import Authority
from hil.mosquitto import Mosquitto, find_mosquitto

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"

needs_mosquitto = pytest.mark.skipif(
    find_mosquitto() is None, reason="mosquitto is not installed: apt-get install mosquitto"
)


def hardened(directory: Path, authority: Authority) -> Mosquitto:
    """Return a mosquitto with the shipped configuration and certificates of an authority."""
    broker = authority.issue("broker", server=True)
    settings = {
        "cafile": str(authority.ca_file),
        "certfile": str(broker.certificate),
        "keyfile": str(broker.key),
        "crlfile": str(authority.crl_file),
        "acl_file": str(DEPLOY / "acl"),
    }
    return Mosquitto(directory, template=(DEPLOY / "mosquitto.conf").read_text(), settings=settings)
