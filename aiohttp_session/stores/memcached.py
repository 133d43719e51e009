"""Records in memcached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import aiomcache

from aiohttp_session._core import quote

from . import Store
from ._memcached_wire import Link
from .batch import Batch
from .per_loop import PerLoop

_RELATIVE_LIMIT = 30 * 24 * 60 * 60  # seconds: memcached takes a longer expiry for a Unix time
_KEY_LIMIT = 250  # bytes
_MAX_CONNECTIONS = 4
_CALLS = frozenset(("get", "gets", "set", "add", "replace", "cas", "delete"))


class MemcachedStore(Store):
    """Keep records in memcached.

    :param client: says where the server is, and how many connections there may be. The
        connections are the store's own, and fewer.
    :param timeout: seconds after which an operation fails with TimeoutError.
    :raises ValueError: if timeout is not positive; at a write, for a record larger than the server
        takes, or a key that memcached can't have.
    """

    # aiomcache's own connections won't do: one that is used by a request that is cancelled goes
    # back to the pool with the rest of the reply in it (by the application's own requests, too),
    # a server that closes one in the middle of a reply sends it into an endless loop, and it
    # knows no timeouts.

    timeout: float

    def __init__(self, client: aiomcache.Client, *, timeout: float = 5) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.timeout = timeout
        self._client = client
        self._is_plain = _has_plain_calls(type(client))
        self._links = PerLoop(self._make_link)
        self._batches: PerLoop[Batch[Any, Any]] = PerLoop(self._make_batch)

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        """Return the record under a key."""
        return self._link().get(_encode(key))

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a key, whether or not there is one."""
        await self._link().store(b"set", _encode(key), payload, _expiry(ttl))

    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        """Replace a record; return False, and do nothing, if there is none."""
        return await self._link().store(b"replace", _encode(key), payload, _expiry(ttl))

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one; return whether it was, atomically."""
        name = _encode(key)
        if expected is None:
            return await self._link().store(b"add", name, payload, _expiry(ttl))
        record, token = await self._link().gets(name)
        if record != expected:
            return False
        return await self._link().store(b"cas", name, payload, _expiry(ttl), token)

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        await self._link().delete(_encode(key))

    def describe(self) -> dict[str, str | int]:
        """Say what the store is, and where."""
        attributes: dict[str, str | int] = {"db.system.name": "memcached"}
        pool = getattr(self._client, "_pool", None)
        host, port = getattr(pool, "_host", None), getattr(pool, "_port", None)
        if host is not None and port is not None:
            attributes |= {"server.address": str(host), "server.port": int(port)}
        return attributes

    async def finish(self) -> None:
        """Wait for what is under way in this event loop, and close its connections."""
        await self._link().finish()

    def _link(self) -> Link | _Calls:
        # Calls may have been put into the client itself since, as tests do.
        if self._is_plain and _CALLS.isdisjoint(self._client.__dict__):
            return self._links.get()
        return _Calls(self._client, self._batches.get())

    def _make_link(self) -> Link:
        # aiomcache has no public name for these.
        pool = self._client._pool
        options = {name: value for name, value in pool.conn_args.items() if name != "limit"}
        return Link(
            pool._host,
            pool._port,
            options,
            timeout=self.timeout,
            max_connections=min(_MAX_CONNECTIONS, pool._maxsize),
        )

    def _make_batch(self) -> Batch[Any, Any]:
        return Batch(self._run, timeout=self.timeout)

    async def _run(self, operations: list[Callable[[], Awaitable[Any]]]) -> Sequence[Any]:
        calls = asyncio.gather(*(call() for call in operations), return_exceptions=True)
        # When the time is up they go on by themselves: aiomcache would put a connection back
        # into its pool with half a reply in it.
        return await asyncio.shield(calls)


class _Calls:
    """What `Link` does, by the public calls of a client that isn't aiomcache's, or overrides it."""

    def __init__(self, client: aiomcache.Client, batch: Batch[Any, Any]) -> None:
        self._client = client
        self._batch = batch

    def get(self, key: bytes) -> asyncio.Future[bytes | None]:
        return self._batch.submit(partial(self._client.get, key), droppable=True)

    def gets(self, key: bytes) -> asyncio.Future[tuple[bytes | None, int]]:
        return self._batch.submit(partial(self._client.gets, key))

    def store(
        self, verb: bytes, key: bytes, payload: bytes, expiry: int, token: int | None = None
    ) -> asyncio.Future[bool]:
        call = getattr(self._client, verb.decode())
        arguments = (key, payload) if token is None else (key, payload, token)
        return self._batch.submit(partial(call, *arguments, exptime=expiry), len(payload))

    def delete(self, key: bytes) -> asyncio.Future[bool]:
        return self._batch.submit(partial(self._client.delete, key))

    async def finish(self) -> None:
        await self._batch.finish()


def _has_plain_calls(kind: type[Any]) -> bool:
    """Tell whether a client's calls are aiomcache's own, so that they may be done without it."""
    plain = aiomcache.FlagClient
    return issubclass(kind, plain) and all(
        getattr(kind, call) is getattr(plain, call) for call in _CALLS
    )


def _encode(key: str) -> bytes:
    if len(key) > _KEY_LIMIT or quote(key) is None or " " in key:
        raise ValueError(
            "A memcached key is printable ASCII without spaces, and at most "
            f"{_KEY_LIMIT} characters; this one has {len(key)}"
        )
    return key.encode("ascii")


def _expiry(ttl: int | None) -> int:
    """Write a TTL as memcached takes it."""
    if ttl is None:
        return 0
    return ttl if ttl <= _RELATIVE_LIMIT else int(time.time()) + ttl
