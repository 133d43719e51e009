"""Reads of one key that several requests begin at the same time: one read serves all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

from aiohttp_session._core import FutureGroup

from . import Store
from .batch import fail
from .per_loop import PerLoop

Waiting: TypeAlias = "list[asyncio.Future[Any]]"
"""The futures of the requests that have joined a read."""
_AGAIN = object()
"""In place of a record: the request that read it was cancelled."""


class Begun(dict[str, Waiting]):
    """The reads that were begun in this tick of an event loop, by key."""

    def __init__(self) -> None:
        self.futures: FutureGroup = FutureGroup(asyncio.get_running_loop())


class SharedReads:
    """Reads records, and shares the reads of one key that begin in one tick of an event loop.

    A request joins only a read that was begun in the same tick, never an older one: the older one
    may have been answered already, before a write that another process has acknowledged since. On
    uvloop, a tick includes the replies that come in with it: a request that goes on there after a
    write of its own may join a read that was sent just before, by another connection.

    :param store: returns the store.
    """

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        self.here: PerLoop[Begun] = PerLoop(Begun)

    async def read(self, key: str) -> bytes | None:
        """Return the record under a key, or None if there is none."""
        begun = self.here.get()
        if key in begun:
            return await self.join(begun, key)
        if not begun:
            asyncio.get_running_loop().call_soon(begun.clear)
        waiting: Waiting = []
        begun[key] = waiting
        try:
            record = await self._store().read(key)
        except BaseException as error:
            fail_all(begun, key, waiting, error)
            raise
        share(begun, key, waiting, record)
        return record

    async def join(self, begun: Begun, key: str) -> bytes | None:
        """Return the record that another request is reading."""
        future: asyncio.Future[Any] = begun.futures.create_future()
        begun[key].append(future)
        record = await future
        return await self.read(key) if record is _AGAIN else record


def share(begun: Begun, key: str, waiting: Waiting, record: bytes | None) -> None:
    """Give a record to the requests that have joined a read, and let no other join it."""
    _close(begun, key, waiting)
    for future in waiting:
        if not future.done():
            future.set_result(record)


def fail_all(begun: Begun, key: str, waiting: Waiting, error: BaseException) -> None:
    """Fail the requests that have joined a read; if only its request was cancelled, repeat it."""
    _close(begun, key, waiting)
    for future in waiting:
        if isinstance(error, Exception):
            fail(future, error)
        elif not future.done():
            future.set_result(_AGAIN)


def _close(begun: Begun, key: str, waiting: Waiting) -> None:
    if begun.get(key) is waiting:  # the read was answered in the tick in which it was begun
        del begun[key]
