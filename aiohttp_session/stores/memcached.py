"""Records in memcached."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeAlias, TypeVar

import aiomcache

from aiohttp_session.log import log

from . import Store
from ._memcached_calls import CALLS, Calls, has_plain_calls
from ._memcached_client import Client
from ._memcached_operations import Operations
from .per_loop import PerLoop

_MAX_CONNECTIONS = 4

_T = TypeVar("_T")
_Result: TypeAlias = Coroutine[Any, Any, _T]


class MemcachedStore(Store):
    """Keep records in memcached.

    A swap is a ``cas``. A read whose connection is lost, or stalls for half of the time limit, is
    repeated on another connection; a write raises `UnsettledError`.

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
        if self._is_plain and not _is_known(client):
            self._is_plain = False
            log.info("This aiomcache is not known inside: memcached is asked by its own calls")
        self._calls = Calls(client, timeout)
        self._operations: PerLoop[Operations] = PerLoop(self._connect)

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        """Return the record under a key."""
        return self._server().read(key)

    # To await their coroutines here would make each 0.3 µs slower.

    def create(self, key: str, payload: bytes, ttl: int | None) -> _Result[None]:
        """Store a record under a key, whether or not there is one."""
        return self._server().create(key, payload, ttl)

    def swap(
        self, key: str, expected: bytes | None, payload: bytes, ttl: int | None
    ) -> _Result[bool]:
        """Replace a record if it still is the expected one; return whether it was, atomically."""
        return self._server().swap(key, expected, payload, ttl)

    def delete(self, key: str) -> _Result[None]:
        """Delete a record, if there is one."""
        return self._server().delete(key)

    def describe(self) -> dict[str, str | int]:
        """Say what the store is, and where."""
        attributes: dict[str, str | int] = {"db.system.name": "memcached"}
        pool = getattr(self._client, "_pool", None)
        host, port = getattr(pool, "_host", None), getattr(pool, "_port", None)
        if host is not None and port is not None:
            attributes |= {"server.address": str(host), "server.port": int(port)}
        return attributes

    def finish(self) -> _Result[None]:
        """Wait for what is under way in this event loop, and close its connections."""
        return self._server().finish()

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


def _is_known(client: Any) -> bool:
    """Tell whether a client says where its server is, in the way that is expected."""
    pool = getattr(client, "_pool", None)
    return (
        isinstance(getattr(client, "__dict__", None), dict)
        and isinstance(getattr(pool, "_host", None), str)
        and isinstance(getattr(pool, "_port", None), int)
        and isinstance(getattr(pool, "_maxsize", None), int)
        and isinstance(getattr(pool, "conn_args", None), Mapping)
    )
