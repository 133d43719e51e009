"""Waiting for what a test brings about, however long this machine takes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

PATIENCE = 60
"""Seconds that nothing takes which works, on any machine; what is broken fails after them."""

_now = time.monotonic


async def until(holds: Callable[[], object]) -> None:
    """Wait until something holds.

    :raises AssertionError: if it never does.
    """
    end = _now() + PATIENCE
    while not holds():
        assert _now() < end, "what this test waits for does not happen"
        await asyncio.sleep(0.001)


async def turns(number: int = 5) -> None:
    """Let everything that can go on do so for some turns of the event loop."""
    for _ in range(number):
        await asyncio.sleep(0)


class LoopClock:
    """The clock of an event loop, which can be put forward: nobody sits out a time limit.

    A test whose operations have a time limit of `PATIENCE` meets it only where it says so.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._time = loop.time
        self._ahead = 0.0

    def __call__(self) -> float:
        return self._time() + self._ahead

    def advance(self, seconds: float) -> None:
        """Put the clock forward; timers that are due by then run in the next turn of the loop."""
        self._ahead += seconds

    async def pass_until(self, holds: Callable[[], object]) -> float:
        """Let time pass fast until something holds, and return the seconds that it took."""
        begun = self()
        for _ in range(10_000):
            if holds():
                return self() - begun
            self.advance(PATIENCE / 1000)
            await asyncio.sleep(0)
        raise AssertionError("what this test waits for does not happen")


@contextlib.asynccontextmanager
async def running(*visitors: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Future[Any]]:
    """Run something beside a block of code, and no longer, whether or not the block fails."""
    tasks = asyncio.gather(*visitors)
    try:
        yield tasks
    finally:
        tasks.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks
