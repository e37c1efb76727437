"""Wait in tests for what nothing announces."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

STEP_S = 0.01


async def until(condition: Callable[[], bool | Awaitable[bool]], bound_s: float = 5.0) -> None:
    """Return when the condition is true; fail when it is not within `bound_s`."""
    for _ in range(round(bound_s / STEP_S)):
        met = condition()
        if await met if inspect.isawaitable(met) else met:
            return
        await asyncio.sleep(STEP_S)
    raise AssertionError(f"did not come true within {bound_s} s")


async def handled(queue: asyncio.Queue[Any]) -> None:
    """Return when all that was put into a queue is handled: its reader waits for more."""
    await until(lambda: queue.empty() and bool(queue._getters), 30.0)  # type: ignore[attr-defined]
