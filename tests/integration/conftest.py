"""What every integration test is held to: it leaves no shared memory behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path("/dev/shm")  # noqa: S108 - tmpfs on purpose


@pytest.fixture(autouse=True)
def no_arena_is_left() -> Iterator[None]:
    """Fail a test that leaves a KV arena: it outlives every process, and holds memory."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield  # Those of the other tests are there meanwhile.
        return
    before = set(SHARED.glob("penumbra-*"))
    yield
    left = sorted(path.name for path in set(SHARED.glob("penumbra-*")) - before)
    assert left == [], f"left in {SHARED}: {left}"
