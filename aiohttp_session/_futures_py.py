"""Futures for what many requests wait for at a time: the reference implementation."""

from __future__ import annotations

import asyncio
from typing import Any, final
from weakref import ref

__all__ = ("FutureGroup",)


@final
class FutureGroup:
    """Makes futures of an event loop, as its own ``create_future()`` does.

    The compiled ones that are done in one turn of the loop share a callback there; with asyncio's
    each has one, which takes half a microsecond. Those that are done between `hold` and `release`
    need no other turn: who waits for them goes on within `release`. And the compiled ones don't
    report an exception that nobody asked for.

    :param loop: is not kept alive.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)

    def create_future(self) -> asyncio.Future[Any]:
        """Make a future."""
        return asyncio.Future(loop=self._loop())

    def hold(self) -> None:
        """Have those who wait go on when `release` is called."""

    def release(self) -> None:
        """Let those go on who wait for what is done: at once, if no task is running."""
