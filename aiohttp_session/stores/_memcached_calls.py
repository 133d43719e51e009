"""A store's operations by the public calls of a client that isn't aiomcache's, or overrides it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import aiomcache

from ._memcached_protocol import encode_key, expiry
from .batch import Batch
from .per_loop import PerLoop

CALLS = frozenset(("get", "gets", "set", "add", "cas", "delete"))


def has_plain_calls(kind: type[Any]) -> bool:
    """Tell whether a client's calls are aiomcache's own, so that they need not be made."""
    plain = aiomcache.FlagClient
    return issubclass(kind, plain) and all(
        getattr(kind, call) is getattr(plain, call) for call in CALLS
    )


class Calls:
    """The operations of a store by a client's own calls; none of them is repeated.

    :param timeout: seconds after which a call fails with TimeoutError.
    """

    def __init__(self, client: aiomcache.Client, timeout: float) -> None:
        self._client = client
        self._batches: PerLoop[Batch[Any, Any]] = PerLoop(lambda: Batch(_run, timeout=timeout))

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        return self._call("get", key, droppable=True)

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        await self._call("set", key, payload, exptime=expiry(ttl))

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        if expected is None:
            return bool(await self._call("add", key, payload, exptime=expiry(ttl)))
        record, token = await self._call("gets", key, droppable=True)
        if record != expected:
            return False
        return bool(await self._call("cas", key, payload, token, exptime=expiry(ttl)))

    async def delete(self, key: str) -> None:
        await self._call("delete", key)

    async def finish(self) -> None:
        await self._batches.get().finish()

    def _call(
        self, name: str, key: str, *arguments: Any, droppable: bool = False, **options: int
    ) -> asyncio.Future[Any]:
        call = partial(getattr(self._client, name), encode_key(key), *arguments, **options)
        size = len(arguments[0]) if arguments else 0
        return self._batches.get().submit(call, size, droppable=droppable)


async def _run(calls: list[Callable[[], Awaitable[Any]]]) -> Sequence[Any]:
    results = asyncio.gather(*(call() for call in calls), return_exceptions=True)
    # When the time is up they go on by themselves: aiomcache would put a connection back into its
    # pool with half a reply in it.
    return await asyncio.shield(results)
