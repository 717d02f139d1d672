"""Waits for what a test wants to see; how long that takes is not what is tested."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

Value = TypeVar("Value")
SECONDS = 60.0
"""How long a busy machine may take."""
PAUSE = 0.002


def soon(condition: Callable[[], Value], seconds: float = SECONDS) -> Value:
    """The first true value of ``condition``; fails when there is none."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(PAUSE)
    return value


async def until(
    condition: Callable[[], object] | Callable[[], Awaitable[object]], seconds: float = SECONDS
) -> None:
    """The same while the event loop runs on; ``condition`` may be a coroutine function."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if await value if inspect.isawaitable(value) else value:
            return
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(PAUSE)
