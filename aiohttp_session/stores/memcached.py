"""Records in memcached."""

from __future__ import annotations

import asyncio
import time

import aiomcache

from aiohttp_session._core import quote

from . import Store
from ._memcached_calls import CALLS, Calls, has_plain_calls
from ._memcached_client import Client
from ._memcached_operations import Operations
from .per_loop import PerLoop

_RELATIVE_LIMIT = 30 * 24 * 60 * 60  # seconds: memcached takes a longer expiry for a Unix time
_KEY_LIMIT = 250  # bytes
_MAX_CONNECTIONS = 4


class MemcachedStore(Store):
    """Keep records in memcached.

    An operation whose connection is lost, or stalls for half of the time limit, is settled on
    another; a write that can't be has failed, and never undoes one that was acknowledged since.

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
        self._is_plain = has_plain_calls(type(client))
        self._calls = Calls(client, timeout)
        self._operations: PerLoop[Operations] = PerLoop(self._connect)

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        """Return the record under a key."""
        return self._server().read(_encode(key))

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a key, whether or not there is one."""
        await self._server().create(_encode(key), payload, _expiry(ttl))

    async def update(self, key: str, payload: bytes, ttl: int | None) -> bool:
        """Replace a record; return False, and do nothing, if there is none."""
        return await self._server().update(_encode(key), payload, _expiry(ttl))

    async def swap(self, key: str, expected: bytes, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one; return whether it was, atomically."""
        return await self._server().swap(_encode(key), expected, payload, _expiry(ttl))

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        await self._server().delete(_encode(key))

    async def finish(self) -> None:
        """Wait for what is under way in this event loop, and close its connections."""
        await self._server().finish()

    def _server(self) -> Operations | Calls:
        # Calls may have been put into the client itself since, as tests do.
        if self._is_plain and CALLS.isdisjoint(self._client.__dict__):
            return self._operations.get()
        return self._calls

    def _connect(self) -> Operations:
        # aiomcache has no public name for these.
        pool = self._client._pool
        options = {name: value for name, value in pool.conn_args.items() if name != "limit"}
        client = Client(
            pool._host,
            pool._port,
            options,
            timeout=self.timeout,
            max_connections=min(_MAX_CONNECTIONS, pool._maxsize),
        )
        return Operations(client)


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
