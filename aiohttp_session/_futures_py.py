"""Futures for what many requests wait for at a time: the reference implementation."""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import ref

__all__ = ("FutureGroup",)


class FutureGroup:
    """Makes futures of an event loop whose waiters may be woken together.

    They are like `asyncio.Future`, but one that has an exception which nobody asks for is not
    reported. The compiled ones that are done in one turn of the loop share one callback there,
    where each of asyncio's has its own, which takes longer than all else that it does.

    :param loop: is not kept alive by the group.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)

    def create_future(self) -> asyncio.Future[Any]:
        """Make a future."""
        return asyncio.Future(loop=self._loop())
