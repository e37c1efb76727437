"""What every integration test is held to: it leaves no shared memory behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import own_run
import pytest


@pytest.fixture(autouse=True)
def no_arena_is_left() -> Iterator[None]:
    """Fail a test that leaves a KV arena: it outlives every process, and holds memory."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield  # Those of the other tests are there meanwhile.
        return
    before = own_run.arenas()
    yield
    left = own_run.left_since(before)
    assert left == [], f"left in {own_run.SHARED}: {left}"
