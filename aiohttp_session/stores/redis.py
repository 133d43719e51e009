"""Records in Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from time import monotonic
from typing import Any, TypeVar

from aiohttp_session._core import write_command, write_get, write_set

from . import Store, UnsettledError
from ._redis_client import (
    WORKERS,
    connections_of,
    is_client,
    log_once,
    tell,
    why_not_plain,
    why_not_shared,
)
from ._redis_cluster import Cluster
from ._redis_pipeline import READ, WRITE, Operation
from ._redis_server import Server
from ._redis_tracking import Tracking
from ._redis_transaction import swap_by_transaction
from .kept_records import KeptRecords
from .per_loop import PerLoop

_T = TypeVar("_T")
_XX = b"XX"  # only if there is one
_NX = b"NX"  # only if there is none
_SWAP = """\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2])
else redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3]) end
return 1
"""


class RedisStore(Store):
    """Keep records in Redis.

    Each operation is done once, or is known to have failed. A write whose connection was lost is
    never done late (see `Fence`), and what became of it is found out where the record tells: it
    is what was to be written, or for `swap` still what was expected. Otherwise it fails with
    `UnsettledError`; where the server can't be told to forget it, with ConnectionError.

    :param client: one of redis-py's or valkey-py's asyncio clients.
    :param timeout: seconds after which an operation fails with TimeoutError.
    :raises TypeError: if client is no such client.
    :raises ValueError: if timeout is not positive.
    """

    timeout: float
    server_of: Callable[[str], Hashable] | None

    def __init__(self, client: Any, *, timeout: float = 5) -> None:
        if not is_client(client):
            raise TypeError(f"Expected redis.asyncio.Redis got {type(client)}")
        if timeout <= 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.timeout = timeout
        self._client = client
        self._is_first = True
        self._scripts = True  # the server takes them, as far as is known
        self._tracking: Tracking | None = None
        self._servers: PerLoop[Any] = PerLoop(self._connect)
        if hasattr(client, "get_node_from_key"):
            self.server_of = self._node_of

    def read(self, key: str) -> asyncio.Future[bytes | None]:
        """Return the record under a key."""
        operation: Operation = (key, write_get(key), (_get,), READ)
        record: asyncio.Future[bytes | None] = self._servers.get().submit(operation, droppable=True)
        return record

    async def create(self, key: str, payload: bytes, ttl: int | None) -> None:
        """Store a record under a key, whether or not there is one."""
        await self._set(key, payload, ttl, b"")

    def update(self, key: str, payload: bytes, ttl: int | None) -> Coroutine[Any, Any, bool]:
        """Replace a record; return False, and do nothing, if there is none."""
        return self._set(key, payload, ttl, _XX)

    async def _set(self, key: str, payload: bytes, ttl: int | None, condition: bytes) -> bool:
        operation: Operation = (
            key,
            write_set(key, payload, ttl, condition),
            (_set, payload, ttl, condition),
            WRITE,
        )
        began = monotonic()  # the time of the loop, which takes 0.1 µs more, only if it is needed
        try:
            return bool(await self._servers.get().submit(operation, len(payload)))
        except UnsettledError as unsettled:
            since = asyncio.get_running_loop().time() - (monotonic() - began)
            if await self._was_set(key, payload, ttl, since, unsettled):
                return True
            raise

    async def _was_set(
        self, key: str, payload: bytes, ttl: int | None, since: float, unsettled: UnsettledError
    ) -> bool:
        # If the record is this one, it was. An update may differ by its TTL only, which is set once
        # more.
        try:
            return await _repeat(lambda: self._swap(key, payload, payload, ttl, since))
        except Exception as error:
            raise unsettled from error

    async def swap(self, key: str, expected: bytes | None, payload: bytes, ttl: int | None) -> bool:
        """Replace a record if it still is the expected one; return whether it was, atomically."""
        if expected is None:
            return await self._set(key, payload, ttl, _NX)
        since = asyncio.get_running_loop().time()
        try:
            return await self._swap(key, expected, payload, ttl, since, is_first=True)
        except UnsettledError:
            if await _repeat(lambda: self._swap(key, expected, payload, ttl, since)):
                return True
            operation: Operation = (key, write_get(key), (_get,), READ)
            if await self._servers.get().resubmit(operation, since) == payload:
                return True
            raise

    async def _swap(
        self,
        key: str,
        expected: bytes,
        payload: bytes,
        ttl: int | None,
        since: float,
        *,
        is_first: bool = False,
    ) -> bool:
        server = self._servers.get()
        if self._scripts:
            arguments = (key.encode(), expected, payload, b"" if ttl is None else b"%d" % ttl)
            operation: Operation = (
                key,
                write_command(b"EVAL", _SWAP.encode(), b"1", *arguments),
                (_swap, *arguments),
                WRITE,
            )
            size = len(expected) + len(payload)
            try:
                if is_first:
                    return bool(await server.submit(operation, size))
                return bool(await server.resubmit(operation, since, size))
            except Exception as error:
                if not _is_refused(error) or why_not_plain(self._client) is not None:
                    raise
                self._scripts = False
                log_once(
                    "Redis refuses EVAL: a record is compared and replaced by a transaction "
                    "(WATCH, MULTI), which takes three round trips"
                )
        operation = (
            key,
            b"",
            (swap_by_transaction, expected, payload, ttl),
            WRITE,
        )
        return bool(await server.submit_transaction(operation, since))

    async def delete(self, key: str) -> None:
        """Delete a record, if there is one."""
        operation: Operation = (key, write_command(b"DEL", key.encode()), (_delete,), WRITE)
        server = self._servers.get()
        future = server.submit(operation)
        since = future.get_loop().time()
        try:
            await future
        except UnsettledError:
            await _repeat(lambda: server.resubmit(operation, since))

    def describe(self) -> dict[str, str | int]:
        """Say what the store is, and where, unless there are several servers."""
        attributes: dict[str, str | int] = {"db.system.name": "redis"}
        pool = getattr(self._client, "connection_pool", None)
        options = getattr(pool, "connection_kwargs", {})
        address = options.get("path") or options.get("host")
        if address is not None:
            attributes["server.address"] = str(address)
            if options.get("path") is None:
                attributes["server.port"] = int(options.get("port") or 6379)
        return attributes

    def track(self, records: Callable[[], KeptRecords]) -> None:
        """Keep what is read, for as long as the server tells of changes: see `NearCache`.

        :param records: gives what keeps the records of the running event loop.
        :raises ValueError: if the client's connections can't be used for that.
        """
        reason = why_not_shared(self._client)
        if reason is not None:
            raise ValueError(f"near_cache can't be used with this client: {reason}")
        self._tracking = Tracking(records)

    async def finish(self) -> None:
        """Wait for what is under way in this event loop, and give its connections back."""
        await self._servers.get().finish()

    def _node_of(self, key: str) -> str | None:
        try:
            return str(self._client.get_node_from_key(key).name)
        except Exception:  # noqa: BLE001 - it doesn't know its nodes yet, or none has the slot
            return None

    def _connect(self) -> Server | Cluster:
        # Connections belong to one event loop: the first has the client's own.
        is_first, self._is_first = self._is_first, False
        if hasattr(self._client, "get_node_from_key"):
            return Cluster(self._client, self.timeout, tracking=self._tracking)
        return _connect_one(self._client, self.timeout, is_first=is_first, tracking=self._tracking)


async def _repeat(send: Callable[[], Awaitable[_T]]) -> _T:
    """Do an operation that may be repeated if it is unsettled, since its connection may be too."""
    for _ in range(2):
        with contextlib.suppress(UnsettledError):
            return await send()
    return await send()


def _connect_one(
    client: Any, timeout: float, *, is_first: bool, tracking: Tracking | None = None
) -> Server:
    """Make what does the operations in this event loop.

    :param is_first: the client's own connections are free for this loop; otherwise it gets others.
    :param tracking: what the near cache is told by; None if there is none.
    """
    reason = why_not_plain(client)
    if reason is not None:
        tell("by the client's own methods, one operation at a time for each connection", reason)
        return Server(client, None, timeout)
    client, connections = connections_of(client, is_first=is_first)
    if connections.limit <= WORKERS:
        tell("a batch at a time", f"its pool has only {connections.limit} connections")
    return Server(client, connections, timeout, tracking=tracking)


def _is_refused(error: Exception) -> bool:
    return type(error).__name__ == "NoPermissionError" or "unknown command" in str(error)


def _get(client: Any, key: str) -> Awaitable[Any]:
    return client.get(key)  # type: ignore[no-any-return]


def _set(
    client: Any, key: str, payload: bytes, ttl: int | None, condition: bytes
) -> Awaitable[Any]:
    return client.set(  # type: ignore[no-any-return]
        key, payload, ex=ttl, xx=condition is _XX, nx=condition is _NX
    )


def _swap(client: Any, _: str, *arguments: bytes) -> Awaitable[Any]:
    return client.eval(_SWAP, 1, *arguments)  # type: ignore[no-any-return]


def _delete(client: Any, key: str) -> Awaitable[Any]:
    return client.delete(key)  # type: ignore[no-any-return]
