"""Scenarios of tests, made from the packaged ones."""

from __future__ import annotations

import re


def changed(text: str, **values: str) -> str:
    """The scenario with keys given other values, wherever they stand."""
    for key, value in values.items():
        text, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    return text
